"""The step: one pure function from a state and a batch to the next state and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.struct
import jax
import optax

from lcl.data import Batch
from lcl.models import Decoder
from lcl.objectives.parts import value_and_grad_of
from lcl.optim import Optimizer

Metrics = Mapping[str, jax.Array]


class Objective(Protocol):
    """A loss: `lcl.objectives.NextToken`, or anything that is called like it.

    One that has `value_and_grad` (same arguments) is asked for its gradient in that way, instead of
    being differentiated as a whole: `lcl.objectives.Accumulate` goes over the batch piece by piece.
    """

    def __call__(
        self, model: Decoder, params: Any, batch: Batch, num_sources: int
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss in nats per token, and sums by source."""
        ...


@flax.struct.dataclass
class TrainState:
    """All that a run remembers, one pytree: sharded, donated and checkpointed as a whole.

    Attributes:
      step: int32 scalar, updates so far.
      params: float32 parameters of the decoder.
      opt_state: state of the Optax chain, the method's state included.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def make_train_step(
    model: Decoder,
    objective: Objective,
    optimizer: Optimizer,
    chain: optax.GradientTransformation,
    num_sources: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step: (state, batch) -> (next state, metrics); pure, jitted by the caller.

    Args:
      model: the decoder.
      objective: (model, params, batch, num_sources) -> (loss, sums by source).
      optimizer: knows the schedule.
      chain: `optimizer.build()`.
      num_sources: twice the number of domains: new tokens of each, then replayed ones of each.

    Returns:
      A function whose metrics are float32 device arrays: "loss" (nats/token, the exact global
      average), "grad_norm" (before clipping), "learning_rate" (the one this update uses), and the
      objective's "weight", "nll_sum_by_source" and "weight_by_source"; a method's own figures, if
      it has any, stand under "diagnostics" by name (NaN: none at this step).
    """
    value_and_grad = value_and_grad_of(objective)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (loss, sums), gradients = value_and_grad(model, state.params, batch, num_sources)
        learning_rate = optimizer.learning_rate(state.opt_state)
        updates, opt_state = chain.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.global_norm(gradients),
            "learning_rate": learning_rate,
            **sums,
        }
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def make_eval_step(
    model: Decoder, objective: Objective, num_sources: int
) -> Callable[[Any, Batch], Metrics]:
    """The held-out forward: (params, batch) -> the objective's sums by source."""

    def eval_step(params: Any, batch: Batch) -> Metrics:
        _, sums = objective(model, params, batch, num_sources)
        return sums

    return eval_step
