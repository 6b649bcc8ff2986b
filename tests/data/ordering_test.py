"""lcl.data.ordering: keyed permutations."""

from __future__ import annotations

import collections
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.data.ordering import named_key, permute, shuffle, shuffle_with_key

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
