"""Blockwise attention with its own backward: linear memory, work only where the mask lets one see.

Legend: B batch, T length (padded to whole blocks), N query heads, K key/value heads, G = N / K
query heads a key head, M = B * K, H head dim (H1: and a column of ones), C block length, J = T / C
blocks. scores_CC is [queries, keys] forward and [keys, queries] backward; JHC is blocks transposed.

    one head, documents 1 1 1 2 2 2 2 3 (in blocks)       # computed    . skipped

        queries 1  # . . . . . . .    forward: for each block of queries, a loop over blocks of keys
                1  # # . . . . . .    from the start of the documents that the block touches (a
                1  # # # . . . . .    *traced* bound) to the diagonal, with a running softmax. So a
                2  . . . # . . . .    packed row costs less than one long document, and compile time
                2  . . . # # . . .    does not grow with T.
                2  . . . # # # . .    backward: for each block of keys, a loop over the blocks of
                2  . . . # # # # .    queries that see it (a column), on transposed scores.
                3  . . . . . . . #
                   keys

The loop runs over one head at a time, so that its working set (a few blocks of C x C and C x H)
stays in cache. Every matmul is a plain [m, k] x [k, n] product, which makes bfloat16 fast on CPU
(lcl.attention.matmul): blocks that are needed transposed are laid out so once. The row sums of
the softmax come out of the matmul with the values, through a column of ones; with a separate sum,
XLA would compute every exponential twice.

The algorithm is FlashAttention-2's (Dao 2023, arXiv:2307.08691, algorithms 1 and 2).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lcl.attention.mask import Mask
from lcl.attention.matmul import plain_dot

# Finite stand-ins for the maximum and the log-sum-exp of a row that has seen no key yet:
# exp(-inf - _NO_MAXIMUM) and exp(score - _NO_SUM) are 0, where infinities would give NaN.
_NO_MAXIMUM = -1e30
_NO_SUM = 1e30


def blockwise(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask,
    segment_ids_BT: jax.Array | None = None,
    scale: float | None = None,
    block: int = 128,
) -> jax.Array:
    """softmax(scale * q k^T + mask) v for rows whose tokens stand in their original order.

    Args:
      q_BTNH: queries, float32 or bfloat16 [B, T, N, H], already rotated by RoPE. Any T.
      k_BSKH, v_BSKH: keys and values [B, S, K, H], S == T and N % K == 0.
      mask: causal, window, prefix; not explicit.
      segment_ids_BT: int [B, T], 0 = padding; any ids are right, documents in order are fast.
      scale: multiplies the scores; None is H ** -0.5.
      block: block length.

    Returns:
      [B, T, N, H] in q's dtype; differentiable once, in reverse. Softmax and sums are float32. A
      query that sees no key gives 0, and its gradients are 0.

    Raises:
      ValueError: an explicit mask (its table is dense; use impl="reference").

    Example:
      >>> import jax.numpy as jnp
      >>> ones = jnp.ones((1, 2, 1, 4))
      >>> out = blockwise(ones, ones, jnp.array([[[[2.0]], [[4.0]]]]) * ones, mask=Mask())
      >>> out[0, :, 0, 0].tolist()
      [2.0, 3.0]
    """
    if mask.explicit is not None:
        raise ValueError('attention "blockwise" takes no explicit mask; use impl="reference"')
    batch, length, num_heads, head_dim = q_BTNH.shape
    scale = head_dim**-0.5 if scale is None else scale
    padding = -length % block
    if segment_ids_BT is None and padding and (not mask.causal or mask.prefix_length):
        # Without causality, only a segment can hide the padding from real queries.
        segment_ids_BT = jnp.ones((batch, length), jnp.int32)

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x

    def fold(x_BTNH):
        """[B, T, N, H] -> [B * K, N / K, T, H]."""
        x_BNTH = jnp.swapaxes(pad(x_BTNH), 1, 2)
        num_kv_heads = k_BSKH.shape[2]
        return x_BNTH.reshape(batch * num_kv_heads, -1, length + padding, head_dim)

    scaled = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    segment_ids_BT = None if segment_ids_BT is None else pad(segment_ids_BT)
    out = _attend(fold(scaled), fold(k_BSKH), fold(v_BSKH), segment_ids_BT, _Plan(mask, block))
    out_BNTH = out.reshape(batch, num_heads, length + padding, head_dim)
    return jnp.swapaxes(out_BNTH, 1, 2)[:, :length]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known when compiling."""

    mask: Mask
    block: int


class _Bounds(NamedTuple):
    """Half-open ranges of blocks, int32 [B, J]: keys of a query block, queries of a key block."""

    first_key: jax.Array
    stop_key: jax.Array
    first_query: jax.Array
    stop_query: jax.Array


