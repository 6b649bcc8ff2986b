"""lcl.data.chain_order: held to its definition, one edge after another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.data import chain_order
from lcl.data.chain_order import chained
from lcl.data.neighbors import adjacent_similarity
from lcl.data.order_baselines import released
from lcl.data.ordering import jumps, traverse
from tests.data.ordering_test import clustered, neighbor_lists


def naive_edges(neighbors, similarity):
    """Every pair once: heaviest first, then by who lists whom."""
    listed = [
        (-s, i, j)
        for i, (row, values) in enumerate(zip(neighbors, similarity, strict=True))
        for j, s in zip(row, values, strict=True)
        if j >= 0 and j != i
    ]
    return list(dict.fromkeys((min(i, j), max(i, j)) for _, i, j in sorted(listed)))


def naive_chained(neighbors, similarity, chain_length):
    """The three steps as the module's page has them, with lists that are searched."""
    edges = naive_edges(neighbors, similarity)
    chains = [[i] for i in range(len(neighbors))]
    for x, y in edges:
        a = next(chain for chain in chains if x in chain)
        b = next(chain for chain in chains if y in chain)
        if a is b or len(a) + len(b) > chain_length:
            continue
        if x in (a[0], a[-1]) and y in (b[0], b[-1]):
            chains = [chain for chain in chains if chain is not a and chain is not b]
            chains.append((a if a[-1] == x else a[::-1]) + (b if b[0] == y else b[::-1]))
    chains = sorted((min(chain, chain[::-1]) for chain in chains), key=lambda chain: chain[0])

    number = {document: n for n, chain in enumerate(chains) for document in chain}
    part = list(range(len(chains)))
    tree = []
    for x, y in edges:
        a, b = part[number[x]], part[number[y]]
        if a != b:
            part = [a if p == b else p for p in part]
            tree.append((x, y))

    def touching(chain):
        for rank, (x, y) in enumerate(tree):
            for inside, outside in ((x, y), (y, x)):
                if number[inside] == chain:
                    yield rank, outside

    def lay(chain, entry, parent):
        documents = chains[chain]
        place = documents.index(entry)
        result = documents[::-1] if len(documents) - 1 - place < place else list(documents)
        parts = [
            (lay(number[outside], outside, chain), rank)
            for rank, outside in touching(chain)
            if number[outside] != parent
        ]
        for documents, _ in sorted(parts, key=lambda part: (len(part[0]), part[1])):
            result += documents
        return result

    order = []
    for chain in sorted(range(len(chains)), key=lambda c: (len(list(touching(c))), c)):
        if chains[chain][0] not in order:
            order += lay(chain, chains[chain][0], -1)
    return order


@pytest.mark.parametrize("few", [1, 256])  # edges in rounds, and one by one
@given(lists=neighbor_lists(), chain_length=st.integers(1, 6))
def test_the_order_is_its_definition(few, lists, chain_length):
    ids, weights = lists
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_order, "_FEW", few)
        order = chained(ids, weights, chain_length=chain_length)
    assert order.tolist() == naive_chained(ids.tolist(), weights.tolist(), chain_length)
    assert np.array_equal(np.sort(order), np.arange(len(ids)))


@pytest.mark.parametrize("chain_length", [1, 8, 10**9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_order_equals_the_naive_one(chain_length, dtype):
    _, _, ids, similarity = clustered(600)
    similarity = np.round(similarity.astype(dtype), 2)  # hundreds of ties
    assert len(np.unique(similarity)) < similarity.size / 20
    want = naive_chained(ids.tolist(), similarity.tolist(), chain_length)
    assert chained(ids, similarity, chain_length=chain_length).tolist() == want


def test_rounds_that_take_one_edge_only_are_given_up():
    """A line whose edges get lighter: each round could take but its first."""
    num_documents = 20_000
    ids = np.minimum(np.arange(num_documents) + 1, num_documents - 1)[:, None]
    weights = np.linspace(1.0, 0.1, num_documents)[:, None]
    rounds = []
    heaviest = chain_order._heaviest_at_both

    def counted(*arguments):
        rounds.append(len(arguments[1]))
        return heaviest(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_order, "_heaviest_at_both", counted)
        order = chained(ids, weights, chain_length=10**9)
    assert order.tolist() == list(range(num_documents))
    assert len(rounds) <= 3


def test_the_picture_in_the_docstring():
    ids = [[1], [2], [3], [4], [3], [1]]
    weights = [[0.9], [0.8], [0.4], [0.7], [0.7], [0.3]]
    assert chained(ids, weights, chain_length=3).tolist() == [3, 4, 2, 1, 0, 5]


def test_the_order_does_not_depend_on_how_lists_are_sorted():
    _, _, ids, similarity = clustered(300)
    similarity = np.round(similarity, 1)
    turned = chained(ids[:, ::-1], similarity[:, ::-1])
    assert np.array_equal(chained(ids, similarity), turned)
    with_itself = np.column_stack([np.arange(300), ids])
    ones = np.column_stack([np.ones(300), similarity])
    assert np.array_equal(chained(with_itself, ones), turned)


def test_documents_without_neighbours_and_no_documents():
    assert chained(np.zeros((0, 3), int), np.zeros((0, 3))).tolist() == []
    assert chained(np.full((3, 2), -1), np.zeros((3, 2))).tolist() == [0, 1, 2]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="chain_length is 0; give 1 or more documents"):
        chained([[1], [0]], [[1.0], [1.0]], chain_length=0)
    with pytest.raises(ValueError, match="document 0 has the neighbour 5"):
        chained([[5]], [[1.0]])


def test_nearer_and_purer_than_the_released_heuristic():
    """Both targets, on topics and seeds of its own; and fewer jumps."""

    def purity(topics, order):
        windows = topics[order][: len(order) // 32 * 32].reshape(-1, 32)
        return np.mean([np.bincount(window).max() / 32 for window in windows])

    for seed in range(3):
        vectors, topics, ids, similarity = clustered(1500, seed=seed, num_topics=25, dim=32)
        ours, theirs = chained(ids, similarity), released(ids)
        assert (
            adjacent_similarity(vectors, ours).mean() > adjacent_similarity(vectors, theirs).mean()
        )
        assert purity(topics, ours) > purity(topics, theirs)
        assert jumps(ours, ids).sum() < jumps(theirs, ids).sum()
        assert purity(topics, ours) > purity(topics, traverse(ids, similarity)) - 0.05
