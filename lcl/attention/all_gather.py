"""Context parallelism by gathering keys and values: simplest, and fastest where memory allows.

Legend: B batch, T tokens of a row on one device, S = c T, N query heads, K key/value heads, H head
dim, c devices that share a row.

    device i:   q_i  x  [k_0 k_1 ... k_c-1]      forward: every device gathers the row's keys.
                                                 backward: dk, dv are summed and scattered home.

The gather is written out inside `shard_map`, so that its transpose is a reduce-scatter; gathering
by a sharding of the whole array would sum dk and dv on every device (an all-reduce, twice the
bytes). Memory of k and v is O(S) a device: beyond some row length only a ring fits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lcl.attention import layouts
from lcl.attention.blockwise import blockwise
from lcl.attention.context_plan import ContextPlan
from lcl.attention.rows import Rows
from lcl.attention.splash import splash_sharded_queries


def all_gather(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, rows: Rows, plan: ContextPlan
) -> jax.Array:
    """softmax(scale * q k^T + mask) v over rows that devices share; inside `shard_map`.

    Args:
      q_BTNH, k_BTKH, v_BTKH: this device's tokens, float32 or bfloat16.
      rows: their original row indices (blockwise inside: required where context > 1) and documents.
      plan: which devices share the rows, and how.

    Returns:
      [B, T, N, H] in q's dtype; a query that sees no key gives 0, and its gradients are 0.
    """

    def gather(x):
        return lax.all_gather(x, plan.axis, axis=1, tiled=True) if plan.context > 1 else x

    k_BSKH, v_BSKH, key_rows = jax.tree.map(gather, (k_BTKH, v_BTKH, rows))
    if plan.inner == "blockwise":
        return blockwise(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            mask=plan.mask,
            query=rows,
            key=key_rows,
            scale=plan.scale,
            soft_cap=plan.soft_cap,
        )
    length = k_BSKH.shape[1]
    k_BSKH, v_BSKH, key_segments = jax.tree.map(
        lambda x: in_row_order(x, plan), (k_BSKH, v_BSKH, key_rows.segment_ids_BT)
    )
    order = layouts.permutation(plan.layout, length, plan.context)
    return splash_sharded_queries(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=plan.mask,
        rows_CT=order.reshape(plan.context, -1),
        axis=plan.axis,
        query_segment_ids_BT=rows.segment_ids_BT,
        key_segment_ids_BS=key_segments,
        scale=plan.scale,
        soft_cap=plan.soft_cap,
        block_sizes=plan.block_sizes,
        interpret=plan.interpret,
    )


def in_row_order(x_BS: jax.Array, plan: ContextPlan) -> jax.Array:
    """Whole rows [B, S, ...] as laid out, put back into their original order."""
    return _reordered(x_BS, plan, layouts.inverse)


def as_laid_out(x_BS: jax.Array, plan: ContextPlan) -> jax.Array:
    """Undoes `in_row_order`."""
    return _reordered(x_BS, plan, layouts.permutation)


def _reordered(x_BS: jax.Array, plan: ContextPlan, order_fn) -> jax.Array:
    if plan.layout == "contiguous" or plan.context == 1:
        return x_BS
    batch, length, *rest = x_BS.shape
    if plan.layout == "zigzag":
        # Whole chunks move: a few large copies rather than a gather of tokens.
        chunks = order_fn("zigzag", 2 * plan.context, plan.context)
        pieces = jnp.split(x_BS, 2 * plan.context, axis=1)
        return jnp.concatenate([pieces[i] for i in np.asarray(chunks)], axis=1)
    shape = (plan.context, -1) if order_fn is layouts.inverse else (-1, plan.context)
    return jnp.swapaxes(x_BS.reshape(batch, *shape, *rest), 1, 2).reshape(x_BS.shape)
