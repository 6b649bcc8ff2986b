"""The rows of an embedding table, without ever putting a table together that the mesh has cut.

Legend: B batch, T row length, V vocabulary, D model; v, d, t: a device's part of V, D and T.

The table [V, D] lies cut along D over fsdp and context, and along V over tensor; the tokens are cut
over the same axes along B and T. Left to itself the partitioner gathers the table, 2.1 GB for
Llama-3-8B on every chip, and in the backward pass makes a gradient as large. Here the tokens
travel instead (4 bytes each), are looked up in every device's columns, and the columns of a token
are sent to where the token lives:

    device 0   table[:, 0:d]   tokens A  --gather-->  A B  --look up-->  A[0:d] B[0:d]
    device 1   table[:, d:D]   tokens B  --gather-->  A B  --look up-->  A[d:D] B[d:D]
                                                                 |  all-to-all  |
    device 0                                                     A[0:d] A[d:D]
    device 1                                                     B[0:d] B[d:D]

Each device receives its own [B, T, D] once and nothing else of size. The gradient goes the same way
back: all-to-all, then every device adds up the rows of its own columns.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from lcl.attention.ambient import (
    BATCH_AXES,
    CONTEXT_AXIS,
    TENSOR_AXIS,
    ambient_mesh,
    axis_size,
    present_axes,
)
from lcl.parallel.rules import axes_of


def embed_tokens(table_VD: jax.Array, tokens_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The table's row of every token.

    Under an ambient mesh that cuts the table along D, by the exchange at the top of this file,
    provided that the mesh's axes divide the batch, the row and the table. Otherwise (one device; a
    mesh of data and tensor only; a prompt of three tokens on a mesh of eight devices) by a plain
    lookup that the partitioner places. The values are the same to the bit.

    Args:
      table_VD: float32 [V, D].
      tokens_BT: int32 [B, T].
      dtype: of the result.

    Returns:
      [B, T, D]; NaN for a token of V or more. Differentiable with respect to the table.

    Example:
      >>> embed_tokens(jnp.eye(3), jnp.array([[2, 0]]), jnp.float32).tolist()
      [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
    """
    exchange = _Exchange.on(table_VD.shape, tokens_BT.shape, jnp.dtype(dtype).name)
    if exchange is None:
        return jnp.take(table_VD, tokens_BT, axis=0, mode="fill").astype(dtype)
    return _embed(table_VD, tokens_BT, exchange)


@dataclasses.dataclass(frozen=True)
class _Exchange:
    """Which mesh axes hold what, and the dtype of the result."""

    batch: tuple[str, ...]
    context: tuple[str, ...]
    cut: tuple[str, ...]  # the table's D; all of them hold tokens as well
    vocab: tuple[str, ...]
    dtype: str

    @classmethod
    def on(cls, table_shape, tokens_shape, dtype: str) -> _Exchange | None:
        mesh = ambient_mesh()
        if mesh is None:
            return None
        batch, context = present_axes(mesh, BATCH_AXES), present_axes(mesh, (CONTEXT_AXIS,))
        cut, vocab = present_axes(mesh, axes_of("embed")), present_axes(mesh, (TENSOR_AXIS,))
        dims = zip((*tokens_shape, *table_shape), (batch, context, vocab, cut), strict=True)
        if not cut or any(dim % axis_size(mesh, axes) for dim, axes in dims):
            return None
        assert set(cut) <= {*batch, *context}, "columns go to where tokens are"
        return cls(batch, context, cut, vocab, dtype)

    @property
    def table(self) -> PartitionSpec:
        return PartitionSpec(self.vocab or None, self.cut)

    @property
    def tokens(self) -> PartitionSpec:
        return PartitionSpec(self.batch or None, self.context or None)

    def places(self, tokens_BT: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
        """Where this device finds every token of the devices that share its rows of the table.

        Returns:
          Its row in the own part (`num_rows`, out of bounds, where that has none), and whether it
          is in no device's part.
        """
        tokens_cBT = lax.all_gather(tokens_BT, self.cut)
        first = lax.axis_index(self.vocab) * num_rows if self.vocab else 0
        whole = num_rows * (lax.axis_size(self.vocab) if self.vocab else 1)
        outside = (tokens_cBT < 0) | (tokens_cBT >= whole)
        here = (tokens_cBT >= first) & (tokens_cBT < first + num_rows)
        return jnp.where(here, tokens_cBT - first, num_rows), outside


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _embed(table_VD: jax.Array, tokens_BT: jax.Array, exchange: _Exchange) -> jax.Array:
    def local(table_vd: jax.Array, tokens_Bt: jax.Array) -> jax.Array:
        rows_cBt, outside_cBt = exchange.places(tokens_Bt, table_vd.shape[0])
        x_cBtd = table_vd.astype(exchange.dtype).at[rows_cBt].get(mode="fill", fill_value=0)
        x_cBtd = jnp.where(outside_cBt[..., None], jnp.nan, x_cBtd)
        x_Btd = lax.all_to_all(x_cBtd, exchange.cut, split_axis=0, concat_axis=3, tiled=True)[0]
        # One device of the tensor group has the row, the others 0: the sum rounds nothing.
        return lax.psum(x_Btd, exchange.vocab) if exchange.vocab else x_Btd

    return jax.shard_map(
        local,
        in_specs=(exchange.table, exchange.tokens),
        out_specs=PartitionSpec(*exchange.tokens, None),
        check_vma=False,
    )(table_VD, tokens_BT)


def _forward(table_VD: jax.Array, tokens_BT: jax.Array, exchange: _Exchange):
    # The table itself is no residual: the backward pass needs its shape and dtype alone.
    shape = jax.ShapeDtypeStruct(table_VD.shape, table_VD.dtype)
    return _embed(table_VD, tokens_BT, exchange), (tokens_BT, _Static(shape))


def _backward(exchange: _Exchange, residuals, g_BTD: jax.Array):
    tokens_BT, static = residuals
    mesh = ambient_mesh()
    assert mesh is not None, "the forward pass found one"
    num_rows = static.shape.shape[0] // axis_size(mesh, exchange.vocab)

    def local(g_BtD: jax.Array, tokens_Bt: jax.Array) -> jax.Array:
        rows_cBt, _ = exchange.places(tokens_Bt, num_rows)
        g_cBtd = lax.all_to_all(g_BtD[None], exchange.cut, split_axis=3, concat_axis=0, tiled=True)
        sums_vd = jnp.zeros((num_rows, g_cBtd.shape[-1]), static.shape.dtype)
        sums_vd = sums_vd.at[rows_cBt].add(g_cBtd.astype(sums_vd.dtype), mode="drop")
        copies = tuple(name for name in exchange.batch if name not in exchange.cut)
        return lax.psum(sums_vd, copies) if copies else sums_vd

    gradient = jax.shard_map(
        local,
        in_specs=(PartitionSpec(*exchange.tokens, None), exchange.tokens),
        out_specs=exchange.table,
        check_vma=False,
    )(g_BTD, tokens_BT)
    return gradient, None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A shape that travels from the forward to the backward pass without being an array."""

    shape: jax.ShapeDtypeStruct


_embed.defvjp(_forward, _backward)
