r"""Gradient alignment: do the new and the replayed tokens of a batch pull the same way?

    cos(g, r) = g . r / (|g| |r|)      g, r: gradients of the new and of the replayed tokens' loss

    1  the same step serves both (transfer)     0  neither helps nor harms     -1  interference

It is the mechanism that Meta-Experience Replay claims (Riemer et al., 1810.11910; 2508.01908 for
language models): Reptile is said to raise it. A claim about the mechanism can be looked at here,
whatever becomes of the losses.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lcl.analysis.diagnostic import Diagnostic, MeasureFn
from lcl.objectives.parts import both_gradients, cosine, dot, plain

# Where a decoder keeps its layers: every leaf's axis 0 counts them, scanned or not.
LAYERS = "layers"


@dataclasses.dataclass(frozen=True)
class GradientAlignment(Diagnostic):
    """The cosine between the gradients of a batch's new and replayed tokens, whole and by layer.

    Written as "gradient_cosine" and, by layer, "gradient_cosine/layer_00", ... The gradients are
    the loss's own: before clipping and before what a method makes of them (`AGem`). Steps without
    replayed tokens write nothing. One look costs two steps' compute, and two gradient trees.

    Attributes:
      every_steps: looked at in steps 0, n, 2 n, ...
      by_layer: also the cosine within each layer.

    >>> GradientAlignment(every_steps=50).due(100)
    True
    """

    every_steps: int = 100
    by_layer: bool = True

    def __post_init__(self) -> None:
        """Refuses an interval of no steps."""
        every = self.every_steps
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"GradientAlignment.every_steps={every!r} must be 1 or more")

    def build(self, model: Any, objective: Any, num_sources: int) -> MeasureFn:
        """See `Diagnostic`."""
        loss = plain(objective)

        def measure(params: Any, batch: Any) -> dict[str, jax.Array]:
            _, new, replayed = both_gradients(loss, model, params, batch, num_sources)
            found = {"gradient_cosine": _cosine(new, replayed)}
            if self.by_layer and LAYERS in params:
                per_layer = jax.vmap(_cosine)(new[LAYERS], replayed[LAYERS])
                for layer in range(per_layer.shape[0]):
                    found[f"gradient_cosine/layer_{layer:02d}"] = per_layer[layer]
            return found

        return measure


def _cosine(a: Any, b: Any) -> jax.Array:
    return jnp.asarray(cosine(dot(a, b), dot(a, a), dot(b, b)), jnp.float32)
