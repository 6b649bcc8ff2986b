"""Replay or a larger model? (2508.01908, scaling analysis), small: equal compute, spent either way.

    lcl reproduce replay_scaling

A replayed token costs what a new one does. Over three stages, of which the first has nothing to
replay, 25% replay costs (1 + 2 * 4/3) / 3 = 11/9 of the compute without, and 50% costs 5/3. The
paper asks what else that compute could have bought:

    compute of the run    1    11/9       5/3                 x 11/9        x 5/3
    small model           S    S + 25%    S + 50%
    spent on size              11/9 S     5/3 S = L           11/9 L        15/11 L + 25%
    large model                           L                   L + 25%       L + 50%

What stands in one column has one compute and the same new tokens. Models are widened until their
training FLOPs fit to about two percent; what each run has spent stands in the table. The measured
result stands in configs/papers/replay_scaling.gin.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from lcl.data import Replay
from lcl.models import DecoderConfig
from lcl.papers import figures, streams
from lcl.papers.claims import Claim, Values
from lcl.papers.grid import PaperRun
from lcl.papers.registry import PodRun
from lcl.papers.stream_paper import StreamPaper
from lcl.papers.streams import MadeUp

if TYPE_CHECKING:
    import pathlib

    from matplotlib.figure import Figure


class Size(NamedTuple):
    """A model: its width and that of its MLP (two layers, four heads)."""

    width: int
    mlp_dim: int


# Training FLOPs of a run of the default sizes, by lcl.parallel.flops, in the ratios of their names.
SIZES = {
    "S": Size(48, 144),
    "11/9 S": Size(56, 148),
    "L": Size(64, 200),
    "11/9 L": Size(72, 224),
    "15/11 L": Size(80, 215),
}
# Arm -> (size, share of replay).
ARMS: dict[str, tuple[str, float]] = {
    "S": ("S", 0.0),
    "S + 25%": ("S", 0.25),
    "S + 50%": ("S", 0.5),
    "11/9 S": ("11/9 S", 0.0),
    "L": ("L", 0.0),
    "L + 25%": ("L", 0.25),
    "L + 50%": ("L", 0.5),
    "11/9 L": ("11/9 L", 0.0),
    "15/11 L + 25%": ("15/11 L", 0.25),
}
_SOURCE = "2508.01908, abstract and scaling analysis; no number of its figures was read"


def _claim(name: str, text: str, better: str, worse: str, published: str = "") -> Claim:
    source = _SOURCE if published else ""
    return Claim(name, text, better, worse, "retained_loss", published=published, source=source)


@dataclasses.dataclass(frozen=True)
class ReplayScaling(StreamPaper):
    """The experiment's sizes (`StreamPaper`); the models' are SIZES."""

    name = "replay_scaling"
    title = "Replay or a larger model (arXiv:2508.01908), on manual pages in three languages"
    claims = (
        _claim(
            "a little replay, small model",
            "25% replay retains better than the same compute in a larger model",
            "S + 25%",
            "11/9 S",
            "small rates of replay are a better use of compute than model size",
        ),
        _claim(
            "a little replay, large model",
            "and so it does for a larger model",
            "L + 25%",
            "11/9 L",
            "small rates of replay are a better use of compute than model size",
        ),
        _claim(
            "much replay",
            "from 25% to 50% replay, a larger model is the better use of the same compute",
            "15/11 L + 25%",
            "L + 50%",
            "it is more compute efficient to scale the model than to replay at high rates",
        ),
        _claim(
            "much replay, small model",
            "50% replay retains better than the same compute in a larger model without",
            "S + 50%",
            "L",
            "560M with 50% replay about equals 1B without",
        ),
        _claim("replay helps, small model", "25% replay retains better than none", "S + 25%", "S"),
        _claim("replay helps, large model", "25% replay retains better than none", "L + 25%", "L"),
    )
    columns = {
        "retained_loss": "retained",
        "learned_loss": "learned",
        "forgetting": "forgetting",
        "new_tokens": "new tokens",
        "tokens": "all tokens",
        "train_flops": "FLOPs",
    }

    @property
    def equal(self) -> str:
        """What the compared runs have in common."""
        return (
            f"new tokens ({self.steps} steps a stage of {self.batch_size} x "
            f"{self.sequence_length}, replay on top); in each claim about compute also the run's "
            "training FLOPs, to about 2% (see the column); schedule, first weights of a seed"
        )

    def model(self, size: str) -> DecoderConfig:
        """The model called S, L, ... in SIZES."""
        width, mlp_dim = SIZES[size]
        return dataclasses.replace(
            streams.small_decoder(self.sequence_length, width), mlp_dim=mlp_dim
        )

    def runs(self, seed: int, out: pathlib.Path) -> list[PaperRun]:
        """The nine runs of a seed."""
        data = self.data(out)
        return [
            self.run(
                arm,
                seed,
                data,
                self.sequence(Replay(share) if share else None),
                self.adamw(),
                model=self.model(size),
            )
            for arm, (size, share) in ARMS.items()
        ]

    def remarks(self, out: pathlib.Path) -> list[str]:
        """The interval of the evaluations."""
        del out
        return [f"gaps are not claimed about here; evaluated every {self.interval} steps"]

    def draw(self, values: Values) -> Figure:
        """Retained loss over training FLOPs: a line for each share of replay."""
        dots: dict[str, tuple[list[float], list[float]]] = {}
        for arm, (_, share) in ARMS.items():
            seeds = values.get(arm, {}).values()
            xs, ys = dots.setdefault(f"{share:.0%} replay", ([], []))
            xs.extend(one["train_flops"] for one in seeds)
            ys.extend(one["retained_loss"] for one in seeds)
        lines = {}
        for label, (xs, ys) in dots.items():
            means = [
                (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
                for group in _by_x(xs, ys)
            ]
            lines[label] = ([x for x, _ in means], [y for _, y in means])
        return figures.curves(
            lines, dots, xlabel="training FLOPs", ylabel="retained loss, nats/token", log_x=True
        )


def _by_x(xs: list[float], ys: list[float]) -> list[list[tuple[float, float]]]:
    """Points of (nearly) one x together, by rising x."""
    groups: list[list[tuple[float, float]]] = []
    for x, y in sorted(zip(xs, ys, strict=True)):
        if groups and x < groups[-1][-1][0] * 1.01:
            groups[-1].append((x, y))
        else:
            groups.append([(x, y)])
    return groups


PAPER = ReplayScaling()
TINY = ReplayScaling(
    corpora=MadeUp(("alpha", "beta")),
    steps=4,
    batch_size=3,
    sequence_length=64,
    warmup_steps=1,
    interval=2,
    rows=4,
)
_POD, _99M = "configs/papers/pods/mer.gin", "configs/models/spectra_99m.gin"
POD = (
    PodRun("1B", (_POD,)),
    PodRun("1B + 25%", (_POD, "configs/methods/replay.gin")),
    PodRun("99M", (_POD, _99M), ("cosine.peak=4e-4",)),
    PodRun(
        "99M + 50%",
        (_POD, _99M, "configs/methods/replay.gin"),
        ("cosine.peak=4e-4", "Replay.fraction=0.5"),
    ),
)
