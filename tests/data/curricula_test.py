"""lcl.data.curricula: the tables of odds, and the steps dealt out by them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl.data.curricula import (
    GrowLinear,
    GrowP2,
    GrowP100,
    ShrinkP100,
    Uniform,
    largest_remainders,
)

CURRICULA = [Uniform(), GrowLinear(), GrowP2(), GrowP100(), ShrinkP100()]
STYLES = ["table", "exhaustion"]


def test_grow_p2_is_the_published_table():
    """OLMo-core's VSLGrowthCurriculum, n = 6."""
    assert GrowP2().table(6).tolist() == [
        [32, 16, 8, 4, 2, 1],
        [16, 32, 8, 4, 2, 1],
        [8, 16, 32, 4, 2, 1],
        [4, 8, 16, 32, 2, 1],
        [2, 4, 8, 16, 32, 1],
        [1, 2, 4, 8, 16, 32],
    ]


def test_grow_linear_is_the_published_table():
    assert GrowLinear().table(6).tolist() == [
        [6, 5, 4, 3, 2, 1],
        [5, 6, 4, 3, 2, 1],
        [4, 5, 6, 3, 2, 1],
        [3, 4, 5, 6, 2, 1],
        [2, 3, 4, 5, 6, 1],
        [1, 2, 3, 4, 5, 6],
    ]


def test_p100_is_exact_in_python_integers():
    assert GrowP100().table(12)[0, 0] == 100**11  # more than 64 bits hold
    assert ShrinkP100().table(3).tolist() == [[1, 100, 10_000], [1, 10_000, 100], [10_000, 100, 1]]


def test_a_cycle_with_the_tables_own_counts_is_the_table():
    """63 steps of each bucket in a cycle: each sub-cycle has exactly the odds."""
    schedule = GrowP2().schedule(np.full(6, 126), cycles=2, key=3, longest_first=False)
    begin = 0
    for _ in range(2):
        for size, column in zip(GrowP2().table(6).sum(axis=0), GrowP2().table(6).T, strict=True):
            part = schedule.bucket[begin : begin + size]
            assert np.bincount(part, minlength=6).tolist() == column.tolist()
            begin += size
    assert begin == len(schedule.bucket)


counts = st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any)


@given(
    counts, st.integers(1, 5), st.sampled_from(CURRICULA), st.sampled_from(STYLES), st.booleans()
)
@settings(max_examples=150, deadline=None)
def test_each_bucket_gets_its_steps_and_rows_once(counts, cycles, curriculum, style, longest_first):
    curriculum = type(curriculum)(style=style)
    schedule = curriculum.schedule(
        np.array(counts), cycles=cycles, key=1, longest_first=longest_first
    )
    assert np.bincount(schedule.bucket, minlength=len(counts)).tolist() == counts
    for b, count in enumerate(counts):
        assert schedule.nth[schedule.bucket == b].tolist() == list(range(count))
    longest = max(b for b, count in enumerate(counts) if count)
    if longest_first:
        assert schedule.bucket[0] == longest
    half = len(schedule.bucket) // 2
    seen = np.bincount(schedule.bucket[:half], minlength=len(counts))
    assert schedule.counts_before(half).tolist() == seen.tolist()


@given(counts, st.integers(1, 4), st.sampled_from(CURRICULA))
@settings(max_examples=60, deadline=None)
def test_cycles_are_alike(counts, cycles, curriculum):
    """Each cycle has an equal part of each bucket, to a step."""
    schedule = curriculum.schedule(np.array(counts), cycles=cycles, key=1, longest_first=False)
    begin = 0
    for cycle in range(cycles):
        want = [n * (cycle + 1) // cycles - n * cycle // cycles for n in counts]
        part = schedule.bucket[begin : begin + sum(want)]
        assert np.bincount(part, minlength=len(counts)).tolist() == want
        begin += sum(want)


@pytest.mark.parametrize("style", STYLES)
def test_lengths_grow_within_a_cycle_and_start_anew(style):
    schedule = GrowP2(style=style).schedule(np.full(5, 400), cycles=2, key=0)
    quarters = schedule.bucket.reshape(2, 4, -1).mean(axis=2)  # cycle, quarter
    assert (np.diff(quarters, axis=1) > 0).all()
    assert quarters[1, 0] < quarters[0, 3]
    shrinking = ShrinkP100(style=style).schedule(np.full(5, 400), cycles=2, key=0)
    assert (np.diff(shrinking.bucket.reshape(2, 4, -1).mean(axis=2), axis=1) < 0).all()
    uniform = Uniform(style=style).schedule(np.full(5, 400), cycles=2, key=0)
    assert np.ptp(uniform.bucket.reshape(8, -1).mean(axis=1)) < 0.5
    sharp = GrowP100(style=style).schedule(np.full(5, 400), cycles=1, key=0)
    assert np.mean(np.diff(sharp.bucket.astype(int)) < 0) < 0.1  # practically sequential


def test_exhaustion_draws_by_tokens_times_odds():
    """The released sampler: at first, bucket b with p proportional to count * odds."""
    first = np.zeros(3)
    for key in range(600):
        schedule = GrowP2(style="exhaustion").schedule(
            np.array([10, 20, 40]), cycles=1, key=key, longest_first=False
        )
        first[schedule.bucket[0]] += 1
    weights = np.array([10 * 4, 20 * 2, 40 * 1])
    assert np.abs(first / 600 - weights / weights.sum()).max() < 5 * np.sqrt(0.25 / 600)


def test_another_key_another_order_the_same_counts():
    one, other = (GrowP2().schedule(np.array([9, 9, 9]), cycles=1, key=k) for k in (0, 1))
    assert one.bucket.tolist() != other.bucket.tolist()
    assert one.counts.tolist() == other.counts.tolist()


@given(st.lists(st.integers(0, 10**20), min_size=1, max_size=6).filter(any), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_largest_remainders(weights, total):
    shares = largest_remainders(weights, total)
    assert sum(shares) == total
    for weight, share in zip(weights, shares, strict=True):
        exact = weight * total / sum(weights)
        assert abs(share - exact) < 1 + 1e-9 and (weight or not share)
