"""The document graph: neighbour lists made an undirected weighted graph, in flat arrays.

Documents i and j are joined if j is among i's nearest neighbours OR i among j's:

    neighbours       0: 1      edges     0 --.9-- 1 --.7-- 2
                     1: 0                                  |
                     2: 1                                 .8
                     3: 2                                  |
                                                           3

    offsets   0 1   3     5 6       document i has neighbors[offsets[i] : offsets[i + 1]],
    neighbors 1 0 2 3 1 2           heaviest first, ties by number
    weights  .9.9.7.8.7.8

Sorting is by radix (16 bits at a time), so time is linear in the number of pairs; memory is about
60 bytes for each pair in the lists.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Graph(NamedTuple):
    """An undirected graph without loops; every edge is stored at both its ends.

    offsets: int64[N + 1]; neighbors: int32[2E] (int64 from 2**31 documents), of each document
    heaviest first and ties by number; weights: float[2E].
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
        The graph: every document's neighbours heaviest first, ties by number.

    Raises:
        ValueError: see `check_neighbors`.

    Example:
        >>> graph = union_graph([[1], [0], [1]], [[0.9], [0.9], [0.7]])
        >>> graph.num_edges, graph.neighbors.tolist()
        (2, [1, 0, 2, 1])
    """
    neighbors, similarity = check_neighbors(neighbors_NK, similarity_NK)
    num_documents = len(neighbors)
    number = np.int32 if num_documents < 2**31 else np.int64
    itself = np.arange(num_documents, dtype=number).reshape(-1, 1)
    real = (neighbors >= 0) & (neighbors != itself)
    source = np.broadcast_to(itself, neighbors.shape)[real]
    target = neighbors[real].astype(number, copy=False)
    weight = similarity[real]
    low, high, weight = _unique_pairs(
        np.minimum(source, target), np.maximum(source, target), weight
    )
    del source, target, real

    # By weight; an edge then stands at both its ends, one after the other. Sorted by the end,
    # stably, a document's neighbours are heaviest first; of equally heavy ones those with lower
    # numbers than its own (it is `high`) first, ascending, then those with higher ones.
    order = _argsort(_descending(weight))
    low, high, weight = low[order], high[order], weight[order]
    ends, others = np.empty(2 * len(low), number), np.empty(2 * len(low), number)
    ends[::2], ends[1::2], others[::2], others[1::2] = high, low, low, high
    del low, high
    order = _argsort(ends)
    counts = np.bincount(ends, minlength=num_documents)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Graph(offsets, others[order], weight[order >> 1])


def heaviest_first(neighbors: np.ndarray, similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List the graph's edges from the heaviest to the lightest.

    For what takes edges one after another: a pair whose documents list one another comes twice, and
    the first time, with the larger weight, is the one that counts. Sparing the search for such
    pairs makes this twice as fast as `union_graph`. Ties go by the number of the document that
    lists the other, then by that of the other.

    Args:
        neighbors, similarity: as `check_neighbors` returns them.

    Returns:
        (listing, listed), the two documents of each edge.

    Example:
        >>> first, second = heaviest_first(
        ...     np.array([[1], [0], [1]]), np.array([[0.9], [0.9], [0.7]])
        ... )
        >>> first.tolist(), second.tolist()
        ([0, 1, 2], [1, 0, 1])
    """
    # Each list heaviest first and ties by number, as most are; then a stable sort keeps to that.
    fine = similarity[:, :-1] > similarity[:, 1:]
    fine |= (similarity[:, :-1] == similarity[:, 1:]) & (neighbors[:, :-1] <= neighbors[:, 1:])
    wrong = np.flatnonzero(~fine.all(axis=1))
    if wrong.size:
        place = np.lexsort((neighbors[wrong], -similarity[wrong]), axis=1)
        neighbors, similarity = neighbors.copy(), similarity.copy()
        neighbors[wrong] = np.take_along_axis(neighbors[wrong], place, axis=1)
        similarity[wrong] = np.take_along_axis(similarity[wrong], place, axis=1)
    number = np.int32 if len(neighbors) < 2**31 else np.int64
    itself = np.arange(len(neighbors), dtype=number).reshape(-1, 1)
    real = (neighbors >= 0) & (neighbors != itself)
    source = np.broadcast_to(itself, neighbors.shape)[real]
    target = neighbors[real].astype(number, copy=False)
    key = _descending(similarity[real])
    if key.dtype == np.uint32 and len(key) < 2**32:  # the place in the low bits: nothing is equal
        key = (key.astype(np.uint64) << np.uint64(32)) | np.arange(len(key), dtype=np.uint64)
        key.sort()
        order = (key & np.uint64(2**32 - 1)).astype(np.int64)
    else:
        order = _argsort(key)
    return source[order], target[order]


def _unique_pairs(
    low: np.ndarray, high: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs sorted by (low, high), each once, with the largest of its weights."""
    order = _argsort(high)
    order = order[_argsort(low[order])]
    low, high, weight = low[order], high[order], weight[order]
    first = np.ones(len(low), bool)
    first[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    if len(low):
        weight = np.maximum.reduceat(weight, np.flatnonzero(first))
    return low[first], high[first], weight


def _argsort(keys: np.ndarray) -> np.ndarray:
    """A stable argsort of whole numbers of 0 and more, in linear time.

    NumPy sorts 16-bit numbers by radix, and only those; so the lowest 16 bits first, then the next.
    """
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    shift = 16
    while len(keys) and int(keys.max()) >> shift:
        digit = (keys >> keys.dtype.type(shift)).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
        shift += 16
    return order


def _descending(weight: np.ndarray) -> np.ndarray:
    """Unsigned numbers that rise as the weights fall: their bits, turned round."""
    if weight.dtype not in (np.float32, np.float64):
        weight = weight.astype(np.float64)
    unsigned = np.uint32 if weight.dtype == np.float32 else np.uint64
    bits = (weight + weight.dtype.type(0)).view(unsigned)  # -0.0 + 0.0 is 0.0
    sign = unsigned(1) << unsigned(8 * weight.dtype.itemsize - 1)
    # Negative numbers: the larger the bits, the lower the weight. Others: turn all but the sign.
    return np.where(bits & sign, bits, bits ^ (sign - unsigned(1)))
