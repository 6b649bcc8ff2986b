"""The linear layers' matmul, `dense_dot`, with a derivative rule that is fast on every platform.

JAX's own rule for the backward pass of a bfloat16 matmul multiplies by folded transposes and asks
for bfloat16 results; XLA's CPU backend is fast at neither (see lcl.attention.matmul). Here
    y = x w,    dx = g w^T,    dw = x^T g
are three plain products of bfloat16 operands with float32 results; on a TPU the same form is the
right one. Gradients reach float32 parameters without having been rounded to bfloat16.

In float32 the rule is about dw alone: JAX's own asks for (g^T x)^T, for which XLA's CPU backend
writes g out transposed and then multiplies two transposed operands: a sixth of a layer's time.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lcl.attention.ambient import ambient_mesh
from lcl.attention.matmul import materialized_transpose, plain_dot


def dense_dot(
    x: jax.Array,
    w: jax.Array,
    *,
    num_contracting: int = 1,
    compute_dtype: DTypeLike | None = None,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Contracts the last `num_contracting` dims of x with the first ones of w.

    [B,T,D] x [D,N,H] -> [B,T,N,H] with num_contracting=1; [B,T,N,H] x [N,H,D] -> [B,T,D] with 2.

    Args:
      x: float array [..., *contracted].
      w: float array [*contracted, ...]; typically float32 parameters, cast here.
      num_contracting: how many dims are contracted.
      compute_dtype: bfloat16 for bfloat16 operands with float32 accumulation; None for the promoted
        dtype of x and w. Differentiable in reverse, and that again in either mode
        (Hessian-vector products) where the dtype is float32.
      dtype: of the result. Gradients have the dtypes of x and w.

    Returns:
      [..., ...] in `dtype`.

    Raises:
      ValueError: the contracted dims differ.

    Example:
      >>> import jax.numpy as jnp
      >>> dense_dot(jnp.ones((2, 3, 4)), jnp.ones((4, 5, 6))).shape
      (2, 3, 5, 6)
      >>> dense_dot(jnp.ones((1, 5, 6)), jnp.ones((5, 6, 2)), num_contracting=2).tolist()
      [[30.0, 30.0]]
    """
    if x.shape[x.ndim - num_contracting :] != w.shape[:num_contracting]:
        raise ValueError(
            f"cannot contract the last {num_contracting} dims of {x.shape} "
            f"with the first of {w.shape}: they must be equal"
        )
    compute_dtype = jnp.dtype(compute_dtype or jnp.promote_types(x.dtype, w.dtype))
    return _dot(x, w, num_contracting, compute_dtype).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dot(x: jax.Array, w: jax.Array, num_contracting: int, compute_dtype: Any) -> jax.Array:
    return _forward(x, w, num_contracting, compute_dtype)[0]


def _forward(x: jax.Array, w: jax.Array, num_contracting: int, compute_dtype: Any):
    x_low = x.astype(compute_dtype)
    # w itself is kept and cast again: it exists anyway, a cast copy of every layer's would not.
    # The empty array carries the dtype of x to the backward pass.
    residuals = (x_low, w, jnp.zeros((0,), x.dtype))
    return plain_dot(x_low, w.astype(compute_dtype), num_contracting), residuals


def _backward(num_contracting: int, compute_dtype: Any, residuals, g: jax.Array):
    x, w, x_kind = residuals
    w_low, g = w.astype(compute_dtype), g.astype(compute_dtype)
    num_batch, num_out = x.ndim - num_contracting, w.ndim - num_contracting
    dx = plain_dot(g, materialized_transpose(w_low, num_contracting), num_out)
    dw = _over_tokens(x, g, num_batch)
    return dx.astype(x_kind.dtype), dw.astype(w.dtype)


def _over_tokens(x: jax.Array, g: jax.Array, num_batch: int) -> jax.Array:
    """x^T g, summed over the `num_batch` leading dims: the gradient of w."""
    if x.dtype == jnp.bfloat16 or ambient_mesh() is not None:
        return plain_dot(materialized_transpose(x, num_batch), g, num_batch)
    # As one matrix product over all tokens that names no transpose: XLA's CPU backend would move a
    # transpose into whatever made x, and write it column by column.
    x_XI, g_XO = (y.reshape(math.prod(y.shape[:num_batch]), -1) for y in (x, g))
    accum = jnp.promote_types(x.dtype, jnp.float32)
    dw = lax.dot_general(x_XI, g_XO, (((0,), (0,)), ((), ())), preferred_element_type=accum)
    return dw.reshape(x.shape[num_batch:] + g.shape[num_batch:])


_dot.defvjp(_forward, _backward)
