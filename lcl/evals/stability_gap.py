"""The stability gap: what a stage does to the domains before it, between its two ends. Pure NumPy.

A loss matrix looks at a run once a stage. Right after a border the loss of what was known often
jumps and then mostly comes back (De Lange et al. 2023, arXiv:2205.13452), and a matrix sees
nothing of it. This reads the evaluations *within* the stages:

    loss of an earlier domain i, in stage k

    worst            . * .                          worst      max L_i(n) over t_{k-1} < n <= t_k
                   *       *                        gap        worst - start
                 *           * . .                  lasting    end - start = gap - regained
    start  *---*-------------------*--- recovered   regained   worst - end
           |                       |
           t_{k-1} <-- recovery -->                 recovery   the first evaluation from the worst
                                                               one on at `start` or below

`n` runs over the evaluations, one every N steps. A peak between two of them isn't seen, so **N is
part of every number here** and is handed out and printed with them.

    ====================  =============================================  ======================
    name                  formula (losses: down is good)                 sign
    ====================  =============================================  ======================
    gap                   max_{n in stage k} L_i(n) - L_i(t_{k-1})       positive = it rose;
                                                                         negative = it never did
    lasting               L_i(t_k) - L_i(t_{k-1})                        positive = forgot
    recovery_steps        steps from the border until L_i is back        0 = it never rose;
                                                                         None = not in this stage
    max-LOSS_k            mean over earlier i of                         lower is better
                            max_{t_i < n <= t_k} L_i(n)
    WC-LOSS_k             1/k L_k(t_k) + (1 - 1/k) max-LOSS_k            lower is better
    WF^W                  max rise of L_i between two evaluations at     0 = never rose
                            most W steps apart, m < n
    WP^W                  the same for a fall                            larger = learned faster
    average_k             mean of L_j(t_k) over the domains trained up   lower is better
                            to stage k
    anytime               mean over evaluations n > 0 of the mean of     lower is better
                            L_j(n) over the domains trained by then
    ====================  =============================================  ======================

max-LOSS and WC-LOSS are the mirrors of min-ACC_k and WC-ACC; like them they do not exist in the
first stage, and are None there. Stages may be mixtures: a domain is *earlier* in stage k if some
stage before k trained it (stage k may train it again), and t_i is the end of the stage before k
that had its largest share. With c domains that stage k is the first to train and e earlier ones
WC-LOSS is the mean of c final and e worst losses; one domain a stage gives the formula above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lcl.evals.loss_matrix import UNITS, LossMatrix, as_mapping, format_loss


class Gap(NamedTuple):
    """What one stage did to one earlier domain.

    stage_index: as in evals.jsonl, 0 = the first. start, worst, end: losses at the border before
    the stage, at most and at the last evaluation within it. worst_step, recovery_steps: counted
    from that border; the latter 0 where the loss never rose, None where it did not come back.
    num_evaluations: how many the stage had; with one, the gap is only what lasted.
    """

    stage_index: int
    stage: str
    domain: str
    start: float
    worst: float
    worst_step: int
    end: float
    recovery_steps: int | None
    num_evaluations: int

    @property
    def gap(self) -> float:
        """worst - start; positive = the loss rose above what it was at the border."""
        return self.worst - self.start

    @property
    def lasting(self) -> float:
        """end - start: what of the gap was left when the stage ended; positive = forgot."""
        return self.end - self.start

    @property
    def regained(self) -> float:
        """worst - end, never negative: what came back by itself within the stage."""
        return self.worst - self.end


class StabilityGap:
    """Held-out losses L[n, j] at every evaluation of a run; NaN means "not measured".

    Args:
        steps: int[E], updates done at each evaluation, strictly rising from 0.
        values: float[E, D], the losses. Copied, never changed.
        ends: int[K], the step at which each stage that has ended did, rising.
        domains: the D names.
        stages: names of the run's stages, those that have not begun included.
        trained: what each stage trained, as for `LossMatrix`.
        unit: printed in tables ("nats/token", "bits/byte").

    Raises:
        ValueError: shapes that do not fit, steps that do not rise, a stage's end without an
            evaluation.

    >>> g = StabilityGap(
    ...     steps=[0, 10, 20, 30, 40],
    ...     values=[[5, 5], [2, 4], [3, 2], [2.5, 1.5], [2, 1]],
    ...     ends=[10, 40],
    ...     domains=["en", "fr"],
    ...     stages=["en", "fr"],
    ...     trained=[["en"], ["fr"]],
    ... )
    >>> one = g.gaps[0]
    >>> one.stage, one.domain, one.gap, one.worst_step, one.recovery_steps, g.interval
    ('fr', 'en', 1.0, 10, 30, (10, 10))
    >>> g.max_loss, g.wc_loss
    ({'en': None, 'fr': 3.0}, {'en': None, 'fr': 2.0})
    """

    def __init__(
        self,
        steps: Any,
        values: Any,
        ends: Sequence[int],
        domains: Sequence[str],
        stages: Sequence[str],
        trained: Any,
        unit: str = "nats/token",
    ) -> None:
        self.steps = np.array(steps, dtype=np.int64)
        self.values = np.array(values, dtype=np.float64).reshape(len(self.steps), len(domains))
        self.ends = tuple(int(end) for end in ends)
        self.domains, self.stages, self.unit = tuple(domains), tuple(stages), unit
        if (np.diff(self.steps) <= 0).any():
            raise ValueError(f"evaluation steps {self.steps.tolist()} must rise; give each once")
        unseen = sorted(set(self.ends) - set(self.steps.tolist()))
        if unseen or list(self.ends) != sorted(set(self.ends)) or len(self.ends) > len(self.stages):
            raise ValueError(
                f"stage ends {list(self.ends)} must rise, be evaluated and be at most one for each "
                f"of the {len(self.stages)} stages; evaluated are {self.steps.tolist()}"
            )
        # The matrix knows all forms of `trained` and checks them; its rows are not looked at.
        rows = np.zeros((len(self.stages) + 1, len(self.domains)))
        self.trained = LossMatrix(rows, self.domains, self.stages, trained).trained
        self.values.setflags(write=False)
        self.steps.setflags(write=False)

    @classmethod
    def from_evals(
        cls,
        evals: Sequence[Mapping[str, Any]],
        stages: Sequence[str],
        trained: Sequence[Any],
        *,
        domains: Sequence[str] | None = None,
        unit: str = "nats_per_token",
    ) -> StabilityGap:
        """Reads the lines of an evals.jsonl; arguments as of `LossMatrix.from_evals`.

        Lines of other kinds than "start", "interval" and "stage_end" (a branch's, say) are passed
        over: they are no points of the trunk.
        """
        if unit not in UNITS:
            raise ValueError(f"unit {unit!r} is not one of {', '.join(UNITS)}")
        order = {"start": 0, "interval": 1, "stage_end": 2}
        trunk = [line for line in evals if line.get("kind") in order]
        # Where a step has two lines they hold the same losses; the stage's end knows the border.
        at = {int(x["step"]): x for x in sorted(trunk, key=lambda x: order[x["kind"]])}
        steps = sorted(at)
        names = LossMatrix.from_evals(evals, stages, trained, domains=domains, unit=unit).domains
        values = np.full((len(steps), len(names)), np.nan)
        for row, step in enumerate(steps):
            scores = at[step].get("domains") or {}
            for column, domain in enumerate(names):
                value = (scores.get(domain) or {}).get(unit)
                values[row, column] = np.nan if value is None else value
        ended = {int(x["stage_index"]): int(x["step"]) for x in trunk if x["kind"] == "stage_end"}
        ends: list[int] = []
        while len(ends) in ended:
            ends.append(ended[len(ends)])
        known = [{d: w for d, w in as_mapping(one).items() if d in set(names)} for one in trained]
        return cls(steps, values, ends, names, stages, known, unit=UNITS[unit])

    # ---- the interval ----------------------------------------------------------------------

    @property
    def interval(self) -> tuple[int, int] | None:
        """N: the least and the greatest number of steps between two evaluations; None = fewer."""
        gaps = np.diff(self.steps)
        return (int(gaps.min()), int(gaps.max())) if len(gaps) else None

    @property
    def interval_text(self) -> str:
        """`evaluated every 10 steps`, or `every 10 to 40 steps`: said beside every number."""
        if self.interval is None:
            return "evaluated once so far"
        low, high = self.interval
        return f"evaluated every {low}{f' to {high}' if high != low else ''} steps"

    # ---- gaps ------------------------------------------------------------------------------

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """One for each (stage, domain that an earlier stage trained), stage by stage.

        A stage that is still running is read as far as it has come. A domain that was not measured
        at the stage's start, or nowhere within it, has none.
        """
        found = []
        for k in range(1, len(self.stages)):
            for j in self._earlier(k):
                one = self._gap(k, j)
                if one is not None:
                    found.append(one)
        return tuple(found)

    @property
    def worst_gap(self) -> Gap | None:
        """The largest gap of the run; None where there is none (one stage, say)."""
        return max(self.gaps, key=lambda one: one.gap, default=None)

    @property
    def mean_gap(self) -> float | None:
        """Mean over all (stage, earlier domain); negative = losses fell rather than rose."""
        return _mean(one.gap for one in self.gaps)

    def _gap(self, k: int, j: int) -> Gap | None:
        border, inside = self._span(k)
        if border is None or not len(inside):
            return None
        start, losses = self.values[border, j], self.values[inside, j]
        if np.isnan(start) or np.isnan(losses).all():
            return None
        after = self.steps[inside] - self.steps[border]
        worst = int(np.nanargmax(losses))
        measured = np.flatnonzero(~np.isnan(losses))
        recovery: int | None = 0
        if losses[worst] > start:
            back = np.flatnonzero(losses[worst:] <= start)
            recovery = int(after[worst + back[0]]) if len(back) else None
        return Gap(
            stage_index=k,
            stage=self.stages[k],
            domain=self.domains[j],
            start=float(start),
            worst=float(losses[worst]),
            worst_step=int(after[worst]),
            end=float(losses[measured[-1]]),
            recovery_steps=recovery,
            num_evaluations=len(measured),
        )

    # ---- the mirrors of min-ACC and WC-ACC -------------------------------------------------

    @property
    def max_loss(self) -> dict[str, float | None]:
        """max-LOSS_k after each stage that has ended; None in the first (nothing was learned)."""
        return {self.stages[k]: _mean(self._worst_since(k)) for k in range(len(self.ends))}

    @property
    def wc_loss(self) -> dict[str, float | None]:
        """WC-LOSS_k after each stage that has ended; None in the first."""
        found: dict[str, float | None] = {}
        for k in range(len(self.ends)):
            worst = self._worst_since(k)
            row = self._row(self.ends[k])
            new = [self.values[row, j] for j in self._new(k)]
            found[self.stages[k]] = _mean([*worst, *new]) if worst else None
        return found

    def _worst_since(self, k: int) -> list[float]:
        """For each domain earlier than stage k, its highest loss since the stage it learned in."""
        found = []
        end = self._row(self.ends[k])
        for j in self._earlier(k):
            weights = self.trained[:k, j]
            home = int(np.flatnonzero(weights >= weights.max() * (1 - 1e-6))[-1])
            losses = self.values[self._row(self.ends[home]) + 1 : end + 1, j]
            if not np.isnan(losses).all():
                found.append(float(np.nanmax(losses)))
        return found

    # ---- windows and averages --------------------------------------------------------------

    def windowed_forgetting(self, window: int) -> dict[str, float | None]:
        """WF^W of each domain: its greatest rise within `window` steps; 0 = it never rose."""
        return self._windowed(window, 1.0)

    def windowed_plasticity(self, window: int) -> dict[str, float | None]:
        """WP^W of each domain: its greatest fall within `window` steps; 0 = it never fell."""
        return self._windowed(window, -1.0)

    def _windowed(self, window: int, sign: float) -> dict[str, float | None]:
        if window < 1:
            raise ValueError(f"window is {window} steps; give at least one evaluation interval")
        near = self.steps[None, :] - self.steps[:, None]
        pairs = (near >= 0) & (near <= window)  # m = n is a pair: the least that can be is 0.
        found = {}
        for j, domain in enumerate(self.domains):
            changes = sign * (self.values[None, :, j] - self.values[:, None, j])
            changes = changes[pairs & ~np.isnan(changes)]
            found[domain] = float(changes.max()) if len(changes) else None
        return found

    @property
    def average(self) -> dict[str, float | None]:
        """average_k after each stage that has ended: over the domains trained up to it."""
        found: dict[str, float | None] = {}
        for k in range(len(self.ends)):
            row = self.values[self._row(self.ends[k])]
            found[self.stages[k]] = _mean(row[j] for j in (*self._earlier(k), *self._new(k)))
        return found

    @property
    def anytime(self) -> float | None:
        """Mean over the evaluations of the mean loss of the domains trained by then."""
        means = []
        for k in range(len(self.stages)):
            _, inside = self._span(k)
            known = [*self._earlier(k), *self._new(k)]
            means += [_mean(self.values[row, j] for j in known) for row in inside]
        return _mean(m for m in means if m is not None)

    # ---- what is handed out ----------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, the interval first."""
        window = 5 * self.interval[1] if self.interval else None
        return {
            "unit": self.unit,
            "interval_steps": list(self.interval) if self.interval else None,
            "gaps": [
                {**one._asdict(), "gap": one.gap, "lasting": one.lasting, "regained": one.regained}
                for one in self.gaps
            ],
            "worst_gap": self.worst_gap.gap if self.worst_gap else None,
            "mean_gap": self.mean_gap,
            "max_loss": self.max_loss,
            "wc_loss": self.wc_loss,
            "average": self.average,
            "anytime": self.anytime,
            "window_steps": window,
            "windowed_forgetting": self.windowed_forgetting(window) if window else {},
            "windowed_plasticity": self.windowed_plasticity(window) if window else {},
        }

    def table(self) -> str:
        """A text table for terminals: a line for each stage and earlier domain.

        >>> print(
        ...     StabilityGap(
        ...         [0, 10, 20, 30], [[5, 5], [2, 4], [3, 2], [2.5, 1]], [10, 30],
        ...         ["en", "fr"], ["one", "two"], [["en"], ["fr"]],
        ...     ).table()
        ... )  # fmt: skip
        stability gap, nats/token, evaluated every 10 steps
        stage  domain     start    worst      gap  lasting  recovery
        two    en         2.000    3.000   +1.000   +0.500     never
        max-LOSS 3.000  WC-LOSS 2.000  anytime 2.083
        """
        gaps = self.gaps
        head = f"stability gap, {self.unit}, {self.interval_text}"
        if not gaps:
            return f"{head}\nno domain of an earlier stage was measured within a later one"
        first = max(7, *(len(one.stage) + 2 for one in gaps))
        second = max(8, *(len(one.domain) + 2 for one in gaps))
        names = ("start", "worst", "gap", "lasting", "recovery")
        widths = (8, 9, 9, 9, 10)
        columns = "".join(name.rjust(w) for name, w in zip(names, widths, strict=True))
        lines = [head, f"{'stage':{first}}{'domain':{second}}{columns}"]
        for one in gaps:
            cells = (
                format_loss(one.start),
                format_loss(one.worst),
                format_loss(one.gap, True),
                format_loss(one.lasting, True),
                recovery_text(one),
            )
            columns = "".join(cell.rjust(w) for cell, w in zip(cells, widths, strict=True))
            lines.append(f"{one.stage:{first}}{one.domain:{second}}{columns}")
        last = self.stages[len(self.ends) - 1] if self.ends else None
        if last is not None:
            lines.append(
                f"max-LOSS {format_loss(self.max_loss[last])}  "
                f"WC-LOSS {format_loss(self.wc_loss[last])}  anytime {format_loss(self.anytime)}"
            )
        return "\n".join(lines)

    # ---- places ----------------------------------------------------------------------------

    def _row(self, step: int) -> int:
        return int(np.searchsorted(self.steps, step))

    def _span(self, k: int) -> tuple[int | None, np.ndarray]:
        """Rows of stage k: that of the border before it, and those after it up to its end."""
        if k > len(self.ends) or not len(self.steps):
            return None, np.zeros(0, np.int64)
        before = 0 if k == 0 else self.ends[k - 1]
        border = self._row(before)
        if border >= len(self.steps) or self.steps[border] != before:
            return None, np.zeros(0, np.int64)  # The run was not evaluated at its start.
        end = self._row(self.ends[k]) if k < len(self.ends) else len(self.steps) - 1
        return border, np.arange(border + 1, end + 1)

    def _earlier(self, k: int) -> list[int]:
        return np.flatnonzero((self.trained[:k] > 0).any(axis=0)).tolist()

    def _new(self, k: int) -> list[int]:
        known = set(self._earlier(k))
        return [j for j in np.flatnonzero(self.trained[k] > 0).tolist() if j not in known]


def recovery_text(one: Gap) -> str:
    """`30 steps`, `at once` where the loss never rose, `never` where it did not come back.

    >>> recovery_text(Gap(1, "b", "en", 2.0, 1.9, 10, 1.9, 0, 1))
    'at once'
    """
    if one.recovery_steps is None:
        return "never"
    return f"{one.recovery_steps} steps" if one.recovery_steps else "at once"


def _mean(values: Any) -> float | None:
    kept = [float(v) for v in values if v is not None and not np.isnan(v)]
    return float(np.mean(kept)) if kept else None
