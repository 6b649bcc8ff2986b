"""The progress line of a run.

    stage en 120/500  loss 2.31  lr 3.0e-04  12.3k tok/s  MFU 41%  ETA 0:01:12 ━━━━━━╸────── 24%

On a terminal it is one tqdm bar; anywhere else (a file, a pipe, CI) a plain line every so often,
with no control characters. It is handed plain numbers and never touches a device array, so it costs
no sync. The convention behind MFU is said once, at the start, since the number means nothing
without it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO


class Progress:
    """Shows where a run is.

    Args:
        num_steps: updates of the whole run.
        start_step: updates already done (a resumed run).
        flop_convention: what MFU counts and against which peak, printed once; None = say nothing.
        enabled: False shows nothing at all (quiet runs, processes other than the first).
        stream: where to; stderr by default, so that stdout stays clean for results.
        every_seconds: between plain lines when the stream is no terminal.
        clock: seconds; replaced in tests.

    >>> from itertools import count
    >>> bar = Progress(4, stream=sys.stdout, every_seconds=0, clock=count().__next__)
    >>> bar.update(2, stage="en", stage_step=2, stage_steps=4, loss=2.3, learning_rate=3e-4)
    step 2/4 (50%)  stage en 2/4  loss 2.30  lr 3.0e-04  ETA 0:00:01
    """

    def __init__(
        self,
        num_steps: int,
        *,
        start_step: int = 0,
        flop_convention: str | None = None,
        enabled: bool = True,
        stream: TextIO | None = None,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_steps = num_steps
        self.enabled = enabled
        self.stream = stream if stream is not None else sys.stderr
        self.every_seconds = every_seconds
        self._clock = clock
        self._step = start_step
        self._fields: dict[str, Any] = {}
        self._rate: float | None = None  # Seconds a step, smoothed.
        self._last_step, self._last_time = start_step, clock()
        self._last_line: float | None = None
        self._bar: Any = None
        if not enabled:
            return
        if flop_convention:
            self.stream.write(f"MFU: {flop_convention}\n")
        if _is_terminal(self.stream):
            from tqdm import tqdm

            self._bar = tqdm(
                total=num_steps,
                initial=start_step,
                file=self.stream,
                bar_format="{desc} {bar} {percentage:3.0f}%",
                dynamic_ncols=True,
                mininterval=0.2,
                smoothing=0,
            )

    def update(
        self,
        step: int,
        *,
        stage: str | None = None,
        stage_step: int | None = None,
        stage_steps: int | None = None,
        loss: float | None = None,
        learning_rate: float | None = None,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """Says that `step` updates are done. What is not given keeps its last value.

        Args:
            step: updates done, of the whole run.
            stage, stage_step, stage_steps: the stage's name, its updates done, its length.
            loss: nats/token. learning_rate, tokens_per_second: as they are.
            mfu: share of the peak, 0..1.
        """
        if not self.enabled:
            return
        given = {
            "stage": stage,
            "stage_step": stage_step,
            "stage_steps": stage_steps,
            "loss": loss,
            "learning_rate": learning_rate,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
        }
        self._fields.update({k: v for k, v in given.items() if v is not None})
        now = self._clock()
        self._measure(step, now)
        if self._bar is not None:
            self._bar.set_description_str(self.line(), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._last_line is None or now - self._last_line >= self.every_seconds:
            self._last_line = now
            self._write_plain()

    def line(self) -> str:
        """The text beside the bar."""
        f = self._fields
        parts = []
        if "stage" in f:
            where = f" {f['stage_step']}/{f['stage_steps']}" if "stage_steps" in f else ""
            parts.append(f"stage {f['stage']}{where}")
        if "loss" in f:
            parts.append(f"loss {f['loss']:.2f}")
        if "learning_rate" in f:
            parts.append(f"lr {f['learning_rate']:.1e}")
        if "tokens_per_second" in f:
            parts.append(f"{human(f['tokens_per_second'])} tok/s")
        if "mfu" in f:
            parts.append(f"MFU {100 * f['mfu']:.0f}%")
        if self._rate is not None:
            parts.append(f"ETA {duration(self._rate * (self.num_steps - self._step))}")
        return "  ".join(parts)

    def log(self, message: str) -> None:
        """A line of its own: above the bar, or simply in the file."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.write(message, file=self.stream)
        else:
            self.stream.write(message + "\n")
            self.stream.flush()

    def pause(self) -> None:
        """Time until the next update (an evaluation, a save) doesn't count towards the ETA."""
        self._last_time = None  # type: ignore[assignment]

    def close(self) -> None:
        """Leaves the last state on the screen; safe to call twice."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
        elif self.enabled and self._last_line is not None and self._fields:
            self._write_plain()
        self.enabled = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _measure(self, step: int, now: float) -> None:
        steps = step - self._last_step
        if steps > 0 and self._last_time is not None:
            seconds = (now - self._last_time) / steps
            # The first interval holds the compilation: it is replaced, not averaged in.
            fresh = self._rate is None or self._num_measured < 2
            self._rate = seconds if fresh else 0.7 * self._rate + 0.3 * seconds  # type: ignore
            self._num_measured += 1
        self._step = self._last_step = step
        self._last_time = now

    _num_measured = 0

    def _write_plain(self) -> None:
        share = 100 * self._step / self.num_steps if self.num_steps else 100
        self.stream.write(f"step {self._step}/{self.num_steps} ({share:.0f}%)  {self.line()}\n")
        self.stream.flush()


def human(x: float) -> str:
    """A number for people.

    >>> human(950), human(12_345), human(1.2e6)
    ('950', '12.3k', '1.2M')
    """
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= limit:
            return f"{x / limit:.1f}{suffix}"
    return f"{x:.0f}"


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(72), duration(90_061)
    ('0:01:12', '1 day 1:01:01')
    """
    days, rest = divmod(max(0, round(seconds)), 86_400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} day{'s' if days > 1 else ''} {clock}" if days else clock


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # A closed or home-made stream.
        return False
