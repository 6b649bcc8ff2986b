"""Context parallelism by trading tokens for heads: two all-to-alls around whole-row attention.

Legend: B batch, T tokens of a row on one device, S = c T, N query heads, K key/value heads, H head
dim, c devices that share a row.

    before      device 0: tokens 0 1, heads a b      after      device 0: tokens 0 1 2 3, head a
                device 1: tokens 2 3, heads a b                 device 1: tokens 0 1 2 3, head b

Every device then attends over whole rows, in their original order, for its own heads. Least traffic
for many heads, but the degree is bounded by them: N must split over c. Too few key heads are
repeated, as little as it takes.

Jacobs et al. 2023 (DeepSpeed-Ulysses, arXiv:2309.14509).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from lcl.attention.all_gather import as_laid_out, in_row_order
from lcl.attention.blockwise import blockwise
from lcl.attention.context_plan import ContextPlan
from lcl.attention.rows import Rows
from lcl.attention.splash import splash


def ulysses(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, rows: Rows, plan: ContextPlan
) -> jax.Array:
    """softmax(scale * q k^T + mask) v over rows that devices share; inside `shard_map`.

    Args:
      q_BTNH, k_BTKH, v_BTKH: this device's tokens, float32 or bfloat16; N a multiple of the
        devices.
      rows: their original row indices (None: as the layout says) and documents.
      plan: which devices share the rows, and how.

    Returns:
      [B, T, N, H] in q's dtype; a query that sees no key gives 0, and its gradients are 0.

    Raises:
      ValueError: heads that do not split over the devices.
    """
    num_heads, num_kv_heads = q_BTNH.shape[2], k_BTKH.shape[2]
    if num_heads % plan.context:
        raise ValueError(
            f"{num_heads} heads on a device do not split over context={plan.context}: use a "
            "context that divides them, or impl='ring'"
        )
    copies = math.lcm(num_kv_heads, plan.context) // num_kv_heads

    def whole_rows(x):
        """[B, T, n, H] -> [B, S, n / c, H], in row order."""
        if plan.context > 1:
            x = lax.all_to_all(x, plan.axis, split_axis=2, concat_axis=1, tiled=True)
        return in_row_order(x, plan)

    def whole_index(x):
        if plan.context > 1:
            x = lax.all_gather(x, plan.axis, axis=1, tiled=True)
        return in_row_order(x, plan)

    q = whole_rows(q_BTNH)
    k, v = (whole_rows(jnp.repeat(x, copies, axis=2)) for x in (k_BTKH, v_BTKH))
    rows = jax.tree.map(whole_index, rows)
    if plan.inner == "blockwise":
        out = blockwise(
            q, k, v, mask=plan.mask, query=rows, scale=plan.scale, soft_cap=plan.soft_cap
        )
    else:
        out = splash(
            q,
            k,
            v,
            mask=plan.mask,
            segment_ids_BT=rows.segment_ids_BT,
            scale=plan.scale,
            soft_cap=plan.soft_cap,
            block_sizes=plan.block_sizes,
            interpret=plan.interpret,
        )
    out = as_laid_out(out, plan)
    if plan.context > 1:
        out = lax.all_to_all(out, plan.axis, split_axis=1, concat_axis=2, tiled=True)
    return out
