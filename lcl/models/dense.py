"""The linear layers' matmul, `dense_dot`, with a derivative rule that is fast on every platform.

JAX's own rule for the backward pass of a bfloat16 matmul multiplies by folded transposes and asks
for bfloat16 results; XLA's CPU backend is fast at neither (see lcl.attention.matmul). Here
    y = x w,    dx = g w^T,    dw = x^T g
are three plain products of bfloat16 operands with float32 results; on a TPU the same form is the
right one. Gradients reach float32 parameters without having been rounded to bfloat16, unless
`with_gradient_in` asks for it: where devices share a parameter, their parts travel in that dtype.

In float32 the rule is about dw alone: JAX's own asks for (g^T x)^T, for which XLA's CPU backend
writes g out transposed and then multiplies two transposed operands: a sixth of a layer's time.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lcl.attention.ambient import ambient_mesh, ambient_platform
from lcl.attention.matmul import materialized_transpose, plain_dot


def dense_dot(
    x: jax.Array,
    w: jax.Array,
    *,
    num_contracting: int = 1,
    compute_dtype: DTypeLike | None = None,
    axes: tuple[str | None, ...] | None = None,
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
      axes: logical names of w's dims as it is used, None for a dim that is whole. A mesh on which w
        lies cut otherwise gathers it, in `compute_dtype`. None: as the compiler likes.
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
    how = _How(num_contracting, compute_dtype, axes)
    return _dot(x, w, how).astype(dtype)


@dataclasses.dataclass(frozen=True)
class _How:
    num_contracting: int
    compute_dtype: jnp.dtype
    axes: tuple[str | None, ...] | None

    def used(self, w: jax.Array) -> jax.Array:
        """w in the compute dtype, lying as the matmuls want it."""
        w_low = w.astype(self.compute_dtype)
        # Said out loud, so that a layer's recomputation and its backward pass share one gather: the
        # partitioner gathers once for each of them where many operations lie between.
        return w_low if self.axes is None else nn.with_logical_constraint(w_low, self.axes)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x: jax.Array, w: jax.Array, how: _How) -> jax.Array:
    return _forward(x, w, how)[0]


def _forward(x: jax.Array, w: jax.Array, how: _How):
    x_low = x.astype(how.compute_dtype)
    # w itself is kept and cast again: it exists anyway, a cast copy of every layer's would not.
    # The empty array carries the dtype of x to the backward pass.
    residuals = (x_low, w, jnp.zeros((0,), x.dtype))
    return plain_dot(x_low, how.used(w), how.num_contracting), residuals


def _backward(how: _How, residuals, g: jax.Array):
    x, w, x_kind = residuals
    g = g.astype(how.compute_dtype)
    dx = _over_outputs(g, how.used(w), how.num_contracting, w.ndim - how.num_contracting)
    dw = _over_tokens(x, g, x.ndim - how.num_contracting)
    return dx.astype(x_kind.dtype), dw.astype(w.dtype)


def _over_outputs(g: jax.Array, w: jax.Array, num_contracting: int, num_out: int) -> jax.Array:
    """g w^T, summed over the last `num_out` dims: the gradient of x."""
    if ambient_platform() == "tpu":
        # Of w as it stands: a mesh that has gathered it for the layer's recomputation need not
        # gather a transposed copy too. A TPU transposes inside the matmul.
        outs = tuple(range(g.ndim - num_out, g.ndim)), tuple(range(num_contracting, w.ndim))
        accum = jnp.promote_types(w.dtype, jnp.float32)
        return lax.dot_general(g, w, (outs, ((), ())), preferred_element_type=accum)
    return plain_dot(g, materialized_transpose(w, num_contracting), num_out)


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


def with_gradient_in(parameter: jax.Array, gradient_dtype: DTypeLike | None) -> jax.Array:
    """The parameter itself; its gradient is rounded to `gradient_dtype` before devices sum it.

    Args:
      parameter: float array.
      gradient_dtype: "bfloat16" halves the bytes that devices with other tokens send; each one's
        part is still accumulated in float32, then rounded. float32 and None leave it alone.

    Returns:
      The same values in the same dtype.

    Example:
      >>> import jax
      >>> jax.grad(lambda x: 1.001 * with_gradient_in(x, "bfloat16"))(1.0).item()
      1.0
    """
    rounds = gradient_dtype is not None and jnp.dtype(gradient_dtype).itemsize < 4
    return _rounded(parameter, jnp.dtype(gradient_dtype)) if rounds else parameter


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rounded(x: jax.Array, summed_in: jnp.dtype) -> jax.Array:
    return x


_rounded.defvjp(
    lambda x, summed_in: (x, None),
    lambda summed_in, _, g: (g.astype(summed_in).astype(g.dtype),),
)
