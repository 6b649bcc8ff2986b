r"""What a diagnostic is, and how the loop asks for it.

    step t:  parameters, batch --> diagnostic, if t is due --> scalars --\
                             \---> train step ---------------> metrics --+--> line of metrics.jsonl

It reads the parameters before the update and the very batch of the update, is jitted, donates
nothing, and so cannot change a bit of the run. The line of a step that is not due has none of it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from lcl.models import Decoder, DecoderConfig
from lcl.parallel import rules

MeasureFn = Callable[[Any, Any], dict[str, jax.Array]]


class Diagnostic(abc.ABC):
    """Something to look at every so many steps: `Logging.diagnostics`."""

    every_steps: int

    @abc.abstractmethod
    def build(self, model: Any, objective: Any, num_sources: int) -> MeasureFn:
        """The measurement: (params, batch) -> {name: float32 scalar}; pure, jitted by the caller.

        Args:
          model: the decoder.
          objective: the run's.
          num_sources: twice the number of domains.

        Returns:
          A function; a NaN says that there is nothing to see at this step, and is not written.
        """

    def due(self, step: int) -> bool:
        """Whether step t is looked at: steps 0, n, 2 n, ..."""
        return step % self.every_steps == 0


class Diagnostics:
    """A run's diagnostics, each compiled once a model and shape of batch.

    Args:
      diagnostics: `Logging.diagnostics`.
      objective: the run's.
      num_sources: twice the number of domains.
      mesh: where parameters and batches lie.
    """

    def __init__(
        self,
        diagnostics: Sequence[Diagnostic],
        *,
        objective: Any,
        num_sources: int,
        mesh: jax.sharding.Mesh,
    ) -> None:
        self._diagnostics = tuple(diagnostics)
        self._objective = objective
        self._num_sources = num_sources
        self._mesh = mesh
        self._jitted: dict[Any, Any] = {}

    def due(self, step: int) -> bool:
        """Whether any of them looks at this step."""
        return any(diagnostic.due(step) for diagnostic in self._diagnostics)

    def measure(
        self, step: int, model: DecoderConfig, params: Any, batch: Any
    ) -> dict[str, jax.Array]:
        """The scalars of those that look at this step, on the device and perhaps under way.

        Args:
          step: t.
          model: the stage's decoder, as it runs on the mesh.
          params: before the update.
          batch: the update's.
        """
        found: dict[str, jax.Array] = {}
        for index, diagnostic in enumerate(self._diagnostics):
            if not diagnostic.due(step):
                continue
            key = index, model
            if key not in self._jitted:
                built = diagnostic.build(Decoder(model), self._objective, self._num_sources)
                self._jitted[key] = jax.jit(_by_the_rules(built))
            with jax.set_mesh(self._mesh):
                found |= self._jitted[key](params, batch)
        return found


def _by_the_rules(function: MeasureFn) -> MeasureFn:
    """`function`, traced under the logical rules."""

    def traced(params: Any, batch: Any) -> dict[str, jax.Array]:
        with nn.logical_axis_rules(rules.LOGICAL_AXIS_RULES):
            return function(params, batch)

    return traced
