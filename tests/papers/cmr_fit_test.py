"""Power laws are found again from their own points, and the critical ratio by its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl.papers.cmr_fit import (
    PowerLaw,
    critical_ratio,
    extrapolate,
    fit_power,
    fit_two_powers,
)

X = np.array([1.0, 2.0, 3.0, 5.0, 8.0, 13.0])


@settings(max_examples=20, deadline=None)
@given(
    st.floats(0.3, 3.0),
    st.sampled_from([-1.5, -0.7, -0.3, 0.4, 0.9, 1.7]),
    st.floats(-2.0, 2.0),
    st.sampled_from([-1.0, 1.0]),
)
def test_a_power_law_is_found_again(scale, exponent, offset, sign):
    law = fit_power(X, sign * scale * X**exponent + offset)
    assert law.exponent == pytest.approx(exponent, abs=0.01)
    assert law.scale == pytest.approx(sign * scale, rel=0.03)
    assert np.allclose(law(X), sign * scale * X**exponent + offset, atol=1e-3)
    assert law.rmse < 1e-3


def test_units_of_x_change_nothing_but_the_scale():
    y = 2.0 * X**-0.5 + 1.0
    law, large = fit_power(X, y), fit_power(X * 1e6, y)
    assert large.exponent == pytest.approx(law.exponent, abs=1e-6)
    assert np.allclose(law(X), large(X * 1e6))


def test_a_loss_that_rises_and_falls():
    """0.5 sqrt(T) - 0.1 T has its top at T = 6.25; what lies beyond the points is predicted."""
    times = np.arange(1.0, 13.0)
    law = fit_two_powers(times, 0.5 * times**0.5 - 0.1 * times)
    assert law.rmse < 1e-3
    assert float(law(20.0)) == pytest.approx(0.5 * 20.0**0.5 - 2.0, abs=0.02)


def test_noise_moves_the_law_a_little():
    rng = np.random.default_rng(0)
    x = np.linspace(1, 20, 40)
    law = fit_power(x, 1.5 * x**-0.6 + 0.2 + 0.005 * rng.standard_normal(40))
    assert law.rmse < 0.01
    assert float(law(40.0)) == pytest.approx(1.5 * 40**-0.6 + 0.2, abs=0.02)


@pytest.mark.parametrize(
    ("increase", "epsilon", "expected"),
    [
        (lambda r: 0.4 * r**2 - 0.05, 0.05, 0.5),
        (lambda r: 0.4 * r**2 - 0.05, 0.35, 1.0),  # all of it is feasible
        (lambda r: 0.4 * r**2 + 0.1, 0.05, 0.0),  # nothing is
        (lambda r: 0.2 * r - 0.3, 0.05, 1.0),  # the general loss only falls
    ],
)
def test_critical_ratio(increase, epsilon, expected):
    ratios = [0.125, 0.25, 0.5, 0.75, 1.0]
    found = critical_ratio(ratios, [increase(r) for r in ratios], epsilon)
    assert found == pytest.approx(expected, abs=2e-3)


def test_a_larger_tolerance_allows_no_less():
    ratios = [0.25, 0.5, 0.75, 1.0]
    increases = [0.3 * r**1.5 - 0.02 for r in ratios]
    found = [critical_ratio(ratios, increases, e) for e in (0.0, 0.02, 0.05, 0.1, 0.5)]
    assert found == sorted(found) and found[0] > 0.0 and found[-1] == 1.0


def test_a_run_that_was_not_made_is_predicted():
    """The laws hold exactly here, so the prediction at a new ratio, later, is right."""
    times = np.arange(1.0, 11.0)

    def domain(r):
        return -(0.4 * r**0.5) * times**0.5

    def general(r):
        return 0.3 * r**2 * times**0.5 - 0.05 * times

    ratios = (0.125, 0.25, 0.5, 0.75, 1.0)
    for truth, rises in ((domain, False), (general, True)):
        curves = {r: truth(r) for r in ratios}
        found = extrapolate(times, curves, 0.375, 6, rises=rises)
        assert found == pytest.approx(truth(0.375)[6:], abs=5e-3)


def test_solve_is_the_inverse():
    law = PowerLaw(2.0, -0.5, 1.0)
    assert float(law(law.solve(1.5))) == pytest.approx(1.5)
    assert law.solve(0.5) is None  # the law lies above its offset


def test_too_few_points():
    with pytest.raises(ValueError, match="measure at 3 or more"):
        fit_power([1.0, 1.0, 2.0], [1.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="measure at 5 or more"):
        fit_two_powers(X[:4], X[:4])
    with pytest.raises(ValueError, match="positive"):
        fit_power([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
