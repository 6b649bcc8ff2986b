"""The matmul chosen by platform: bfloat16 in, float32 out, and on CPU transposes really made.

bfloat16 operands with a float32 result are the right form everywhere. A TPU's matrix unit works
that way, and XLA's CPU backend has a fast bfloat16 matmul that it takes only if the result type is
float32 *and* both operands lie in memory as a plain [m, k] x [k, n] product. A transposed operand
is folded into the dot, which then falls back to a matmul two to three times slower. The cure is a
layout constraint on the transposed operand, on CPU only: the transpose is really made, and the dot
runs at full speed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from lcl.attention.ambient import ambient_mesh


def plain_dot(x: jax.Array, w: jax.Array, num_contracting: int = 1) -> jax.Array:
    """Contracts the last dims of x with the first of w, accumulating in float32 at least.

    Args:
      x: float array [..., *contracted].
      w: float array [*contracted, ...] of the same dtype.
      num_contracting: how many dims are contracted.

    Returns:
      [..., ...] in float32 (float64 for float64 operands).
    """
    accum = jnp.promote_types(jnp.result_type(x, w), jnp.float32)
    lhs = tuple(range(x.ndim - num_contracting, x.ndim))
    rhs = tuple(range(num_contracting))
    return lax.dot_general(x, w, ((lhs, rhs), ((), ())), preferred_element_type=accum)


def materialized_transpose(x: jax.Array, num_leading: int = 1) -> jax.Array:
    """Moves the first `num_leading` dims behind the others; bfloat16 on CPU really in memory.

    Args:
      x: array [*leading, *trailing].
      num_leading: how many dims are leading.

    Returns:
      array [*trailing, *leading], the same values.

    Example:
      >>> import jax.numpy as jnp
      >>> materialized_transpose(jnp.ones((2, 3, 4)), 2).shape
      (4, 2, 3)
    """
    order = (*range(num_leading, x.ndim), *range(num_leading))
    if x.dtype != jnp.bfloat16 or ambient_mesh() is not None:
        # float32 dots are as fast on a folded transpose. And XLA's partitioner does not see through
        # a layout constraint: on a mesh it would gather x whole.
        return jnp.transpose(x, order)
    row_major = Layout(major_to_minor=tuple(range(x.ndim)))
    return lax.platform_dependent(
        x,
        cpu=lambda y: with_layout_constraint(jnp.transpose(y, order), row_major),
        default=lambda y: jnp.transpose(y, order),
    )
