"""The door to every attention kernel: `attend`.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.

A kernel sees one device's rows and heads. `attend` splits the batch over the mesh axes data and
fsdp and the heads over tensor, so that no kernel needs to know of a mesh; the attentions that cross
devices (ring, all_gather, ulysses) talk over the axis context only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from lcl.attention import layouts
from lcl.attention.all_gather import all_gather
from lcl.attention.ambient import (
    BATCH_AXES,
    CONTEXT_AXIS,
    TENSOR_AXIS,
    ambient_mesh,
    ambient_platform,
    axis_size,
    manual_axis_size,
)
from lcl.attention.blockwise import blockwise
from lcl.attention.choice import ACROSS_DEVICES, IMPLEMENTATIONS, Call, check_attention, choose
from lcl.attention.context_plan import ContextPlan
from lcl.attention.mask import Mask
from lcl.attention.reference import reference
from lcl.attention.ring import ring
from lcl.attention.rows import Rows
from lcl.attention.splash import BlockSizes, splash
from lcl.attention.ulysses import ulysses

__all__ = ["IMPLEMENTATIONS", "attend", "check_attention"]


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask = Mask(causal=True),  # noqa: B008  (frozen)
    segment_ids_BT: jax.Array | None = None,
    row_index_BT: jax.Array | None = None,
    key_segment_ids_BS: jax.Array | None = None,
    key_row_index_BS: jax.Array | None = None,
    layout: str = "contiguous",
    impl: str = "auto",
    scale: float | None = None,
    soft_cap: float | None = None,
    head_mask_N: jax.Array | None = None,
    block_sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of every query over the keys that its mask and its document let it see.

    | impl | memory a device | takes |
    |---|---|---|
    | reference | T x S scores | everything; the oracle |
    | blockwise | O(T + S) | any row order, other keys; no explicit mask |
    | splash | O(T) | TPU; rows in order, of multiples of 128 |
    | ring | O(T / context) | rows split over the mesh axis context; k, v travel |
    | all_gather | O(T) for k, v | the same; k, v are gathered |
    | ulysses | O(T) for some heads | the same; heads must split over context |

    The last three run splash inside on TPU, blockwise elsewhere. "auto" is ring where a context
    axis splits the rows, else splash on TPU, else blockwise, and reference for what that cannot
    serve, on short rows. An explicit choice never falls back.

    Args:
      q_BTNH: queries, float32 or bfloat16 [B, T, N, H], already rotated by RoPE.
      k_BSKH, v_BSKH: keys and values [B, S, K, H] of q's dtype; K divides N (K == N is multi-head,
        K == 1 multi-query attention). S == T, unless the keys' own rows are given.
      mask: causal, window, prefix, explicit; see `Mask`.
      segment_ids_BT: int32 [B, T], the document of each token, 0 = padding. None: one document.
      row_index_BT: int32 [B, T], the original row index of each token. None: as `layout` says.
      key_segment_ids_BS, key_row_index_BS: given together with the queries' where keys are other
        tokens than the queries (injected memories, a cache). None: the queries' own tokens.
      layout: how rows are laid out over the context axis, see `lcl.attention.layouts`. Kernels that
        are compiled for it go by it: row_index_BT must agree.
      impl: see above.
      scale: multiplies the scores; None is H ** -0.5.
      soft_cap: if set, scores become soft_cap * tanh(scores / soft_cap) before the mask (Gemma 2).
      head_mask_N: float [N], multiplies each head's output (ablation); None: ones.
      block_sizes: of splash; None: it chooses by the row.
      interpret: run TPU kernels interpreted where there is no TPU; slow, for tests.

    Returns:
      [B, T, N, H] in q's dtype; 0, with gradients 0, where a query sees no key (padding).

    Raises:
      ValueError: an unknown `impl`, shapes that do not fit, or an `impl` that cannot run here; one
        line that says why, and what to change.

    Example:
      >>> import jax.numpy as jnp
      >>> ones = jnp.ones((1, 3, 1, 4))
      >>> v = jnp.array([2.0, 4.0, 8.0])[None, :, None, None] * ones
      >>> attend(ones, ones, v, segment_ids_BT=jnp.array([[1, 1, 2]]))[0, :, 0, 0].tolist()
      [2.0, 3.0, 8.0]
    """
    external = key_segment_ids_BS is not None or key_row_index_BS is not None
    query = Rows(row_index_BT, segment_ids_BT)
    key = Rows(key_row_index_BS, key_segment_ids_BS) if external else None
    _check_shapes(q_BTNH, k_BSKH, v_BSKH, query, key, head_mask_N)
    mesh = ambient_mesh()
    # Inside a shard_map that has taken the context axis, the arrays are already one device's.
    inside = manual_axis_size(CONTEXT_AXIS)
    context = inside if mesh is None else axis_size(mesh, CONTEXT_AXIS)
    batch, length, num_heads, _ = q_BTNH.shape
    call = Call(
        mask=mask,
        row_length=length * inside,
        num_heads=num_heads,
        num_kv_heads=k_BSKH.shape[2],
        layout=layout,
        context=context,
        tensor=1 if mesh is None else axis_size(mesh, TENSOR_AXIS),
        batch_parts=1 if mesh is None else axis_size(mesh, BATCH_AXES),
        batch=batch,
        dtype=q_BTNH.dtype,
        platform=ambient_platform(),
        block_sizes=block_sizes,
        interpret=interpret,
        own_rows=row_index_BT is not None,
        external_keys=external,
    )
    layouts.check(layout, call.row_length, context if layout != "contiguous" else 1)
    impl = choose(impl, call)
    if inside > 1 and impl not in ACROSS_DEVICES:
        raise ValueError(
            f'attention "{impl}" inside a shard_map over context={inside} would see a part of each '
            "row: use impl='ring', 'all_gather' or 'ulysses'"
        )
    rules: dict[str, Any] = dict(mask=mask, scale=scale, soft_cap=soft_cap)
    if impl in ACROSS_DEVICES:
        plan = ContextPlan(
            context=context,
            layout=layout,
            inner=call.inner,
            block_sizes=block_sizes,
            interpret=interpret and call.platform != "tpu",
            **rules,
        )
        kernel = partial(_across, impl, plan)
        out_BTNH = _per_device(kernel, mesh, q_BTNH, k_BSKH, v_BSKH, query, None, split_rows=True)
    else:
        query = _with_row_index(query, layout, context, length)
        if impl == "reference":
            out_BTNH = reference(q_BTNH, k_BSKH, v_BSKH, query=query, key=key, **rules)
        elif impl == "blockwise":
            kernel = partial(_blockwise, rules)
            out_BTNH = _per_device(kernel, mesh, q_BTNH, k_BSKH, v_BSKH, query, key)
        else:
            rules.update(block_sizes=block_sizes, interpret=interpret and call.platform != "tpu")
            kernel = partial(_splash, rules)
            out_BTNH = _per_device(kernel, mesh, q_BTNH, k_BSKH, v_BSKH, query, None)
    if head_mask_N is not None:
        out_BTNH = (out_BTNH * head_mask_N[:, None].astype(jnp.float32)).astype(q_BTNH.dtype)
    return out_BTNH


