"""Replay and gradient alignment for continual pretraining (2508.01908): MER, small.

    lcl reproduce mer

English, French, German manual pages, one after the other, under one cosine over all of them, as
many new tokens in every arm but two:

    sequential                    nothing against forgetting
    + 25%, + 50%                  replay on top of the new tokens: 11/9 and 5/3 of the compute
    + Reptile                     every `sync_every` steps back to where the last window began, by
                                  all but a step of 0.5 or 0.1 (the paper's): 24 windows a stage,
                                  as many as the paper has
    + 25% + Reptile               MER
    + 25% as A-GEM                the replayed tokens only bend the new ones' gradient (1812.00420)
    + 25%, within batches         the original MER (1810.11910, algorithm 6): examples of four rows
                                  one after the other

and the controls without which none of it says anything:

    sequential, longer            the compute of 25% replay, spent on more new tokens instead
    25% substituted               replay in the place of new tokens: the compute of sequential
    low, lower, lowest rate       0.3, 0.1 and 0.05 of the learning rate, with and without replay:
                                  a smaller step forgets less because it learns less
    joint                         all three languages at once

A forgetting score alone rewards not learning. So MER is also compared at equal learning: the arms
of 25% replay at four rates make a line of forgetting over learned loss for each seed, and it is
read where Reptile's learned loss lies. And whether Reptile aligns gradients is looked at: the
cosine of new and replayed gradients, at every evaluation. The measured result stands in
configs/papers/mer.gin.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lcl.analysis import GradientAlignment
from lcl.data import Data, Replay
from lcl.objectives import AGem, NextToken, WithinBatchReptile
from lcl.optim import Reptile
from lcl.papers import figures, streams
from lcl.papers.claims import Claim, Values
from lcl.papers.grid import PaperRun
from lcl.papers.measures import GradientMisalignment
from lcl.papers.registry import PodRun
from lcl.papers.stream_paper import StreamPaper
from lcl.papers.streams import MadeUp
from lcl.stages import Stage

if TYPE_CHECKING:
    import pathlib

    from matplotlib.figure import Figure

SEQUENTIAL, JOINT = "sequential", "joint"
R25, R50, SUBSTITUTED = "+ 25%", "+ 50%", "25% substituted"
LONGER = "sequential, longer"
LOW, LOWER, LOWEST = ", low rate", ", lower rate", ", lowest rate"
RATES = {"": 1.0, LOW: 0.3, LOWER: 0.1, LOWEST: 0.05}
REPTILE, REPTILE_01 = "+ Reptile .5", "+ Reptile .1"
MER, MER_01 = "+ 25% + Reptile .5", "+ 25% + Reptile .1"
A_GEM, WITHIN = "+ 25% as A-GEM", "+ 25%, within batches"
FRONTIER = ", rate for its learning"
_DIGEST = "2508.01908, as quoted by one digest (the table itself was not read)"
_1B = "1B, mean retained loss: "


def _claim(
    name: str,
    text: str,
    better: str,
    worse: str,
    metric: str = "retained_loss",
    published: str = "",
) -> Claim:
    source = _DIGEST if published else ""
    return Claim(name, text, better, worse, metric, published=published, source=source)


class Arm(NamedTuple):
    """What is an arm's own."""

    stages: tuple[Stage, ...]
    optimizer: Any
    objective: Any = NextToken()


