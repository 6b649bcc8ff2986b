"""Next-token prediction: the exact global token average, and the loss of every source beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lcl.objectives.cross_entropy import chunked_cross_entropy


@dataclasses.dataclass(frozen=True)
class NextToken:
    """sum(weight * (nll + z_loss * lse^2)) / sum(weight) over every token of the global batch.

    A sum over a sum, never a mean of means: the loss does not depend on how rows are spread over
    devices or how full they are. A batch without any weight has loss 0 and gradient 0, not NaN.

    Attributes:
      z_loss: coefficient of lse^2; part of the loss, not of the sums by source.
      chunk_size: tokens of a device whose logits are alive at once.
    """

    z_loss: float = 0.0
    chunk_size: int = 512

    def __post_init__(self) -> None:
        if not self.z_loss >= 0.0:
            raise ValueError(f"z_loss={self.z_loss}: must be 0 or more; 1e-4 is usual")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size}: must be at least 1 token")

    def __call__(
        self, model: Any, params: Any, batch: Any, num_sources: int
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch, for `jax.value_and_grad(..., has_aux=True)`.

        Args:
          model: a Decoder, of which `apply(..., method="hidden")`, `head_kernel(params)` and
            `config.dtype` are used.
          params: its parameters.
          batch: a Batch, fields [B, T].
          num_sources: source_ids lie in 0 .. num_sources - 1.

        Returns:
          loss, float32 scalar in nats per token, and a dict of float32 arrays:
          "nll_sum_by_source" [num_sources] (weighted nats), "weight_by_source" [num_sources] and
          "weight" (scalar).
        """
        hidden_BTD = model.apply(
            {"params": params},
            batch.tokens,
            batch.positions,
            segment_ids_BT=batch.segment_ids,
            row_index_BT=batch.row_index,
            method="hidden",
        )
        total, nll_BT = chunked_cross_entropy(
            hidden_BTD,
            model.head_kernel(params),
            batch.targets,
            batch.loss_weights,
            chunk_size=self.chunk_size,
            z_loss=self.z_loss,
            dtype=model.config.dtype,
        )
        weight = jnp.sum(batch.loss_weights)
        aux = {
            "nll_sum_by_source": sum_by_source(
                nll_BT * batch.loss_weights, batch.source_ids, num_sources
            ),
            "weight_by_source": sum_by_source(batch.loss_weights, batch.source_ids, num_sources),
            "weight": weight,
        }
        return total / jnp.where(weight > 0.0, weight, 1.0), aux


def sum_by_source(values_BT: jax.Array, source_ids_BT: jax.Array, num_sources: int) -> jax.Array:
    """Sums `values` by source.

    Args:
      values_BT: float [B, T].
      source_ids_BT: int32 [B, T] in 0 .. num_sources - 1.
      num_sources: how many sums.

    Returns:
      float [num_sources].

    Example:
      >>> import jax.numpy as jnp
      >>> sum_by_source(jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[1, 0, 1]]), 3).tolist()
      [2.0, 5.0, 0.0]
    """
    # Compare and reduce: fuses into one pass and, unlike a scatter, splits over any mesh.
    hit_BTX = source_ids_BT[..., None] == jnp.arange(num_sources)
    return jnp.sum(jnp.where(hit_BTX, values_BT[..., None], 0.0), axis=(0, 1))
