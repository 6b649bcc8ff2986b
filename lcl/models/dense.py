"""The one place where a matmul is chosen by platform: `dense_dot`.

bfloat16 operands with a float32 result is the right form everywhere. A TPU's matrix unit works that way,
and XLA's CPU backend has a fast bfloat16 matmul that it takes only if the result type is float32 *and*
both operands lie in memory as a plain [m, k] x [k, n] product. The backward pass of a matmul multiplies
by transposed operands; XLA folds such a transpose into the dot and the CPU then falls back to a matmul
two to three times slower. The cure is a layout constraint on the transposed operand, on CPU only: the
transpose is really made, and the dot runs at full speed. JAX's own derivative rule does neither, hence
the custom rule here.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from lcl.attention.ambient import ambient_mesh


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
      w: float array [*contracted, ...]; typically float32 parameters: they are cast here, and their
        gradient comes back in w's own dtype without having been rounded to `compute_dtype`.
      num_contracting: how many dims are contracted.
      compute_dtype: bfloat16 for bfloat16 operands with float32 accumulation; None for the promoted
        dtype of x and w. With float32 this is a plain `lax.dot_general`, differentiable any number of times.
      dtype: of the result; gradients have the dtypes of x and w.

    Returns:
      [..., ...] in `dtype`.

    Raises:
      ValueError: the contracted dims differ.

    Example:
      >>> import jax.numpy as jnp
      >>> dense_dot(jnp.ones((2, 3, 4)), jnp.ones((4, 5, 6))).shape
      (2, 3, 5, 6)
      >>> dense_dot(jnp.ones((2, 5, 6)), jnp.ones((5, 6, 4)), num_contracting=2)[0, 0].tolist()
      [30.0, 30.0, 30.0, 30.0]
    """
    contracted = x.shape[x.ndim - num_contracting :]
    if contracted != w.shape[:num_contracting]:
        raise ValueError(
            f"cannot contract the last {num_contracting} dims of {x.shape} with the first of {w.shape}"
        )
    compute_dtype = jnp.dtype(compute_dtype or jnp.promote_types(x.dtype, w.dtype))
    if compute_dtype == jnp.bfloat16:
        out = _low_precision_dot(x, w, num_contracting)
    else:
        out = _plain_dot(x.astype(compute_dtype), w.astype(compute_dtype), num_contracting)
    return out.astype(dtype)


def materialized_transpose(x: jax.Array, num_leading: int) -> jax.Array:
    """Moves the first `num_leading` dims behind the others; on CPU, in memory and not only in name.

    Args:
      x: array [*leading, *trailing].
      num_leading: how many dims are leading.

    Returns:
      array [*trailing, *leading].
    """
    order = (*range(num_leading, x.ndim), *range(num_leading))
    if ambient_mesh() is not None:
        # XLA's partitioner does not see through a layout constraint: it would gather x whole.
        return jnp.transpose(x, order)
    row_major = Layout(major_to_minor=tuple(range(x.ndim)))
    return lax.platform_dependent(
        x,
        cpu=lambda y: with_layout_constraint(jnp.transpose(y, order), row_major),
        default=lambda y: jnp.transpose(y, order),
    )


def _plain_dot(x: jax.Array, w: jax.Array, num_contracting: int) -> jax.Array:
    accum = jnp.promote_types(jnp.result_type(x, w), jnp.float32)
    lhs = tuple(range(x.ndim - num_contracting, x.ndim))
    rhs = tuple(range(num_contracting))
    return lax.dot_general(x, w, ((lhs, rhs), ((), ())), preferred_element_type=accum)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _low_precision_dot(x: jax.Array, w: jax.Array, num_contracting: int) -> jax.Array:
    return _forward(x, w, num_contracting)[0]


def _forward(x: jax.Array, w: jax.Array, num_contracting: int):
    x_low, w_low = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    # Empty arrays carry the dtypes of x and w to the backward pass.
    kinds = (jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype))
    return _plain_dot(x_low, w_low, num_contracting), (x_low, w_low, kinds)


def _backward(num_contracting: int, residuals, g: jax.Array):
    x, w, (x_kind, w_kind) = residuals
    g = g.astype(jnp.bfloat16)
    num_batch, num_out = x.ndim - num_contracting, w.ndim - num_contracting
    dx = _plain_dot(g, materialized_transpose(w, num_contracting), num_out)
    dw = _plain_dot(materialized_transpose(x, num_batch), g, num_batch)
    return dx.astype(x_kind.dtype), dw.astype(w_kind.dtype)


_low_precision_dot.defvjp(_forward, _backward)
