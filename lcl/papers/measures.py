"""What is measured on a finished run, read off what it wrote: no model is run again.

    RUN/evals.jsonl     -> LossMatrix     learned, retained, forgetting, transfer, by domain too
                        -> StabilityGap   the worst gap, how long it took to recover, at any time
                        -> its branches   the same of annealed copies: "annealed_..."
    RUN/metrics.jsonl,  -> tokens, new tokens, training FLOPs: what a comparison holds equal
    RUN/run_card.json

A measure has a `version` (raised when the same settings are measured differently), `settings` (what
else decides its values) and `measure(run_dir)`; it takes part in the hash of the runs it reads.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from lcl.evals import LossMatrix
from lcl.evals.stability_gap import StabilityGap
from lcl.report.read import Run


@dataclasses.dataclass(frozen=True)
class Measure(abc.ABC):
    """What a run of a grid may list in `measures`: a frozen dataclass, so that it can be hashed."""

    version = 1

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides the values, beside the run itself, as plain values: the attributes."""
        return dataclasses.asdict(self)

    @abc.abstractmethod
    def measure(self, run_dir: str | os.PathLike[str]) -> dict[str, float]:
        """{metric: finite value}; a metric that the run does not have is left out."""


@dataclasses.dataclass(frozen=True)
class StreamMeasures(Measure):
    """The numbers of a continual run. Losses in nats/token: less is better throughout.

        learned_loss     mean over domains of the loss right after the stage that trained it most
        retained_loss    mean over domains of the loss at the end
        forgetting       mean over earlier domains of: end - best before; positive = forgot
        bwt, fwt         backward, forward transfer (`LossMatrix`): negative = helped
        transfer_loss    mean loss of each domain before its first training (ZSCL's Transfer)
        worst_gap        largest rise of an earlier domain within a stage above the stage's start
        mean_gap         mean of those rises over all (stage, earlier domain)
        recovery_steps   mean steps until such a loss is back where the stage found it; a loss that
                         never came back counts as the stage's whole length
        anytime_loss     mean over all evaluations of the domains trained by then
        annealed_...     learned, retained and forgetting of the branches at the stages' ends
        .../<domain>     learned, retained and forgetting of one domain
        new_tokens, train_flops     what the run has cost (`tokens` and `steps` every run has)

    Gaps and recovery depend on how often the run was evaluated: `interval_steps` says so.

    Attributes:
      interval_steps: evaluations must be as close as this; None where no gap is claimed about.
      domains: the columns; None = all that were evaluated.
    """

    interval_steps: int | None = None
    domains: tuple[str, ...] | None = None

    def measure(self, run_dir: str | os.PathLike[str]) -> dict[str, float]:
        """Reads the run; a ValueError where it was evaluated less often than `interval_steps`."""
        run = Run.load(run_dir)
        where: dict[str, Any] = {
            "evals": run.evals,
            "stages": [stage.name for stage in run.stages],
            "trained": [stage.domains for stage in run.stages],
            "domains": self.domains,
        }
        values = matrix_values(LossMatrix.from_evals(**where))
        values |= gap_values(StabilityGap.from_evals(**where), self.interval_steps)
        if any(line.get("kind") == "branch" for line in run.evals):
            branches = matrix_values(LossMatrix.from_evals(**where, kind="branch"))
            kept = ("learned_loss", "retained_loss", "forgetting")
            values |= {
                f"annealed_{name}": value
                for name, value in branches.items()
                if name.partition("/")[0] in kept
            }
        return _finite(values | cost_values(run))


@dataclasses.dataclass(frozen=True)
class GradientMisalignment(Measure):
    """1 less the mean cosine of new and replayed gradients: less is better aligned, 1 = neither.

    `gradient_misalignment`; not there for a run without replay. The cosine falls as a run learns:
    it says something of two runs that have learned alike.

    Attributes:
      every_steps: how often the run looked (`lcl.analysis.GradientAlignment`).
    """

    every_steps: int

    def measure(self, run_dir: str | os.PathLike[str]) -> dict[str, float]:
        """Reads the run's metrics at the looks; A-GEM's lines have the cosine of every step."""
        steps, cosines = Run.load(run_dir).series("gradient_cosine")
        looked = cosines[steps % self.every_steps == 0]
        return {"gradient_misalignment": float(1 - looked.mean())} if len(looked) else {}


def matrix_values(matrix: LossMatrix) -> dict[str, float | None]:
    """What is read off a loss matrix, whole and by domain; None = not measured."""
    home = matrix.home_stage
    learned = {
        domain: float(matrix.values[stage, matrix.domains.index(domain)])
        for domain, stage in home.items()
        if stage is not None
    }
    values: dict[str, float | None] = {
        "learned_loss": math.fsum(learned.values()) / len(learned) if learned else None,
        "retained_loss": matrix.mean_retained,
        "forgetting": matrix.mean_forgetting,
        "bwt": matrix.bwt,
        "fwt": matrix.fwt,
        "transfer_loss": matrix.zscl["transfer"],
    }
    parts: dict[str, Mapping[str, float | None]] = {
        "learned_loss": learned,
        "retained_loss": matrix.retained,
        "forgetting": matrix.forgetting,
    }
    return values | {
        f"{name}/{domain}": value for name, part in parts.items() for domain, value in part.items()
    }


def gap_values(gaps: StabilityGap, interval_steps: int | None) -> dict[str, float | None]:
    """What is read off the evaluations within stages.

    Raises:
      ValueError: two evaluations lie further apart than `interval_steps`.
    """
    found = gaps.interval
    if interval_steps is not None and (found is None or found[1] > interval_steps):
        raise ValueError(
            f"the run was {gaps.interval_text}, a gap is claimed at {interval_steps}; set "
            f"HeldOut.every_steps={interval_steps}"
        )
    lengths = dict(enumerate(b - a for a, b in zip((0, *gaps.ends), gaps.ends, strict=False)))
    recovery = [
        lengths[gap.stage_index] if gap.recovery_steps is None else gap.recovery_steps
        for gap in gaps.gaps
        if gap.stage_index in lengths
    ]
    return {
        "worst_gap": gaps.worst_gap.gap if gaps.worst_gap else None,
        "mean_gap": gaps.mean_gap,
        "recovery_steps": math.fsum(recovery) / len(recovery) if recovery else None,
        "anytime_loss": gaps.anytime,
    }


def cost_values(run: Run) -> dict[str, float | None]:
    """New tokens, and training FLOPs by the convention on the run's card."""
    new, _ = run.tokens()
    per_token = (run.card.get("flops") or {}).get("per_token") or {}
    flops, before = 0.0, 0
    for line in run.metrics:
        flops += (line["tokens"] - before) * float(per_token.get(line["stage"], math.nan))
        before = line["tokens"]
    return {"new_tokens": new, "train_flops": flops}


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(v) for name, v in values.items() if v is not None and math.isfinite(v)}
