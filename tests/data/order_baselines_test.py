"""lcl.data.order_baselines: the orders that the walk is compared with."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.data.order_baselines import released, with_neighbors
from lcl.data.ordering import jumps
from tests.data.ordering_test import clustered, neighbor_lists


def as_released(neighbors, cluster_size):
    """sort and merge with sets and dictionaries as that script has them, and the three guards."""
    unseen, seen = set(range(len(neighbors))), set()
    clusters, cluster_of = defaultdict(list), {}
    cluster, size = 0, 0

    def pop():
        document = min(unseen)
        unseen.remove(document)
        return document

    if not unseen:
        return []
    document = pop()
    clusters[0].append(document)
    cluster_of[document] = 0  # guard: the first document is in its cluster's index
    seen.add(document)
    while unseen:
        first = next((k for k in neighbors[document][:9] if k >= 0 and k not in seen), None)
        if first is None or size >= cluster_size:
            document = pop()
            cluster += 1
            size = 0
        else:
            document = first
            unseen.remove(first)
        clusters[cluster].append(document)
        cluster_of[document] = cluster
        size += 1
        seen.add(document)
    for cluster, documents in clusters.copy().items():
        if len(documents) < cluster_size:
            for document in list(documents):
                near = next(
                    (k for k in neighbors[document][:9] if k >= 0 and cluster_of[k] != cluster),
                    None,
                )
                if near is None:  # guard: nowhere to go
                    continue
                others = clusters[cluster_of[near]]
                others.insert(others.index(near), document)
                cluster_of[document] = cluster_of[near]
                documents.remove(document)
            if not documents:
                del clusters[cluster]
    return [document for documents in clusters.values() for document in documents]


@given(lists=neighbor_lists(), cluster_size=st.integers(1, 5))
def test_released_is_the_script_with_its_guards(lists, cluster_size):
    ids, _ = lists
    # A document is not in its own list, as after the script's knn[1:].
    ids = np.where(ids == np.arange(len(ids))[:, None], -1, ids)
    order = released(ids, cluster_size=cluster_size)
    assert order.tolist() == as_released(ids.tolist(), cluster_size)
    assert np.array_equal(np.sort(order), np.arange(len(ids)))


def test_released_on_topics_and_more_lists_than_it_reads():
    _, _, ids, _ = clustered(800)
    order = released(ids)
    assert order.tolist() == as_released(ids.tolist(), 21)
    assert np.array_equal(order, released(ids[:, :9]))
    assert 0 < jumps(order, ids).mean() < 0.9


def test_neighbours_follow_their_document():
    ids = np.array([[1, 2], [0, -1], [1, 0]])
    order = with_neighbors(np.array([2, 0, 1]), ids)
    assert order.tolist() == [2, 1, 0, 0, 1, 2, 1, 0]


@given(lists=neighbor_lists())
def test_repeats_are_counted_by_the_lists(lists):
    ids, _ = lists
    order = with_neighbors(np.arange(len(ids)), ids)
    want = Counter(range(len(ids))) + Counter(ids[ids >= 0].tolist())
    assert Counter(order.tolist()) == want


def test_lists_that_are_none_are_refused():
    with pytest.raises(ValueError, match="document 0 has the neighbour 7"):
        released([[7], [0]])
    with pytest.raises(ValueError, match="document 0 has the neighbour 7"):
        with_neighbors([0], [[7], [0]])
