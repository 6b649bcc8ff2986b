"""Blockwise attention with its own backward: linear memory, work only where the mask lets one see.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, G = N / K query
heads a key head, H head dim (H1: and a column of ones), C queries a block, E keys a block, I blocks
of queries, J blocks of keys. scores_CE are [queries, keys] forward, scores_EC [keys, queries]
backward; JHE is blocks transposed.

    one head, documents 1 1 1 2 2 2 2 3 (in blocks)      # no mask    / masked    . skipped

        queries 1  / . . . . . . .    forward: for each block of queries, a loop over the blocks of
                1  # / . . . . . .    keys that it may see (a *traced* list, `block_pairs`), with a
                1  # # / . . . . .    running softmax. So a packed row costs less than one long
                2  . . . / . . . .    document, tokens may stand in any order, and compile time does
                2  . . . # / . . .    not grow with T.
                2  . . . # # / . .    backward: for each block of keys, a loop over the blocks of
                2  . . . # # # / .    queries that may see it (a column), on transposed scores.
                3  . . . . . . . /
                   keys

What a query sees is decided by the row index and the document that travel with the tokens, never by
their places; queries and keys may be different tokens. `blockwise_forward` and `blockwise_backward`
give what one set of keys contributes, to be joined with others' by their log-sum-exp (a ring).

The loop runs over one head at a time, which is also when its blocks are cut out and laid out, so
that beyond arguments and results only a few [T, H] exist, and the working set (a few blocks of
C x E and C x H) stays in cache. Every matmul is a plain [m, k] x [k, n] product, which makes
bfloat16 fast on CPU (lcl.attention.matmul). The row sums of the softmax come out of the matmul with
the values, through a column of ones; a separate sum would make XLA compute each exponential twice.

The algorithm is FlashAttention-2's (Dao 2023, arXiv:2307.08691, algorithms 1 and 2).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lcl.attention.block_pairs import (
    BlockedRows,
    block_pairs,
    block_rows,
    default_block,
    seen,
    visits,
)
from lcl.attention.mask import Mask
from lcl.attention.matmul import plain_dot
from lcl.attention.rows import Rows

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
    query: Rows = Rows(),  # noqa: B008  (immutable)
    key: Rows | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    block: int | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + mask) v; tokens in any order, fastest in their original one.

    Args:
      q_BTNH: queries, float32 or bfloat16 [B, T, N, H], already rotated by RoPE. Any T.
      k_BSKH, v_BSKH: keys and values [B, S, K, H], N % K == 0. Any S.
      mask: causal, window, prefix; not explicit.
      query: row indices and documents of the queries.
      key: those of the keys, both with segments or both without; None: the queries' (S == T).
      scale: multiplies the scores; None is H ** -0.5.
      soft_cap: if set, scores become soft_cap * tanh(scores / soft_cap) (Gemma 2).
      block: block length of queries and keys (shorter rows are one block); None: chosen by T, S.

    Returns:
      [B, T, N, H] in q's dtype; differentiable once, in reverse. Softmax and sums are float32. A
      query that sees no key gives 0, and its gradients are 0.

    Raises:
      ValueError: an explicit mask (its table is dense; use impl="reference"), segments on one side
        only, a block below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> ones = jnp.ones((1, 2, 1, 4))
      >>> out = blockwise(ones, ones, jnp.array([[[[2.0]], [[4.0]]]]) * ones, mask=Mask())
      >>> out[0, :, 0, 0].tolist()
      [2.0, 3.0]
    """
    plan, query_rows, key_rows = _prepare(q_BTNH, k_BSKH, mask, query, key, scale, soft_cap, block)
    return _attend(q_BTNH, k_BSKH, v_BSKH, query_rows, key_rows, plan)


