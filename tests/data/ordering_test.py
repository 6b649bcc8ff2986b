"""lcl.data.ordering: keyed permutations, and the walk through the documents' graph."""

from __future__ import annotations

import collections
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.data import ordering
from lcl.data.ordering import (
    jumps,
    named_key,
    permute,
    shuffle,
    shuffle_with_key,
    traverse,
    traverse_with_jumps,
)

KEYS = st.integers(0, 2**64 - 1)


@given(size=st.integers(1, 3000), key=KEYS)
def test_permute_is_a_permutation(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(size=st.integers(1, 2**62), key=KEYS, data=st.data())
def test_permute_stays_inside_and_distinct_at_any_size(size, key, data):
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=40, unique=True))
    out = permute(index, size, key)
    assert ((out >= 0) & (out < size)).all()
    assert len(set(out.tolist())) == len(index)


@given(data=st.data())
def test_an_entry_depends_on_its_own_size_and_key_only(data):
    """The rows of one host must not depend on which other rows are asked for with them."""
    n = data.draw(st.integers(1, 12))
    size = np.array([data.draw(st.integers(1, 5000)) for _ in range(n)])
    index = np.array([data.draw(st.integers(0, s - 1)) for s in size.tolist()])
    key = np.array([data.draw(KEYS) for _ in range(n)], np.uint64)
    together = permute(index, size, key)
    alone = [int(permute([i], s, k)[0]) for i, s, k in zip(index, size, key, strict=True)]
    assert together.tolist() == alone


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_small_permutations_are_uniform(size):
    """Chi-square over all size! permutations; each bound is the 1 - 1e-6 quantile or above."""
    num_keys = 200 * math.factorial(size)
    keys = np.array([named_key("uniform", i) for i in range(num_keys)], np.uint64)
    drawn = permute(np.arange(size)[None], size, keys[:, None])
    counts = collections.Counter(map(tuple, drawn.tolist()))
    cells = math.factorial(size)
    assert len(counts) == cells
    chi2 = sum((c - 200) ** 2 / 200 for c in counts.values())
    freedom = cells - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 25


