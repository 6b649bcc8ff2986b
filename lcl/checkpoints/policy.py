"""When checkpoints are made, and which of them stay."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointPolicy:
    """When checkpoints are made and which are kept.

    Args:
        every_steps: a checkpoint after every so many updates; None = only at the end of the run.
        keep_last: how many of the newest are kept.
        keep_every: steps that are multiples of this are kept for good; None = none are.
        asynchronous: write in the background while training goes on.

    Example:
        >>> CheckpointPolicy(every_steps=10, keep_last=2, keep_every=40).kept([10, 20, 40, 50, 60])
        {40, 50, 60}
    """

    every_steps: int | None = 500
    keep_last: int = 2
    keep_every: int | None = None
    asynchronous: bool = True

    def __post_init__(self) -> None:
        """Refuses numbers that would keep nothing."""
        for name in ("every_steps", "keep_last", "keep_every"):
            value = getattr(self, name)
            optional = name != "keep_last"
            if (value is None and not optional) or (value is not None and value < 1):
                raise ValueError(
                    f"CheckpointPolicy.{name} = {value}: give a positive number"
                    + (", or None" if optional else "; the newest checkpoint is what resume needs")
                )

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due when `step` updates are complete."""
        return self.every_steps is not None and step > 0 and step % self.every_steps == 0

    def kept(self, steps: list[int]) -> set[int]:
        """Which of these steps stay on disk."""
        forever = {s for s in steps if self.keep_every is not None and s % self.keep_every == 0}
        return forever | set(sorted(steps)[-self.keep_last :])