def _check_shapes(q_BTNH, k_BSKH, v_BSKH, query: Rows, key: Rows | None, head_mask_N) -> None:
    if q_BTNH.ndim != 4 or k_BSKH.ndim != 4 or k_BSKH.shape != v_BSKH.shape:
        raise ValueError(
            f"q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}: "
            "need [B, T, N, H] and twice [B, S, K, H]"
        )
    batch, length, num_heads, head_dim = q_BTNH.shape
    num_keys, num_kv_heads = k_BSKH.shape[1:3]
    if key is None and num_keys != length:
        raise ValueError(
            f"{num_keys} keys for {length} queries: give key_row_index and key_segment_ids where "
            "keys are other tokens than the queries"
        )
    if k_BSKH.shape != (batch, num_keys, num_kv_heads, head_dim):
        raise ValueError(
            f"k {k_BSKH.shape} does not fit q {q_BTNH.shape}: only length and heads may differ"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} key heads")
    for side, rows, size in (("", query, length), ("key_", key or Rows(), num_keys)):
        for name, x in (("segment_ids", rows.segment_ids_BT), ("row_index", rows.row_index_BT)):
            if x is not None and x.shape != (batch, size):
                raise ValueError(f"{side}{name} has shape {x.shape}: need {(batch, size)}")
    if key is not None and (query.segment_ids_BT is None) != (key.segment_ids_BT is None):
        raise ValueError(
            "segment_ids on one side only: give them for queries and keys, or for none"
        )
    if head_mask_N is not None and head_mask_N.shape != (num_heads,):
        raise ValueError(
            f"head_mask has shape {head_mask_N.shape}: need {(num_heads,)}, a number for each head"
        )


