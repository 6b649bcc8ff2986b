"""The document graph: neighbour lists made an undirected weighted graph, in flat arrays.

Documents i and j are joined if j is among i's nearest neighbours OR i among j's:

    neighbours       0: 1      edges     0 --.9-- 1 --.7-- 2
                     1: 0                                  |
                     2: 1                                 .8
                     3: 2                                  |
                                                           3

    offsets   0 1   3     5 6       document i has neighbors[offsets[i] : offsets[i + 1]],
    neighbors 1 0 2 1 3 2           their numbers ascending
    weights  .9.9.7.7.8.8

Memory: about 20 numbers for each pair in the lists while it is built, 3 for each edge afterwards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Graph(NamedTuple):
    """An undirected graph without loops; every edge is stored at both its ends.

    offsets: int64[N + 1]; neighbors: int64[2E], ascending within a document; weights: float[2E].
    """

    offsets: np.ndarray
    neighbors: np.ndarray
    weights: np.ndarray

    @property
    def num_documents(self) -> int:
        """N."""
        return len(self.offsets) - 1

    @property
    def num_edges(self) -> int:
        """E, each pair of documents once."""
        return len(self.neighbors) // 2

    @property
    def degrees(self) -> np.ndarray:
        """Neighbours of each document, int64[N]."""
        return np.diff(self.offsets)


def check_neighbors(neighbors_NK: Any, similarity_NK: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Refuse neighbour lists that are none, in one line; return both as arrays.

    Args:
        neighbors_NK: int[N, K], each a document's number or -1 for none.
        similarity_NK: float[N, K], or None where no weights are needed (then all are 0).

    Raises:
        ValueError: wrong shape or kind, a number outside -1 .. N - 1, a similarity that is no
            number.
    """
    neighbors = np.asarray(neighbors_NK)
    if neighbors.ndim != 2 or (neighbors.size and neighbors.dtype.kind not in "iu"):
        raise ValueError(
            f"neighbors_NK is {neighbors.dtype}{list(neighbors.shape)}; give int[documents, k]"
        )
    num_documents = len(neighbors)
    wrong = np.flatnonzero(((neighbors < -1) | (neighbors >= num_documents)).any(axis=1))
    if wrong.size:
        row = neighbors[wrong[0]]
        value = row[(row < -1) | (row >= num_documents)][0]
        raise ValueError(
            f"document {wrong[0]} has the neighbour {value}; give 0 to {num_documents - 1}, or -1 "
            "for none"
        )
    if similarity_NK is None:
        return neighbors, np.zeros(neighbors.shape, np.float32)
    similarity = np.asarray(similarity_NK)
    if similarity.shape != neighbors.shape:
        raise ValueError(
            f"similarity_NK has the shape {list(similarity.shape)}; give that of neighbors_NK, "
            f"{list(neighbors.shape)}"
        )
    if similarity.dtype.kind != "f":
        similarity = similarity.astype(np.float64)
    wrong = np.flatnonzero((~np.isfinite(similarity) & (neighbors >= 0)).any(axis=1))
    if wrong.size:
        raise ValueError(
            f"a similarity of document {wrong[0]} is not a finite number; give -1 as the neighbour "
            "where there is none"
        )
    return neighbors, similarity


def union_graph(neighbors_NK: Any, similarity_NK: Any) -> Graph:
    """Join documents of which one is in the other's list; weight s, the larger if both are listed.

    Args:
        neighbors_NK: int[N, K]; -1 is no neighbour, and a document itself is passed over.
        similarity_NK: float[N, K].

    Returns:
        The graph, deterministic: every document's neighbours in ascending order.

    Raises:
        ValueError: see `check_neighbors`.

    Example:
        >>> graph = union_graph([[1], [0], [1]], [[0.9], [0.9], [0.7]])
        >>> graph.num_edges, graph.neighbors.tolist()
        (2, [1, 0, 2, 1])
    """
    neighbors, similarity = check_neighbors(neighbors_NK, similarity_NK)
    num_documents = len(neighbors)
    source, column = np.nonzero(
        (neighbors >= 0) & (neighbors != np.arange(num_documents).reshape(-1, 1))
    )
    target = neighbors[source, column].astype(np.int64)
    weight = similarity[source, column]
    del column
    # One integer a pair, smaller number first, so that i -> j and j -> i are the same.
    pair = np.minimum(source, target) * num_documents + np.maximum(source, target)
    del source, target
    by_pair = np.argsort(pair)
    pair, weight = pair[by_pair], weight[by_pair]
    del by_pair
    first = np.flatnonzero(np.diff(pair, prepend=-1))
    if first.size:
        weight = np.maximum.reduceat(weight, first)
    low, high = np.divmod(pair[first], max(num_documents, 1))
    del pair, first

    num_low = np.bincount(low, minlength=num_documents)
    num_high = np.bincount(high, minlength=num_documents)
    offsets = np.concatenate([[0], np.cumsum(num_low + num_high)]).astype(np.int64)
    out = np.empty(2 * len(low), np.int64)
    weights = np.empty(2 * len(low), weight.dtype)
    # A document's list: first those before it (it is `high`), then those after it (it is `low`).
    by_high = np.argsort(high * num_documents + low)
    place = _places(offsets[:-1], num_high)
    out[place], weights[place] = low[by_high], weight[by_high]
    place = _places(offsets[:-1] + num_high, num_low)
    out[place], weights[place] = high, weight
    return Graph(offsets, out, weights)


def _places(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts [0, 5], counts [2, 3] -> 0 1 5 6 7."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())
