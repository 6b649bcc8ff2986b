"""Claims and how they are decided: paired differences over seeds, and whether they exclude zero.

    seed            0      1      2
    random        2.31   2.28   2.35       d = worse - better = 0.20, 0.15, 0.26
    in-context    2.11   2.13   2.09       mean 0.203, 95% interval 0.203 -+ 4.303 s / sqrt(3)

    the whole interval above zero   holds
    the whole interval below zero   does not hold
    it includes zero                not testable at this scale

The runs of one seed share what the seed decides (first weights, corpus), so the difference is taken
seed by seed and its spread is that of the difference. Nobody writes a verdict by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

HOLDS = "holds"
DOES_NOT_HOLD = "does not hold"
NOT_TESTABLE = "not testable at this scale"
RULE = (
    "verdict: the 95% interval (Student's t, paired over seeds) of the difference lies above zero: "
    f"{HOLDS}; below zero: {DOES_NOT_HOLD}; includes zero, or fewer than 3 seeds: {NOT_TESTABLE}"
)
MIN_SEEDS = 3
# 97.5% quantiles of Student's t by degrees of freedom 1, 2, ...; beyond the table its last value,
# which errs towards the wider interval.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

# arm -> seed -> metric -> value
Values = Mapping[str, Mapping[int, Mapping[str, float]]]


class Interval(NamedTuple):
    """A mean with its 95% interval, mean - half .. mean + half; half is inf for one value."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """Its lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.mean + self.half

    def __str__(self) -> str:
        if abs(self.mean) >= 100:  # a count
            return f"{self.mean:,.0f}"
        return f"{self.mean:.4f}" if math.isinf(self.half) else f"{self.mean:.4f} ± {self.half:.4f}"


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values and the 95% interval of Student's t about it.

    Args:
      values: one a seed, finite; at least one.

    >>> interval([1.0, 2.0, 3.0])  # 4.303 * 1 / sqrt(3)
    Interval(mean=2.0, half=2.4843...)
    """
    array = np.asarray(values, np.float64)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(f"{list(values)} are not finite values of at least one seed; look at them")
    if array.size == 1:
        return Interval(float(array[0]), math.inf)
    quantile = _T[min(array.size - 2, len(_T) - 1)]
    return Interval(
        float(array.mean()), quantile * float(array.std(ddof=1)) / math.sqrt(array.size)
    )


@dataclass(frozen=True)
class Claim:
    """`better` is below `worse` by `metric`: a statement that the runs can decide.

    Attributes:
      name: short, unique in its paper.
      text: what is claimed, in one line.
      better, worse: arms.
      metric: a loss, or anything else of which less is better.
      worse_metric: the metric of `worse`, where it is another one; None = `metric`.
      published: the paper's numbers for it; "" where it has none of this kind.
      source: where they stand: paper, table or figure, and how we know.
    """

    name: str
    text: str
    better: str
    worse: str
    metric: str
    worse_metric: str | None = None
    published: str = ""
    source: str = ""

    def difference(self, values: Values) -> list[float]:
        """worse - better of every seed that has both; in the order of the seeds.

        A seed in which one of the two could not be measured (no gap to recover from, a point
        outside a fitted range) takes no part.
        """
        better, worse = values.get(self.better, {}), values.get(self.worse, {})
        other = self.worse_metric or self.metric
        return [
            worse[seed][other] - better[seed][self.metric]
            for seed in sorted(better)
            if self.metric in better[seed] and other in worse.get(seed, {})
        ]

    def decide(self, values: Values) -> Verdict:
        """The verdict by RULE; without a seed that has both arms it is not testable."""
        differences = self.difference(values)
        if not differences:
            return Verdict(self, NOT_TESTABLE, Interval(math.nan, math.inf), 0)
        found = interval(differences)
        return Verdict(self, verdict(found, len(differences)), found, len(differences))


class Verdict(NamedTuple):
    """What became of a claim."""

    claim: Claim
    verdict: str
    difference: Interval
    num_seeds: int

    def line(self) -> str:
        """One line of the report."""
        claim = self.claim
        metric = claim.metric
        if claim.worse_metric and claim.worse_metric != metric:
            metric = f"{claim.worse_metric} - {metric}"
        return (
            f"{self.verdict:27s} {claim.name}: {claim.text} [{claim.worse} - {claim.better} = "
            f"{self.difference} {metric}, {self.num_seeds} seeds]"
        )

    def published_line(self) -> str | None:
        """What the paper has for it, and where; None where it has no number of this kind."""
        claim = self.claim
        if not claim.published:
            return None
        return f"  {claim.name}: {claim.published}" + (f" [{claim.source}]" if claim.source else "")

    def as_dict(self) -> dict[str, object]:
        """Plain values, for results.json; an infinite interval is null."""
        mean, half = self.difference
        return {
            "claim": self.claim.name,
            "text": self.claim.text,
            "published": self.claim.published,
            "source": self.claim.source,
            "better": self.claim.better,
            "worse": self.claim.worse,
            "metric": self.claim.metric,
            "worse_metric": self.claim.worse_metric or self.claim.metric,
            "difference": None if math.isnan(mean) else mean,
            "half_width_95": None if math.isinf(half) else half,
            "num_seeds": self.num_seeds,
            "verdict": self.verdict,
        }


def verdict(difference: Interval, num_seeds: int) -> str:
    """RULE, applied.

    >>> (
    ...     verdict(Interval(0.2, 0.1), 3),
    ...     verdict(Interval(-0.2, 0.1), 3),
    ...     verdict(Interval(0.2, 0.3), 3),
    ... )
    ('holds', 'does not hold', 'not testable at this scale')
    >>> verdict(Interval(0.2, 0.1), 2)
    'not testable at this scale'
    """
    if num_seeds < MIN_SEEDS:
        return NOT_TESTABLE
    if difference.low > 0.0:
        return HOLDS
    if difference.high < 0.0:
        return DOES_NOT_HOLD
    return NOT_TESTABLE


def table_text(values: Values, columns: Mapping[str, str]) -> str:
    """Arms by metrics: mean and 95% interval over seeds.

    Args:
      values: arm -> seed -> metric -> value; arms are shown in this order.
      columns: metric -> its heading. A metric that an arm lacks is shown as "-".
    """
    rows = [["arm", "seeds", *columns.values()]]
    for arm, seeds in values.items():
        cells = []
        for metric in columns:
            found = [one[metric] for one in seeds.values() if metric in one]
            cells.append(str(interval(found)) if found else "-")
        rows.append([arm, str(len(seeds)), *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
