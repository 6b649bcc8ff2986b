"""Dense attention, written to be obviously right: the oracle that every kernel is held to.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K query
heads a key head, H head dim.

It makes the [T, S] scores, so memory is quadratic; it takes any mask and any row order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lcl.attention.mask import Mask
from lcl.attention.rows import Rows


def reference(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask,
    query: Rows = Rows(),  # noqa: B008  (immutable)
    key: Rows | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + mask) v, with the softmax in float32 (or float64, if q is).

    Query head n reads key head n // (N / K): grouped-query attention without repeating the keys.

    Args:
      q_BTNH: queries, float [B, T, N, H], already rotated by RoPE.
      k_BSKH, v_BSKH: keys and values, float [B, S, K, H] with N % K == 0.
      mask: the rules on row indices.
      query: row indices and documents of the queries.
      key: those of the keys, both with segments or both without; None: the queries' (S == T).
      scale: multiplies the scores; None is H ** -0.5.
      soft_cap: if set, scores become soft_cap * tanh(scores / soft_cap) (Gemma 2).

    Returns:
      float [B, T, N, H], q's dtype. A query that sees no key gives 0, and its gradients are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> ones = jnp.ones((1, 2, 1, 4))
      >>> out = reference(ones, ones, jnp.array([[[[2.0]], [[4.0]]]]) * ones, mask=Mask())
      >>> out[0, :, 0, 0].tolist()
      [2.0, 3.0]
    """
    batch, num_queries, num_heads, head_dim = q_BTNH.shape
    _, num_keys, num_kv_heads, _ = k_BSKH.shape
    key = query if key is None else key
    accum = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    scale = head_dim**-0.5 if scale is None else scale
    seen_xTS = mask.dense(
        _row_index(query, num_queries),
        query.segment_ids_BT,
        _row_index(key, num_keys),
        key.segment_ids_BT,
    )
    seen_BTS = jnp.broadcast_to(seen_xTS, (batch, num_queries, num_keys))[:, None, None]

    q_BTKGH = q_BTNH.reshape(batch, num_queries, num_kv_heads, -1, head_dim)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=accum) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen_BTS, scores, -jnp.inf)
    # A row without keys has a maximum of -inf; 0 in its place keeps exp(-inf - max) = 0, not NaN.
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    # The inner where keeps masked scores out of exp's derivative as well (0 * inf is NaN).
    p = jnp.where(seen_BTS, jnp.exp(jnp.where(seen_BTS, scores - top, 0.0)), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    p = p / jnp.where(total == 0.0, 1.0, total)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", p, v_BSKH, preferred_element_type=accum)
    return out.reshape(q_BTNH.shape).astype(q_BTNH.dtype)


def _row_index(rows: Rows, length: int) -> jax.Array:
    return jnp.arange(length) if rows.row_index_BT is None else rows.row_index_BT
