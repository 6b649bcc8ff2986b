"""SkyLadder: an attention window that grows with the step (arXiv:2503.15450).

At step t a token in cell i of its row sees the cells j with floor(i / w) * w <= j <= i, w = w(t):
the row falls into fragments of w cells, each causal in itself (it is no sliding window). Fragments
are segments, and segment ids are data: the compiled step is the same for every w.

    row_length 8     w = 2          w = 4          w = 8         w = 4, documents a a a a a a b b
    segment_ids      11223344       11112222       11111111      11112233

                     x.......       x.......       x.......      x.......
                     xx......       xx......       xx......      xx......
                     ..x.....       xxx.....       xxx.....      xxx.....
                     ..xx....       xxxx....       xxxx....      xxxx....
                     ....x...       ....x...       xxxxx...      ....x...
                     ....xx..       ....xx..       xxxxxx..      ....xx..
                     ......x.       ....xxx.       xxxxxxx.      ......x.
                     ......xx       ....xxxx       xxxxxxxx      ......xx

Positions stay what they were. The released code (sail-sg/SkyLadder at 8ef4156) rotates by the place
in the row whatever the fragments, with document masks too; ours restart in each document if there
are masks, and a rotation is relative, so within a fragment this is the same. Three things of that
code are not copied: with document masks its fragments end one cell late (`arange(w, ...)` lacks the
-1 of the variant without masks), its log schedule counts a process's samples rather than steps, and
its last window is T + 1. Its cosine, which overshoots, is copied: see `cos` below.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from lcl.data.batch import Batch

# u = t / horizon in [0, 1); each gives the window at step t before rounding, capped at `end`.
SCHEDULES = ("linear", "sin", "cos", "exp", "log", "inverse", "step")
# A value that is a whole number but for the last bits of a float counts as that number.
_ALMOST = 1e-6


def window_segments(segment_ids_BT: np.ndarray, window: int) -> np.ndarray:
    """Cut the segments of every row at the multiples of `window`.

    Equal results mean: same segment before, and same floor(cell / window). Numbers count 1, 2, ...
    along the row; padding stays 0.

        segment_ids   1 1 1 1 1 2 2 2 0     window 4
        result        1 1 1 1 2 3 3 3 0     at cell 4 the window ends, at cell 5 document 1 does

    Args:
        segment_ids_BT: int[B, T], 0 = padding; a segment is a run of equal numbers.
        window: w, at least 1; T or more changes no border.

    Returns:
        int32[B, T].

    Example:
        >>> window_segments(np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0]]), 4).tolist()
        [[1, 1, 1, 1, 2, 3, 3, 3, 0]]
    """
    if window < 1:
        raise ValueError(f"window is {window}; a window holds at least 1 cell")
    segment_ids_BT = np.asarray(segment_ids_BT)
    begins = np.zeros(segment_ids_BT.shape, bool)
    begins[:, ::window] = True
    begins[:, 1:] |= segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    real = segment_ids_BT > 0
    count = np.cumsum(begins & real, axis=1, dtype=np.int32)
    return np.where(real, count, np.int32(0))


@dataclasses.dataclass(frozen=True)
class SkyLadder:
    """The window grows from `start` to `end` cells over a horizon of steps; then it stays.

    The horizon is given in one of three ways: `rate`, `steps` or `percent` (of the stage). With
    d = end - start, t the step in the stage, u = t / horizon, the window at t < horizon is

        linear   start + floor(d * u)                      with rate: start + floor(rate * t)
        sin      start + floor(d * sin(pi u / 2))          fast, then slow
        cos      start + floor(d * (1 - cos(pi u)))        as released: slow, then fast; `end` is
                                                           reached at half of the horizon
        exp      floor(start * (end / start)^u)            slow, then fast
        log      floor(start * (end / start)^(log(1 + t) / log(1 + horizon)))
        inverse  end - floor(d * u)                        shrinks to `start`, then jumps to `end`
        step     start                                     jumps to `end`

    and `end` from the horizon on, never more than `end`. `round_to` makes it a ladder: rounded down
    to a multiple (`start` where that is 0), as the released "inc" variants do.

    Attributes:
        start: w_s, first window, >= 1. The paper's default is 32.
        end: w_e, last window; None: the row's length.
        schedule: one of the above.
        rate: alpha, cells a step; the horizon is d / rate. The paper's default is 1/8.
        steps: the horizon.
        percent: the horizon, of the stage's steps; 70 in "sin70p".
        round_to: None, or the steps of the ladder.

    Raises:
        ValueError: not exactly one of rate, steps and percent, or a number out of range.

    Example:
        >>> ladder = SkyLadder(start=2, end=8, schedule="linear", steps=6)
        >>> [ladder.window(t, row_length=8, num_steps=10) for t in range(8)]
        [2, 3, 4, 5, 6, 7, 8, 8]
    """

    start: int = 32
    end: int | None = None
    schedule: str = "linear"
    rate: float | None = None
    steps: int | None = None
    percent: float | None = None
    round_to: int | None = None

    def __post_init__(self) -> None:
        if self.start < 1:
            raise ValueError(f"start is {self.start}; a window holds at least 1 cell")
        if self.end is not None and self.end < self.start:
            raise ValueError(f"end is {self.end}, below start {self.start}; windows grow")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule {self.schedule!r} is unknown; use one of {', '.join(SCHEDULES)}"
            )
        given = [n for n in ("rate", "steps", "percent") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"SkyLadder has {' and '.join(given) or 'no horizon'}; give exactly one of rate "
                "(cells a step, 1/8 in the paper), steps and percent"
            )
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ValueError(f"rate is {self.rate}; give cells a step above 0")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give at least 1")
        if self.percent is not None and not 0 < self.percent <= 100:
            raise ValueError(f"percent is {self.percent}; give one in (0, 100]")
        if self.round_to is not None and self.round_to < 1:
            raise ValueError(f"round_to is {self.round_to}; give at least 1, or None")

    def content_length(self, row_length: int) -> int:
        """All cells hold documents; refuses rows shorter than the first window."""
        self._last(row_length)
        return row_length

    def _last(self, row_length: int) -> int:
        end = row_length if self.end is None else self.end
        if not self.start <= end <= row_length:
            raise ValueError(
                f"windows from {self.start} to {end} do not fit rows of {row_length}; "
                "lower start or end"
            )
        return end

    def horizon(self, row_length: int, num_steps: int) -> float:
        """Return the step from which on the window is `end`."""
        if self.rate is not None:
            return (self._last(row_length) - self.start) / self.rate
        if self.steps is not None:
            return self.steps
        assert self.percent is not None
        return math.floor(num_steps * self.percent / 100 + _ALMOST)

    def window(self, step: int, *, row_length: int, num_steps: int) -> int:
        """Return the window at a step of a stage of `num_steps`, an int in [1, row_length]."""
        start, end = self.start, self._last(row_length)
        horizon = self.horizon(row_length, num_steps)
        if step >= horizon:
            return end
        u, span = step / horizon, end - start
        if self.schedule == "linear":
            value = start + span * u
        elif self.schedule == "sin":
            value = start + span * math.sin(math.pi * u / 2)
        elif self.schedule == "cos":
            value = start + span * (1 - math.cos(math.pi * u))
        elif self.schedule == "exp":
            value = start * (end / start) ** u
        elif self.schedule == "log":
            value = start * (end / start) ** (math.log1p(step) / math.log1p(horizon))
        elif self.schedule == "inverse":
            value = end - math.floor(span * u + _ALMOST)
        else:
            value = start
        window = math.floor(value + _ALMOST)
        if self.round_to is not None:
            window = window // self.round_to * self.round_to or start
        return min(window, end)

    def __call__(
        self, batch: Batch, *, step: int, num_steps: int, key: int, places_B: np.ndarray
    ) -> Batch:
        """Cut the segments at the step's window (see `lcl.data.batch.RowTransform`)."""
        assert batch.row_index is None, "windows are cut before a mesh permutes the row"
        window = self.window(step, row_length=batch.tokens.shape[1], num_steps=num_steps)
        return batch._replace(segment_ids=window_segments(batch.segment_ids, window))

    def settings(self) -> dict[str, Any]:
        """Return the fields, as plain values."""
        return dataclasses.asdict(self)
