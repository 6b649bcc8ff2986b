"""lcl.data.neighbors: top-k by blocks, and near-duplicates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl.data import neighbors as neighbors_module
from lcl.data.embeddings import quantise
from lcl.data.neighbors import Neighbors, adjacent_similarity, near_duplicates, nearest


def brute_force(vectors, num_neighbors, rows=None, among=None):
    """All similarities of whole-number vectors, exact, sorted: nearest first, ties by number."""
    vectors = np.asarray(vectors, np.int64)
    length = np.sqrt(np.square(vectors).sum(axis=1).astype(np.float64))
    inverse = np.where(length > 0, 1 / np.maximum(length, 1e-300), 0).astype(np.float32)
    product = (vectors @ vectors.T).astype(np.float32)
    similarity = product * (inverse[:, None] * inverse[None])
    np.fill_diagonal(similarity, -np.inf)
    if among is not None:
        similarity[:, ~among] = -np.inf
    similarity = similarity if rows is None else similarity[rows]
    ids = np.argsort(-similarity, axis=1, kind="stable")[:, :num_neighbors]
    similarity = np.take_along_axis(similarity, ids, axis=1)
    short = num_neighbors - ids.shape[1]
    if short > 0:
        ids = np.pad(ids, ((0, 0), (0, short)))
        similarity = np.pad(similarity, ((0, 0), (0, short)), constant_values=-np.inf)
    real = similarity > -np.inf
    return np.where(real, ids, -1), np.where(real, similarity, 0)


def vectors_with_ties(num_documents, dim, seed):
    """Many equal vectors and many equal similarities."""
    rng = np.random.default_rng(seed)
    return rng.integers(-2, 3, (num_documents, dim)).astype(np.int8)


@pytest.mark.parametrize("block", [(1024, 16_384), (64, 128), (8, 1984)])
@pytest.mark.parametrize("num_neighbors", [1, 10])
def test_exact_is_exact_in_any_blocks(block, num_neighbors):
    """To the last bit, ties by number; 1,000 documents against 64, 128 or all at once."""
    for vectors in (
        vectors_with_ties(1000, 4, 0),
        quantise(np.random.default_rng(0).normal(size=(1000, 24))),
    ):
        found = nearest(vectors, num_neighbors, block=block)
        ids, similarity = brute_force(vectors, num_neighbors)
        assert np.array_equal(found.ids, ids)
        assert np.array_equal(found.similarity, similarity)


def test_groups_do_not_change_the_result(monkeypatch):
    """Maxima by group are a short cut: without them the same comes out."""
    vectors = vectors_with_ties(3000, 3, 1)
    want = nearest(vectors, 5)
    assert np.array_equal(want.ids, brute_force(vectors, 5)[0])
    monkeypatch.setattr(neighbors_module, "_GROUP", 7)  # 2048 columns are no multiple of it
    neighbors_module._step.cache_clear()
    again = nearest(vectors, 5, block=(256, 2048))
    neighbors_module._step.cache_clear()
    assert np.array_equal(want.ids, again.ids)


@settings(max_examples=20)
@given(data=st.data())
def test_any_rows_among_any_documents(data):
    n = data.draw(st.integers(1, 30))
    k = data.draw(st.integers(1, 6))
    vectors = vectors_with_ties(n, 3, data.draw(st.integers(0, 5)))
    among = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    rows = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n)))
    found = nearest(vectors, k, rows=rows, among=among, block=(16, 64))
    ids, similarity = brute_force(vectors, k, rows, among)
    assert np.array_equal(found.ids, ids)
    assert np.array_equal(found.similarity, similarity)


def test_likeness_is_mutual_to_the_last_bit():
    found = nearest(quantise(np.random.default_rng(3).normal(size=(200, 16))), 199)
    table = np.zeros((200, 200), np.float32)
    np.put_along_axis(table, found.ids.astype(np.int64), found.similarity, axis=1)
    assert np.array_equal(table, table.T)


def test_vectors_that_are_streamed_to_the_device_give_the_same(monkeypatch):
    vectors = vectors_with_ties(500, 4, 2)
    want = nearest(vectors, 5, block=(64, 128))
    monkeypatch.setattr(neighbors_module, "_DEVICE_BYTES", 0)
    again = nearest(vectors, 5, block=(64, 128))
    assert np.array_equal(want.ids, again.ids)


def test_float_vectors_are_normalised():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 8)).astype(np.float32)
    found = nearest(vectors * rng.uniform(0.1, 50, (300, 1)).astype(np.float32), 3)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    want = unit @ unit.T
    np.fill_diagonal(want, -1)
    assert np.allclose(found.similarity, -np.sort(-want, axis=1)[:, :3], atol=1e-5)


def test_approximate_finds_most():
    vectors = quantise(np.random.default_rng(0).normal(size=(2000, 16)))
    exact, found = nearest(vectors, 10), nearest(vectors, 10, index="approximate")
    assert recall(exact, found) > 0.9
    assert not (found.ids == np.arange(2000)[:, None]).any()


def recall(exact, found):
    rows = zip(exact.ids.tolist(), found.ids.tolist(), strict=True)
    return np.mean([len(set(a) & set(b)) / len(a) for a, b in rows])


def test_faiss_agrees_with_exact():
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    rng = np.random.default_rng(0)
    topics = rng.normal(size=(60, 16))[rng.integers(0, 60, 3000)]
    vectors = quantise(topics + 0.5 * rng.normal(size=(3000, 16)))
    exact, found = nearest(vectors, 10), nearest(vectors, 10, index="faiss")
    assert recall(exact, found) > 0.95
    assert not (found.ids == np.arange(3000)[:, None]).any()
    same = found.ids == exact.ids
    assert np.allclose(found.similarity[same], exact.similarity[same], atol=1e-5)
    again = nearest(vectors, 10, index="faiss")
    assert np.array_equal(found.ids, again.ids)
    # In one list there is nothing to miss: then it is exact, but for the order of equal ones.
    few = vectors[:60]
    found, exact = nearest(few, 5, index="faiss"), nearest(few, 5)
    assert np.allclose(found.similarity, exact.similarity, atol=1e-5)


def test_faiss_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(neighbors_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"index 'faiss' needs faiss; `pip install lcl\[faiss\]`"):
        nearest(np.eye(3), 1, index="faiss")


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        (np.zeros(3), {}, r"vectors_ND is float64\[3\]; give float\[N, D\]"),
        (np.zeros((2, 2)), {"num_neighbors": 0}, "num_neighbors is 0; give 1 or more"),
        (np.zeros((2, 2)), {"index": "magic"}, "index 'magic' is unknown; use exact, approximate"),
        (np.full((2, 2), np.nan), {}, "the vector of document 0 is not finite"),
    ],
)
def test_nonsense_is_refused(vectors, options, message):
    with pytest.raises(ValueError, match=message):
        nearest(vectors, **{"num_neighbors": 1, **options})


def test_no_documents_and_one():
    assert nearest(np.zeros((0, 4), np.int8), 3).ids.shape == (0, 3)
    assert nearest(np.ones((1, 4), np.int8), 3).ids.tolist() == [[-1, -1, -1]]


def test_adjacent_similarity_is_the_cosine():
    vectors = np.array([[3.0, 0], [0, 2], [5, 5], [0, 0]])
    found = adjacent_similarity(vectors, np.array([0, 2, 1, 1, 3]))
    assert np.allclose(found, [0.5**0.5, 0.5**0.5, 1, 0])
    assert adjacent_similarity(vectors, np.array([1])).shape == (0,)


@given(data=st.data())
def test_near_duplicates_by_definition(data):
    n = data.draw(st.integers(0, 12))
    k = data.draw(st.integers(1, 4))
    ids = np.array([[data.draw(st.integers(-1, n - 1)) for _ in range(k)] for _ in range(n)])
    values = st.sampled_from([0.5, 0.9, 0.95, 1.0])
    similarity = np.array([[data.draw(values) for _ in range(k)] for _ in range(n)])
    ids, similarity = ids.reshape(n, k), similarity.reshape(n, k)
    alike = set()
    for i, j in np.ndindex(n, k):
        if ids[i, j] >= 0 and ids[i, j] != i and similarity[i, j] >= 0.95:
            alike |= {(i, int(ids[i, j])), (int(ids[i, j]), i)}
    want: list[int] = []
    for i in range(n):
        earlier = [j for j in range(i) if want[j] < 0 and (i, j) in alike]
        want.append(min(earlier, default=-1))
    assert near_duplicates(Neighbors(ids, similarity), 0.95).tolist() == want


def test_jax_is_not_imported_with_the_module(run_python):
    code = "import sys, lcl.data.neighbors, lcl.data.in_context\nprint('jax' in sys.modules)"
    assert run_python(code).strip() == "False"
