"""lcl.data.in_context: orders by likeness, from a store."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest

from lcl.data import in_context
from lcl.data.chain_order import chained
from lcl.data.embeddings import FromFunction, HashedTfidf, quantise
from lcl.data.in_context import ChainOrder, InContext, KNNOrder, ReleasedOrder
from lcl.data.neighbors import nearest
from lcl.data.order_baselines import released, with_neighbors
from lcl.data.ordering import jumps, shuffle, traverse
from tests.data.ordering_test import clustered

KINDS = [InContext, ChainOrder, KNNOrder, ReleasedOrder]


class Documents:
    """As much of a store as an order looks at."""

    def __init__(self, vectors):
        self.vectors = vectors
        self.num_documents = len(vectors)
        self.lengths = np.arange(3, 3 + len(vectors))
        self.fingerprint = f"made of {len(vectors)}"


def embedder():
    return FromFunction(lambda store: store.vectors, name="vectors")


def documents_with_copies(seed=0, num_documents=400, num_copies=60, num_of_one=30):
    """Topics; then copies of random documents, and many of one, all a little changed."""
    rng = np.random.default_rng(seed)
    vectors, *_ = clustered(num_documents, seed=seed)
    of = np.concatenate([rng.integers(0, num_documents, num_copies), np.full(num_of_one, 7)])
    copies = vectors[of] + 0.002 * rng.normal(size=(len(of), vectors.shape[1]))
    return Documents(np.concatenate([vectors, copies])), of


@pytest.mark.parametrize("kind", KINDS)
def test_without_duplicates_the_orders_are_those_of_the_functions(kind):
    store = Documents(clustered(300)[0])
    order = kind(embedder(), duplicate_threshold=None).order(store, seed=3, domain="d")
    lists = nearest(quantise(store.vectors), 10)
    want = {
        InContext: lambda: traverse(*lists),
        ChainOrder: lambda: chained(*lists),
        KNNOrder: lambda: with_neighbors(shuffle(300, seed=3, domain="d"), lists.ids),
        ReleasedOrder: lambda: released(lists.ids),
    }[kind]()
    assert np.array_equal(order, want)


def test_degree_and_number_of_neighbours_matter():
    store = Documents(clustered(300)[0])
    plain = InContext(embedder(), duplicate_threshold=None)
    order = plain.order(store, seed=0, domain="d")
    for change in ({"degree": "static"}, {"num_neighbors": 3}):
        other = dataclasses.replace(plain, **change)
        assert not np.array_equal(order, other.order(store, seed=0, domain="d"))
        assert plain.settings() != other.settings()
    assert np.array_equal(order, plain.order(store, seed=5, domain="e"))  # nothing left to chance


def test_near_duplicates_come_last_and_are_told(caplog):
    store, of = documents_with_copies()
    order = InContext(embedder(), duplicate_threshold=0.99)
    with caplog.at_level(logging.INFO):
        plan = order.plan(store, seed=0, domain="d")
    assert np.array_equal(np.sort(plan.order), np.arange(490))  # every document, once
    assert (plan.duplicate_of[:400] == -1).all()
    assert np.array_equal(plan.duplicate_of[400:], of)
    assert np.array_equal(np.sort(plan.order[400:]), np.arange(400, 490))
    assert plan.starts[400:].all()
    assert plan.report()["near_duplicates"] == 90
    assert plan.report()["dropped_documents"] == plan.report()["dropped_tokens"] == 0
    assert "90 near-duplicates put last; 0 documents with 0 tokens left out" in caplog.text
    # Another seed or domain shuffles the tail only.
    other = order.order(store, seed=1, domain="d")
    assert np.array_equal(plan.order[:400], other[:400])
    assert not np.array_equal(plan.order[400:], other[400:])


def test_dropped_duplicates_are_counted(caplog):
    store, _ = documents_with_copies()
    order = InContext(embedder(), duplicate_threshold=0.99, duplicates="drop")
    with caplog.at_level(logging.INFO):
        plan = order.plan(store, seed=0, domain="d")
    assert np.array_equal(np.sort(plan.order), np.arange(400))
    tokens = int(store.lengths[400:].sum())
    assert plan.report()["dropped_documents"] == 90
    assert plan.dropped_tokens == tokens == store.lengths.sum() - store.lengths[plan.order].sum()
    assert f"90 near-duplicates dropped; 90 documents with {tokens} tokens left out" in caplog.text


def test_pruned_lists_are_those_of_the_documents_that_stay():
    """Also where a list was all duplicates: document 7 has thirty copies, twenty are looked at."""
    store, _ = documents_with_copies()
    found = InContext(embedder(), duplicate_threshold=0.99).find(store)
    want = nearest(quantise(store.vectors[:400]), 10)
    assert np.array_equal(found.neighbors.ids[:400], want.ids)
    assert np.array_equal(found.neighbors.similarity[:400], want.similarity)
    assert (found.neighbors.ids[400:] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_hops_are_edges_or_marked(kind):
    store, _ = documents_with_copies(num_documents=200)
    order = kind(embedder(), duplicate_threshold=0.99)
    plan = order.plan(store, seed=0, domain="d")
    ids = order.find(store).neighbors.ids
    if kind is ReleasedOrder:
        ids = ids[:, :9]
    assert np.array_equal(plan.starts, jumps(plan.order, ids))
    unit = quantise(store.vectors).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = np.einsum("nd,nd->n", unit[plan.order[1:]], unit[plan.order[:-1]])
    assert np.allclose(plan.similarity[1:], cosine, atol=1e-5)
    assert plan.similarity[0] == 0


def test_documents_like_nothing_have_no_edges():
    vectors = np.eye(6)
    vectors[3] = 0
    plan = InContext(embedder(), num_neighbors=2).plan(Documents(vectors), seed=0, domain="d")
    assert plan.order.tolist() == [0, 1, 2, 3, 4, 5]
    assert plan.starts.all()


@pytest.mark.parametrize("num_documents", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_stores(kind, num_documents, tmp_path):
    store = Documents(np.ones((num_documents, 4)))
    for cache in (None, tmp_path):
        order = kind(embedder()).order(store, seed=0, domain="d", cache_dir=cache)
        assert sorted(order.tolist()) == list(range(num_documents))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_changes_nothing_and_saves_the_work(kind, tmp_path, monkeypatch):
    store, _ = documents_with_copies(num_documents=100)
    order = kind(embedder())
    want = order.order(store, seed=0, domain="d")
    calls = []
    counting = FromFunction(lambda store: calls.append(1) or store.vectors, name="vectors")
    for _ in range(3):
        found = kind(counting).order(store, seed=0, domain="d", cache_dir=tmp_path)
        assert np.array_equal(found, want)
    assert len(calls) == 1

    def no_search(*args, **options):
        raise AssertionError("searched again")

    monkeypatch.setattr(in_context, "nearest_in_blocks", no_search)
    assert np.array_equal(order.order(store, seed=0, domain="d", cache_dir=tmp_path), want)
    # Other neighbours, another store, another encoder: none is taken for these.
    for other in (
        dataclasses.replace(order, num_neighbors=4),
        dataclasses.replace(order, index="approximate"),
    ):
        with pytest.raises(AssertionError, match="searched again"):
            other.order(store, seed=0, domain="d", cache_dir=tmp_path)
    with pytest.raises(AssertionError, match="searched again"):
        order.order(Documents(store.vectors[:-1]), seed=0, domain="d", cache_dir=tmp_path)
    with pytest.raises(AssertionError, match="searched again"):
        kind(HashedTfidf()).order(_store(tmp_path), seed=0, domain="d", cache_dir=tmp_path)


def test_a_search_that_was_stopped_goes_on(tmp_path, monkeypatch):
    store = Documents(clustered(300)[0])
    order = InContext(embedder())
    want = order.order(store, seed=0, domain="d")
    search, asked = in_context.nearest_in_blocks, []

    def small(vectors, k, *, index, rows, stop=False):
        asked.append(int(rows[0]))
        for number, block in enumerate(search(vectors, k, index=index, rows=rows, block=(64, 64))):
            if len(asked) == 1 and number == 2:
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(in_context, "nearest_in_blocks", small)
    with pytest.raises(KeyboardInterrupt):
        order.order(store, seed=0, domain="d", cache_dir=tmp_path)
    assert np.array_equal(order.order(store, seed=0, domain="d", cache_dir=tmp_path), want)
    assert asked == [0, 128]


def _store(path):
    from lcl.data.testing import make_stores

    return make_stores(path / "stores", {"en": 30}).open("en")


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_real_store_by_default(kind, tmp_path):
    store = _store(tmp_path)
    order = kind()
    assert order.needs_open_rows
    found = order.order(store, seed=0, domain="en", cache_dir=tmp_path / "cache")
    assert set(found.tolist()) == set(range(store.num_documents))
    assert np.array_equal(found, order.order(store, seed=0, domain="en"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_neighbors": 0}, "num_neighbors is 0; give 1 or more"),
        ({"index": "magic"}, "index 'magic' is unknown"),
        ({"duplicate_threshold": 0.0}, "duplicate_threshold is 0.0; give a cosine in"),
        ({"duplicates": "burn"}, "duplicates 'burn' is unknown; use last or drop"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_nonsense_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_nonsense_of_their_own_is_refused():
    with pytest.raises(ValueError, match="degree 'dynamic' is unknown; use residual or static"):
        InContext(degree="dynamic")
    with pytest.raises(ValueError, match="cluster_size is 0; give 1 or more"):
        ReleasedOrder(cluster_size=0)
    with pytest.raises(ValueError, match="chain_length is 0; give 1 or more"):
        ChainOrder(chain_length=0)


def test_settings_are_plain_and_tell_orders_apart():
    import json

    said = {json.dumps(kind().settings(), sort_keys=True) for kind in KINDS}
    said.add(json.dumps(InContext(HashedTfidf(seed=1)).settings(), sort_keys=True))
    said.add(json.dumps(InContext(duplicates="drop").settings(), sort_keys=True))
    said.add(json.dumps(ChainOrder(chain_length=16).settings(), sort_keys=True))
    assert len(said) == 7
