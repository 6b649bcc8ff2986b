"""The linear layers' matmul, `dense_dot`, with a derivative rule that stays fast in bfloat16.

JAX's own rule for the backward pass of a bfloat16 matmul multiplies by folded transposes and asks
for bfloat16 results; XLA's CPU backend is fast at neither (see lcl.attention.matmul). Here
    y = x w,    dx = g w^T,    dw = x^T g
are three plain products of bfloat16 operands with float32 results; on a TPU the same form is the
right one. Gradients reach float32 parameters without having been rounded to bfloat16.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

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
        dtype of x and w. With float32 this is a plain `lax.dot_general`, differentiable any number
        of times in either mode; with bfloat16, once and in reverse.
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
    if compute_dtype == jnp.bfloat16:
        out = _bfloat16_dot(x, w, num_contracting)
    else:
        out = plain_dot(x.astype(compute_dtype), w.astype(compute_dtype), num_contracting)
    return out.astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _bfloat16_dot(x: jax.Array, w: jax.Array, num_contracting: int) -> jax.Array:
    return _forward(x, w, num_contracting)[0]


def _forward(x: jax.Array, w: jax.Array, num_contracting: int):
    x_low, w_low = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    # Empty arrays carry the dtypes of x and w to the backward pass.
    kinds = (jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype))
    return plain_dot(x_low, w_low, num_contracting), (x_low, w_low, kinds)


def _backward(num_contracting: int, residuals, g: jax.Array):
    x, w, (x_kind, w_kind) = residuals
    g = g.astype(jnp.bfloat16)
    num_batch, num_out = x.ndim - num_contracting, w.ndim - num_contracting
    dx = plain_dot(g, materialized_transpose(w, num_contracting), num_out)
    dw = plain_dot(materialized_transpose(x, num_batch), g, num_batch)
    return dx.astype(x_kind.dtype), dw.astype(w_kind.dtype)


_bfloat16_dot.defvjp(_forward, _backward)
