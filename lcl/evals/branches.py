r"""Where branches leave the trunk: an annealed copy is evaluated, the trunk goes on without it.

    learning rate
      .-----------o---------------o-----------       trunk: the constant phase goes on
                   \               \
                    `--x            `--x             branches: annealed over `anneal_steps`, judged

        stage a            |       stage b        |
                        end_step               end_step

A branch begins at o, after as many updates as its step says, reads the very batches that the trunk
reads next, and ends at x, within its stage. What is decided here is integers alone; what a branch
does is told in lcl/branches.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class StageClock(NamedTuple):
    """A stage as a branch sees it.

    Attributes:
        name: for errors.
        first_step, end_step: it trains the steps first_step <= t < end_step.
        clock_zero: the step at which the learning-rate schedule's clock was last zero: 0, or the
            first step of the newest stage (this one included) that restarts it.
    """

    name: str
    first_step: int
    end_step: int
    clock_zero: int = 0


@dataclass(frozen=True)
class Branches:
    """Annealed side runs: what the weights would be worth had one stopped here.

    The constant phase of a schedule is good for going on and bad for judging: its noise hides what
    was learned. So a copy of the state is annealed over the next `anneal_steps` batches, with the
    trunk's moments and the schedule's own anneal counted from 0, and evaluated; it gives a line of
    evals.jsonl of the kind "branch" and nothing else. Each costs `anneal_steps` steps and, while it
    lasts, the memory of a second state.

    Args:
        anneal_steps: length of the anneal, t_a.
        every_steps: also branch at the multiples of this that lie in the constant phase, wherever
            the branch ends within its stage; None = only for the stages' ends.
        stage_ends: one branch a stage that ends where the stage does.

    >>> stages = [StageClock("en", 0, 100), StageClock("fr", 100, 160)]
    >>> Branches(anneal_steps=20, every_steps=40).begin(stages, constant_from=30)
    (40, 80, 120, 140)
    """

    anneal_steps: int
    every_steps: int | None = None
    stage_ends: bool = True

    def __post_init__(self) -> None:
        """Refuses lengths that are no whole number of steps, and branches that never are."""
        for name in ("anneal_steps", "every_steps"):
            value = getattr(self, name)
            if value is None and name == "every_steps":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Branches.{name}={value!r} must be a whole number of at least 1")
        if self.every_steps is None and not self.stage_ends:
            raise ValueError(
                "Branches.stage_ends=False and every_steps=None: there is no branch; set one of "
                "them, or HeldOut.branches=None"
            )

    def begin(
        self,
        stages: Sequence[StageClock],
        *,
        constant_from: int,
        constant_until: int | None = None,
    ) -> tuple[int, ...]:
        """The steps at which a branch begins, ascending.

        Args:
            stages: the run's stages, in order.
            constant_from: first step, on the schedule's clock, of its constant phase.
            constant_until: last step, on that clock, at which a branch may begin; None = any.

        Raises:
            ValueError: a stage's own branch does not fit into it, or lies outside the constant
                phase; or no multiple of `every_steps` lies within it.
        """
        phase = (constant_from, constant_until)
        steps: set[int] = set()
        for stage in stages:
            if self.stage_ends:
                steps.add(stage.end_step - self.anneal_steps)
                check_branch(stage.end_step - self.anneal_steps, self.anneal_steps, stage, *phase)
            if self.every_steps is not None:
                first = max(stage.first_step, stage.clock_zero + constant_from)
                last = stage.end_step - self.anneal_steps
                if constant_until is not None:
                    last = min(last, stage.clock_zero + constant_until)
                every = self.every_steps
                steps.update(range(max(1, -(-first // every)) * every, last + 1, every))
        if not steps:
            raise ValueError(
                f"Branches.every_steps={self.every_steps}: no multiple of it lies in the constant "
                f"phase with {self.anneal_steps} steps of its stage left; branch more often, or "
                "anneal over fewer steps"
            )
        return tuple(sorted(steps))


def check_branch(
    at: int,
    anneal_steps: int,
    stage: StageClock,
    constant_from: int,
    constant_until: int | None = None,
) -> None:
    """Refuses a branch that does not lie within its stage and the constant phase, in one line.

    Args:
        at: updates before the branch.
        anneal_steps: its length.
        stage: the stage that trains step `at`.
        constant_from, constant_until: as in `Branches.begin`.

    Raises:
        ValueError: says what lies where, and the mend.

    >>> check_branch(90, 20, StageClock("en", 0, 100), constant_from=30)
    Traceback (most recent call last):
    ValueError: a branch of 20 steps from step 90 would end after stage 'en', whose last is step 99;
    anneal over 10 steps or fewer, or branch earlier
    """
    length = stage.end_step - stage.first_step
    if at < stage.first_step:
        raise ValueError(
            f"a branch of {anneal_steps} steps is longer than stage {stage.name!r}, which has "
            f"{length}; set Branches.anneal_steps to {length} or fewer, or lengthen the stage"
        )
    if at + anneal_steps > stage.end_step:
        left = stage.end_step - at
        mend = f"anneal over {left} steps or fewer, or branch earlier" if left else "branch earlier"
        raise ValueError(
            f"a branch of {anneal_steps} steps from step {at} would end after stage "
            f"{stage.name!r}, whose last is step {stage.end_step - 1}; {mend}"
        )
    clock = at - stage.clock_zero
    where = f"a branch from step {at} of stage {stage.name!r}"
    restarted = f" (its clock restarted at step {stage.clock_zero})" if stage.clock_zero else ""
    if clock < constant_from:
        begins = stage.clock_zero + constant_from
        room = stage.end_step - begins
        mend = f"anneal over {room} steps or fewer, or " if 0 < room < anneal_steps else ""
        raise ValueError(
            f"{where} lies before the constant phase, which begins at step {begins}{restarted}; "
            f"{mend}branch later, or shorten the schedule's warm-up and cool-down"
        )
    if constant_until is not None and clock > constant_until:
        ends = stage.clock_zero + constant_until
        raise ValueError(
            f"{where} lies after the constant phase, which ends at step {ends}{restarted}; branch "
            "earlier, or let the schedule of the trunk have no anneal of its own"
        )
