"""lcl.data.mixture: exact shares in every block, at any row number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lcl.data.mixture import Mixture

WEIGHTS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3), st.floats(0.01, 100), min_size=1, max_size=6
)


def mixture(weights, block):
    share = min(weights.values()) / sum(weights.values())
    assume(share * block >= 1)
    return Mixture(weights, block)


@given(weights=WEIGHTS, block=st.integers(1, 200), key=st.integers(0, 2**64 - 1))
def test_counts_are_exact_in_every_block(weights, block, key):
    mix = mixture(weights, block)
    domain, _ = mix.locate(np.arange(5 * block), key=key)
    for b in range(5):
        counts = np.bincount(domain[b * block : (b + 1) * block], minlength=len(weights))
        assert counts.tolist() == mix.counts.tolist()


@given(weights=WEIGHTS, block=st.integers(1, 200))
def test_counts_are_the_largest_remainders(weights, block):
    mix = mixture(weights, block)
    exact = np.array([weights[d] for d in mix.domains]) / sum(weights.values()) * block
    assert mix.counts.sum() == block
    assert (np.abs(mix.counts - exact) < 1).all()
    up = mix.counts > np.floor(exact + 1e-9)
    remainder = exact - np.floor(exact + 1e-9)
    if up.any() and not up.all():
        assert remainder[up].min() >= remainder[~up].max() - 1e-9


@given(weights=WEIGHTS, block=st.integers(1, 60), key=st.integers(0, 2**64 - 1))
def test_occurrences_count_up_without_a_gap(weights, block, key):
    """The rows of a domain that are used before step t are a prefix: what replay relies on."""
    mix = mixture(weights, block)
    domain, occurrence = mix.locate(np.arange(4 * block + 3), key=key)
    for d in range(len(weights)):
        mine = occurrence[domain == d]
        assert mine.tolist() == list(range(len(mine)))


@given(weights=WEIGHTS, block=st.integers(1, 60), data=st.data())
def test_any_row_alone_is_the_same(weights, block, data):
    mix = mixture(weights, block)
    asked = np.array(data.draw(st.lists(st.integers(0, 10 * block), min_size=1, max_size=10)))
    domain, occurrence = mix.locate(asked, key=3)
    all_domains, all_occurrences = mix.locate(np.arange(10 * block + 1), key=3)
    assert domain.tolist() == all_domains[asked].tolist()
    assert occurrence.tolist() == all_occurrences[asked].tolist()
    k = int(asked[0])
    want = np.bincount(all_domains[:k], minlength=len(weights))
    assert mix.counts_before(k, key=3).tolist() == want.tolist()


def test_far_rows_cost_nothing_and_are_exact():
    mix = Mixture({"a": 1, "b": 2}, block=3)
    k = 3 * 10**15
    assert mix.counts_before(k).tolist() == [k // 3, 2 * k // 3]
    assert sorted(mix.locate(np.arange(k, k + 3))[1].tolist()) == sorted(
        [k // 3, 2 * k // 3, 2 * k // 3 + 1]
    )


def test_blocks_and_keys_are_ordered_differently():
    mix = Mixture({"a": 1, "b": 1}, block=64)
    first, second = mix.locate(np.arange(128))[0].reshape(2, 64)
    assert first.tolist() != second.tolist()
    assert first.tolist() != mix.locate(np.arange(64), key=1)[0].tolist()
    assert 3 < np.count_nonzero(np.diff(first)) < 60  # shuffled, neither sorted nor alternating


def test_domains_are_sorted_whatever_the_order_of_the_weights():
    a = Mixture({"x": 1, "b": 3}, block=8)
    b = Mixture({"b": 3, "x": 1}, block=8)
    assert a.domains == ("b", "x") and a.counts.tolist() == [6, 2]
    assert a.locate(np.arange(20))[0].tolist() == b.locate(np.arange(20))[0].tolist()


@pytest.mark.parametrize("weight", [0, -1, 0.0, math.nan, math.inf, "1", None])
def test_bad_weights_are_refused(weight):
    with pytest.raises(ValueError, match="mixture weight of 'b' is .*; give a positive") as error:
        Mixture({"a": 1, "b": weight})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weights={}), "mixture weights are {}; give at least one"),
        (dict(weights=[1, 2]), "give at least one"),
        (dict(weights={"a": 1}, block=0), "mixture block is 0; give at least 1 row"),
        (dict(weights={"a": 1, "b": 9999}), "weight of 'a' is 0.0001 of the whole.*block to 10000"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**arguments)


def test_the_mend_for_a_starved_domain_works():
    assert Mixture({"a": 1, "b": 9999}, block=10_000).counts.tolist() == [1, 9999]


def test_huge_and_tiny_weights_do_not_overflow():
    assert Mixture({"a": 1e308, "b": 1e308}, block=4).counts.tolist() == [2, 2]
    with pytest.raises(ValueError, match="weight of 'c' is 5e-309 of the whole"):
        Mixture({"a": 1e308, "b": 1e308, "c": 1})
    assert Mixture({"a": 1e-300, "b": 3e-300}, block=4).counts.tolist() == [1, 3]
