"""A paper tried on a stream of domains: the sizes, corpora and runs that such papers share."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lcl.data import Data, Replay
from lcl.models import DecoderConfig
from lcl.optim import AdamW, cosine
from lcl.papers import streams
from lcl.papers.grid import PaperRun
from lcl.papers.measures import StreamMeasures
from lcl.papers.paper import Paper
from lcl.papers.streams import Corpora, Prepared
from lcl.stages import Stage

MANPAGES = Prepared(("manpages-en", "manpages-fr", "manpages-de"))

# Metric -> heading, for the tables of papers about what is learned and what is kept.
COLUMNS: Mapping[str, str] = {
    "retained_loss": "retained",
    "learned_loss": "learned",
    "forgetting": "forgetting",
    "worst_gap": "worst gap",
    "recovery_steps": "recovery",
    "new_tokens": "new tokens",
    "tokens": "all tokens",
    "train_flops": "FLOPs",
}


@dataclasses.dataclass(frozen=True)
class StreamPaper(Paper):
    """Sizes; the defaults are minutes on two cores.

    Attributes:
      corpora: the domains, in the order of the stream.
      steps: of a stage.
      batch_size: new rows a step.
      sequence_length: T.
      peak: highest learning rate; the lowest is a tenth of it.
      warmup_steps: of the learning rate.
      interval: steps between evaluations within a stage, part of every gap.
      rows: held-out rows a domain.
      width: of the model (`streams.small_decoder`).
    """

    corpora: Corpora = MANPAGES
    steps: int = 144
    batch_size: int = 12
    sequence_length: int = 96
    peak: float = 4e-3
    warmup_steps: int = 20
    interval: int = 24
    rows: int = 48
    width: int = 64

    @property
    def columns(self) -> Mapping[str, str]:
        """What every run over a stream is told by."""
        return COLUMNS

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains, in the order of the stream."""
        return self.corpora.names

    def data(self, out: pathlib.Path) -> Data:
        """The stores, made under the paper's directory."""
        return self.corpora.write(out / "data")

    def sizes(self, **changes: Any) -> dict[str, Any]:
        """Steps, rows and row length of a stage, for `streams.stage`; `changes` win."""
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
        } | changes

    def sequence(self, replay: Replay | None = None, **changes: Any) -> tuple[Stage, ...]:
        """One stage a domain."""
        return streams.stream(self.domains, replay=replay, **self.sizes(**changes))

    def adamw(self, *, scale: float = 1.0, total_steps: int | None = None) -> AdamW:
        """AdamW under one cosine over the whole run; `scale`: of its learning rates."""
        total = self.steps * len(self.domains) if total_steps is None else total_steps
        peak = self.peak * scale
        warmup = min(self.warmup_steps, total // 4)
        schedule = cosine(peak=peak, final=peak / 10, warmup_steps=warmup, total_steps=total)
        return AdamW(schedule=schedule)

    def run(
        self,
        arm: str,
        seed: int,
        data: Data,
        stages: Sequence[Stage],
        optimizer: Any,
        *,
        model: DecoderConfig | None = None,
        measures: Sequence[Any] = (),
        **changes: Any,
    ) -> PaperRun:
        """A run over a stream, measured as such, and by further `measures`."""
        settings = streams.settings(
            seed=seed,
            data=data,
            model=model or streams.small_decoder(self.sequence_length, self.width),
            stages=stages,
            optimizer=optimizer,
            interval=self.interval,
            rows=self.rows,
            **changes,
        )
        return PaperRun(arm, seed, settings, measures=(StreamMeasures(self.interval), *measures))
