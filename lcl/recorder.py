"""The metrics of a run's steps on their way from the device to the disk.

The loop hands over device arrays and goes on; every few steps they are fetched in one transfer,
checked, and written, one line a step. What is written is a function of (config, seed, step) alone;
whatever the clock decides goes into timings.jsonl.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lcl.parallel.run_ahead import RunAhead
from lcl.policies import check_finite
from lcl.report.progress import Progress
from lcl.report.writers import MetricsWriter
from lcl.stages import Span

# Steps that may be in flight on the device: enough to hide the host's work, and few enough that
# a SIGTERM, which waits for them, is answered at once.
RUN_AHEAD = 2


class Recorder:
    """Collects the metrics of steps and writes them down.

    Args:
      writer: the run's log.
      bar: the run's progress line.
      domains: names of the sources; source d is a new token of domains[d], D + d a replayed one.
      describe_rows: step -> a text that names the rows of that step, for errors.
      tokens: trained tokens so far (a resumed run hands over its checkpoint's count).
      flops_per_token: training FLOPs per token of a step, for the MFU; None where it is not known.
      peak_flops: FLOP/s of all devices together, or None where it is not known.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        bar: Progress,
        *,
        domains: Sequence[str],
        describe_rows: Callable[[int], str],
        tokens: int = 0,
        flops_per_token: Callable[[int], float] | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self.tokens = tokens
        self._writer = writer
        self._bar = bar
        self._domains = tuple(domains)
        self._describe_rows = describe_rows
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._ahead = RunAhead(RUN_AHEAD)
        self._pending: list[tuple[int, Span, Mapping[str, Any] | None]] = []
        self._clock = time.monotonic()
        self._excluded = 0.0

    @classmethod
    def of(cls, run: Any, writer: MetricsWriter, bar: Progress, tokens: int) -> Recorder:
        """The recorder of a loop over `run`, an `lcl.assembly.Assembly`."""
        return cls(
            writer,
            bar,
            domains=run.stream.domains,
            describe_rows=run.describe_rows,
            tokens=tokens,
            flops_per_token=run.flops_at,
            peak_flops=run.peak_flops,
        )

    def add(
        self,
        step: int,
        span: Span,
        metrics: Mapping[str, Any] | None,
        looked: Mapping[str, jax.Array] | None = None,
    ) -> None:
        """Takes one step's metrics, still on the device.

        Args:
          step, span: which.
          metrics: what the train step gave; None for a step that was left out.
          looked: what diagnostics saw at this step (`lcl.analysis`).
        """
        if metrics is not None and looked:
            metrics = {**metrics, "diagnostics": {**metrics.get("diagnostics", {}), **looked}}
        self._pending.append((step, span, metrics))
        self._ahead.add(None if metrics is None else metrics["loss"])

    def exclude(self, seconds: float) -> None:
        """Takes time that was no training (an evaluation, a compilation) out of the speed."""
        self._excluded += seconds

    def drain(self) -> None:
        """Fetches, checks and writes all that is pending.

        Raises:
          NonFiniteError: a step's loss or gradient norm is NaN or infinite. The steps before it
            have been written.
        """
        if not self._pending:
            return
        host = jax.device_get([metrics for _, _, metrics in self._pending])
        trained, flops = 0, 0.0
        for (step, span, _), metrics in zip(self._pending, host, strict=True):
            if metrics is None:
                self._writer.metrics(
                    {
                        "step": step,
                        "stage": span.stage.name,
                        "left_out": True,
                        "tokens": self.tokens,
                    }
                )
                continue
            check_finite(
                step,
                float(metrics["loss"]),
                float(metrics["grad_norm"]),
                lambda step=step: self._describe_rows(step),
            )
            tokens = round(float(metrics["weight"]))
            trained += tokens
            self.tokens += tokens
            if self._flops_per_token is not None:
                flops += tokens * self._flops_per_token(step)
            self._writer.metrics(self._line(step, span, metrics))
        self._time(trained, flops, host[-1])
        self._pending.clear()

    def _line(self, step: int, span: Span, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """One step's line: the whole loss, then the loss of each domain the step saw."""
        line: dict[str, Any] = {
            "step": step,
            "stage": span.stage.name,
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            "learning_rate": metrics["learning_rate"],
            "tokens": self.tokens,
        }
        nll, weight = metrics["nll_sum_by_source"], metrics["weight_by_source"]
        count = len(self._domains)
        for kind, offset in (("loss", 0), ("replay_loss", count)):
            for index, domain in enumerate(self._domains, start=offset):
                if weight[index] > 0:
                    line[f"{kind}/{domain}"] = np.float32(nll[index] / weight[index])
        # What one looks at has no value at every step: it is then NaN, and no part of the line.
        found = metrics.get("diagnostics", {})
        return line | {name: value for name, value in found.items() if not np.isnan(value)}

    def _time(self, trained: int, flops: float, newest: Mapping[str, Any] | None) -> None:
        """Speed since the last call, without what was excluded."""
        now = time.monotonic()
        seconds = max(now - self._clock - self._excluded, 1e-9)
        self._clock, self._excluded = now, 0.0
        step, span, _ = self._pending[-1]
        speed = trained / seconds
        mfu = flops / seconds / self._peak_flops if flops and self._peak_flops else None
        timing = {"step": step, "tokens_per_second": round(speed, 1)}
        timing["seconds_per_step"] = round(seconds / len(self._pending), 6)
        if mfu is not None:
            timing["mfu"] = round(mfu, 4)
        self._writer.timings(timing)
        self._bar.update(
            step + 1,
            stage=span.stage.name,
            stage_step=step + 1 - span.first_step,
            stage_steps=span.end_step - span.first_step,
            loss=None if newest is None else float(newest["loss"]),
            learning_rate=None if newest is None else float(newest["learning_rate"]),
            tokens_per_second=speed,
            mfu=mfu,
        )
