"""The door to every attention kernel: `attend`.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import jax

from lcl.attention.mask import Mask
from lcl.attention.reference import reference

IMPLEMENTATIONS = ("auto", "reference", "blocked")


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask = Mask(causal=True),  # noqa: B008  (frozen)
    segment_ids_BT: jax.Array | None = None,
    row_index_BT: jax.Array | None = None,
    impl: str = "auto",
    scale: float | None = None,
) -> jax.Array:
    """Attention of every query over the keys its mask and document let it see.

    Args:
      q_BTNH: queries, float32 or bfloat16 [B, T, N, H], already rotated by RoPE.
      k_BSKH, v_BSKH: keys and values [B, S, K, H], S == T; K divides N (K == N is plain multi-head,
        K == 1 multi-query).
      mask: causal, window, prefix, explicit; see `Mask`.
      segment_ids_BT: int32 [B, T], the document of each token, 0 = padding. None: one document.
      row_index_BT: int32 [B, T], the original row index of each token. None: 0 .. T-1 in order.
      impl: "auto" | "reference" | "blocked".
      scale: multiplies the scores; None is H ** -0.5.

    Returns:
      [B, T, N, H] in q's dtype; 0 where a query sees no key (padding).
    """
    return reference(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=mask,
        segment_ids_BT=segment_ids_BT,
        row_index_BT=row_index_BT,
        scale=scale,
    )
