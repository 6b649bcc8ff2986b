"""Beyond Cosine Decay (2503.02844), small: an infinite learning rate against repeated cosines.

    lcl reproduce infinite_lr

Three languages of manual pages, one after the other, under four schedules, with and without replay:

    cosine            one, over all stages: it must know the end when the first stage begins
    repeated cosine   re-warmed and decayed again in each stage (2403.08763)
      the same, lower   its peak is the constant rate of the infinite one: the control, since a
                        smaller step by itself makes a smaller gap
    infinite          warm-up, cool-down, constant for ever; judged by branches that anneal over the
                      last steps of each stage, on the very batches that the trunk reads there

So at each stage's end two decayed models are compared, both of which have seen the same tokens; the
infinite one goes on from its un-annealed trunk. The gap is that of the run itself (the trunk), at
evaluations every `interval` steps. The measured result stands in configs/papers/infinite_lr.gin.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lcl.data import Replay
from lcl.evals import Branches
from lcl.optim import AdamW, infinite, repeated_cosine
from lcl.papers import figures
from lcl.papers.claims import Claim, Values
from lcl.papers.grid import PaperRun
from lcl.papers.registry import PodRun
from lcl.papers.stream_paper import COLUMNS, StreamPaper
from lcl.papers.streams import MadeUp

if TYPE_CHECKING:
    import pathlib

    from matplotlib.figure import Figure

COSINE, REPEATED, LOWER, INFINITE = "cosine", "repeated cosine", "repeated cosine, low", "infinite"
SCHEDULES = (COSINE, REPEATED, LOWER, INFINITE)
REPLAYED = " + 25%"
ANNEALED = "annealed_retained_loss"
_SOURCE = "2503.02844, as quoted by a digest (the table itself was not read)"
_TABLE = (
    "570M, normalised accuracy after three tasks, infinite (constant 1e-4) / cosine: {}; "
    "higher is better there"
)


def _claim(
    name: str, text: str, better: str, worse: str, metric: str, published: str = "", **more: Any
) -> Claim:
    source = _SOURCE if published else ""
    return Claim(name, text, better, worse, metric, published=published, source=source, **more)


@dataclasses.dataclass(frozen=True)
class InfiniteLR(StreamPaper):
    """The experiment's sizes (`StreamPaper`).

    Attributes:
      constant_share: the constant rate over the peak.
      cooldown_steps: from the peak to the constant rate.
      anneal_steps: of each branch.
    """

    constant_share: float = 0.375
    cooldown_steps: int = 60
    anneal_steps: int = 30

    name = "infinite_lr"
    title = "Beyond Cosine Decay (arXiv:2503.02844), on manual pages in three languages"
    claims = (
        _claim(
            "worst gap",
            "at the borders an infinite schedule loses less of what was known than a repeated one",
            INFINITE,
            REPEATED,
            "worst_gap",
        ),
        _claim(
            "worst gap, at equal rate",
            "and less than a repeated cosine whose peak is no higher than the constant rate",
            INFINITE,
            LOWER,
            "worst_gap",
        ),
        _claim(
            "worst gap, with replay",
            "the same with 25% replay",
            INFINITE + REPLAYED,
            REPEATED + REPLAYED,
            "worst_gap",
        ),
        _claim(
            "retained",
            "annealed at the end, it retains better than repeated cosines",
            INFINITE,
            REPEATED,
            ANNEALED,
            _TABLE.format("34.66 / 33.92"),
            worse_metric="retained_loss",
        ),
        _claim(
            "retained, with replay",
            "the same with replay (where the paper has a tie)",
            INFINITE + REPLAYED,
            REPEATED + REPLAYED,
            ANNEALED,
            "with 50% replay, " + _TABLE.format("44.21 / 44.65"),
            worse_metric="retained_loss",
        ),
        _claim(
            "retained, at equal rate",
            "annealed at the end, it retains better than the lower repeated cosine",
            INFINITE,
            LOWER,
            ANNEALED,
            worse_metric="retained_loss",
        ),
        _claim(
            "learned",
            "annealed at each stage's end, it has learned more of the stage than repeated cosines",
            INFINITE,
            REPEATED,
            "annealed_learned_loss",
            worse_metric="learned_loss",
        ),
        _claim(
            "against one cosine",
            "without knowing the end, it retains better than one cosine that does",
            INFINITE,
            COSINE,
            ANNEALED,
            worse_metric="retained_loss",
        ),
    )
    columns = {
        "retained_loss": "retained",
        "annealed_retained_loss": "annealed",
        "learned_loss": "learned",
        "annealed_learned_loss": "annealed",
        **{metric: COLUMNS[metric] for metric in ("forgetting", "worst_gap", "recovery_steps")},
        "tokens": "all tokens",
        "train_flops": "FLOPs",
    }

    @property
    def equal(self) -> str:
        """What the compared runs have in common."""
        return (
            f"tokens and FLOPs of the trunk ({self.steps} steps a stage of {self.batch_size} x "
            f"{self.sequence_length}; replay on top in the arms that have it), peak rate (but in "
            f"the lower control), model, first weights of a seed; branches of {self.anneal_steps} "
            "steps cost the infinite arms as much again for each stage"
        )

    def optimizer(self, schedule: str) -> AdamW:
        """AdamW under one of SCHEDULES; all warm up over as many steps and end at one rate."""
        peak, final = self.peak, self.peak / 10
        constant = self.peak * self.constant_share
        warmup = min(self.warmup_steps, self.steps // 4)
        if schedule == COSINE:
            return self.adamw()
        if schedule == INFINITE:
            return AdamW(
                schedule=infinite(
                    peak=peak,
                    constant=constant,
                    final=final,
                    warmup_steps=warmup,
                    cooldown_steps=self.cooldown_steps,
                )
            )
        return AdamW(
            schedule=repeated_cosine(
                peak=peak if schedule == REPEATED else constant,
                final=final,
                warmup_steps=warmup,
                cycle_steps=self.steps,
            )
        )

    def runs(self, seed: int, out: pathlib.Path) -> list[PaperRun]:
        """Four schedules, each with and without replay."""
        data = self.data(out)
        runs = []
        for replay, suffix in ((None, ""), (Replay(0.25), REPLAYED)):
            for schedule in SCHEDULES:
                stages = self.sequence(replay)
                branches = self.branches if schedule == INFINITE else None
                optimizer = self.optimizer(schedule)
                arm = schedule + suffix
                runs.append(self.run(arm, seed, data, stages, optimizer, branches=branches))
        return runs

    @property
    def branches(self) -> Branches:
        """The infinite arms' annealed copies: one for each stage's end."""
        return Branches(anneal_steps=self.anneal_steps)

    def remarks(self, out: pathlib.Path) -> list[str]:
        """The interval, and what the columns of the infinite arms are."""
        del out
        return [
            f"gap and recovery: evaluated every {self.interval} steps",
            "retained and learned of an infinite arm are its trunk's, at the constant rate; "
            "'annealed' right of each is its branches'",
        ]

    def draw(self, values: Values) -> Figure:
        """The gap, and what is retained by decayed models."""
        decayed = {
            arm: {
                seed: dict(one) | {"decayed": one.get(ANNEALED, one["retained_loss"])}
                for seed, one in seeds.items()
            }
            for arm, seeds in values.items()
        }
        panels = [("worst_gap", "worst gap"), ("decayed", "retained, decayed")]
        return figures.bars(panels, decayed)


PAPER = InfiniteLR()
TINY = InfiniteLR(
    corpora=MadeUp(("alpha", "beta")),
    steps=6,
    batch_size=3,
    sequence_length=64,
    width=32,
    warmup_steps=1,
    cooldown_steps=2,
    anneal_steps=2,
    interval=2,
    rows=4,
)
POD = (
    PodRun("infinite", ("configs/papers/pods/infinite_lr.gin",)),
    PodRun(
        "repeated cosine",
        ("configs/papers/pods/infinite_lr.gin", "configs/papers/pods/infinite_lr_repeated.gin"),
    ),
)
