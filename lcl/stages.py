"""A continual run as a list of stages: what each reads, and what it keeps, resets and changes.

Four words that are often one word, and four different things here:

    resume      the same run goes on: everything is restored, bit for bit
    new stage   the run's next stage: the weights stay, and of the rest what its policy says
    warm start  another run's weights and nothing else
    branch      a side run from some step; the run itself goes on as if it had not been

What happens at a border, in this order (`lcl.train` holds to it, so that a run killed anywhere
goes on exactly):

    ... last step | method, on_exit | evaluate | save | on_enter, moments, clock | first step ...
                              a checkpoint at a border holds the state *between* two stages
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import optax

from lcl.data import StageData
from lcl.evals import StageClock
from lcl.models.rope import Rope
from lcl.optim import Optimizer

__all__ = ["Span", "Stage", "changes_state", "clocks", "enter", "leave", "timeline"]

Transform = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a continual run.

    Attributes:
      name: shown in every report; unique in a run.
      data: what it reads: mixture, order, layout, batch size, replay (`lcl.data.StageData`).
      steps: its length in steps; or
      tokens: its length in *new* tokens (replayed ones come on top), rounded up to whole steps.
      moments: "keep" or "reset" the optimizer's moments when the stage starts.
      clock: "continue" or "restart" the learning-rate schedule when the stage starts.
      rope: rotary embedding from this stage on within it; None = the model's own. A longer context
        usually wants one (`lcl.models.rope`).
      on_enter, on_exit: pure functions of the parameters, applied at the stage's two ends (expand,
        merge, estimate); None = the identity.

    >>> from lcl.data import Mixture
    >>> data = StageData(Mixture({"en": 1.0}), sequence_length=256, batch_size=8)
    >>> Stage(name="english", data=data, tokens=10_000).num_steps
    5
    """

    name: str
    data: StageData
    steps: int | None = None
    tokens: int | None = None
    moments: str = "keep"
    clock: str = "continue"
    rope: Rope | None = None
    on_enter: Transform | None = None
    on_exit: Transform | None = None

    def __post_init__(self) -> None:
        """Refuses a stage without a length or with an unknown policy."""
        if not self.name:
            raise ValueError("a stage has no name; set Stage.name")
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(
                f"stage {self.name!r} needs either steps or tokens, "
                f"got steps={self.steps} and tokens={self.tokens}"
            )
        length = self.steps if self.steps is not None else self.tokens
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"stage {self.name!r} must be at least one step long, got {length!r}")
        for field, allowed in (("moments", ("keep", "reset")), ("clock", ("continue", "restart"))):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"stage {self.name!r}: {field}={getattr(self, field)!r} is unknown; "
                    f"use {allowed[0]!r} or {allowed[1]!r}"
                )

    @property
    def num_steps(self) -> int:
        """Its length in steps."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // (self.data.batch_size * self.data.sequence_length))


@dataclasses.dataclass(frozen=True)
class Span:
    """A stage's place on the run's clock: the steps first_step <= t < end_step."""

    index: int
    stage: Stage
    first_step: int
    end_step: int


def timeline(stages: Sequence[Stage]) -> tuple[Span, ...]:
    """Places the stages one behind the other.

    Raises:
      ValueError: no stage at all, two of one name, or replay where nothing was seen.

    >>> from lcl.data import Mixture
    >>> data = StageData(Mixture({"en": 1.0}), sequence_length=256, batch_size=8)
    >>> spans = timeline([Stage("a", data, steps=3), Stage("b", data, steps=4)])
    >>> [(span.stage.name, span.first_step, span.end_step) for span in spans]
    [('a', 0, 3), ('b', 3, 7)]
    """
    if not stages:
        raise ValueError("the run has no stages; bind train.stages = [@first/Stage(), ...]")
    names = [stage.name for stage in stages]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"two stages are called {repeated[0]!r}; give each a name of its own")
    if len(stages) == 1 and stages[0].data.replay is not None:
        raise ValueError(
            f"stage {names[0]!r} is the run's only one and replays, but nothing was seen before "
            "it: take its StageData.replay away, or add the stages before it"
        )
    spans, first = [], 0
    for index, stage in enumerate(stages):
        spans.append(Span(index, stage, first, first + stage.num_steps))
        first += stage.num_steps
    return tuple(spans)


def check_rows_seen(stages: Sequence[Stage], sequence_length: int) -> None:
    """Refuses an evaluation on rows longer than any bucket of a run that decomposes its documents.

    Positions that no step trains would be judged. Transforms may train them on short rows (PoSE),
    so a run that has some is left alone.

    Args:
      stages: all of the run.
      sequence_length: of the evaluation.

    Raises:
      ValueError: names both lengths and the mend.
    """
    data = [stage.data for stage in stages]
    longest = max(one.sequence_length for one in data)
    free = any(one.decomposition is None or one.transforms for one in data)
    if not free and longest < sequence_length:
        raise ValueError(
            f"the evaluation has rows of {sequence_length} tokens, but the longest bucket has "
            f"{longest}: set HeldOut.sequence_length to {longest} or fewer, or a stage's "
            f"Decomposition.max_log2 to {(sequence_length - 1).bit_length()} (its sequence_length "
            f"to 2 ** that)"
        )


def clocks(spans: Sequence[Span]) -> list[StageClock]:
    """The stages as branches see them: where each lies, and where its schedule's clock was zero.

    >>> from lcl.data import Mixture
    >>> data = StageData(Mixture({"en": 1.0}), sequence_length=256, batch_size=8)
    >>> stages = [Stage("a", data, steps=3), Stage("b", data, steps=4, clock="restart")]
    >>> [clock.clock_zero for clock in clocks(timeline(stages))]
    [0, 3]
    """
    zero, found = 0, []
    for span in spans:
        zero = span.first_step if span.stage.clock == "restart" else zero
        found.append(StageClock(span.stage.name, span.first_step, span.end_step, zero))
    return found


def enter(
    stage: Stage,
    params: Any,
    opt_state: Any,
    optimizer: Optimizer,
    chain: optax.GradientTransformation,
) -> tuple[Any, Any]:
    """Parameters and optimizer state with which `stage` starts; pure, and jitted by the loop.

    Args:
      stage: the stage that is about to begin.
      params: parameters at the end of the stage before (or the initial ones).
      opt_state: optimizer state at the end of the stage before.
      optimizer: the run's; says what its state becomes.
      chain: `optimizer.build()`.

    Returns:
      (params, opt_state) of the same structure.
    """
    if stage.on_enter is not None:
        params = stage.on_enter(params)
        opt_state = optimizer.moved(params, opt_state)
    opt_state = optimizer.carry_over(
        opt_state,
        chain.init(params),
        keep_moments=stage.moments == "keep",
        keep_clock=stage.clock == "continue",
    )
    return params, opt_state


def leave(stage: Stage, params: Any, opt_state: Any, optimizer: Optimizer) -> tuple[Any, Any]:
    """Parameters and optimizer state as `stage` leaves them; pure, and jitted by the loop.

    The optimizer's own end of a stage (Reptile's last step towards its slow weights, say) comes
    before `on_exit`: what a stage hands on is what the method says that it has learned.

    Args:
      stage: the stage that has just had its last update.
      params, opt_state: after that update.
      optimizer: the run's.

    Returns:
      (params, opt_state) of the same structure.
    """
    params, opt_state = optimizer.at_stage_end(params, opt_state)
    if stage.on_exit is not None:
        params = stage.on_exit(params)
        opt_state = optimizer.moved(params, opt_state)
    return params, opt_state


def changes_state(stage: Stage) -> bool:
    """Whether entering `stage` changes anything, so that the loop need not compile the identity."""
    return stage.on_enter is not None or stage.moments == "reset" or stage.clock == "restart"
