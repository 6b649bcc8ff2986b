"""The laws of CMR (2407.17467) and how they are fitted: power laws in tokens and in the ratio.

With R the share of domain data in the mixture, T the tokens of the continual stage, and a loss
counted from what it was when the stage began:

    in tokens, at one ratio     d_dom(T) = a1 T^s1 + b1                     falls
                                d_gen(T) = a2 T^s2 + a3 T^s3 + b2           rises, then falls
    in the ratio, at one T      d(R) = a R^p + b
    feasible ratios             d_gen(R, T_max) <= epsilon
    critical mixture ratio      the largest feasible one: R* = ((epsilon - b) / a)^(1 / p)
    its scaling law             R*(T) = a4 T^s4 + b3

For given exponents every law is linear in its coefficients. So the exponents are sought (a grid,
made finer about its best point) and the rest is least squares: no start to choose, the same answer
every time.

>>> law = fit_power([1.0, 2.0, 4.0, 8.0], [3.0, 6.0, 12.0, 24.0])
>>> round(law.exponent, 3), round(law.scale, 3), abs(round(law.offset, 3))
(1.0, 3.0, 0.0)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

# Exponents that are tried; 0 (a constant, which the offset has already) is passed over. In tokens a
# loss changes no faster than in proportion: without this bound two powers fit a dozen points with
# cubes that cancel, and lead anywhere beyond them.
IN_RATIO = (-3.0, 6.0)
IN_TOKENS = (-1.0, 1.0)
_GRID, _ROUNDS = 61, 8


class PowerLaw(NamedTuple):
    """y = scale * x ** exponent + offset; rmse: of the fit."""

    scale: float
    exponent: float
    offset: float
    rmse: float = 0.0

    def __call__(self, x: Sequence[float] | np.ndarray | float) -> np.ndarray:
        """y at x > 0, float64 of the same shape."""
        return self.scale * np.asarray(x, np.float64) ** self.exponent + self.offset

    def solve(self, y: float) -> float | None:
        """The x > 0 at which the law is y; None where there is none."""
        if self.scale == 0.0:
            return None
        power = (y - self.offset) / self.scale
        return float(power ** (1.0 / self.exponent)) if power > 0.0 else None


class TwoPowers(NamedTuple):
    """y = scales[0] * x ** exponents[0] + scales[1] * x ** exponents[1] + offset."""

    scales: tuple[float, float]
    exponents: tuple[float, float]
    offset: float
    rmse: float = 0.0

    def __call__(self, x: Sequence[float] | np.ndarray | float) -> np.ndarray:
        """y at x > 0, float64 of the same shape."""
        x = np.asarray(x, np.float64)
        (a, b), (s, t) = self.scales, self.exponents
        return a * x**s + b * x**t + self.offset


def fit_power(
    x: Sequence[float], y: Sequence[float], exponents: tuple[float, float] = IN_RATIO
) -> PowerLaw:
    """Least squares of y = a x^s + b.

    Args:
      x: positive, at least three different values.
      y: as many finite values.
      exponents: least and greatest s.

    Raises:
      ValueError: too few points, or some that are not positive or not finite.
    """
    xs, ys = _points(x, y, 3)
    (s,), (a, b), rmse = _search(xs, ys, 1, exponents)
    return PowerLaw(a, s, b, rmse)


def fit_two_powers(
    x: Sequence[float], y: Sequence[float], exponents: tuple[float, float] = IN_TOKENS
) -> TwoPowers:
    """Least squares of y = a x^s + b x^t + c: a loss that rises and then falls, or the reverse.

    Args:
      x: positive, at least five different values.
      y: as many finite values.
      exponents: least and greatest s and t.

    Raises:
      ValueError: as `fit_power`.
    """
    xs, ys = _points(x, y, 5)
    (s, t), (a, b, c), rmse = _search(xs, ys, 2, exponents)
    return TwoPowers((a, b), (s, t), c, rmse)


def critical_ratio(ratios: Sequence[float], increases: Sequence[float], epsilon: float) -> float:
    """The largest share of domain data at which the general loss rises by no more than `epsilon`.

    Args:
      ratios: shares in (0, 1] that were tried, at least three.
      increases: of the general loss at each, nats/token.
      epsilon: the tolerance.

    Returns:
      R* by the law in the ratio; 1.0 where all of it is feasible, 0.0 where nothing is. Between
      these the law is followed, also where it leads below the smallest ratio that was tried.

    >>> ratios = [0.25, 0.5, 0.75, 1.0]
    >>> round(critical_ratio(ratios, [0.4 * r**2 - 0.05 for r in ratios], 0.05), 3)
    0.5
    """
    law = fit_power(ratios, increases)
    if float(law(1.0)) <= epsilon:
        return 1.0
    found = law.solve(epsilon)
    if found is None or not 0.0 < found < 1.0:
        return 0.0  # The law is above epsilon on all of (0, 1]: it can cross it once at most.
    return found if float(law(found / 2)) <= epsilon else 0.0


def extrapolate(
    times: Sequence[float],
    curves: Mapping[float, Sequence[float]],
    ratio: float,
    until: int,
    *,
    rises: bool,
) -> np.ndarray:
    """What the laws say of a run that was not made, beyond what the others were looked at.

    Args:
      times: T of each point, positive and rising.
      curves: ratio -> change of the loss at `times`, of the runs that were made.
      ratio: of the run that is predicted.
      until: only the first `until` points of each curve are used.
      rises: whether the loss may rise before it falls (the general one): two powers, not one.

    Returns:
      float64[len(times) - until]: the predicted change at the later times: first along T at each
      ratio, then across the ratios at each T.
    """
    fit = fit_two_powers if rises else fit_power
    later = np.asarray(times[until:], np.float64)
    along = {
        r: fit(times[:until], curve[:until], IN_TOKENS)(later)
        for r, curve in sorted(curves.items())
    }
    ratios = list(along)
    return np.array(
        [float(fit_power(ratios, [along[r][i] for r in ratios])(ratio)) for i in range(len(later))]
    )


def _points(x: Sequence[float], y: Sequence[float], least: int) -> tuple[np.ndarray, np.ndarray]:
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if xs.shape != ys.shape or len(np.unique(xs)) < least:
        raise ValueError(
            f"a law of {least} numbers was given {len(np.unique(xs))} different points; measure "
            f"at {least} or more"
        )
    if not (np.isfinite(ys).all() and np.isfinite(xs).all() and (xs > 0).all()):
        raise ValueError(f"{list(x)} -> {list(y)} are not finite values at positive places")
    return xs, ys


def _search(
    x: np.ndarray, y: np.ndarray, terms: int, bounds: tuple[float, float]
) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """The exponents with the least squares, their coefficients (the offset last), the error."""
    unit = x.max()  # powers of x / unit stay near 1, whatever x counts
    scaled = x / unit
    low, high = bounds
    centre = [(low + high) / 2] * terms
    width = (high - low) / 2
    points = _GRID if terms == 1 else 25
    best: tuple[float, tuple[float, ...], np.ndarray] | None = None
    for _ in range(_ROUNDS):
        axes = [np.linspace(max(low, c - width), min(high, c + width), points) for c in centre]
        for exponents in itertools.product(*axes):
            distinct = all(abs(s) > 1e-3 for s in exponents) and (
                terms == 1 or exponents[0] < exponents[1] - 1e-2
            )
            if not distinct:
                continue
            columns = [scaled**s for s in exponents] + [np.ones_like(scaled)]
            design = np.stack(columns, axis=1)
            found, *_ = np.linalg.lstsq(design, y, rcond=None)
            error = float(np.sum((design @ found - y) ** 2))
            if best is None or error < best[0]:
                best = (error, exponents, found)
        assert best is not None
        centre, width = list(best[1]), width * 0.3
    assert best is not None
    error, exponents, found = best
    scales = [float(a / unit**s) for a, s in zip(found[:-1], exponents, strict=True)]
    return (
        tuple(float(s) for s in exponents),
        (*scales, float(found[-1])),
        float(np.sqrt(error / len(x))),
    )
