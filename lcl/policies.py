"""What the loop does beside training: how often it logs, and what it does about a NaN."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence

from lcl import files
from lcl.analysis.diagnostic import Diagnostic
from lcl.report.trackers import Tracker

__all__ = ["Guard", "Logging", "NonFiniteError", "check_finite", "leave_out", "read_left_out"]


@dataclasses.dataclass(frozen=True)
class Logging:
    """How a run shows itself.

    Attributes:
      every_steps: metrics are fetched from the device, checked and written this often; every
        step's metrics are written, whatever the interval.
      tensorboard: also write TensorBoard events under RUN/tensorboard.
      progress: show a progress bar (a plain line now and then where the output is no terminal).
      report: build RUN/report/index.html at the end.
      trackers: where the scalars go too, such as `lcl.report.WandB`.
      diagnostics: what is looked at beside the loss, such as `lcl.analysis.GradientAlignment`; it
        stands in the lines of metrics.jsonl and changes no result.
    """

    every_steps: int = 10
    tensorboard: bool = True
    progress: bool = True
    report: bool = True
    trackers: Sequence[Tracker] = ()
    diagnostics: Sequence[Diagnostic] = ()

    def __post_init__(self) -> None:
        """Refuses an interval of no steps."""
        if self.every_steps < 1:
            raise ValueError(f"Logging.every_steps={self.every_steps} must be 1 or more")


@dataclasses.dataclass(frozen=True)
class Guard:
    """What happens when a loss or a gradient norm is not finite.

    Attributes:
      on_nonfinite: "stop" ends the run with the step and its rows named; "rollback" goes back to
        the last checkpoint (all of which are from before the step) and leaves that step out.
      max_rollbacks: so many steps may be left out in one run before it stops after all.

    >>> Guard(on_nonfinite="rollback").rolls_back
    True
    """

    on_nonfinite: str = "stop"
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        """Refuses an unknown policy."""
        if self.on_nonfinite not in ("stop", "rollback"):
            raise ValueError(
                f"Guard.on_nonfinite={self.on_nonfinite!r} is unknown; use 'stop' or 'rollback'"
            )
        if self.max_rollbacks < 0:
            raise ValueError(f"Guard.max_rollbacks={self.max_rollbacks} must be 0 or more")

    @property
    def rolls_back(self) -> bool:
        """Whether a bad step is left out rather than ending the run."""
        return self.on_nonfinite == "rollback"


class NonFiniteError(ValueError):
    """A step's loss or gradient was NaN or infinite; `step` says which, the text what it read."""

    def __init__(self, step: int, loss: float, grad_norm: float, rows: str) -> None:
        """Describes the step in one line."""
        self.step = step
        super().__init__(
            f"step {step} is not finite: loss {loss}, gradient norm {grad_norm}; its rows were "
            f"{rows}; lower the learning rate, or leave such steps out with "
            f"Guard.on_nonfinite = 'rollback'"
        )


def check_finite(step: int, loss: float, grad_norm: float, rows: object) -> None:
    """Raises `NonFiniteError` unless both numbers are finite; `rows()` names what was read."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        assert callable(rows)
        raise NonFiniteError(step, loss, grad_norm, rows())


def read_left_out(run_dir: str | os.PathLike[str]) -> frozenset[int]:
    """The steps that rollbacks have left out of this run so far; they belong to its result."""
    path = files.place(run_dir) / "left_out_steps.json"
    return frozenset(json.loads(path.read_text())) if path.exists() else frozenset()


def leave_out(run_dir: str | os.PathLike[str], step: int) -> None:
    """Adds `step` to the steps left out, atomically: a kill sees the old list or the new."""
    steps = sorted(read_left_out(run_dir) | {step})
    files.write_whole(files.place(run_dir) / "left_out_steps.json", json.dumps(steps).encode())
