"""Orders to compare `traverse` with: each document followed by its neighbours, the released one.

(The third baseline, a random order, is `lcl.data.ordering.shuffle`.)

    neighbours of 0: 4 2    1: 3 0    ...

    with_neighbors   0 4 2 | 1 3 0 | ...        every document comes once for itself and once for
                                                each list it is in: repeats are meant
    released         0 4 7 5 | 1 3 | ...        clusters of at most 21 along the lists, then the
                                                documents of small clusters go into others
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lcl.data.document_graph import check_neighbors

CLUSTER_SIZE = 21
NUM_RELEASED_NEIGHBORS = 9


def with_neighbors(order_M: Any, neighbors_NK: Any) -> np.ndarray:
    """Return each document of an order followed by its neighbours, nearest first: with repeats.

    The kNN baseline of arXiv 2310.10638 (a document, then its top k, in one context). Popular
    documents come again and again: that is its weakness, and what the paper compares with.

    Args:
        order_M: int[M], the documents to begin with, e.g. a shuffle.
        neighbors_NK: int[N, K], nearest first; -1 is none.

    Returns:
        int64[at most M (K + 1)].

    Example:
        >>> with_neighbors([2, 0, 1], [[1], [0], [-1]]).tolist()
        [2, 0, 1, 1, 0]
    """
    neighbors, _ = check_neighbors(neighbors_NK)
    order = np.asarray(order_M, np.int64)
    rows = np.column_stack([order, neighbors[order]]).astype(np.int64).ravel()
    return rows[rows >= 0]


def released(neighbors_NK: Any, *, cluster_size: int = CLUSTER_SIZE) -> np.ndarray:
    """Return the order of the code released with in-context pretraining, which is another one.

    swj0419/in-context-pretraining, sort/sort.py (sort and merge), written anew. It is no Algorithm
    1: no graph, no weights, no degrees.

    1. Begin a cluster with any document not yet seen. (There: what `set.pop` gives, which for a set
       of small integers is the lowest. Here: the lowest.)
    2. Go on to the first unseen of the last document's 9 nearest neighbours; when there is none, or
       the cluster has `cluster_size` documents, begin another.
    3. Every document of a cluster smaller than `cluster_size` then goes before its first neighbour
       that is in another cluster, wherever that neighbour is by now.

    As published the script crashes; each guard here is the smallest that lets it run:

    - its first document is in no cluster's index (KeyError in 3): it is put there. That it is not
      counted in its cluster's size is kept.
    - it reads `self.knns`, made from an undefined name: the neighbour lists are meant.
    - a document all of whose 9 neighbours are in its own cluster has nowhere to go (KeyError None):
      it stays, and so does its cluster if any such document is left in it.

    Not here: dropping a document whose first 100 characters resemble the previous one's, which
    happens while that script writes its files, from one list split over 32 processes.

    Args:
        neighbors_NK: int[N, K], nearest first, without the document itself; the first 9 are used;
            -1 is none.
        cluster_size: 21 there.

    Returns:
        order_N, int64[N]: a permutation.

    Example:
        >>> released([[1], [0], [3], [2]], cluster_size=2).tolist()
        [0, 1, 2, 3]
    """
    neighbors, _ = check_neighbors(neighbors_NK)
    neighbors = neighbors[:, :NUM_RELEASED_NEIGHBORS]
    clusters, cluster_of = _sort(neighbors, cluster_size)
    _merge(neighbors, clusters, cluster_of, cluster_size)
    flat = [document for documents in clusters.values() for document in documents]
    return np.array(flat, np.int64)


def _sort(neighbors: np.ndarray, cluster_size: int) -> tuple[dict[int, list[int]], list[int]]:
    """Steps 1 and 2: (cluster -> its documents, document -> its cluster)."""
    num_documents = len(neighbors)
    clusters: dict[int, list[int]] = {}
    cluster_of = [-1] * num_documents
    unseen = bytearray(b"\1") * num_documents
    lowest = document = cluster = size = 0
    for place in range(num_documents):
        following = -1
        if place:
            listed = neighbors[document].tolist() if size < cluster_size else ()
            following = next((i for i in listed if i >= 0 and unseen[i]), -1)
            if following < 0:
                lowest = unseen.index(1, lowest)
                following = lowest
                cluster, size = cluster + 1, 0
            size += 1
            document = following
        clusters.setdefault(cluster, []).append(document)
        cluster_of[document] = cluster
        unseen[document] = 0
    return clusters, cluster_of


def _merge(
    neighbors: np.ndarray,
    clusters: dict[int, list[int]],
    cluster_of: list[int],
    cluster_size: int,
) -> None:
    """Step 3, in place."""
    for cluster, documents in list(clusters.items()):
        if len(documents) >= cluster_size:
            continue
        stay = []
        for document in documents:
            listed = neighbors[document].tolist()
            near = next((i for i in listed if i >= 0 and cluster_of[i] != cluster), -1)
            if near < 0:
                stay.append(document)
                continue
            others = clusters[cluster_of[near]]
            others.insert(others.index(near), document)
            cluster_of[document] = cluster_of[near]
        if stay:
            clusters[cluster] = stay
        else:
            del clusters[cluster]
