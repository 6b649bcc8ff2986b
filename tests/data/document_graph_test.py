"""lcl.data.document_graph: neighbour lists as an undirected graph."""

from __future__ import annotations

import numpy as np
from hypothesis import given

from lcl.data.document_graph import union_graph
from tests.data.ordering_test import neighbor_lists


@given(lists=neighbor_lists())
def test_an_edge_is_a_pair_of_which_one_lists_the_other(lists):
    ids, weights = lists
    want = {}
    for i, j in np.ndindex(ids.shape):
        other = int(ids[i, j])
        if other >= 0 and other != i:
            pair = (min(i, other), max(i, other))
            want[pair] = max(want.get(pair, -np.inf), weights[i, j])
    graph = union_graph(ids, weights)
    assert graph.num_documents == len(ids)
    assert graph.num_edges == len(want)
    found = {}
    for i in range(len(ids)):
        span = slice(graph.offsets[i], graph.offsets[i + 1])
        others = graph.neighbors[span]
        assert np.array_equal(others, np.unique(others))  # ascending, each once
        assert len(others) == graph.degrees[i]
        for other, weight in zip(others.tolist(), graph.weights[span].tolist(), strict=True):
            found[i, other] = weight
    both = {**want, **{(j, i): w for (i, j), w in want.items()}}
    assert found == both


def test_the_picture_in_the_docstring():
    graph = union_graph([[1], [0], [1], [2]], np.array([[0.9], [0.9], [0.7], [0.8]]))
    assert graph.offsets.tolist() == [0, 1, 3, 5, 6]
    assert graph.neighbors.tolist() == [1, 0, 2, 1, 3, 2]
    assert graph.weights.tolist() == [0.9, 0.9, 0.7, 0.7, 0.8, 0.8]


def test_weights_keep_their_precision():
    assert union_graph([[1], [0]], np.float32([[0.1], [0.1]])).weights.dtype == np.float32
    assert union_graph([[1], [0]], [[1], [1]]).weights.dtype == np.float64