@pytest.mark.parametrize("size", [1000, 5000, 100_000])
def test_large_permutations_mix(size):
    """Neighbours do not stay neighbours, and where an entry goes says nothing of where it was."""
    index = np.arange(min(size, 20_000))
    out = permute(index, size, key=11)
    assert abs(np.corrcoef(index, out)[0, 1]) < 6 / math.sqrt(len(index))
    assert np.mean(np.abs(np.diff(out)) <= 1) < 10 / size + 0.002
    quarters = np.bincount(out * 4 // size, minlength=4) / len(out)
    assert np.abs(quarters - 0.25).max() < 6 * math.sqrt(0.1875 / len(out))


def test_golden_permutations():
    """The order of a run must never change under a resumed run: these numbers are forever."""
    assert named_key("order", 0, "python") == 3614942241214109663
    assert permute(np.arange(10), 10, 7).tolist() == [6, 5, 2, 4, 9, 1, 0, 3, 7, 8]
    assert permute([0, 1, 2], 10**9, 7).tolist() == [384431653, 829407926, 509457399]
    assert shuffle(8, seed=0, domain="python").tolist() == [1, 2, 7, 3, 0, 4, 6, 5]


def test_shuffle_is_a_permutation_of_its_own_for_each_seed_and_domain():
    a = shuffle(500, seed=0, domain="a")
    assert np.array_equal(np.sort(a), np.arange(500))
    assert np.array_equal(a, shuffle(500, seed=0, domain="a"))
    assert not np.array_equal(a, shuffle(500, seed=1, domain="a"))
    assert not np.array_equal(a, shuffle(500, seed=0, domain="b"))
    assert shuffle(0, seed=0, domain="a").shape == (0,)


def test_shuffle_refuses_a_negative_count():
    with pytest.raises(ValueError, match="num_documents is -1; give a count of 0 or more"):
        shuffle(-1, seed=0, domain="a")


def test_shuffle_does_not_touch_the_global_generator():
    """Peers 5: a global, unseeded generator decides the order of the reference implementation."""
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    shuffle_with_key(100, 5)
    permute(np.arange(100), 100, 5)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_names_are_not_confused():
    assert named_key("ab", "c") != named_key("a", "bc")
    assert named_key("x", 1) != named_key("x", "1")
    assert named_key("x", (1, 2)) != named_key("x", 1, 2)
    assert 0 <= named_key("x", bits=128) < 2**128


# The walk.


def naive_walk(neighbors, similarity, degree):
    """Algorithm 1 as the paper has it: sets, every degree and every edge looked at each time."""
    num_documents = len(neighbors)
    edges = [dict() for _ in range(num_documents)]
    for i in range(num_documents):
        for j, s in zip(neighbors[i], similarity[i], strict=True):
            if j >= 0 and j != i:
                edges[i][j] = edges[j][i] = max(s, edges[i].get(j, s))
    remaining = set(range(num_documents))
    order, starts = [], []
    while remaining:
        scope = remaining if degree == "residual" else set(range(num_documents))
        d = min(remaining, key=lambda i: (len(edges[i].keys() & scope), i))
        starts.append(True)
        while True:
            order.append(d)
            remaining.remove(d)
            near = edges[d].keys() & remaining
            if not near:
                break
            d = min(near, key=lambda j: (-edges[order[-1]][j], j))  # noqa: B023
            starts.append(False)
    return order, starts


@st.composite
def neighbor_lists(draw, max_documents=14, max_neighbors=4):
    """Few distinct weights, so that ties abound; some lists are short, some name themselves."""
    n = draw(st.integers(0, max_documents))
    k = draw(st.integers(1, max_neighbors))
    ids = [[draw(st.integers(-1, n - 1)) for _ in range(k)] for _ in range(n)]
    weights = [[draw(st.sampled_from([-0.5, 0.0, 0.25, 0.5])) for _ in range(k)] for _ in range(n)]
    return np.array(ids, np.int64).reshape(n, k), np.array(weights).reshape(n, k)


@pytest.mark.parametrize("degree", ["residual", "static"])
@given(lists=neighbor_lists())
def test_the_walk_is_the_papers_algorithm(degree, lists):
    ids, weights = lists
    path = traverse_with_jumps(ids, weights, degree=degree)
    order, starts = naive_walk(ids.tolist(), weights.tolist(), degree)
    assert path.order.tolist() == order
    assert path.starts.tolist() == starts
    assert traverse(ids, weights, degree=degree).tolist() == order


@pytest.mark.parametrize("degree", ["residual", "static"])
@given(lists=neighbor_lists())
def test_every_document_once_and_every_hop_an_edge_or_a_counted_jump(degree, lists):
    ids, weights = lists
    path = traverse_with_jumps(ids, weights, degree=degree)
    assert np.array_equal(np.sort(path.order), np.arange(len(ids)))
    assert np.array_equal(jumps(path.order, ids), path.starts)
    assert path.num_jumps == max(int(path.starts.sum()) - 1, 0)


def clustered(num_documents, seed=0, num_topics=None, dim=16):
    """(vectors, topics, exact neighbour lists, similarities) of documents about topics."""
    rng = np.random.default_rng(seed)
    num_topics = num_topics or num_documents // 40
    topics = rng.integers(0, num_topics, num_documents)
    vectors = rng.normal(size=(num_topics, dim))[topics] + 0.9 * rng.normal(
        size=(num_documents, dim)
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    ids = np.argsort(-similarity, axis=1, kind="stable")[:, :10]
    return vectors, topics, ids, np.take_along_axis(similarity, ids, axis=1)


@pytest.mark.parametrize("degree", ["residual", "static"])
def test_large_walk_equals_the_naive_one(degree, monkeypatch):
    """Thousands of documents, and a queue that is flushed and rebuilt all the time."""
    _, _, ids, similarity = clustered(1500)
    want = naive_walk(ids.tolist(), similarity.tolist(), degree)
    assert traverse(ids, similarity, degree=degree).tolist() == want[0]
    monkeypatch.setattr(ordering, "_FLUSH", 8)
    path = traverse_with_jumps(ids, similarity, degree=degree)
    assert (path.order.tolist(), path.starts.tolist()) == want


def test_the_queue_does_not_grow(monkeypatch):
    """Every fall of a degree leaves an entry behind; there must not be one an edge."""
    monkeypatch.setattr(ordering, "_FLUSH", 8)
    sizes = []
    flush = ordering._DegreeQueue.flush

    def counted(queue):
        flush(queue)
        sizes.append(sum(map(len, queue._heaps)))

    monkeypatch.setattr(ordering._DegreeQueue, "flush", counted)
    num_documents = 400
    ids = np.array([np.delete(np.arange(num_documents), i) for i in range(num_documents)])
    weights = np.random.default_rng(0).random(ids.shape)
    order = traverse(ids, weights)
    assert np.array_equal(np.sort(order), np.arange(num_documents))
    assert max(sizes) <= 3 * num_documents + 16


def test_the_picture_in_the_docstring():
    ids = [[1], [0], [3], [2], [5], [4]]
    weights = [[0.9], [0.9], [0.8], [0.8], [0.6], [0.6]]
    ids[1] = [2]
    weights[1] = [0.7]
    path = traverse_with_jumps(ids, weights)
    assert path.order.tolist() == [0, 1, 2, 3, 4, 5]
    assert path.starts.tolist() == [True, False, False, False, True, False]


def test_residual_and_static_degrees_differ_as_they_say():
    """From 0 to 3, then stuck. Of 1 and 2, 2 has the smaller degree, but 1 has lost 4 by then."""
    #  0 --.5-- 5 --.2-- 4 --1.-- 3
    #                    |
    #                    .6-- 1 --.8-- 2
    ids = [[5], [4], [1], [4], [5], [0]]
    weights = [[0.5], [0.6], [0.8], [1.0], [0.2], [0.5]]
    assert traverse(ids, weights, degree="static").tolist() == [0, 5, 4, 3, 2, 1]
    assert traverse(ids, weights, degree="residual").tolist() == [0, 5, 4, 3, 1, 2]


def test_the_order_does_not_depend_on_how_lists_are_sorted():
    _, _, ids, similarity = clustered(300)
    turned = traverse(ids[:, ::-1], similarity[:, ::-1])
    assert np.array_equal(traverse(ids, similarity), turned)
    with_itself = np.column_stack([np.arange(300), ids])
    ones = np.column_stack([np.ones(300), similarity])
    assert np.array_equal(traverse(with_itself, ones), turned)


def test_documents_without_neighbours_and_no_documents():
    assert traverse(np.zeros((0, 3), int), np.zeros((0, 3))).tolist() == []
    alone = traverse_with_jumps(np.full((3, 2), -1), np.zeros((3, 2)))
    assert (alone.order.tolist(), alone.num_jumps) == ([0, 1, 2], 2)


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        ([[5]], [[1.0]], "document 0 has the neighbour 5; give 0 to 0, or -1"),
        ([[0], [-2]], [[1.0], [1.0]], "document 1 has the neighbour -2"),
        ([[1], [0]], [[1.0], [np.nan]], "a similarity of document 1 is not a finite number"),
        ([[1], [0]], [[1.0]], r"similarity_NK has the shape \[1, 1\]"),
        ([0, 1], [1.0, 1.0], r"neighbors_NK is int64\[2\]; give int\[documents, k\]"),
        ([[1.0], [0.0]], [[1.0], [1.0]], r"neighbors_NK is float64\[2, 1\]"),
    ],
)
def test_lists_that_are_none_are_refused(ids, weights, message):
    with pytest.raises(ValueError, match=message) as caught:
        traverse(ids, weights)
    assert "\n" not in str(caught.value)


def test_an_unknown_degree_is_refused():
    with pytest.raises(ValueError, match="degree 'dynamic' is unknown; use residual or static"):
        traverse([[1], [0]], [[1.0], [1.0]], degree="dynamic")


def test_residual_is_better_than_released_is_better_than_random():
    """Mean similarity of neighbours, and topics in windows of 32; seeds 0 to 2, each of them."""
    from lcl.data.neighbors import adjacent_similarity
    from lcl.data.order_baselines import released

    for seed in range(3):
        vectors, topics, ids, similarity = clustered(2000, seed=seed)
        orders = [
            traverse(ids, similarity),
            released(ids),
            shuffle(2000, seed=seed, domain="topics"),
        ]
        means = [float(adjacent_similarity(vectors, order).mean()) for order in orders]
        assert means[0] > means[1] > means[2] + 0.2
        assert abs(means[2]) < 0.1

        def purity(order, topics=topics):
            windows = topics[order][: len(order) // 32 * 32].reshape(-1, 32)
            return np.mean([np.bincount(window).max() / 32 for window in windows])

        assert purity(orders[0]) > purity(orders[2]) + 0.2
