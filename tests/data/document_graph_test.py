"""lcl.data.document_graph: neighbour lists as an undirected graph."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from lcl.data.document_graph import _argsort, _descending, union_graph
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
        pairs = list(zip(graph.neighbors[span].tolist(), graph.weights[span].tolist(), strict=True))
        assert pairs == sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
        assert len(pairs) == graph.degrees[i]
        found |= {(i, other): weight for other, weight in pairs}
    both = {**want, **{(j, i): w for (i, j), w in want.items()}}
    assert found == both


def test_the_picture_in_the_docstring():
    graph = union_graph([[1], [0], [1], [2]], np.array([[0.9], [0.9], [0.7], [0.8]]))
    assert graph.offsets.tolist() == [0, 1, 3, 5, 6]
    assert graph.neighbors.tolist() == [1, 0, 2, 3, 1, 2]
    assert graph.weights.tolist() == [0.9, 0.9, 0.7, 0.8, 0.7, 0.8]


def test_weights_keep_their_precision():
    assert union_graph([[1], [0]], np.float32([[0.1], [0.1]])).weights.dtype == np.float32
    assert union_graph([[1], [0]], [[1], [1]]).weights.dtype == np.float64


def test_radix_sorts_like_numpy():
    rng = np.random.default_rng(0)
    for top in (1, 9, 2**16, 2**16 + 1, 2**31 - 1, 2**40):
        keys = rng.integers(0, top, 3000)
        assert np.array_equal(_argsort(keys), np.argsort(keys, kind="stable"))
    assert _argsort(np.zeros(0, np.int32)).tolist() == []


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_as_whole_numbers_keep_their_order(dtype):
    rng = np.random.default_rng(0)
    weights = np.concatenate([rng.normal(size=500), [0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30]])
    weights = np.concatenate([weights, weights[::3]]).astype(dtype)
    order = np.argsort(_descending(weights), kind="stable")
    assert np.array_equal(order, np.argsort(-weights, kind="stable"))
