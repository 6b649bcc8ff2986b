"""The verdict rule in closed form: intervals, what excludes zero, and what cannot be decided."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.papers.claims import (
    DOES_NOT_HOLD,
    HOLDS,
    NOT_TESTABLE,
    Claim,
    Interval,
    interval,
    table_text,
    verdict,
)

CLAIM = Claim("a", "x is below y", better="x", worse="y", metric="loss")


def values(better: list[float], worse: list[float]) -> dict:
    return {
        "x": {seed: {"loss": v} for seed, v in enumerate(better)},
        "y": {seed: {"loss": v} for seed, v in enumerate(worse)},
    }


def test_interval_is_students():
    """1, 2, 3: s = 1, so the half width is t(0.975, 2) / sqrt(3) with t = 4.3027."""
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-12)
    assert found.low == 2.0 - found.half and found.high == 2.0 + found.half


def test_quantiles_are_students_t():
    """The coverage of the table's quantiles, by integrating the density."""
    from lcl.papers.claims import _T

    for degrees in (1, 2, 3, 4, 9, 29):
        x = np.linspace(0, _T[degrees - 1], 200_001)
        log_norm = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
        density = np.exp(log_norm) / math.sqrt(degrees * math.pi)
        density = density * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=2e-5)


def test_one_value_has_no_interval_and_decides_nothing():
    assert interval([3.0]) == Interval(3.0, math.inf)
    assert CLAIM.decide(values([1.0], [2.0])).verdict == NOT_TESTABLE
    with pytest.raises(ValueError, match="not finite"):
        interval([1.0, math.nan])
    with pytest.raises(ValueError, match="at least one seed"):
        interval([])


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.25], HOLDS),
        ([2.0, 2.1, 2.25], [1.0, 1.1, 1.2], DOES_NOT_HOLD),
        ([1.0, 1.0, 1.0], [1.1, 0.9, 1.2], NOT_TESTABLE),
        ([1.0, 1.0], [2.0, 2.0], NOT_TESTABLE),  # two seeds decide nothing
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], NOT_TESTABLE),  # no difference at all
    ],
)
def test_rule(better, worse, expected):
    assert CLAIM.decide(values(better, worse)).verdict == expected


def test_difference_is_paired_by_seed():
    """Seeds differ by far more than the arms do: only the paired difference can see it."""
    base = np.array([1.0, 5.0, 9.0])
    found = CLAIM.decide(values(list(base), list(base + [0.1, 0.11, 0.09])))
    assert found.verdict == HOLDS
    assert found.difference.mean == pytest.approx(0.1)
    # A seed that only one arm has takes no part.
    some = values([1.0, 1.0, 1.0, 7.0], [2.0, 2.1, 2.2])
    assert CLAIM.decide(some).num_seeds == 3


def test_other_metric_of_the_worse_arm():
    claim = Claim("b", "", better="x", worse="y", metric="loss", worse_metric="other")
    some = {"x": {0: {"loss": 1.0}}, "y": {0: {"loss": 9.0, "other": 3.0}}}
    assert claim.difference(some) == [2.0]


def test_missing_arm_is_not_testable():
    found = CLAIM.decide({"x": {0: {"loss": 1.0}}})
    assert found.verdict == NOT_TESTABLE and found.num_seeds == 0
    assert found.as_dict()["difference"] is None and found.as_dict()["half_width_95"] is None


@given(
    st.lists(st.floats(-5, 5), min_size=3, max_size=8),
    st.lists(st.floats(-5, 5), min_size=8, max_size=8),
)
def test_swapping_the_arms_swaps_the_verdict(better, worse):
    worse = worse[: len(better)]
    ahead = CLAIM.decide(values(better, worse))
    behind = CLAIM.decide(values(worse, better))
    opposite = {HOLDS: DOES_NOT_HOLD, DOES_NOT_HOLD: HOLDS, NOT_TESTABLE: NOT_TESTABLE}
    assert behind.verdict == opposite[ahead.verdict]
    assert verdict(ahead.difference, len(better)) == ahead.verdict


def test_table_shows_every_arm_and_dashes_where_nothing_was_measured():
    text = table_text(
        {"x": {0: {"loss": 1.0}, 1: {"loss": 3.0}}, "y": {0: {"tokens": 4096}}},
        {"loss": "the loss", "tokens": "tokens"},
    )
    head, rule, x, y = text.splitlines()
    assert head.split() == ["arm", "seeds", "the", "loss", "tokens"]
    assert set(rule) == {"-"}
    assert x.startswith("x") and "2.0000 ± 12.7060" in x and x.endswith("-")
    assert "4,096" in y and " - " in y