def _bounds(plan: _Plan, batch: int, length: int, segment_ids_BT: jax.Array | None) -> _Bounds:
    """Which blocks meet, by the mask's closed form and the range of documents in each block."""
    block = plan.block
    first_row_J = np.arange(0, length, block)
    ranges = []
    for of in (plan.mask.key_range, plan.mask.query_range):
        start_J, stop_J = of(first_row_J, first_row_J + block - 1, length)
        ranges += [start_J // block, -(-stop_J // block)]
    bounds = [jnp.broadcast_to(x.astype(np.int32), (batch, len(x))) for x in ranges]
    if segment_ids_BT is not None:
        segments_BJC = segment_ids_BT.reshape(batch, -1, block)
        top = jnp.iinfo(segments_BJC.dtype).max
        low_BJ = jnp.min(jnp.where(segments_BJC == 0, top, segments_BJC), axis=-1)
        high_BJ = jnp.max(segments_BJC, axis=-1)
        # Ranges that do not overlap share no document; a block of padding (top, 0) overlaps none.
        meet_BJJ = (low_BJ[:, :, None] <= high_BJ[:, None]) & (
            low_BJ[:, None] <= high_BJ[:, :, None]
        )
        first_BJ = jnp.argmax(meet_BJJ, axis=-1)
        stop_BJ = meet_BJJ.shape[-1] - jnp.argmax(meet_BJJ[..., ::-1], axis=-1)
        stop_BJ = jnp.where(meet_BJJ.any(-1), stop_BJ, 0)
        for i in (0, 2):
            bounds[i] = jnp.maximum(bounds[i], first_BJ.astype(jnp.int32))
            bounds[i + 1] = jnp.minimum(bounds[i + 1], stop_BJ.astype(jnp.int32))
    return _Bounds(*bounds)


def _per_head(x_Bx: jax.Array, num_folded: int) -> jax.Array:
    return jnp.repeat(x_Bx, num_folded // x_Bx.shape[0], axis=0)


def _blocks(x_MTH: jax.Array, plan: _Plan) -> jax.Array:
    """[..., T, H] -> [..., J, C, H]."""
    return x_MTH.reshape(*x_MTH.shape[:-2], -1, plan.block, x_MTH.shape[-1])


def _transposed_blocks(x_MTH: jax.Array, plan: _Plan) -> jax.Array:
    """[..., T, H] -> [..., J, H, C]."""
    return jnp.swapaxes(_blocks(x_MTH, plan), -1, -2)


def _seen(plan: _Plan, query_block, key_block, segments_JC):
    """bool [C queries, C keys] of one pair of blocks."""
    row_C = jnp.arange(plan.block)
    query_row, key_row = query_block * plan.block + row_C, key_block * plan.block + row_C
    seen = plan.mask.visible(query_row[:, None], key_row[None, :])
    if segments_JC is not None:
        query, key = segments_JC[query_block][:, None], segments_JC[key_block][None, :]
        seen = seen & (query == key) & (query != 0)
    return seen


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_MGTH, k_M1TH, v_M1TH, segment_ids_BT, plan: _Plan):
    return _forward(q_MGTH, k_M1TH, v_M1TH, segment_ids_BT, plan)[0]


def _forward(q_MGTH, k_M1TH, v_M1TH, segment_ids_BT, plan: _Plan):
    num_folded, group, length, head_dim = q_MGTH.shape
    batch = num_folded if segment_ids_BT is None else segment_ids_BT.shape[0]
    bounds = _bounds(plan, batch, length, segment_ids_BT)

    def key_head(_, x):
        q_GJCH, k_JHC, v_JCH, segments_JC, bounds_J = x

        def query_head(_, q_JCH):
            return None, lax.map(query_block, (jnp.arange(len(q_JCH)), q_JCH))

        def query_block(x):
            i, q_CH = x

            def key_block(j, state):
                top_C, acc_CH1 = state
                scores_CC = plain_dot(q_CH, k_JHC[j])
                scores_CC = jnp.where(_seen(plan, i, j, segments_JC), scores_CC, -jnp.inf)
                new_top_C = jnp.maximum(top_C, jnp.max(scores_CC, axis=1))
                p_CC = jnp.exp(scores_CC - new_top_C[:, None]).astype(v_JCH.dtype)
                acc_CH1 = acc_CH1 * jnp.exp(top_C - new_top_C)[:, None] + plain_dot(p_CC, v_JCH[j])
                return new_top_C, acc_CH1

            start = (
                jnp.full((plan.block,), _NO_MAXIMUM, jnp.float32),
                jnp.zeros((plan.block, head_dim + 1), jnp.float32),
            )
            first, stop = bounds_J.first_key[i], bounds_J.stop_key[i]
            top_C, acc_CH1 = lax.fori_loop(first, stop, key_block, start)
            total_C = acc_CH1[:, head_dim]
            empty_C = total_C == 0.0
            total_C = jnp.where(empty_C, 1.0, total_C)
            out_CH = acc_CH1[:, :head_dim] / total_C[:, None]
            return out_CH.astype(q_CH.dtype), jnp.where(empty_C, _NO_SUM, top_C + jnp.log(total_C))

        return None, lax.scan(query_head, None, q_GJCH)[1]

    ones = jnp.ones((num_folded, length, 1), v_M1TH.dtype)
    v_MTH1 = jnp.concatenate([v_M1TH[:, 0], ones], axis=-1)
    segments_BJC = None if segment_ids_BT is None else segment_ids_BT.reshape(batch, -1, plan.block)
    per_head = jax.tree.map(lambda x: _per_head(x, num_folded), (segments_BJC, bounds))
    xs = (
        _blocks(q_MGTH, plan),
        _transposed_blocks(k_M1TH[:, 0], plan),
        _blocks(v_MTH1, plan),
        *per_head,
    )
    out_MGJCH, lse_MGJC = lax.scan(key_head, None, xs)[1]
    # Named so that a rematerialisation policy can keep them: with both, and q, k, v, the backward
    # pass needs no second forward.
    out_MGTH = checkpoint_name(out_MGJCH.reshape(q_MGTH.shape), "context")
    lse_MGJC = checkpoint_name(lse_MGJC, "context_lse")
    return out_MGTH, (q_MGTH, k_M1TH, v_M1TH, out_MGTH, lse_MGJC, *per_head)


def _backward(plan: _Plan, residuals, dout_MGTH):
    q_MGTH, k_M1TH, v_M1TH, out_MGTH, lse_MGJC, segments_MJC, bounds = residuals
    block, head_dim = plan.block, q_MGTH.shape[-1]
    delta = jnp.sum(dout_MGTH.astype(jnp.float32) * out_MGTH.astype(jnp.float32), axis=-1)
    delta_MGJC = delta.reshape(lse_MGJC.shape)
    dtype = q_MGTH.dtype

    def key_head(_, x):
        heads_G, (k_JCH, k_JHC, v_JCH), segments_JC, bounds_J = x
        num_blocks = len(k_JCH)

        def query_head(dkv_JCH, head):
            q_JCH, q_JHC, dout_JCH, dout_JHC, lse_JC, delta_JC = head

            def key_block(dq_JHC, x):
                j, dk_CH, dv_CH = x

                def query_block(i, state):
                    dq_JHC, dk_CH, dv_CH = state
                    seen_CC = _seen(plan, i, j, segments_JC).T
                    p_CC = jnp.exp(plain_dot(k_JCH[j], q_JHC[i]) - lse_JC[i][None, :])
                    p_CC = jnp.where(seen_CC, p_CC, 0.0)
                    dp_CC = plain_dot(v_JCH[j], dout_JHC[i])
                    ds_CC = (p_CC * (dp_CC - delta_JC[i][None, :])).astype(dtype)
                    dv_CH = dv_CH + plain_dot(p_CC.astype(dtype), dout_JCH[i])
                    dk_CH = dk_CH + plain_dot(ds_CC, q_JCH[i])
                    dq_JHC = dq_JHC.at[i].add(plain_dot(k_JHC[j], ds_CC))
                    return dq_JHC, dk_CH, dv_CH

                bounds_j = bounds_J.first_query[j], bounds_J.stop_query[j]
                dq_JHC, dk_CH, dv_CH = lax.fori_loop(*bounds_j, query_block, (dq_JHC, dk_CH, dv_CH))
                return dq_JHC, (dk_CH, dv_CH)

            dq_JHC = jnp.zeros((num_blocks, head_dim, block), jnp.float32)
            dq_JHC, dkv_JCH = lax.scan(key_block, dq_JHC, (jnp.arange(num_blocks), *dkv_JCH))
            return dkv_JCH, jnp.swapaxes(dq_JHC, 1, 2).astype(dtype)

        zeros = jnp.zeros((num_blocks, block, head_dim), jnp.float32)
        dkv_JCH, dq_GJCH = lax.scan(query_head, (zeros, zeros), heads_G)
        return None, (dq_GJCH, *(x.astype(dtype) for x in dkv_JCH))

    heads = (
        _blocks(q_MGTH, plan),
        _transposed_blocks(q_MGTH, plan),
        _blocks(dout_MGTH, plan),
        _transposed_blocks(dout_MGTH, plan),
        lse_MGJC,
        delta_MGJC,
    )
    k_MTH, v_MTH = k_M1TH[:, 0], v_M1TH[:, 0]
    keys = _blocks(k_MTH, plan), _transposed_blocks(k_MTH, plan), _blocks(v_MTH, plan)
    dq, dk, dv = lax.scan(key_head, None, (heads, keys, segments_MJC, bounds))[1]
    return dq.reshape(q_MGTH.shape), dk.reshape(k_M1TH.shape), dv.reshape(v_M1TH.shape), None


_attend.defvjp(_forward, _backward)