@dataclasses.dataclass(frozen=True)
class MetaExperienceReplay(StreamPaper):
    """The experiment's sizes (`StreamPaper`).

    Attributes:
      sync_every: k of Reptile; it divides the interval of the evaluations, so that these see slow
        weights.
      inner_rate: of the SGD within a batch.
      rows_per_example: of an example within a batch.
    """

    sync_every: int = 6
    inner_rate: float = 0.03
    rows_per_example: int = 4

    name = "mer"
    title = "Replay and gradient alignment (arXiv:2508.01908), on manual pages in three languages"
    claims = (
        _claim(
            "25% replay",
            "25% replay retains better than none",
            R25,
            SEQUENTIAL,
            published=_1B + "2.50 sequential, 2.29 with 25%; 6B: 1.47, 1.08",
        ),
        _claim(
            "50% replay",
            "50% replay retains better than 25%",
            R50,
            R25,
            published=_1B + "2.29 with 25%, 2.08 with 50%; 6B: 1.08, 0.97",
        ),
        _claim(
            "25% replay, equal compute, longer",
            "25% replay retains better than the same compute spent on new tokens",
            R25,
            LONGER,
        ),
        _claim(
            "25% replay, equal compute, substituted",
            "replay in the place of a quarter of the new tokens retains better than none",
            SUBSTITUTED,
            SEQUENTIAL,
        ),
        _claim(
            "25% replay, low rate",
            "25% replay retains better than a lower learning rate without",
            R25,
            SEQUENTIAL + LOW,
        ),
        _claim(
            "Reptile alone",
            "Reptile (0.1) retains better than nothing",
            REPTILE_01,
            SEQUENTIAL,
            published="6B, mean retained loss: 1.47 sequential, 1.33 Reptile",
        ),
        _claim(
            "MER",
            "with 25% replay, Reptile (0.1) retains better than replay alone",
            MER_01,
            R25,
            published=_1B + "2.29 with 25%, 2.18 with Reptile; 6B: 1.08, 0.91",
        ),
        _claim("MER, longer step", "the same with a step of 0.5", MER, R25),
        _claim(
            "MER learns more",
            "with 25% replay, Reptile (0.1) learns better than replay alone",
            MER_01,
            R25,
            "learned_loss",
            published="6B, mean learned loss: 1.00 with 25%, 0.80 with Reptile",
        ),
        _claim(
            "MER, low rate",
            "MER (0.5) retains better than replay at 0.3 of the learning rate",
            MER,
            R25 + LOW,
        ),
        _claim(
            "MER at equal learning",
            "MER (0.5) forgets less than replay at the rate that learns as much",
            MER,
            MER + FRONTIER,
            "forgetting",
        ),
        _claim(
            "MER at equal learning, paper's step",
            "MER (0.1) forgets less than replay at the rate that learns as much",
            MER_01,
            MER_01 + FRONTIER,
            "forgetting",
        ),
        _claim(
            "gap",
            "MER (0.5) has a smaller worst gap than replay at the rate that learns as much",
            MER,
            MER + FRONTIER,
            "worst_gap",
        ),
        _claim(
            "alignment",
            "with 25% replay, Reptile (0.1) aligns new and replayed gradients better than without",
            MER_01,
            R25,
            "gradient_misalignment",
        ),
        _claim("A-GEM", "A-GEM retains better than nothing", A_GEM, SEQUENTIAL),
        _claim(
            "replay, not A-GEM",
            "25% replay retains better than A-GEM on the same tokens (at half of its compute)",
            R25,
            A_GEM,
        ),
        _claim(
            "within batches",
            "with 25% replay, Reptile within batches retains better than replay alone",
            WITHIN,
            R25,
        ),
        _claim(
            "joint",
            "50% replay (5/3 of the compute) retains better than all languages at once",
            R50,
            JOINT,
            published="1B, five tasks: 50% replay with Reptile reaches negative forgetting",
        ),
    )

    @property
    def equal(self) -> str:
        """What the compared runs have in common."""
        return (
            f"new tokens ({self.steps} steps a stage of {self.batch_size} x "
            f"{self.sequence_length}, replay on top), but in {LONGER!r} (more) and "
            f"{SUBSTITUTED!r} (fewer), which have the compute of {R25!r} and of {SEQUENTIAL!r}; "
            "schedule over the run's own length, model, first weights of a seed"
        )

    def reptile(self, step_size: float) -> Reptile:
        """Reptile over the run's AdamW."""
        return Reptile(inner=self.adamw(), every=self.sync_every, step_size=step_size)

    def arms(self) -> dict[str, Arm]:
        """Arm -> what is its own."""
        plain, replayed = self.sequence(), self.sequence(Replay(0.25))
        arms: dict[str, Arm] = {}
        for suffix, scale in RATES.items():
            arms[SEQUENTIAL + suffix] = Arm(plain, self.adamw(scale=scale))
        count = len(self.domains)
        # The first stage replays nothing, so the compute of 25% is (1 + (n - 1) 4/3) / n.
        longer = round(self.steps * (1 + (count - 1) * 4 / 3) / count)
        arms[LONGER] = Arm(self.sequence(steps=longer), self.adamw(total_steps=longer * count))
        substituted = self.sequence(Replay(0.25, mode="substitute"))
        arms[SUBSTITUTED] = Arm(substituted, self.adamw())
        for suffix, scale in RATES.items():
            arms[R25 + suffix] = Arm(replayed, self.adamw(scale=scale))
        arms[R50] = Arm(self.sequence(Replay(0.5)), self.adamw())
        arms[REPTILE] = Arm(plain, self.reptile(0.5))
        arms[REPTILE_01] = Arm(plain, self.reptile(0.1))
        arms[MER] = Arm(replayed, self.reptile(0.5))
        arms[MER_01] = Arm(replayed, self.reptile(0.1))
        arms[A_GEM] = Arm(replayed, self.adamw(), AGem())
        within = WithinBatchReptile(self.inner_rate, rows_per_example=self.rows_per_example)
        arms[WITHIN] = Arm(replayed, self.adamw(), within)
        joint = streams.joint(self.domains, **self.sizes(steps=self.steps * count))
        arms[JOINT] = Arm(joint, self.adamw())
        return arms

    def runs(self, seed: int, out: pathlib.Path) -> list[PaperRun]:
        """The arms of a seed."""
        data = self.data(out)
        return [self.arm_run(name, arm, seed, data) for name, arm in self.arms().items()]

    def arm_run(self, name: str, arm: Arm, seed: int, data: Data) -> PaperRun:
        """One arm of a seed."""
        return self.run(
            name,
            seed,
            data,
            arm.stages,
            arm.optimizer,
            objective=arm.objective,
            diagnostics=(GradientAlignment(every_steps=self.interval, by_layer=False),),
            measures=(GradientMisalignment(self.interval),),
        )

    def derive(self, values: Values, out: pathlib.Path) -> Values:
        """What replay gives at the learning rate that learns as much as MER does."""
        del out
        derived: dict[str, dict[int, dict[str, float]]] = {}
        for arm in (MER, MER_01):
            for seed, found in values[arm].items():
                line = [values[R25 + suffix][seed] for suffix in RATES]
                read = at_equal_learning(line, found["learned_loss"])
                if read:
                    derived.setdefault(arm + FRONTIER, {})[seed] = read
        return derived

    def remarks(self, out: pathlib.Path) -> list[str]:
        """What the derived arms are, and the interval."""
        del out
        return [
            f"{FRONTIER[2:]!r}: on the line through {R25!r} at the rates 1, 0.3, 0.1 and 0.05, "
            "where a seed's learned loss is the arm's; no value where it lies outside the line",
            f"gradient alignment: looked at every {self.interval} steps; {A_GEM!r} learns nothing "
            f"from replayed tokens, and {WITHIN!r} goes over a batch in examples of "
            f"{self.rows_per_example} rows at the rate {self.inner_rate:g}",
            f"gap and recovery: evaluated every {self.interval} steps; Reptile syncs every "
            f"{self.sync_every} and at the stages' ends",
        ]

    def draw(self, values: Values) -> Figure:
        """Retained loss, and learned loss beside it: forgetting less must not be learning less."""
        panels = [("retained_loss", "retained"), ("learned_loss", "learned")]
        shown = {arm: found for arm, found in values.items() if not arm.endswith(FRONTIER)}
        return figures.bars(panels, shown)