def _with_row_index(query: Rows, layout: str, context: int, length: int) -> Rows:
    """A layout's row index spelt out, for kernels that go by row indices."""
    if query.row_index_BT is not None or layout == "contiguous" or context == 1:
        return query
    order = jnp.asarray(layouts.permutation(layout, length, context), jnp.int32)
    return query._replace(row_index_BT=order[None])


def _blockwise(rules: dict, q_BTNH, k_BSKH, v_BSKH, query: Rows, key: Rows | None):
    return blockwise(q_BTNH, k_BSKH, v_BSKH, query=query, key=key, **rules)


def _splash(rules: dict, q_BTNH, k_BSKH, v_BSKH, query: Rows, key: None):
    return splash(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT=query.segment_ids_BT, **rules)


def _across(impl: str, plan: ContextPlan, q_BTNH, k_BTKH, v_BTKH, rows: Rows, key: None):
    """One device's part of an attention that crosses devices."""
    if plan.inner == "splash":
        rows = rows._replace(row_index_BT=None)  # the layout says it
    elif rows.row_index_BT is None and plan.context > 1:
        batch, length = q_BTNH.shape[:2]
        place = jnp.arange(length, dtype=jnp.int32)
        here = lax.axis_index(plan.axis)
        index = layouts.device_rows(plan.layout, place, length, plan.context, here)
        rows = rows._replace(row_index_BT=jnp.broadcast_to(index[None], (batch, length)))
    function = {"ring": ring, "all_gather": all_gather, "ulysses": ulysses}[impl]
    return function(q_BTNH, k_BTKH, v_BTKH, rows, plan)


def _per_device(
    kernel: Callable,
    mesh: AbstractMesh | None,
    q_BTNH,
    k_BSKH,
    v_BSKH,
    query: Rows,
    key: Rows | None,
    split_rows: bool = False,
):
    """Runs `kernel` on every device's own rows and heads, and with `split_rows` own tokens."""
    if mesh is None:
        return kernel(q_BTNH, k_BSKH, v_BSKH, query, key)
    num_heads, num_kv_heads = q_BTNH.shape[2], k_BSKH.shape[2]
    if num_kv_heads % axis_size(mesh, TENSOR_AXIS):
        # Too few key heads to share out: give every query head its own copy.
        k_BSKH, v_BSKH = (
            jnp.repeat(x, num_heads // num_kv_heads, axis=2) for x in (k_BSKH, v_BSKH)
        )

    # Axes of one device are named too: for an axis left out, the gradient would be summed over it.
    def named(*axes):
        return tuple(axis for axis in axes if axis in mesh.axis_names) or None

    batch_axes = named(*BATCH_AXES)
    if not split_rows and axis_size(mesh, CONTEXT_AXIS) > 1:
        # Whole rows on every device of the context axis. Where the batch can, it takes the axis
        # in; else the same work is done on all of them.
        everywhere = axis_size(mesh, (*BATCH_AXES, CONTEXT_AXIS))
        if q_BTNH.shape[0] % everywhere == 0:
            batch_axes = named(*BATCH_AXES, CONTEXT_AXIS)
        sequence = None
    else:
        sequence = named(CONTEXT_AXIS)
    batch_of = partial(PartitionSpec, batch_axes, sequence)
    heads = batch_of(named(TENSOR_AXIS))

    def rows_spec(rows):
        # One row index may serve the whole batch.
        return jax.tree.map(
            lambda x: PartitionSpec(None, sequence) if x.shape[0] == 1 else batch_of(), rows
        )

    return jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(heads, heads, heads, rows_spec(query), rows_spec(key)),
        out_specs=heads,
        check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKH, query, key)
