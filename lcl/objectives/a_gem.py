r"""A-GEM: a step on the new tokens that is not allowed to raise the loss of the replayed ones.

With g the gradient of the batch's new tokens and r that of its replayed ones:

    g' = g                              if  g . r >= 0
    g' = g - (g . r) / (r . r) * r      else                    so that  g' . r = 0

            r                            g' is g without its part against r: the nearest gradient
            |                            to g whose step leaves the replayed loss alone, to first
        ____|____ g'                     order
            |\
            | \ g

"Efficient Lifelong Learning with A-GEM" (Chaudhry et al., 1812.00420, equation 11; the problem is
equation 10). The replayed tokens are a reference only: nothing is learned from them directly, which
is what sets it apart from replay. It is here as a comparator: replay trains on both parts, A-GEM
bends one by the other.

Where the projection stands: before clipping, momentum and weight decay. What AdamW makes of g' need
not be at right angles to r any more; the paper uses plain SGD.

Cost: two forward and backward passes over the batch (each with the other part's weights at zero)
and one more gradient tree: about twice a step's compute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lcl.objectives.accumulate import Accumulate
from lcl.objectives.next_token import NextToken
from lcl.objectives.parts import both_gradients, cosine, dot


@dataclasses.dataclass(frozen=True)
class AGem:
    """The new tokens' gradient, projected against the replayed tokens'.

    A batch without replayed tokens (all of the first stage) gives its plain gradient. Every later
    stage must have replay: a configuration in which one has none is refused when it is built.

    The step's line of metrics.jsonl also holds "gradient_cosine" (between g and r) and
    "gradient_projected" (1 where g was changed, else 0), on steps with replayed tokens.

    Attributes:
      objective: the loss; `Accumulate` goes inside.

    >>> AGem().objective.normalisation
    'token'
    """

    objective: NextToken | Accumulate = dataclasses.field(default_factory=NextToken)
    changes_gradient: ClassVar[bool] = True

    @property
    def pieces(self) -> int:
        """Pieces in which the batch is gone over, by the objective inside."""
        return getattr(self.objective, "pieces", 1)

    def check_stages(self, stages: Sequence[Any]) -> None:
        """Refuses a run with a later stage that replays nothing.

        Args:
          stages: `lcl.stages.Stage`s in order.

        Raises:
          ValueError: names the stage and the mend.
        """
        for stage in stages[1:]:
            if stage.data.replay is None:
                raise ValueError(
                    f"AGem projects against replayed tokens, and stage {stage.name!r} replays "
                    "none; set its StageData.replay = @Replay()"
                )

    def __call__(
        self, model: Any, params: Any, batch: Any, num_sources: int
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of the whole batch; see `NextToken`. Evaluations come here."""
        return self.objective(model, params, batch, num_sources)

    def value_and_grad(
        self, model: Any, params: Any, batch: Any, num_sources: int
    ) -> tuple[tuple[jax.Array, dict[str, Any]], Any]:
        """((loss, sums), g'): loss and sums of the whole batch, and the gradient to step along.

        Args:
          model, params, batch, num_sources: as for the objective.
        """
        value, gradient, reference = both_gradients(
            self.objective, model, params, batch, num_sources
        )
        projected, found = project(gradient, reference)
        loss, sums = value
        return (loss, sums | {"diagnostics": found}), projected


def project(gradient: Any, reference: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Equation 11 on two gradient trees.

    Args:
      gradient: g.
      reference: r, of the same structure; all zero: there is nothing to project against.

    Returns:
      g', and {"gradient_cosine", "gradient_projected"}, float32 scalars, NaN where r is zero.

    >>> bent, found = project({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([-1.0, 1.0])})
    >>> bent["w"].tolist(), float(found["gradient_projected"])
    ([0.5, 0.5], 1.0)
    """
    along, size = dot(gradient, reference), dot(reference, reference)
    against = along < 0.0
    share = jnp.where(against, along / jnp.where(size > 0.0, size, 1.0), 0.0)
    projected = jax.tree.map(lambda g, r: g - (share * r).astype(g.dtype), gradient, reference)
    found = {
        "gradient_cosine": cosine(along, dot(gradient, gradient), size),
        "gradient_projected": jnp.where(size > 0.0, against.astype(jnp.float32), jnp.nan),
    }
    return projected, found
