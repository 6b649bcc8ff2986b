"""Splash attention, JAX's Pallas kernel for TPU, behind lcl's conventions.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim, C
devices that share a row.

What the kernel gives: linear memory, blocks that the mask hides are not visited, grouped queries
without repeating the keys. What it leaves to its caller, and is done here: the batch (vmap), the
scale (multiplied into q, in float32), and padding. A padding token would attend to other padding;
its output is set to 0, and with it every gradient that passes through it.

The rule of a mask is compiled into the kernel, segments are data. A row in another than its
original order must therefore be known when compiling (`splash_sharded_queries`), and an explicit
mask or a row length that is no multiple of 128 cannot be served: `splash_obstacle` says why.
The kernel can be differentiated once, in reverse. Off TPU it only runs interpreted, slowly, and
only if asked to (`interpret=True`).

Splash attention: sparse flash attention; JAX, `jax.experimental.pallas.ops.tpu.splash_attention`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lcl.attention.mask import Mask
from lcl.attention.rows import Relation
from lcl.attention.splash_blocks import BlockSizes
from lcl.attention.splash_jax import splash_names
from lcl.attention.splash_tables import (
    QueryRows,
    Rule,
    backward_table,
    forward_table,
    visible_blocks,
)

# Scalar memory holds a kernel's table of visible blocks. 768 KiB compile for v5e and v5p.
_MAX_TABLE_BYTES = 768 * 1024


def splash_obstacle(
    mask: Mask,
    *,
    query_length: int,
    key_length: int | None = None,
    num_heads: int,
    num_kv_heads: int,
    dtype: str | np.dtype | type = "bfloat16",
    block_sizes: BlockSizes | None = None,
    layout: str = "contiguous",
    ring: bool = False,
) -> str | None:
    """Why splash cannot serve a call, in one line with the mend, or None if it can.

    Args:
      mask: the rules on row indices.
      query_length, key_length: rows on one device; keys None: as many.
      num_heads, num_kv_heads: heads on one device.
      dtype: of q, k and v.
      block_sizes: as the call will have them; None: the defaults.
      layout: order of the rows of a context mesh.
      ring: whether keys travel around a ring (`splash_forward`), rather than being local or
        gathered.
    """
    key_length = query_length if key_length is None else key_length
    sizes = block_sizes or BlockSizes()
    if mask.explicit is not None:
        return "splash takes no explicit mask: use impl='reference'"
    if num_heads % num_kv_heads:
        return (
            f"{num_heads} query heads are no multiple of {num_kv_heads} key heads: "
            "use a multiple, or repeat the keys"
        )
    if jnp.dtype(dtype) not in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        return f"splash takes float32 or bfloat16, not {jnp.dtype(dtype)}: use impl='reference'"
    if ring and mask.prefix_length and mask.causal:
        return (
            f"prefix_length={mask.prefix_length} with splash in a ring: "
            "use impl='all_gather', or blockwise inside the ring"
        )
    if ring and layout == "zigzag" and mask.window is not None:
        return (
            f"window={mask.window} with splash in a ring over zigzag rows: use "
            "context_layout='contiguous' or 'striped'"
        )
    lengths = [(query_length, key_length)]
    if ring and layout == "zigzag":
        # From the second step on half of the queries meets half of the keys: both must split.
        lengths += [(query_length, key_length // 2), (query_length // 2, key_length)]
    for queries, keys in lengths:
        try:
            fitted = sizes.fit(queries, keys)
        except ValueError as error:
            return str(error)
        blocks_QK = [
            (queries // q, keys // k)
            for q, k in (
                (fitted.query, fitted.key),
                (fitted.dkv_query, fitted.dkv_key),
                (fitted.dq_query, fitted.dq_key),
            )
            if q and k
        ]
        # A block's number takes one byte or two, whether to run it another.
        table_bytes = max(n * m * (2 if max(n, m) <= 128 else 3) for n, m in blocks_QK)
        if not Rule.of(mask).full and mask.window is None and table_bytes > _MAX_TABLE_BYTES:
            return (
                f"{queries} queries over {keys} keys need a table of {table_bytes} bytes in "
                f"scalar memory (at most {_MAX_TABLE_BYTES}): use larger block_sizes or context"
            )
    return None


def splash(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask,
    segment_ids_BT: jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale * q k^T + mask) v for rows whose tokens stand in their original order.

    Args:
      q_BTNH: queries, float32 or bfloat16 [B, T, N, H], already rotated by RoPE.
      k_BSKH, v_BSKH: keys and values [B, S, K, H], S == T, q's dtype, N % K == 0.
      mask: causal, window, prefix; not explicit.
      segment_ids_BT: int32 [B, T], 0 = padding. None: one document.
      scale: multiplies the scores; None is H ** -0.5.
      soft_cap: if set, scores become soft_cap * tanh(scores / soft_cap) before the mask (Gemma 2,
        arXiv:2408.00118, section 2).
      block_sizes: None: the defaults of `BlockSizes`.
      interpret: run the kernel's program in JAX, on any platform: for tests.

    Returns:
      [B, T, N, H] in q's dtype. Padding gives 0, and its gradients are 0. The kernel's residuals
      (output and log-sum-exp) are tagged "context" for remat policies.

    Raises:
      ValueError: what `splash_obstacle` names.
      ImportError: a JAX whose splash attention has changed.
    """
    if k_BSKH.shape[1] != q_BTNH.shape[1]:
        raise ValueError(
            f"{q_BTNH.shape[1]} queries and {k_BSKH.shape[1]} keys: splash takes a row's own keys; "
            "use impl='blockwise'"
        )
    refuse(mask, q_BTNH, k_BSKH, block_sizes)
    rows = QueryRows(np.arange(q_BTNH.shape[1])[None])
    rule = Rule.of(mask)
    blocks = (block_sizes or BlockSizes()).fit(q_BTNH.shape[1], k_BSKH.shape[1])
    infos = jax.tree.map(lambda table: table[0], mask_infos(rule, rows, k_BSKH.shape[1], blocks))
    return _call(
        infos,
        rule,
        q_BTNH,
        k_BSKH,
        v_BSKH,
        segment_ids_BT,
        segment_ids_BT,
        scale=scale,
        soft_cap=soft_cap,
        blocks=blocks,
        interpret=interpret,
    )


