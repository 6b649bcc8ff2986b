"""Splash attention in parts: some keys now, others later, as a ring of devices needs it.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.

A softmax over keys that come in parts is exact if each part also gives its log-sum-exp (lse):

    lse = log(exp(lse_1) + exp(lse_2)),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

and the backward of a part needs the GLOBAL lse and delta = sum(out * dout), nothing else of the
other parts. How the part's queries stand to its keys is a `Relation`, known when compiling.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lcl.attention.rows import Relation
from lcl.attention.splash import (
    BlockSizes,
    heads_major,
    make_kernel,
    mask_infos,
    refuse,
    scaled,
    segment_pair,
)
from lcl.attention.splash_jax import splash_names
from lcl.attention.splash_tables import QueryRows, Rule

# Below every real log-sum-exp, above the kernel's for a row whose keys are all hidden (-2e38).
_NO_KEYS = -1e29
# A log-sum-exp that makes every probability exp(score - it) 0, without infinities.
_NO_PROBABILITY = 1e38


def splash_forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    relation: Relation,
    query_segments_BT: jax.Array | None = None,
    key_segments_BS: jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention over these keys alone, with what it takes to join it with that over others.

    Args:
      q_BTNH: queries, float32 or bfloat16 [B, T, N, H].
      k_BSKH, v_BSKH: keys and values [B, S, K, H] in q's dtype; S may differ from T.
      relation: what a query may see of these keys, by places in the two blocks.
      query_segments_BT, key_segments_BS: int32, 0 = padding; both or neither.
      scale, soft_cap, block_sizes, interpret: as `splash`.

    Returns:
      out float32 [B, T, N, H] (of q's precision: the kernel rounds it to q's dtype) and
      lse float32 [B, T, N]. A query that sees none of these keys: 0 and -inf.

    Raises:
      ValueError: what `splash_obstacle` names.
    """
    rule, blocks, infos = _prepare(relation, q_BTNH, k_BSKH, block_sizes)
    kernel = make_kernel(
        infos, rule, blocks, soft_cap=soft_cap, save_residuals=True, interpret=interpret
    )
    segments = segment_pair(query_segments_BT, key_segments_BS)
    out_BNTH, (lse_BNT,) = jax.vmap(kernel)(
        heads_major(scaled(q_BTNH, scale)), heads_major(k_BSKH), heads_major(v_BSKH), segments
    )
    out_BTNH, lse_BTN = (jnp.swapaxes(x, 1, 2) for x in (out_BNTH, lse_BNT))
    # Rows without a key come out of the kernel as a mean of values, or as 0 / 0.
    seen_BTN = lse_BTN > _NO_KEYS
    if query_segments_BT is not None:
        seen_BTN &= (query_segments_BT != 0)[:, :, None]
    out_BTNH = jnp.where(seen_BTN[..., None], out_BTNH.astype(jnp.float32), 0.0)
    return out_BTNH, jnp.where(seen_BTN, lse_BTN, -jnp.inf)


def splash_backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    lse_BTN: jax.Array,
    delta_BTN: jax.Array,
    dout_BTNH: jax.Array,
    *,
    relation: Relation,
    query_segments_BT: jax.Array | None = None,
    key_segments_BS: jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """These keys' share of the gradients.

    Args:
      q_BTNH, k_BSKH, v_BSKH: as in `splash_forward`.
      lse_BTN: float32, log-sum-exp over ALL keys; -inf where a query sees none.
      delta_BTN: float32, sum over H of out * dout, out over all keys.
      dout_BTNH: cotangent of out; any dtype, the kernel takes it in q's.
      relation and the rest: as in `splash_forward`.

    Returns:
      dq float32 [B, T, N, H] and dk, dv float32 [B, S, K, H], summed over these keys, or queries.
      The kernel rounds each to q's dtype: in bfloat16 a sum of parts is as precise as its parts.
    """
    rule, blocks, (_, dq_info, dkv_info) = _prepare(relation, q_BTNH, k_BSKH, block_sizes)
    names = splash_names()
    head_minor = names.QKVLayout.HEAD_DIM_MINOR
    shared = dict(
        is_mqa=False,
        mask_value=names.mask_value,
        attn_logits_soft_cap=soft_cap,
        q_layout=head_minor,
        k_layout=head_minor,
        v_layout=head_minor,
        mask_function=None if rule.full else rule,
        interpret=interpret,
    )

    def one_row(q_NTH, k_KSH, v_KSH, segments, lse_NT, dout_NTH, delta_NT):
        arrays = (q_NTH, k_KSH, v_KSH, segments, None, lse_NT, dout_NTH, delta_NT)
        dq_NTH, dk_KSH, dv_KSH = names.backward_dkv(
            *arrays,
            bq=blocks.dkv_query,
            bkv=blocks.dkv_key,
            bkv_compute=blocks.dkv_key_compute,
            use_fused_bwd_kernel=blocks.fused_backward,
            mask_info=dkv_info,
            **shared,
        )
        if not blocks.fused_backward:
            dq_NTH = names.backward_dq(
                *arrays, bq=blocks.dq_query, bkv=blocks.dq_key, mask_info=dq_info, **shared
            )
        return dq_NTH, dk_KSH, dv_KSH

    seen_BTN = lse_BTN > _NO_KEYS
    if query_segments_BT is not None:
        seen_BTN &= (query_segments_BT != 0)[:, :, None]
    lse_BTN = jnp.where(seen_BTN, lse_BTN, _NO_PROBABILITY)
    gradients = jax.vmap(one_row)(
        heads_major(scaled(q_BTNH, scale)),
        heads_major(k_BSKH),
        heads_major(v_BSKH),
        segment_pair(query_segments_BT, key_segments_BS),
        jnp.swapaxes(lse_BTN, 1, 2),
        heads_major(dout_BTNH.astype(q_BTNH.dtype)),
        jnp.swapaxes(delta_BTN.astype(jnp.float32), 1, 2),
    )
    dq, dk, dv = (jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in gradients)
    return dq * (q_BTNH.shape[-1] ** -0.5 if scale is None else scale), dk, dv


def _prepare(relation: Relation, q_BTNH, k_BSKH, block_sizes: BlockSizes | None):
    refuse(relation, q_BTNH, k_BSKH, block_sizes)
    rule = Rule.of(relation)
    query_length, key_length = q_BTNH.shape[1], k_BSKH.shape[1]
    blocks = (block_sizes or BlockSizes()).fit(query_length, key_length)
    infos = mask_infos(rule, QueryRows(np.arange(query_length)[None]), key_length, blocks)
    return rule, blocks, jax.tree.map(lambda table: table[0], infos)
