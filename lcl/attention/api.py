"""The door to every attention kernel: `attend`.

Legend: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.

A kernel sees one device's rows and heads. `attend` splits the batch over the mesh axes data and
fsdp and the heads over tensor, so that no kernel needs to know of a mesh.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from lcl.attention.ambient import (
    BATCH_AXES,
    CONTEXT_AXIS,
    TENSOR_AXIS,
    ambient_mesh,
    ambient_platform,
    axis_size,
)
from lcl.attention.blockwise import blockwise
from lcl.attention.mask import Mask
from lcl.attention.reference import reference
from lcl.attention.rows import Rows

IMPLEMENTATIONS = ("auto", "reference", "blockwise")


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
    """Attention of every query over the keys that its mask and its document let it see.

    Args:
      q_BTNH: queries, float32 or bfloat16 [B, T, N, H], already rotated by RoPE.
      k_BSKH, v_BSKH: keys and values [B, S, K, H] with S == T and q's dtype; K divides N (K == N is
        multi-head, K == 1 multi-query attention).
      mask: causal, window, prefix, explicit; see `Mask`.
      segment_ids_BT: int32 [B, T], the document of each token, 0 = padding. None: one document.
      row_index_BT: int32 [B, T], the original row index of each token. None: 0 .. T-1 in order.
      impl: "reference" makes the [T, S] scores and takes everything. "blockwise" has linear memory
        and skips what the mask hides; tokens must be in order, the context axis unsplit. "auto" is
        "blockwise" on CPU where it can run, else "reference". An explicit choice never falls back.
      scale: multiplies the scores; None is H ** -0.5.

    Returns:
      [B, T, N, H] in q's dtype; 0, with gradients 0, where a query sees no key (padding).

    Raises:
      ValueError: an unknown `impl`, shapes that do not fit, or an explicit `impl` that cannot run
        here (says why).

    Example:
      >>> import jax.numpy as jnp
      >>> ones = jnp.ones((1, 3, 1, 4))
      >>> v = jnp.array([2.0, 4.0, 8.0])[None, :, None, None] * ones
      >>> attend(ones, ones, v, segment_ids_BT=jnp.array([[1, 1, 2]]))[0, :, 0, 0].tolist()
      [2.0, 3.0, 8.0]
    """
    _check_shapes(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, row_index_BT)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: there is no such attention; use one of {IMPLEMENTATIONS}")
    mesh = ambient_mesh()
    if impl != "reference":
        obstacle = _blockwise_obstacle(q_BTNH, mask, row_index_BT, mesh)
        if impl == "blockwise" and obstacle:
            raise ValueError(f'attention "blockwise" cannot run: {obstacle}; use impl="reference"')
        if not obstacle and (impl == "blockwise" or ambient_platform() == "cpu"):
            kernel = partial(blockwise, mask=mask, scale=scale)
            return _per_device(kernel, mesh, q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    return reference(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=mask,
        query=Rows(row_index_BT, segment_ids_BT),
        scale=scale,
    )


def _check_shapes(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, row_index_BT) -> None:
    if q_BTNH.ndim != 4 or k_BSKH.shape != v_BSKH.shape:
        raise ValueError(
            f"q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}: "
            "need [B, T, N, H] and twice [B, T, K, H]"
        )
    batch, length, num_heads, head_dim = q_BTNH.shape
    num_kv_heads = k_BSKH.shape[2]
    if k_BSKH.shape != (batch, length, num_kv_heads, head_dim):
        raise ValueError(
            f"k {k_BSKH.shape} does not fit q {q_BTNH.shape}: only the heads may differ"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} key heads")
    for name, x in (("segment_ids", segment_ids_BT), ("row_index", row_index_BT)):
        if x is not None and x.shape != (batch, length):
            raise ValueError(f"{name} has shape {x.shape}: need {(batch, length)}")


def _blockwise_obstacle(q_BTNH, mask: Mask, row_index_BT, mesh: AbstractMesh | None) -> str | None:
    """Why the blockwise kernel cannot serve this call, or None if it can."""
    if row_index_BT is not None:
        return "row_index is given, and it takes tokens in their original order only"
    if mask.explicit is not None:
        return "it takes no explicit mask"
    if q_BTNH.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32, and q is {q_BTNH.dtype}"
    if mesh is None:
        return None
    batch, _, num_heads, _ = q_BTNH.shape
    if (size := axis_size(mesh, CONTEXT_AXIS)) > 1:
        return f"the mesh splits rows over context={size}"
    if batch % (size := axis_size(mesh, BATCH_AXES)):
        return f"a batch of {batch} rows does not split over data x fsdp = {size} devices"
    if num_heads % (size := axis_size(mesh, TENSOR_AXIS)):
        return f"{num_heads} heads do not split over tensor={size}"
    return None


def _per_device(kernel, mesh: AbstractMesh | None, q_BTNH, k_BSKH, v_BSKH, segment_ids_BT):
    """Runs `kernel` on every device's own rows and heads."""
    if mesh is None:
        return kernel(q_BTNH, k_BSKH, v_BSKH, query=Rows(None, segment_ids_BT))
    num_heads, num_kv_heads = q_BTNH.shape[2], k_BSKH.shape[2]
    if num_kv_heads % axis_size(mesh, TENSOR_AXIS):
        # Too few key heads to share out: give every query head its own copy.
        k_BSKH, v_BSKH = (
            jnp.repeat(x, num_heads // num_kv_heads, axis=2) for x in (k_BSKH, v_BSKH)
        )

    # Axes of one device are named too: for an axis left out, the gradient would be summed over it.
    def named(*axes):
        return tuple(axis for axis in axes if axis in mesh.axis_names) or None

    rows = PartitionSpec(named(*BATCH_AXES), named(CONTEXT_AXIS))
    heads = PartitionSpec(*rows, named(TENSOR_AXIS))
    return jax.shard_map(
        lambda q, k, v, segment_ids: kernel(q, k, v, query=Rows(None, segment_ids)),
        mesh=mesh,
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