def blockwise_forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask,
    query: Rows = Rows(),  # noqa: B008  (immutable)
    key: Rows | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over these keys only, and what is needed to join it with attention over others.

    Arguments as for `blockwise`. Not differentiable itself: whoever joins parts calls
    `blockwise_backward` with the joined log-sum-exp.

    Returns:
      out_BTNH, float32; 0 where no key is seen.
      lse_BTN, float32, log of the sum of exp(scores); -inf where no key is seen.

    Example (two parts a and b are joined so, `lse` of shape [B, T, N, 1]):
      lse = logaddexp(lse_a, lse_b);  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
    """
    plan, query_rows, key_rows = _prepare(q_BTNH, k_BSKH, mask, query, key, scale, soft_cap, block)
    args = q_BTNH, k_BSKH, v_BSKH, query_rows, key_rows
    out_BTNH, lse_BTN = _forward(*args, plan, jnp.float32)
    return out_BTNH, jnp.where(lse_BTN == _NO_SUM, -jnp.inf, lse_BTN)


def blockwise_backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    lse_BTN: jax.Array,
    delta_BTN: jax.Array,
    dout_BTNH: jax.Array,
    *,
    mask: Mask,
    query: Rows = Rows(),  # noqa: B008  (immutable)
    key: Rows | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    block: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys contribute to the gradients of attention over many parts.

    Args:
      lse_BTN: float32, log-sum-exp over the keys of *all* parts; -inf where none is seen.
      delta_BTN: float32, sum over H of out * dout, with the joined output.
      dout_BTNH: the joined output's cotangent.
      the others: as for `blockwise`.

    Returns:
      dq_BTNH, dk_BSKH, dv_BSKH in float32: dq sums over parts, dk and dv belong to these keys.
    """
    plan, query_rows, key_rows = _prepare(q_BTNH, k_BSKH, mask, query, key, scale, soft_cap, block)
    lse_BTN = jnp.where(jnp.isneginf(lse_BTN), _NO_SUM, lse_BTN)
    dout_BTNH = dout_BTNH.astype(q_BTNH.dtype)
    args = q_BTNH, k_BSKH, v_BSKH, lse_BTN, delta_BTN, dout_BTNH, query_rows, key_rows
    return _backward(*args, plan, jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known when compiling."""

    mask: Mask
    scale: float
    soft_cap: float | None
    query_block: int
    key_block: int


def _prepare(
    q_BTNH, k_BSKH, mask, query, key, scale, soft_cap, block
) -> tuple[_Plan, BlockedRows, BlockedRows]:
    """The plan, and the rows of queries and keys cut into its blocks."""
    if mask.explicit is not None:
        raise ValueError('attention "blockwise" takes no explicit mask; use impl="reference"')
    if block is not None and block < 1:
        raise ValueError(f"block={block}: a block holds at least 1 token; None chooses")
    batch, num_queries, _, head_dim = q_BTNH.shape
    num_keys = k_BSKH.shape[1]
    key = query if key is None else key
    if (query.segment_ids_BT is None) != (key.segment_ids_BT is None):
        raise ValueError("segments on one side only: give them for queries and keys, or for none")
    block = default_block(max(num_queries, num_keys)) if block is None else block
    plan = _Plan(
        mask=mask,
        scale=float(head_dim**-0.5 if scale is None else scale),
        soft_cap=soft_cap,
        query_block=min(block, num_queries),
        key_block=min(block, num_keys),
    )
    if num_keys % plan.key_block and key.segment_ids_BT is None:
        # Only a segment can hide the keys that fill up the last block.
        query = query._replace(segment_ids_BT=jnp.ones((1, num_queries), jnp.int32))
        key = key._replace(segment_ids_BT=jnp.ones((1, num_keys), jnp.int32))
    return (
        plan,
        block_rows(query, batch, num_queries, plan.query_block, repeat_last=True),
        block_rows(key, batch, num_keys, plan.key_block, repeat_last=False),
    )


def _head(x_BTNH: jax.Array, row, head) -> jax.Array:
    """[B, T, N, H] -> the [T, H] of one row and head."""
    batch, length, num_heads, *rest = x_BTNH.shape
    start = (row, 0, head) + (0,) * len(rest)
    return lax.dynamic_slice(x_BTNH, start, (1, length, 1, *rest)).reshape(length, *rest)


def _put_head(x_BTNH: jax.Array, head_TH: jax.Array, row, head) -> jax.Array:
    head_TH = head_TH[: x_BTNH.shape[1]].astype(x_BTNH.dtype)
    start = (row, 0, head) + (0,) * (x_BTNH.ndim - 3)
    return lax.dynamic_update_slice(x_BTNH, head_TH[None, :, None], start)


def _blocks(x_TH: jax.Array, block: int, fill: float = 0.0) -> jax.Array:
    """[T, ...] -> [T / block, block, ...]; the last block is filled up."""
    if padding := -len(x_TH) % block:
        widths = [(0, padding)] + [(0, 0)] * (x_TH.ndim - 1)
        x_TH = jnp.pad(x_TH, widths, constant_values=fill)
    return x_TH.reshape(-1, block, *x_TH.shape[1:])


def _transpose(x_JCH: jax.Array) -> jax.Array:
    return jnp.swapaxes(x_JCH, -1, -2)


def _scaled(x: jax.Array, plan: _Plan) -> jax.Array:
    return (x.astype(jnp.float32) * plan.scale).astype(x.dtype)


def _of_row(rows: Any, row) -> Any:
    """The tables of one row of the batch."""
    return jax.tree.map(lambda x: x[row], rows)


def _seen(plan: _Plan, query: BlockedRows, key: BlockedRows, i, j) -> jax.Array:
    """The mask [C, E] of one pair of blocks, from one row's tables."""
    if query.segment_BJE is None or key.segment_BJE is None:
        return seen(plan.mask, query.row_BJE[i], key.row_BJE[j])
    segments = query.segment_BJE[i], key.segment_BJE[j]
    return seen(plan.mask, query.row_BJE[i], key.row_BJE[j], *segments)


def _loop(num_full, num, step, state):
    """step(n, state, masked) over the blocks that need no mask, then over those that do."""
    state = lax.fori_loop(0, num_full, partial(step, masked=False), state)
    return lax.fori_loop(num_full, num, partial(step, masked=True), state)


def _forward(q_BTNH, k_BSKH, v_BSKH, query: BlockedRows, key: BlockedRows, plan: _Plan, dtype):
    """out_BTNH in `dtype`, and lse_BTN."""
    batch, num_queries, num_heads, head_dim = q_BTNH.shape
    num_kv_heads = k_BSKH.shape[2]
    group = num_heads // num_kv_heads
    tables = query, key, visits(*block_pairs(plan.mask, query, key))

    def key_head(results, index):
        row, kv_head = index // num_kv_heads, index % num_kv_heads
        query, key, visit = _of_row(tables, row)
        k_JHE = _transpose(_blocks(_head(k_BSKH, row, kv_head), plan.key_block))
        v_SH = _head(v_BSKH, row, kv_head)
        ones = jnp.ones((len(v_SH), 1), v_SH.dtype)
        v_JEH1 = _blocks(jnp.concatenate([v_SH, ones], axis=-1), plan.key_block)

        def query_block(x):
            i, q_CH = x

            def key_block(n, state, masked):
                top_C, acc_CH1 = state
                j = visit.order_BIJ[i, n]
                scores_CE = plain_dot(q_CH, k_JHE[j])
                if plan.soft_cap is not None:
                    scores_CE = plan.soft_cap * jnp.tanh(scores_CE / plan.soft_cap)
                if masked:
                    scores_CE = jnp.where(_seen(plan, query, key, i, j), scores_CE, -jnp.inf)
                new_top_C = jnp.maximum(top_C, jnp.max(scores_CE, axis=1))
                p_CE = jnp.exp(scores_CE - new_top_C[:, None]).astype(v_JEH1.dtype)
                acc_CH1 = acc_CH1 * jnp.exp(top_C - new_top_C)[:, None] + plain_dot(p_CE, v_JEH1[j])
                return new_top_C, acc_CH1

            start = (
                jnp.full((plan.query_block,), _NO_MAXIMUM, jnp.float32),
                jnp.zeros((plan.query_block, head_dim + 1), jnp.float32),
            )
            counts = visit.num_full_BI[i], visit.num_BI[i]
            top_C, acc_CH1 = _loop(*counts, key_block, start)
            total_C = acc_CH1[:, head_dim]
            empty_C = total_C == 0.0
            total_C = jnp.where(empty_C, 1.0, total_C)
            out_CH = acc_CH1[:, :head_dim] / total_C[:, None]
            return out_CH.astype(dtype), jnp.where(empty_C, _NO_SUM, top_C + jnp.log(total_C))

        def query_head(g, results):
            out_BTNH, lse_BTN = results
            n = kv_head * group + g
            q_ICH = _blocks(_scaled(_head(q_BTNH, row, n), plan), plan.query_block)
            out_ICH, lse_IC = lax.map(query_block, (jnp.arange(len(q_ICH)), q_ICH))
            out_BTNH = _put_head(out_BTNH, out_ICH.reshape(-1, head_dim), row, n)
            return out_BTNH, _put_head(lse_BTN, lse_IC.reshape(-1), row, n)

        return lax.fori_loop(0, group, query_head, results), None

    results = (
        jnp.zeros(q_BTNH.shape, dtype),
        jnp.zeros((batch, num_queries, num_heads), jnp.float32),
    )
    return lax.scan(key_head, results, jnp.arange(batch * num_kv_heads))[0]


def _backward(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    lse_BTN,
    delta_BTN,
    dout_BTNH,
    query: BlockedRows,
    key: BlockedRows,
    plan: _Plan,
    dtype,
):
    """dq_BTNH, dk_BSKH, dv_BSKH in `dtype`; a query without keys has lse = _NO_SUM."""
    num_heads, head_dim = q_BTNH.shape[2:]
    batch, _, num_kv_heads, _ = k_BSKH.shape
    group = num_heads // num_kv_heads
    compute = q_BTNH.dtype
    some, every = block_pairs(plan.mask, query, key)
    tables = query, key, visits(jnp.swapaxes(some, 1, 2), jnp.swapaxes(every, 1, 2))

    def key_head(results, index):
        row, kv_head = index // num_kv_heads, index % num_kv_heads
        query, key, visit = _of_row(tables, row)
        k_JEH = _blocks(_head(k_BSKH, row, kv_head), plan.key_block)
        v_JEH = _blocks(_head(v_BSKH, row, kv_head), plan.key_block)
        k_JHE = _transpose(k_JEH)

        def query_head(g, state):
            dq_BTNH, dk_JEH, dv_JEH = state
            n = kv_head * group + g
            q_ICH = _blocks(_scaled(_head(q_BTNH, row, n), plan), plan.query_block)
            dout_ICH = _blocks(_head(dout_BTNH, row, n), plan.query_block)
            q_IHC, dout_IHC = _transpose(q_ICH), _transpose(dout_ICH)
            lse_IC = _blocks(_head(lse_BTN, row, n), plan.query_block, fill=_NO_SUM)
            delta_IC = _blocks(_head(delta_BTN, row, n), plan.query_block)

            def key_block(dq_IHC, x):
                j, dk_EH, dv_EH = x

                def query_block(n, state, masked):
                    dq_IHC, dk_EH, dv_EH = state
                    i = visit.order_BIJ[j, n]
                    scores_EC = plain_dot(k_JEH[j], q_IHC[i])
                    if plan.soft_cap is not None:
                        slope_EC = jnp.tanh(scores_EC / plan.soft_cap)
                        scores_EC = plan.soft_cap * slope_EC
                    p_EC = jnp.exp(scores_EC - lse_IC[i][None, :])
                    if masked:
                        p_EC = jnp.where(_seen(plan, query, key, i, j).T, p_EC, 0.0)
                    dp_EC = plain_dot(v_JEH[j], dout_IHC[i])
                    ds_EC = p_EC * (dp_EC - delta_IC[i][None, :])
                    if plan.soft_cap is not None:
                        ds_EC = ds_EC * (1.0 - slope_EC * slope_EC)
                    ds_EC = ds_EC.astype(compute)
                    dv_EH = dv_EH + plain_dot(p_EC.astype(compute), dout_ICH[i])
                    dk_EH = dk_EH + plain_dot(ds_EC, q_ICH[i])
                    dq_IHC = dq_IHC.at[i].add(plain_dot(k_JHE[j], ds_EC))
                    return dq_IHC, dk_EH, dv_EH

                counts = visit.num_full_BI[j], visit.num_BI[j]
                dq_IHC, dk_EH, dv_EH = _loop(*counts, query_block, (dq_IHC, dk_EH, dv_EH))
                return dq_IHC, (dk_EH, dv_EH)

            dq_IHC = jnp.zeros(q_IHC.shape, jnp.float32)
            xs = jnp.arange(len(k_JEH)), dk_JEH, dv_JEH
            dq_IHC, (dk_JEH, dv_JEH) = lax.scan(key_block, dq_IHC, xs)
            dq_TH = plan.scale * _transpose(dq_IHC).reshape(-1, head_dim)
            return _put_head(dq_BTNH, dq_TH, row, n), dk_JEH, dv_JEH

        dq_BTNH, dk_BSKH, dv_BSKH = results
        zeros = jnp.zeros(k_JEH.shape, jnp.float32)
        state = lax.fori_loop(0, group, query_head, (dq_BTNH, zeros, zeros))
        dq_BTNH, dk_SH, dv_SH = state[0], *(x.reshape(-1, head_dim) for x in state[1:])
        dk_BSKH = _put_head(dk_BSKH, dk_SH, row, kv_head)
        return (dq_BTNH, dk_BSKH, _put_head(dv_BSKH, dv_SH, row, kv_head)), None

    results = tuple(jnp.zeros(x.shape, dtype) for x in (q_BTNH, k_BSKH, v_BSKH))
    return lax.scan(key_head, results, jnp.arange(batch * num_kv_heads))[0]


def row_delta(out_BTNH: jax.Array, dout_BTNH: jax.Array) -> jax.Array:
    """sum over H of out * dout, float32 [B, T, N].

    Head by head, because XLA's CPU backend hands one reduction of the whole to a library that takes
    more than twice the operands' memory for itself.
    """
    batch, _, num_heads, _ = out_BTNH.shape

    def head(delta_BTN, index):
        row, n = index // num_heads, index % num_heads
        out_TH, dout_TH = (_head(x, row, n).astype(jnp.float32) for x in (out_BTNH, dout_BTNH))
        return _put_head(delta_BTN, jnp.sum(out_TH * dout_TH, axis=-1), row, n), None

    zeros = jnp.zeros(out_BTNH.shape[:-1], jnp.float32)
    return lax.scan(head, zeros, jnp.arange(batch * num_heads))[0]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BTNH, k_BSKH, v_BSKH, query: BlockedRows, key: BlockedRows, plan: _Plan):
    return _attend_forward(q_BTNH, k_BSKH, v_BSKH, query, key, plan)[0]


def _attend_forward(q_BTNH, k_BSKH, v_BSKH, query: BlockedRows, key: BlockedRows, plan: _Plan):
    out_BTNH, lse_BTN = _forward(q_BTNH, k_BSKH, v_BSKH, query, key, plan, q_BTNH.dtype)
    # Named so that a rematerialisation policy can keep them: with both, and q, k, v, the backward
    # pass needs no second forward.
    out_BTNH = checkpoint_name(out_BTNH, "context")
    lse_BTN = checkpoint_name(lse_BTN, "context_lse")
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BTN, query, key)


def _attend_backward(plan: _Plan, residuals, dout_BTNH):
    q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BTN, query, key = residuals
    delta_BTN = row_delta(out_BTNH, dout_BTNH)
    args = q_BTNH, k_BSKH, v_BSKH, lse_BTN, delta_BTN, dout_BTNH, query, key
    return *_backward(*args, plan, q_BTNH.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)
