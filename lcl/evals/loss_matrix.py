"""The loss matrix of a continual run, and everything that is read off it. Pure NumPy.

`R[i, j]` is the held-out loss on domain j after stage i; `R[0, j]` is before the first stage and T
is the last stage. The numbers below are losses, so **down is good**:

                    domains j                       en      code    fr
                   start (i = 0)                   5.55     5.55    5.55    <- R[0, :]
                   after stage 1, trains en        2.10*    3.90    3.10
                   after stage 2, trains code      2.60     1.40*   3.30
                   after stage 3, trains fr        2.50     2.20    1.90*   <- R[T, :]  retained

    =================  =======================================  ==================================
    name               formula                                  sign
    =================  =======================================  ==================================
    learned_j          R[h_j, j] - R[0, j]                      negative = it was learned
    forgetting_j       R[T, j] - min_{0 <= i < T} R[i, j]       positive = some was forgotten
    retained_j         R[T, j]                                  lower is better
    BWT                mean over h_j < T: R[T, j] - R[h_j, j]   positive = forgetting
    FWT                mean over f_j > 1: R[f_j - 1, j]-R[0, j] negative = earlier stages helped
    intransigence_j    R[h_j, j] - joint_j                      positive = all at once learns better
    average_i          mean over f_j <= i: R[i, j]              lower is better
    average_increm.    mean over i of average_i                 lower is better
    Transfer           mean over j: mean over 1 <= i < f_j:     lower is better (ZSCL: before its
                         R[i, j]                                  first training, zero-shot)
    Avg                mean over j and i >= 1: R[i, j]          lower is better (ZSCL)
    Last               mean over j: R[T, j]                     lower is better (ZSCL; = retained)
    =================  =======================================  ==================================

h_j is the *home stage* of domain j, the cell marked `*`: the stage in which j had its largest share
of the new tokens (the last of them where several tie). f_j is the first stage that trained j at
all. With one domain a stage this is the textbook diagonal, h_j = f_j = j (Lopez-Paz & Ranzato 2017
for BWT and FWT; Chaudhry et al. 2018 for forgetting and intransigence, their signs turned as these
are losses; Zheng et al. 2023, arXiv:2303.06628, for ZSCL's three). With mixtures, where every stage
may hold a little of everything, "the last stage that trained j" would be the last stage for all of
them and nothing could be forgotten; the largest share still finds the diagonal.

Two traps that other codes fall into: a minimum that includes i = T can never show an improvement,
so it is excluded; and "best minus final" of a *loss* has the wrong sign. Forgetting is defined from
the second stage on (T = 1 gives None, never 0), and for domains that a stage before T trained. A
domain that no stage trained has no diagonal; its forgetting is what the run lost of what it could
do before. Averages run over trained domains only, so watching one more domain changes no score.

Forgetting alone rewards not learning: always read it beside learned and retained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SIGNS = (
    "signs, these being losses: learned < 0 = learned; forgetting > 0 = forgot;\n"
    "BWT > 0 = forgot; FWT < 0 = earlier stages helped; retained: lower is better"
)

UNITS = {"nats_per_token": "nats/token", "bits_per_byte": "bits/byte"}


class LossMatrix:
    """Held-out losses R[T+1, D] of T stages on D domains; NaN means "not measured".

    Args:
        values: float[T+1, D], row 0 before the first stage. Copied, never changed.
        domains: the D names of the columns.
        stages: the T names of the rows after the first; they need not be domain names.
        trained: what each stage trained: T mappings {domain: weight}, T collections of domain names
            (equal weights), or a float[T, D] array of weights. Weights are shares of the stage's
            new tokens (on any scale); 0 or absent = not trained. Replay doesn't count.
        unit: printed in tables ("nats/token", "bits/byte").

    Raises:
        ValueError: shapes that do not fit, repeated names, an infinite loss, a negative weight, or
            a trained domain that has no column (it is named).

    >>> m = LossMatrix(
    ...     [[5.0, 5.0], [2.0, 4.0], [3.0, 1.0]],
    ...     ["en", "fr"],
    ...     ["en", "fr"],
    ...     [{"en": 1.0}, {"fr": 1.0}],
    ... )
    >>> m.learned, m.forgetting, m.bwt, m.fwt
    ({'en': -3.0, 'fr': -4.0}, {'en': 1.0, 'fr': None}, 1.0, -1.0)
    """

    def __init__(
        self,
        values: Any,
        domains: Sequence[str],
        stages: Sequence[str],
        trained: Any,
        unit: str = "nats/token",
    ) -> None:
        domains, stages = tuple(domains), tuple(stages)
        values = np.array(values, dtype=np.float64)  # A copy, always.
        if len(set(domains)) != len(domains):
            raise ValueError(
                f"domains are named twice in {list(domains)}: give each column one name"
            )
        if values.shape != (len(stages) + 1, len(domains)):
            raise ValueError(
                f"the loss matrix has shape {values.shape}, but {len(stages)} stages and "
                f"{len(domains)} domains need ({len(stages) + 1}, {len(domains)}): "
                "one row before the first stage and one after each"
            )
        if np.isinf(values).any():
            raise ValueError("the loss matrix holds an infinite loss: give NaN for 'not measured'")
        weights = _weights(trained, domains, stages)
        values.setflags(write=False)
        weights.setflags(write=False)
        self.values = values
        self.domains = domains
        self.stages = stages
        self.trained = weights
        self.unit = unit
        self._home = [_home_stage(weights[:, j]) for j in range(len(domains))]
        self._first = [_first_stage(weights[:, j]) for j in range(len(domains))]

    @classmethod
    def from_evals(
        cls,
        evals: Sequence[Mapping[str, Any]],
        stages: Sequence[str],
        trained: Sequence[Any],
        *,
        domains: Sequence[str] | None = None,
        unit: str = "nats_per_token",
        kind: str = "stage_end",
    ) -> LossMatrix:
        """The matrix of an evals.jsonl: its "start" line and the "stage_end" lines so far.

        Args:
            evals: the lines, in any order; "interval" lines are passed over.
            stages, trained: of the whole run; a stage without a "stage_end" line yet (a running
                job) ends the matrix before it.
            domains: columns; None = every domain that occurs, in the order of their training.
            unit: "nats_per_token" or "bits_per_byte".
            kind: "stage_end", the run's own parameters at the stages' ends; or "branch", those of
                the annealed copy that ended where the stage does (`HeldOut.branches`). A stage
                without such a branch has a row of NaN.

        Returns:
            A LossMatrix of as many stages as have ended. Cells that no line gives are NaN.
        """
        if unit not in UNITS:
            raise ValueError(f"unit {unit!r} is not one of {', '.join(UNITS)}")
        if kind not in ("stage_end", "branch"):
            raise ValueError(f"kind {kind!r} has no row a stage; use 'stage_end' or 'branch'")
        rows: dict[int, Mapping[str, Any]] = {}
        ends: dict[int, Any] = {}
        for line in evals:
            if line.get("kind") == "start":
                rows.setdefault(0, line.get("domains") or {})
            elif line.get("kind") == "stage_end":
                rows[int(line["stage_index"]) + 1] = line.get("domains") or {}
                ends[int(line["stage_index"]) + 1] = line.get("step")
        if kind == "branch":
            rows |= dict.fromkeys(ends, {})
            for line in evals:
                if line.get("kind") == "branch":
                    row = int(line["stage_index"]) + 1
                    if row in ends and line.get("step") == ends[row]:
                        rows[row] = line.get("domains") or {}
        num_ended = 0
        while num_ended < len(stages) and num_ended + 1 in rows:
            num_ended += 1
        if domains is None:
            domains = _column_order({d for row in rows.values() for d in row}, trained)
        values = np.full((num_ended + 1, len(domains)), np.nan)
        for i in range(num_ended + 1):
            for j, domain in enumerate(domains):
                value = rows.get(i, {}).get(domain, {}).get(unit)
                values[i, j] = np.nan if value is None else value
        # A trained domain outside the evaluated ones has no column, and so no place in the matrix.
        known = [
            {d: w for d, w in as_mapping(t).items() if d in set(domains)}
            for t in trained[:num_ended]
        ]
        return cls(values, domains, list(stages)[:num_ended], known, unit=UNITS[unit])

    @property
    def num_stages(self) -> int:
        """T, the stages that have ended."""
        return len(self.stages)

    @property
    def home_stage(self) -> dict[str, int | None]:
        """The row (1..T) of each domain's diagonal cell; None = never trained."""
        return dict(zip(self.domains, self._home, strict=True))

    @property
    def first_stage(self) -> dict[str, int | None]:
        """The first stage (1..T) that trained each domain; None = never trained."""
        return dict(zip(self.domains, self._first, strict=True))

    @property
    def never_trained(self) -> tuple[str, ...]:
        """The domains that are evaluated but that no stage so far has trained."""
        return tuple(d for d, f in zip(self.domains, self._first, strict=True) if f is None)

    @property
    def learned(self) -> dict[str, float | None]:
        """R[h_j, j] - R[0, j]; negative = learned; None = never trained or not measured."""
        return self._each(lambda j, h: None if h is None else self._r(h, j) - self._r(0, j))

    @property
    def forgetting(self) -> dict[str, float | None]:
        """R[T, j] - min_{i<T} R[i, j]; positive = forgot.

        None: T < 2, or the last stage is the first that trained j, so there was nothing to forget.
        """
        last = self.num_stages

        def one(j: int, _: int | None) -> float | None:
            first = self._first[j]
            if last < 2 or first == last or np.isnan(self.values[:last, j]).all():
                return None
            return self._r(last, j) - float(np.nanmin(self.values[:last, j]))

        return self._each(one)

    @property
    def retained(self) -> dict[str, float | None]:
        """R[T, j], the loss at the end (so far)."""
        return self._each(lambda j, _: self._r(self.num_stages, j))

    @property
    def backward(self) -> dict[str, float | None]:
        """R[T, j] - R[h_j, j], the terms of BWT; positive = worse than just after learning it."""
        last = self.num_stages
        return self._each(
            lambda j, h: None if h is None or h == last else self._r(last, j) - self._r(h, j)
        )

    @property
    def forward(self) -> dict[str, float | None]:
        """R[f_j - 1, j] - R[0, j], the terms of FWT; negative = earlier stages helped."""

        def one(j: int, _: int | None) -> float | None:
            first = self._first[j]
            return None if first is None or first == 1 else self._r(first - 1, j) - self._r(0, j)

        return self._each(one)

    @property
    def bwt(self) -> float | None:
        """Backward transfer: the mean of `backward`; positive = forgetting; None for T = 1."""
        return _mean(self.backward.values())

    @property
    def fwt(self) -> float | None:
        """Forward transfer: the mean of `forward`; negative = helped; None for T = 1."""
        return _mean(self.forward.values())

    @property
    def mean_learned(self) -> float | None:
        """Mean of `learned` over the trained domains."""
        return _mean(self.learned.values())

    @property
    def mean_forgetting(self) -> float | None:
        """Mean of `forgetting` over the trained domains that have one."""
        never = set(self.never_trained)
        return _mean(v for d, v in self.forgetting.items() if d not in never)

    @property
    def mean_retained(self) -> float | None:
        """Mean of `retained` over the trained domains; over all of them while none is trained."""
        never = set(self.never_trained)
        keep = [v for d, v in self.retained.items() if d not in never]
        return _mean(keep or self.retained.values())

    @property
    def average(self) -> list[float | None]:
        """A_i for i = 1..T: the mean loss, after stage i, of the domains trained up to it."""
        return [
            _mean(
                _value(self._r(i, j))
                for j, first in enumerate(self._first)
                if first is not None and first <= i
            )
            for i in range(1, self.num_stages + 1)
        ]

    @property
    def average_incremental(self) -> float | None:
        """The mean of `average` over the stages; None before the first has ended."""
        return _mean(self.average)

    @property
    def zscl(self) -> dict[str, float | None]:
        """ZSCL's {"transfer", "avg", "last"} of the trained domains, as losses: lower is better.

        "transfer" is None while no domain was first trained after stage 1.
        """
        before, every, last = [], [], []
        for j, first in enumerate(self._first):
            if first is not None:
                before.append(_mean(_value(self._r(i, j)) for i in range(1, first)))
                every.append(_mean(_value(self._r(i, j)) for i in range(1, self.num_stages + 1)))
                last.append(_value(self._r(self.num_stages, j)))
        return {"transfer": _mean(before), "avg": _mean(every), "last": _mean(last)}

    def intransigence(self, joint: LossMatrix | Mapping[str, float]) -> dict[str, float | None]:
        """R[h_j, j] - joint_j: what learning in turn costs against learning all at once.

        Args:
            joint: the final losses of a run on all data from scratch, {domain: loss} or its matrix,
                in this matrix's unit.

        Returns:
            {domain: difference}; positive = the joint run learned it better. None: never trained,
            or the joint run did not measure it.

        Raises:
            ValueError: a matrix in another unit.

        >>> m = LossMatrix([[5, 5], [2, 4], [3, 1]], ["en", "fr"], ["a", "b"], ["en", "fr"])
        >>> m.intransigence({"en": 1.5, "fr": 1.25})
        {'en': 0.5, 'fr': -0.25}
        """
        if isinstance(joint, LossMatrix):
            if joint.unit != self.unit:
                raise ValueError(
                    f"the joint run's losses are in {joint.unit}, these in {self.unit}; "
                    "read both in one unit"
                )
            joint = {d: v for d, v in joint.retained.items() if v is not None}
        known = {d: float(v) for d, v in joint.items()}
        return {
            domain: None if value is None or domain not in known else value - known[domain]
            for domain, value in self._each(
                lambda j, h: None if h is None else self._r(h, j)
            ).items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values (not measured = None)."""
        return {
            "unit": self.unit,
            "domains": list(self.domains),
            "stages": list(self.stages),
            "values": [[_value(float(v)) for v in row] for row in self.values],
            "trained": self.trained.tolist(),
            "home_stage": self.home_stage,
            "learned": self.learned,
            "forgetting": self.forgetting,
            "retained": self.retained,
            "bwt": self.bwt,
            "fwt": self.fwt,
            "mean_learned": self.mean_learned,
            "mean_forgetting": self.mean_forgetting,
            "mean_retained": self.mean_retained,
            "average": self.average,
            "average_incremental": self.average_incremental,
            "zscl": self.zscl,
        }

    def table(self, *, signs: bool = True) -> str:
        """A text table for terminals: rows = after stage, columns = domains, then the summary.

        >>> print(
        ...     LossMatrix(
        ...         [[5, 5], [2, 4], [3, 1]], ["en", "fr"], ["en", "fr"], [["en"], ["fr"]]
        ...     ).table(signs=False)
        ... )
        held-out loss, nats/token        en       fr
        --------------------------------------------
        start                         5.000    5.000
        after en                     *2.000    4.000
        after fr                      3.000   *1.000
        -------------------------------------------------- mean
        learned                      -3.000   -4.000     -3.500
        forgetting                   +1.000        –     +1.000
        retained                      3.000    1.000      2.000
        BWT +1.000  FWT -1.000  (* = the stage that trained it)
        """
        title = f"held-out loss, {self.unit}"
        labels = ["start", *(f"after {s}" for s in self.stages)]
        names = [d + ("°" if d in self.never_trained else "") for d in self.domains]
        first = max(25, *(len(x) + 1 for x in [title, *labels]))
        widths = [max(9, len(name) + 2) for name in names]
        rule = "-" * (first + sum(widths))
        lines = [
            title.ljust(first) + "".join(n.rjust(w) for n, w in zip(names, widths, strict=True))
        ]
        lines.append(rule)
        for i, label in enumerate(labels):
            cells = []
            for j, width in enumerate(widths):
                mark = "*" if self._home[j] == i else ("+" if i and self.trained[i - 1, j] else "")
                cells.append((mark + format_loss(self._r(i, j))).rjust(width))
            lines.append(label.ljust(first) + "".join(cells))
        lines.append(rule + " mean".rjust(11, "-"))
        for name, row, mean, signed in (
            ("learned", self.learned, self.mean_learned, True),
            ("forgetting", self.forgetting, self.mean_forgetting, True),
            ("retained", self.retained, self.mean_retained, False),
        ):
            cells = [
                format_loss(v, signed).rjust(w) for v, w in zip(row.values(), widths, strict=True)
            ]
            lines.append(name.ljust(first) + "".join(cells) + format_loss(mean, signed).rjust(11))
        legend = "(* = the stage that trained it"
        if any(self._home[j] != i + 1 for i, j in zip(*np.nonzero(self.trained), strict=True)):
            legend += " most; + = also trained it"
        if self.never_trained:
            legend += "; ° = no stage so far trained it"
        lines.append(
            f"BWT {format_loss(self.bwt, True)}  FWT {format_loss(self.fwt, True)}  {legend})"
        )
        if signs:
            lines.append(SIGNS)
        return "\n".join(lines)

    def _r(self, i: int, j: int) -> float:
        return float(self.values[i, j])

    def _each(self, fn: Any) -> dict[str, float | None]:
        return {d: _value(fn(j, self._home[j])) for j, d in enumerate(self.domains)}


def format_loss(value: float | None, signed: bool = False) -> str:
    """`+1.234`, `1.234` or an en dash for None and NaN.

    >>> format_loss(1.23456, signed=True), format_loss(None)
    ('+1.235', '–')
    """
    if value is None or np.isnan(value):
        return "–"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return "0.000" if text in ("+0.000", "-0.000") else text


def _value(x: float | None) -> float | None:
    return None if x is None or np.isnan(x) else float(x)


def _mean(values: Any) -> float | None:
    kept = [v for v in values if v is not None]
    return float(np.mean(kept)) if kept else None


def _home_stage(weights_T: np.ndarray) -> int | None:
    if not (weights_T > 0).any():
        return None
    # Shares such as 1/3 computed in two ways should still tie, and ties go to the last.
    best = np.nonzero(weights_T >= weights_T.max() * (1 - 1e-6))[0]
    return int(best[-1]) + 1


def _first_stage(weights_T: np.ndarray) -> int | None:
    trained = np.nonzero(weights_T > 0)[0]
    return int(trained[0]) + 1 if trained.size else None


def as_mapping(trained: Any) -> Mapping[str, float]:
    """What a stage trained as {domain: weight}: a name or several have equal weights."""
    if isinstance(trained, Mapping):
        return trained
    if isinstance(trained, str):
        return {trained: 1.0}
    return {name: 1.0 for name in trained}


def _weights(trained: Any, domains: tuple[str, ...], stages: tuple[str, ...]) -> np.ndarray:
    """`trained` in any of its forms -> shares float64[T, D], each trained row summing to 1."""
    if isinstance(trained, np.ndarray):
        weights = np.array(trained, dtype=np.float64)
    else:
        weights = np.zeros((len(trained), len(domains)))
        for i, one in enumerate(trained):
            for name, weight in as_mapping(one).items():
                if name not in domains:
                    raise ValueError(
                        f"stage {i + 1} trained domain {name!r}, which is not evaluated; "
                        f"the columns are {', '.join(domains)}"
                    )
                weights[i, domains.index(name)] = weight
    if weights.shape != (len(stages), len(domains)):
        raise ValueError(
            f"trained has shape {weights.shape}, but there are {len(stages)} stages and "
            f"{len(domains)} domains: give one entry a stage"
        )
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("a stage's domain weights must be finite and not negative")
    totals = weights.sum(axis=1, keepdims=True)
    return weights / np.where(totals > 0, totals, 1.0)


def _column_order(names: set[str], trained: Sequence[Any]) -> list[str]:
    """Domains in the order of their first training (so the diagonal runs down), then the others."""
    order = [
        d
        for one in trained
        for d in sorted(as_mapping(one), key=lambda d: (-as_mapping(one)[d], d))
    ]
    seen = [d for d in dict.fromkeys(order) if d in names]
    return seen + sorted(names - set(seen))
