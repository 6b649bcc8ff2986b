"""Mitigating the stability gap (2406.14833) and a mixture curriculum (2407.18743), small.

    lcl reproduce stability_gap

A model is pretrained on English manual pages and Python's documentation (the general domains), then
continues on French manual pages, its learning rate warmed up and decayed again. Right after the
border the general losses jump, and come back in part. At equal steps, the second stage reads:

    one pass             new text of the domain at every step
    subset x 4           a quarter as much, drawn by chance, four times
    best subset x 4      as much, the documents that the pretrained model finds least surprising
    close mixture        half of it general text, as the pretraining had
    all three            the best subset, four times, in the close mixture
    curriculum           from 20% to 80% of the domain along a line: as much of it as close mixture
    one pass, low rate   0.3 of the learning rate: what forgets less because it learns less

The best documents are found by scoring the training split with a reference run, which is the
pretraining stage alone (`lcl.scoring`); its hash is in the name of the scores, so that other scores
are other runs. The measured result stands in configs/papers/stability_gap.gin.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from lcl.data import Data, LinearMixture, Mixture, Subset
from lcl.optim import AdamW, repeated_cosine
from lcl.papers import figures, streams
from lcl.papers.claims import Claim, Values
from lcl.papers.grid import PaperRun, run_one
from lcl.papers.measures import Measure
from lcl.papers.registry import PodRun
from lcl.papers.stream_paper import StreamPaper
from lcl.papers.streams import Corpora, MadeUp, Prepared
from lcl.report.read import Run
from lcl.scoring import score
from lcl.stages import Stage

if TYPE_CHECKING:
    import pathlib

    from matplotlib.figure import Figure

ONE_PASS, SUBSET, BEST = "one pass", "subset x 4", "best subset x 4"
CLOSE, ALL_THREE, CURRICULUM = "close mixture", "all three", "curriculum"
LOW_RATE = "one pass, low rate"
_SOURCE = "2406.14833, abstract"
_PUBLISHED = "OpenLlama-3B, all three: medical tasks 36.2 -> 40.7%, with 40% of the budget"
_SYNE = "2407.18743, as quoted by a digest (no table was read)"


@dataclasses.dataclass(frozen=True)
class Shift(Measure):
    """What a stage does to the domain it reads and to the general ones before it.

        domain_loss        at the end
        general_loss       mean over the general domains at the end
        general_gap        the highest such mean within the stage, less that at its start
        general_recovery   steps until it is back at the start's; the whole stage if it never is

    Attributes:
      general: the domains of the stage before.
      domain: the one that the last stage reads.
      interval_steps: of the evaluations: part of the gap and of the recovery.
    """

    general: tuple[str, ...]
    domain: str
    interval_steps: int

    def measure(self, run_dir: str | os.PathLike[str]) -> dict[str, float]:
        """Reads the evaluations within the last stage."""
        run = Run.load(run_dir)
        begin, end = run.stages[-1].first_step, run.stages[-1].end_step
        curves = [run.heldout(name) for name in self.general]
        steps = curves[0][0]
        means = np.mean([losses for _, losses in curves], axis=0)
        start = float(means[steps == begin][0])
        inside = steps > begin
        later, losses = steps[inside] - begin, means[inside]
        worst = int(np.argmax(losses))
        back = np.flatnonzero(losses[worst:] <= start)
        recovered = 0 if losses[worst] <= start else end - begin
        if losses[worst] > start and len(back):
            recovered = int(later[worst + back[0]])
        return {
            "domain_loss": float(run.heldout(self.domain)[1][-1]),
            "general_loss": float(losses[-1]),
            "general_gap": float(losses[worst]) - start,
            "general_recovery": float(recovered),
        }


def _claim(
    name: str,
    text: str,
    better: str,
    worse: str,
    metric: str,
    published: str = "",
    source: str = _SOURCE,
) -> Claim:
    source = source if published else ""
    return Claim(name, text, better, worse, metric, published=published, source=source)


@dataclasses.dataclass(frozen=True)
class StabilityGapPaper(StreamPaper):
    """The experiment's sizes (`StreamPaper`); of `corpora`, the last is the new domain.

    Attributes:
      epochs: how often a subset is read.
      general_share: of the close mixture.
      curriculum: share of the domain at the beginning and at the end.
    """

    corpora: Corpora = Prepared(("manpages-en", "pydoc", "manpages-fr"), limit_documents=400)
    interval: int = 12
    epochs: int = 4
    general_share: float = 0.5
    curriculum: tuple[float, float] = (0.2, 0.8)

    name = "stability_gap"
    title = "Mitigating the stability gap (arXiv:2406.14833), from English to French manual pages"
    claims = (
        _claim(
            "several epochs",
            "four epochs over a subset learn the domain better than one pass, at equal steps",
            SUBSET,
            ONE_PASS,
            "domain_loss",
            _PUBLISHED,
        ),
        _claim(
            "several epochs, gap",
            "and the general losses rise less",
            SUBSET,
            ONE_PASS,
            "general_gap",
            "faster recovery than one epoch over a large corpus",
        ),
        _claim(
            "best subset",
            "the least surprising documents teach the domain better than as many by chance",
            BEST,
            SUBSET,
            "domain_loss",
            "pretraining on the high-quality sub-corpus rapidly boosts domain performance",
        ),
        _claim(
            "best subset, gap",
            "and the general losses rise less than with as many by chance",
            BEST,
            SUBSET,
            "general_gap",
        ),
        _claim(
            "close mixture, gap",
            "with half general text the general losses rise less",
            CLOSE,
            ONE_PASS,
            "general_gap",
            "a mixture similar to pretraining reduces the distribution gap",
        ),
        _claim(
            "close mixture, domain",
            "and the domain is learned better than at a low rate without",
            CLOSE,
            LOW_RATE,
            "domain_loss",
        ),
        _claim(
            "close mixture, gap at low rate",
            "and the general losses rise less than at a low rate without",
            CLOSE,
            LOW_RATE,
            "general_gap",
        ),
        _claim(
            "all three, domain",
            "all three strategies learn the domain better than one pass",
            ALL_THREE,
            ONE_PASS,
            "domain_loss",
            _PUBLISHED,
        ),
        _claim(
            "all three, general",
            "all three strategies end with lower general losses",
            ALL_THREE,
            ONE_PASS,
            "general_loss",
            "average general task performance enhanced, without forgetting",
        ),
        _claim(
            "curriculum, domain",
            "a mixture that moves to the domain learns it better than a constant one, tokens equal",
            CURRICULUM,
            CLOSE,
            "domain_loss",
            "a mixture adjusted over the run: C-Eval +8.81, MMLU 66.60 -> 65.19",
            _SYNE,
        ),
        _claim(
            "curriculum, gap",
            "and the general losses rise less",
            CURRICULUM,
            CLOSE,
            "general_gap",
        ),
    )
    columns = {
        "domain_loss": "domain",
        "general_loss": "general",
        "general_gap": "general gap",
        "general_recovery": "recovery",
        "forgetting": "forgetting",
        "tokens": "tokens",
        "train_flops": "FLOPs",
    }

    @property
    def equal(self) -> str:
        """What the compared runs have in common."""
        return (
            f"all tokens ({self.steps} steps of pretraining and {self.steps} after it, each "
            f"{self.batch_size} x {self.sequence_length}), FLOPs, model, schedule (but for the low "
            "rate), first weights of a seed; mixtures read fewer tokens of the domain, subsets "
            "fewer different ones"
        )

    @property
    def general(self) -> tuple[str, ...]:
        """The domains of the pretraining."""
        return self.domains[:-1]

    @property
    def domain(self) -> str:
        """The new one."""
        return self.domains[-1]

    def pretraining(self) -> Stage:
        """The first stage: the general domains in equal shares."""
        return streams.stage("pretraining", dict.fromkeys(self.general, 1.0), **self.sizes())

    def optimizer(self, scale: float = 1.0) -> AdamW:
        """Warm-up and decay in each of the two stages; `scale`: of the rate of both."""
        return AdamW(
            schedule=repeated_cosine(
                peak=self.peak * scale,
                final=self.peak * scale / 10,
                warmup_steps=min(self.warmup_steps, self.steps // 4),
                cycle_steps=self.steps,
            )
        )

    def mixtures(self, scores: str) -> dict[str, Any]:
        """Arm -> mixture of the second stage; `scores`: what the best documents are ranked by."""
        # Rows in which the shares are exact: several blocks a stage, so that a curriculum moves.
        block = 4 * self.batch_size

        def at(share: float) -> dict[str, float]:
            rest = round((1.0 - share) / len(self.general), 12)
            return {self.domain: share, **dict.fromkeys(self.general, rest)}

        alone = Mixture({self.domain: 1.0})
        close = Mixture(at(1.0 - self.general_share), block=block)
        best: dict[str, Any] = {"epochs": self.epochs, "by": scores, "best": "low"}
        return {
            ONE_PASS: alone,
            SUBSET: Subset(alone, self.domain, epochs=self.epochs),
            BEST: Subset(alone, self.domain, **best),
            CLOSE: close,
            ALL_THREE: Subset(close, self.domain, **best),
            CURRICULUM: LinearMixture(tuple(at(share) for share in self.curriculum), block=block),
            LOW_RATE: alone,
        }

    def scores(self, seed: int, data: Data, out: pathlib.Path) -> str:
        """Scores the domain's training documents by the pretrained model of a seed, once.

        Returns:
          What `Subset.by` is called: "scores:reference-HASH".
        """
        first = self.pretraining()
        run = self.run("reference", seed, data, (first,), self.optimizer(), domains=self.domains)
        run_one(run, out)
        name = f"reference-{run.hash[:10]}"
        score(
            domains=[self.domain],
            name=name,
            run_dir=out / "runs" / run.name,
            **run.settings,
        )
        return f"scores:{name}"

    def runs(self, seed: int, out: pathlib.Path) -> list[PaperRun]:
        """The arms of a seed; the reference is trained, and the documents are scored, first."""
        data = self.data(out)
        shift = Shift(self.general, self.domain, self.interval)
        first = self.pretraining()
        return [
            self.run(
                arm,
                seed,
                data,
                (first, streams.stage("continued", mixture, **self.sizes())),
                self.optimizer(0.3 if arm == LOW_RATE else 1.0),
                measures=(shift,),
                domains=self.domains,
            )
            for arm, mixture in self.mixtures(self.scores(seed, data, out)).items()
        ]

    def remarks(self, out: pathlib.Path) -> list[str]:
        """What the columns are."""
        del out
        return [
            "domain, general: held-out loss at the end (general: mean of "
            f"{', '.join(self.general)}); general gap, recovery: of that mean, evaluated every "
            f"{self.interval} steps, above what it was at the border; a recovery of {self.steps} "
            "steps is none",
            "the low rate is low in both stages: its model is less trained when the second begins",
        ]

    def draw(self, values: Values) -> Figure:
        """The domain, the general domains and the gap between."""
        panels = [
            ("domain_loss", "domain, at the end"),
            ("general_loss", "general, at the end"),
            ("general_gap", "general gap"),
        ]
        return figures.bars(panels, values)


PAPER = StabilityGapPaper()
TINY = StabilityGapPaper(
    corpora=MadeUp(("alpha", "beta", "gamma")),
    steps=8,
    batch_size=4,
    sequence_length=32,
    width=32,
    warmup_steps=1,
    interval=2,
    rows=4,
    epochs=2,
)
POD = (
    PodRun("one pass", ("configs/papers/pods/stability_gap.gin",)),
    PodRun(
        "all three",
        ("configs/papers/pods/stability_gap.gin", "configs/papers/pods/stability_gap_all.gin"),
    ),
)
