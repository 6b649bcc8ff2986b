"""Dense attention, written to be obviously right: the oracle that every kernel is held to.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K query
heads a key head, H head dim.

It makes the [T, S] scores, so memory is quadratic; it takes any mask and any row order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lcl.attention.mask import Mask


def reference(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask,
    segment_ids_BT: jax.Array | None = None,
    row_index_BT: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + mask) v, with the softmax in float32 (or float64, if q is).

    Query head n reads key head n // (N / K): grouped-query attention without repeating the keys.

    Args:
      q_BTNH: queries, float [B, T, N, H], already rotated by RoPE.
      k_BSKH, v_BSKH: keys and values, float [B, S, K, H] with S == T and N % K == 0.
      mask: the rules on row indices.
      segment_ids_BT: int [B, T], documents; 0 is padding. None: one document.
      row_index_BT: int [B, T], original row indices. None: 0 .. T-1.
      scale: multiplies the scores; None is H ** -0.5.

    Returns:
      float [B, T, N, H], q's dtype. A query that sees no key gives 0, and its gradients are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> ones = jnp.ones((1, 2, 1, 4))
      >>> out = reference(ones, ones, jnp.array([[[[2.0]], [[4.0]]]]) * ones, mask=Mask())
      >>> out[0, :, 0, 0].tolist()
      [2.0, 3.0]
    """
    batch, num_rows, num_heads, head_dim = q_BTNH.shape
    num_kv_heads = k_BSKH.shape[2]
    accum = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    scale = head_dim**-0.5 if scale is None else scale
    row_index = jnp.arange(num_rows) if row_index_BT is None else row_index_BT
    seen_xTS = mask.dense(row_index, segment_ids_BT)
    seen_BTS = jnp.broadcast_to(seen_xTS, (batch, num_rows, num_rows))[:, None, None]

    q_BTKGH = q_BTNH.reshape(batch, num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=accum)
    scores = jnp.where(seen_BTS, scores * scale, -jnp.inf)
    # A row without keys has a maximum of -inf; 0 in its place keeps exp(-inf - max) = 0, not NaN.
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    # The inner where keeps masked scores out of exp's derivative as well (0 * inf is NaN).
    p = jnp.where(seen_BTS, jnp.exp(jnp.where(seen_BTS, scores - top, 0.0)), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    p = p / jnp.where(total == 0.0, 1.0, total)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", p, v_BSKH, preferred_element_type=accum)
    return out.reshape(q_BTNH.shape).astype(q_BTNH.dtype)