def at_equal_learning(line: list[Any], learned_loss: float) -> dict[str, float]:
    """The metrics of runs at several rates, read where their learned loss is the one given.

    Args:
      line: values of each run, with "learned_loss".
      learned_loss: where to read.

    Returns:
      Metrics that all runs have, interpolated between the two neighbours by learned loss; nothing
      where it lies outside of what the runs have learned.

    >>> line = [{"learned_loss": 2.0, "forgetting": 0.5}, {"learned_loss": 3.0, "forgetting": 0.1}]
    >>> round(at_equal_learning(line, 2.25)["forgetting"], 6), at_equal_learning(line, 3.5)
    (0.4, {})
    """
    ordered = sorted(line, key=lambda one: one["learned_loss"])
    xs = [one["learned_loss"] for one in ordered]
    if not xs[0] <= learned_loss <= xs[-1]:
        return {}
    kept = ("learned_loss", "retained_loss", "forgetting", "worst_gap")
    return {
        name: float(np.interp(learned_loss, xs, [one[name] for one in ordered]))
        for name in kept
        if all(name in one for one in ordered)
    }


PAPER = MetaExperienceReplay()
TINY = MetaExperienceReplay(
    corpora=MadeUp(("alpha", "beta")),
    steps=4,
    sync_every=2,
    batch_size=12,
    sequence_length=32,
    width=32,
    warmup_steps=1,
    interval=2,
    rows=4,
)
_POD, _REPLAY = "configs/papers/pods/mer.gin", "configs/methods/replay.gin"
# As in the paper: every 500 steps, a step of 0.1.
_REPTILE = ("train.optimizer=@Reptile()", "Reptile.inner=@AdamW()")
POD = (
    PodRun("sequential", (_POD,)),
    PodRun("+ 25%", (_POD, _REPLAY)),
    PodRun("+ 50%", (_POD, _REPLAY), ("Replay.fraction=0.5",)),
    PodRun("+ Reptile", (_POD,), _REPTILE),
    PodRun("+ 25% + Reptile", (_POD, _REPLAY), _REPTILE),
)
