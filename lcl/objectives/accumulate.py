"""Gradient accumulation: a batch gone over piece by piece, its loss and gradient unchanged.

    8 rows on 2 devices, 2 pieces    device 0: rows 0 1 2 3    device 1: rows 4 5 6 7
        piece 0   rows 0 2 4 6                      0   2                     4   6
        piece 1   rows 1 3 5 7                        1   3                     5   7

A piece takes every n-th row, so each device finds its part of every piece among the rows that it
holds: nothing moves between devices. The activations of one piece are alive at once, and one more
gradient tree (float32, lying as the parameters lie).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lcl.objectives.next_token import NextToken


@dataclasses.dataclass(frozen=True)
class Accumulate:
    """`objective` over the batch in `pieces`, by `lax.scan`: a sum over sums, not a mean of means.

    Every piece's sum is divided by the whole batch's denominator, which the batch alone decides, so
    loss and gradient are the whole batch's, up to the order of float32 additions, however unequally
    padding or loss weights are spread over the pieces. It changes memory and time, never the
    result, and so is no part of a run's identity.

    Attributes:
      pieces: how many; rows of a batch must be a multiple of pieces x data x fsdp.
      objective: the loss.

    Raises:
      ValueError: fewer than 1 piece.

    Example:
      >>> Accumulate(pieces=4).objective.normalisation
      'token'
    """

    pieces: int
    objective: NextToken = dataclasses.field(default_factory=NextToken)

    def __post_init__(self) -> None:
        if isinstance(self.pieces, bool) or not isinstance(self.pieces, int) or self.pieces < 1:
            raise ValueError(f"Accumulate.pieces={self.pieces!r} must be a whole number, 1 or more")
        if hasattr(self.objective, "value_and_grad"):
            # Differentiated piece by piece, such an objective would lose what it does.
            raise ValueError(
                f"Accumulate.objective={type(self.objective).__name__} has a gradient of its own; "
                "put Accumulate inside it"
            )

    def __call__(
        self, model: Any, params: Any, batch: Any, num_sources: int
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of the whole batch at once; see `NextToken`. Evaluations come here."""
        return self.objective(model, params, batch, num_sources)

    def value_and_grad(
        self, model: Any, params: Any, batch: Any, num_sources: int
    ) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
        """((loss, sums), gradients) as `jax.value_and_grad(..., has_aux=True)` gives them.

        Args:
          model: a Decoder.
          params: its parameters.
          batch: a Batch, fields [B, T], B a multiple of `pieces`.
          num_sources: as for the objective.
        """
        denominator = self.objective.denominator(batch)
        value_and_grad = jax.value_and_grad(self.objective, argnums=1, has_aux=True)

        def add_piece(total: Any, piece: Any) -> tuple[Any, None]:
            value = value_and_grad(model, params, piece, num_sources, denominator)
            return jax.tree.map(jnp.add, total, value), None

        pieces = jax.tree.map(self._split, batch)
        first = jax.tree.map(lambda x: x[0], pieces)
        shapes = jax.eval_shape(
            lambda piece: value_and_grad(model, params, piece, num_sources, denominator), first
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add_piece, zeros, pieces)
        return total

    def _split(self, x_BT: jax.Array) -> jax.Array:
        """[B, T] -> [pieces, B / pieces, T], each piece spread over the devices as the batch is."""
        rows = x_BT.shape[0] // self.pieces
        pieces = jnp.moveaxis(x_BT.reshape(rows, self.pieces, -1), 1, 0)
        return nn.with_logical_constraint(pieces, (None, "batch", "sequence"))
