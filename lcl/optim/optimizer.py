"""What a run asks of its optimizer: one base class with the answers that most of them give.

    update    build()                          the whole Optax chain, the method's own part included
    log       learning_rate                    the rate that the next update uses
    border    at_stage_end -> on_exit -> moved | evaluate, save | on_enter -> moved -> carry_over
    evaluate  eval_params                      the parameters that are judged, never trained on
    branch    annealed, constant_from          the same optimizer on its way down
    guard     skipped                          a step that is left out

Every function is pure and is traced by the loop's jitted programs. A method that wraps another
optimizer (`lcl.optim.Reptile`) hands each question on to the one inside and adds its own part.
"""

from __future__ import annotations

import abc
from typing import Any

import jax
import optax


class Optimizer(abc.ABC):
    """An Optax chain, and what becomes of its state where a run is not one long row of updates.

    A state is what `build().init(params)` gives; all functions keep its structure, so that it is
    sharded, donated and checkpointed as one.
    """

    @property
    def changes_at_stage_end(self) -> bool:
        """Whether `at_stage_end` is more than the identity; if not, nothing is compiled for it."""
        return False

    @property
    def changes_eval_params(self) -> bool:
        """Whether `eval_params` is more than the identity; if not, nothing is compiled for it."""
        return False

    @abc.abstractmethod
    def build(self) -> optax.GradientTransformation:
        """The whole chain, from gradients to what is added to the parameters."""

    @abc.abstractmethod
    def learning_rate(self, opt_state: Any) -> jax.Array:
        """The rate that the next update will use: float32 scalar, traced or not."""

    @abc.abstractmethod
    def carry_over(
        self, opt_state: Any, fresh_state: Any, *, keep_moments: bool, keep_clock: bool
    ) -> Any:
        """The optimizer state with which a new stage starts.

        Args:
          opt_state: the state at the end of the stage before.
          fresh_state: `build().init(params)` of the parameters that the stage starts from.
          keep_moments: False: whatever was learned from gradients is taken from `fresh_state`.
          keep_clock: False: the learning-rate schedule starts at zero again.

        Returns:
          A state of the same structure.
        """

    @abc.abstractmethod
    def skipped(self, opt_state: Any) -> Any:
        """The state after a step that is left out: the clock goes on, nothing is learned."""

    def at_stage_end(self, params: Any, opt_state: Any) -> tuple[Any, Any]:
        """Parameters and state as a stage leaves them, before its `on_exit`: by default as is."""
        return params, opt_state

    def moved(self, params: Any, opt_state: Any) -> Any:
        """The state once a stage's transform (`on_exit`, `on_enter`) has changed the parameters.

        Args:
          params: the parameters after the transform.
          opt_state: the state before it.

        Returns:
          A state whose own copies of parameters, if it holds any, have moved too.
        """
        del params
        return opt_state

    def eval_params(self, params: Any, opt_state: Any) -> Any:
        """The parameters that evaluations, samples and branches judge: by default the trained."""
        del opt_state
        return params

    def annealed(self, anneal_steps: int) -> Optimizer:
        """The same optimizer whose schedule is the anneal, from the constant phase, counted from 0.

        Its chain has the same state, so that a branch takes over the trunk's (with the clock at
        zero).

        Raises:
          ValueError: the schedule has no constant phase to anneal from; names the mend.
        """
        raise ValueError(
            f"{type(self).__name__} has no schedule that could be annealed over {anneal_steps} "
            "steps; branches need one with a constant phase (infinite, wsd, constant)"
        )

    def constant_from(self) -> int:
        """First step, on the schedule's clock, of the constant phase; none may branch before it.

        Raises:
          ValueError: the schedule has no constant phase; names the mend.
        """
        raise ValueError(
            f"{type(self).__name__} has no schedule with a constant phase to branch from; use "
            "infinite, wsd or constant"
        )

    def constant_until(self) -> int | None:
        """Last step, on the schedule's clock, at which a branch may begin; None: there is none.

        Raises:
          ValueError: as `constant_from`.
        """
        self.constant_from()
        return None
