"""Next-token prediction: the exact global average, and the loss of every source beside it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lcl.objectives.cross_entropy import chunked_cross_entropy

NORMALISATIONS = ("token", "sequence", "row")


@dataclasses.dataclass(frozen=True)
class NextToken:
    """sum(share * (nll + z_loss * lse^2)) / sum(share) over every token of the global batch.

    A sum over a sum, never a mean of means over devices: the loss does not depend on how rows are
    spread over devices or how full they are. A batch without any weight has loss 0 and gradient 0,
    not NaN. What has an equal say is a choice; `loss_weights` is w:

        normalisation   share of a token                    so the loss is
        "token"         w                                   the mean over the batch's tokens
        "sequence"      w / (sum of w in its document)      the mean over the documents' means
        "row"           w / (sum of w in its row)           the mean over the rows' means

    documents of 1 and 3 tokens, then one of 4 in a row of its own, nll as drawn:

        |a bbb|   |cccc|      a: 8   b: 4 4 4   c: 2 2 2 2
        token (8 + 12 + 8) / 8 = 3.5   sequence (8 + 4 + 2) / 3 = 4.67   row (20 / 4 + 2) / 2 = 3.5

    "sequence" is LongAlign's loss weighting (arXiv:2401.18058), which makes packed rows count as
    the same documents unpacked; its code divides by the mean count over batches, here the count is
    the batch's own, exactly. A document is a segment: with `document_mask=False` a row is one, a
    piece of a document cut at a row's end is one, and so is a fragment of SkyLadder's.

    Attributes:
      z_loss: coefficient of lse^2; part of the loss, not of the sums by source.
      chunk_size: tokens of a device whose logits are alive at once.
      vocab_chunk: columns of the output head that are worked on at once, in two passes; None
        chooses. See `lcl.objectives.cross_entropy`.
      keep_head: in two passes, gather each piece once and keep it: memory for a whole head in the
        compute dtype, half of the gathers.
      normalisation: "token", "sequence" or "row". The loss and its gradient only: the sums by
        source, from which the loss of every domain is reported, count tokens always.
    """

    z_loss: float = 0.0
    chunk_size: int = 512
    vocab_chunk: int | None = None
    keep_head: bool = False
    normalisation: str = "token"

    def __post_init__(self) -> None:
        if not self.z_loss >= 0.0:
            raise ValueError(f"z_loss={self.z_loss}: must be 0 or more; 1e-4 is usual")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size}: must be at least 1 token")
        if self.vocab_chunk is not None and self.vocab_chunk < 1:
            raise ValueError(f"vocab_chunk={self.vocab_chunk}: must be at least 1 column, or None")
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(
                f"normalisation {self.normalisation!r} is unknown; use one of "
                f"{', '.join(NORMALISATIONS)}"
            )

    def denominator(self, batch: Any) -> jax.Array:
        """What the loss of this batch is divided by: the sum of its tokens' shares, float32."""
        _, num_shares = loss_shares(batch.segment_ids, batch.loss_weights, self.normalisation)
        return num_shares

    def __call__(
        self,
        model: Any,
        params: Any,
        batch: Any,
        num_sources: int,
        denominator: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch, for `jax.value_and_grad(..., has_aux=True)`.

        Args:
          model: a Decoder, of which `apply(..., method="hidden")`, `head_kernel(params)` and
            `config.dtype` are used.
          params: its parameters.
          batch: a Batch, fields [B, T].
          num_sources: source_ids lie in 0 .. num_sources - 1.
          denominator: divide by this instead of the batch's own (where the batch is a piece of a
            larger one, whose loss is then the sum of the pieces').

        Returns:
          loss, float32 scalar in nats per token, averaged as `normalisation` says, and a dict of
          float32 arrays:
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
        share_BT, num_shares = loss_shares(
            batch.segment_ids, batch.loss_weights, self.normalisation
        )
        total, nll_BT = chunked_cross_entropy(
            hidden_BTD,
            model.head_kernel(params),
            batch.targets,
            share_BT,
            chunk_size=self.chunk_size,
            vocab_chunk=self.vocab_chunk,
            keep_head=self.keep_head,
            z_loss=self.z_loss,
            dtype=model.config.dtype,
            gradient_dtype=model.config.gradient_dtype,
        )
        if denominator is not None:
            num_shares = denominator
        aux = {
            "nll_sum_by_source": sum_by_source(
                nll_BT * batch.loss_weights, batch.source_ids, num_sources
            ),
            "weight_by_source": sum_by_source(batch.loss_weights, batch.source_ids, num_sources),
            "weight": jnp.sum(batch.loss_weights),
        }
        return total / jnp.where(num_shares > 0.0, num_shares, 1.0), aux


def loss_shares(
    segment_ids_BT: jax.Array, loss_weights_BT: jax.Array, normalisation: str
) -> tuple[jax.Array, jax.Array]:
    """Each token's share of the loss, and the sum of all shares.

    Args:
      segment_ids_BT: int32 [B, T], in 0 .. T; the cells of a segment may stand anywhere in the row
        (a balanced context mesh permutes it).
      loss_weights_BT: float32 [B, T], 0 or more.
      normalisation: see `NextToken`.

    Returns:
      float32 [B, T] and a float32 scalar: the sum of the weights, or the number of segments or rows
      that have weight.

    Example:
      >>> import jax.numpy as jnp
      >>> weights = jnp.array([[1.0, 1.0, 1.0, 0.0]])
      >>> share, total = loss_shares(jnp.array([[1, 2, 2, 0]]), weights, "sequence")
      >>> share.tolist(), float(total)
      ([[1.0, 0.5, 0.5, 0.0]], 2.0)
    """
    if normalisation == "token":
        return loss_weights_BT, jnp.sum(loss_weights_BT)
    if normalisation == "row":
        sums_BG = jnp.sum(loss_weights_BT, axis=1, keepdims=True)
        own_BT = sums_BG
    else:
        num_groups = segment_ids_BT.shape[1] + 1
        sum_row = partial(jax.ops.segment_sum, num_segments=num_groups)
        sums_BG = jax.vmap(sum_row)(loss_weights_BT, segment_ids_BT)
        own_BT = jnp.take_along_axis(sums_BG, segment_ids_BT, axis=1)
    share_BT = loss_weights_BT / jnp.where(own_BT > 0.0, own_BT, 1.0)
    return share_BT, jnp.sum(sums_BG > 0.0, dtype=jnp.float32)


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