def splash_sharded_queries(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask,
    rows_CT: np.ndarray,
    axis: str,
    query_segment_ids_BT: jax.Array | None = None,
    key_segment_ids_BS: jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of one device's share of a row over the whole row's keys; inside `shard_map`.

    Queries may stand in any order that is known when compiling; keys stand in their original order.
    For keys gathered by `lax.all_gather`, put in order after.

        context=2, zigzag        rows_CT          device 0: queries 0 1 6 7   keys 0 1 2 3 4 5 6 7
                                 [[0 1 6 7],      device 1: queries 2 3 4 5   keys 0 1 2 3 4 5 6 7
                                  [2 3 4 5]]

    Args:
      q_BTNH: this device's queries [B, T, N, H].
      k_BSKH, v_BSKH: the row's keys and values [B, S, K, H], S == C * T, in original order.
      mask: causal, window, prefix; not explicit.
      rows_CT: int [C, T] NumPy, original row index of each device's queries:
        `layouts.permutation(layout, S, C).reshape(C, T)`.
      axis: the mesh axis, C devices long, that the row is split over.
      query_segment_ids_BT, key_segment_ids_BS: int32, 0 = padding; both or neither.
      scale, soft_cap, block_sizes, interpret: as `splash`.

    Returns:
      [B, T, N, H] in q's dtype. Differentiable: dk and dv are this device's share of the sum.

    Raises:
      ValueError: what `splash_obstacle` names, or rows_CT that do not fit.
    """
    if rows_CT.ndim != 2 or rows_CT.shape[1] != q_BTNH.shape[1]:
        raise ValueError(
            f"rows_CT has shape {rows_CT.shape}: need [devices, {q_BTNH.shape[1]}], the row index "
            "of every query of every device"
        )
    refuse(mask, q_BTNH, k_BSKH, block_sizes)
    rule = Rule.of(mask)
    blocks = (block_sizes or BlockSizes()).fit(q_BTNH.shape[1], k_BSKH.shape[1])
    infos = mask_infos(rule, QueryRows(rows_CT), k_BSKH.shape[1], blocks)
    # Every device holds the tables of all and takes its own: they are small, and constants.
    here = lax.axis_index(axis)
    infos = jax.tree.map(
        lambda table: lax.dynamic_index_in_dim(jnp.asarray(table), here, keepdims=False), infos
    )
    return _call(
        infos,
        rule,
        q_BTNH,
        k_BSKH,
        v_BSKH,
        query_segment_ids_BT,
        key_segment_ids_BS,
        scale=scale,
        soft_cap=soft_cap,
        blocks=blocks,
        interpret=interpret,
    )


def _call(
    infos,
    rule: Rule,
    q_BTNH,
    k_BSKH,
    v_BSKH,
    query_segments,
    key_segments,
    *,
    scale: float | None,
    soft_cap: float | None,
    blocks: BlockSizes,
    interpret: bool,
) -> jax.Array:
    kernel = make_kernel(
        infos, rule, blocks, soft_cap=soft_cap, save_residuals=False, interpret=interpret
    )
    q_BNTH = heads_major(scaled(q_BTNH, scale))
    segments = segment_pair(query_segments, key_segments)
    out_BNTH = jax.vmap(kernel)(q_BNTH, heads_major(k_BSKH), heads_major(v_BSKH), segments)
    out_BTNH = jnp.swapaxes(out_BNTH, 1, 2)
    if query_segments is None:
        return out_BTNH
    # Padding has attended to padding. A constant in its place also stops its gradient: the kernel's
    # backward then sees a cotangent of 0, which is what keeps dq, dk and dv of padding at 0.
    return jnp.where((query_segments != 0)[:, :, None, None], out_BTNH, 0)


def refuse(mask: Mask | Relation, q_BTNH, k_BSKH, block_sizes: BlockSizes | None) -> None:
    """Raises ValueError with what keeps splash from serving these arrays."""
    if isinstance(mask, Relation):
        mask = Mask(causal=mask.causal, window=mask.window)
    obstacle = splash_obstacle(
        mask,
        query_length=q_BTNH.shape[1],
        key_length=k_BSKH.shape[1],
        num_heads=q_BTNH.shape[2],
        num_kv_heads=k_BSKH.shape[2],
        dtype=q_BTNH.dtype,
        block_sizes=block_sizes,
    )
    if obstacle:
        raise ValueError(f'attention "splash" cannot run: {obstacle}')


def heads_major(x_BTNH: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B, N, T, H], the kernel's order; for XLA a choice of layout, not a copy."""
    return jnp.swapaxes(x_BTNH, 1, 2)


def scaled(q_BTNH: jax.Array, scale: float | None) -> jax.Array:
    """q times the scale, rounded once: 128 ** -0.5 itself is 0.1% off in bfloat16."""
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    return (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)


def segment_pair(query_segments, key_segments):
    """The kernel's pair of segment ids, or None without documents."""
    if (query_segments is None) != (key_segments is None):
        raise ValueError("segment ids of queries and keys: give both or neither")
    if query_segments is None:
        return None
    return splash_names().SegmentIds(query_segments, key_segments)


def make_kernel(
    infos, rule: Rule, blocks: BlockSizes, *, soft_cap, save_residuals: bool, interpret: bool
):
    """JAX's kernel object for one row; `infos` of `mask_infos`, without the dimension C."""
    names = splash_names()
    return names.SplashAttentionKernel(
        *infos,
        is_mqa=False,  # the multi-head kernel serves grouped queries, and one key head, as well
        block_sizes=names.BlockSizes(
            block_q=blocks.query,
            block_kv=blocks.key,
            block_kv_compute=blocks.key_compute,
            block_q_dkv=blocks.dkv_query,
            block_kv_dkv=blocks.dkv_key,
            block_kv_dkv_compute=blocks.dkv_key_compute,
            block_q_dq=blocks.dq_query,
            block_kv_dq=blocks.dq_key,
            use_fused_bwd_kernel=blocks.fused_backward,
        ),
        save_residuals=save_residuals,
        mask_value=names.mask_value,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=None if save_residuals else "context",
        mask_function=None if rule.full else rule,
        interpret=interpret,
    )


def mask_infos(rule: Rule, rows: QueryRows, num_keys: int, blocks: BlockSizes) -> tuple:
    """JAX's MaskInfo of the forward, dq and dkv kernels, NumPy, with a leading C; `blocks` fitted.

    Without a rule (`rule.full`) they are empty: the kernel then visits every block.
    """
    MaskInfo = splash_names().MaskInfo

    def info(table):
        return MaskInfo(table.block, None, table.run, None, rows.array)

    if rule.full:
        nothing = MaskInfo(None, None, None, None, None)
        return nothing, None if blocks.fused_backward else nothing, nothing
    forward = forward_table(rule, rows, num_keys, blocks.query, blocks.key)
    dkv = backward_table(
        rule, rows, num_keys, blocks.dkv_query, blocks.dkv_key, blocks.fused_backward
    )
    if blocks.fused_backward:
        return info(forward), None, info(dkv)
    dq = forward_table(rule, rows, num_keys, blocks.dq_query, blocks.dq_key)
    return info(forward), info(dq), info(dkv)


def splash_flops(
    mask: Mask | Relation,
    query_length: int,
    key_length: int,
    *,
    num_heads: int,
    head_dim: int,
    block_sizes: BlockSizes | None = None,
) -> tuple[int, int]:
    """Matmul FLOPs of the kernels' forward and backward, for one row, by the blocks they visit.

    XLA counts next to nothing for a Pallas kernel that declares no cost, and JAX's splash declares
    none. A visited block is computed whole, so this is what the chip does, a little more than what
    the mask needs; segments skip nothing. Forward 2 matmuls a block; backward 7 (dk, dv: 4, dq: 3),
    or 5 fused. A multiply and an add are 2 FLOPs.

    Args:
      mask: without a table.
      query_length, key_length: rows on a device.
      num_heads, head_dim: of the queries.
      block_sizes: None: the defaults.

    Returns:
      (forward, backward).

    Example:
      >>> forward, backward = splash_flops(
      ...     Mask(causal=False), 1024, 1024, num_heads=1, head_dim=128
      ... )
      >>> forward == 2 * 2 * 1024 * 1024 * 128, backward / forward
      (True, 3.5)
    """
    rule = Rule.of(mask)
    blocks = (block_sizes or BlockSizes()).fit(query_length, key_length)
    rows = QueryRows(np.arange(query_length)[None])

    def matmul(query: int | None, key: int | None) -> int:
        assert query and key
        seen = visible_blocks(rule, rows, key_length, query, key)
        return 2 * int(seen.sum()) * query * key * head_dim * num_heads

    forward = 2 * matmul(blocks.query, blocks.key)
    if blocks.fused_backward:
        return forward, 5 * matmul(blocks.dkv_query, blocks.dkv_key)
    dkv = 4 * matmul(blocks.dkv_query, blocks.dkv_key)
    return forward, dkv + 3 * matmul(blocks.dq_query, blocks.dq_key)
