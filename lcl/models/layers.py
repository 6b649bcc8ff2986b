"""The parts of a decoder layer: initialisation, dense projection, RMSNorm, embedding, SwiGLU.

Shapes: B batch, T row length, D model, F mlp, V vocabulary.

Logical axis names of parameters: vocab, embed, heads, kv_heads, head_dim, mlp, norm, layers; of
activations: batch, sequence, and the parameters' words with `activation_` before them.
`lcl.parallel.rules` maps all of them to mesh axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lcl.models.dense import dense_dot, with_gradient_in
from lcl.models.lookup import embed_tokens

_CUT = 3.0  # standard deviations
_DENSITY_AT_CUT = math.exp(-(_CUT**2) / 2) / math.sqrt(2 * math.pi)
# Cutting a normal's tails lowers its standard deviation; dividing by this restores it.
_STD_AFTER_CUT = math.sqrt(1 - 2 * _CUT * _DENSITY_AT_CUT / math.erf(_CUT / math.sqrt(2)))


def truncated_normal(stddev: float) -> Callable[..., jax.Array]:
    """Initialiser: a normal cut at three standard deviations, of exactly this deviation.

    Args:
      stddev: standard deviation after the cut.

    Returns:
      init(key, shape, dtype) -> array.

    Example:
      >>> init = truncated_normal(0.5)
      >>> round(float(init(jax.random.key(0), (100, 100), jnp.float32).std()), 1)
      0.5
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.truncated_normal(key, -_CUT, _CUT, shape, dtype) * (
            stddev / _STD_AFTER_CUT
        )

    return init


def partitioned(init: Callable[..., jax.Array], axes: tuple[str, ...]) -> Callable[..., Any]:
    """An initialiser whose parameter carries the logical name of each of its axes.

    Args:
      init: init(key, shape, dtype) -> array.
      axes: one name an axis.

    Returns:
      An initialiser for `self.param`, which hands the layer the plain array.

    Example:
      >>> box = partitioned(nn.initializers.ones, ("norm",))(jax.random.key(0), (4,), jnp.float32)
      >>> box.names, box.value.shape
      (('norm',), (4,))
    """
    return nn.with_logical_partitioning(init, axes)


class Dense(nn.Module):
    """A projection from the last axes of its input to new ones, with an optional bias.

    The kernel is float32 [*in_shape, *out_shape], so that heads stay an axis of their own: they are
    what tensor parallelism splits.

    Attributes:
      in_shape: the input's last axes, contracted.
      out_shape: the output's new last axes.
      axes: one logical axis name for each axis of the kernel.
      dtype: what the matmul computes in.
      out_dtype: of the result.
      gradient_dtype: in which the kernel's gradient is summed over devices; None: float32.
      use_bias: whether a bias [*out_shape] is added.
      init_scale: the kernel's standard deviation is init_scale / sqrt(size of in_shape).
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: jnp.dtype
    out_dtype: jnp.dtype
    gradient_dtype: jnp.dtype | None = None
    use_bias: bool = False
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *in_shape] -> [..., *out_shape]."""
        init = truncated_normal(self.init_scale / math.sqrt(math.prod(self.in_shape)))
        kernel = self.param(
            "kernel",
            partitioned(init, self.axes),
            self.in_shape + self.out_shape,
            jnp.float32,
        )
        y = dense_dot(
            x,
            with_gradient_in(kernel, self.gradient_dtype),
            num_contracting=len(self.in_shape),
            compute_dtype=self.dtype,
            axes=tuple(None if name == "embed" else name for name in self.axes),
        )
        if self.use_bias:
            out_axes = self.axes[len(self.in_shape) :]
            y += self.param(
                "bias",
                partitioned(nn.initializers.zeros, out_axes),
                self.out_shape,
                jnp.float32,
            )
        return y.astype(self.out_dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (arXiv 1910.07467), in float32.

    Attributes:
      dim: size of the last axis.
      axis: its logical axis name.
      eps: added to the mean square.
      dtype: of the result.
      gradient_dtype: in which the scale's gradient is summed over devices; None: float32.
    """

    dim: int
    axis: str
    eps: float
    dtype: jnp.dtype
    gradient_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., dim] -> [..., dim]."""
        scale = self.param(
            "scale",
            partitioned(nn.initializers.ones, (self.axis,)),
            (self.dim,),
            jnp.float32,
        )
        scale = with_gradient_in(scale, self.gradient_dtype)
        return _normalise(x, scale, self.eps, self.dtype)


class Embed(nn.Module):
    """The table of token embeddings, float32 [V, D].

    Attributes:
      vocab_size: V.
      embed_dim: D.
      init_scale: the standard deviation is init_scale / sqrt(D).
      dtype: of the result.
    """

    vocab_size: int
    embed_dim: int
    init_scale: float
    dtype: jnp.dtype

    def setup(self) -> None:
        """Makes the table, which a tied head reads as well."""
        self.embedding = self.param(
            "embedding",
            partitioned(
                truncated_normal(self.init_scale / math.sqrt(self.embed_dim)), ("vocab", "embed")
            ),
            (self.vocab_size, self.embed_dim),
            jnp.float32,
        )

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D]; a token outside the vocabulary gives NaN, not another row."""
        return embed_tokens(self.embedding, tokens_BT, self.dtype)


class GatedMlp(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)).

    Attributes:
      embed_dim: D.
      mlp_dim: F.
      dtype: what the matmuls compute in.
      out_dtype: of the result.
      use_bias: biases on all three projections.
      init_scale: of gate and up.
      out_init_scale: of down.
      gradient_dtype: in which the kernels' gradients are summed over devices; None: float32.
    """

    embed_dim: int
    mlp_dim: int
    dtype: jnp.dtype
    out_dtype: jnp.dtype
    use_bias: bool
    init_scale: float
    out_init_scale: float
    gradient_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""

        def widen(name: str, tag: str) -> jax.Array:
            y_BTF = Dense(
                in_shape=(self.embed_dim,),
                out_shape=(self.mlp_dim,),
                axes=("embed", "mlp"),
                dtype=self.dtype,
                out_dtype=self.dtype,
                gradient_dtype=self.gradient_dtype,
                use_bias=self.use_bias,
                init_scale=self.init_scale,
                name=name,
            )(x_BTD)
            y_BTF = nn.with_logical_constraint(y_BTF, ("batch", "sequence", "activation_mlp"))
            return checkpoint_name(y_BTF, tag)

        gate_BTF, up_BTF = widen("gate", "mlp_gate"), widen("up", "mlp_up")
        hidden_BTF = _swiglu(gate_BTF, up_BTF, self.dtype)
        return Dense(
            in_shape=(self.mlp_dim,),
            out_shape=(self.embed_dim,),
            axes=("mlp", "embed"),
            dtype=self.dtype,
            out_dtype=self.out_dtype,
            gradient_dtype=self.gradient_dtype,
            use_bias=self.use_bias,
            init_scale=self.out_init_scale,
            name="down",
        )(hidden_BTF)


# The two below are cheap to make and dear to keep: autodiff would keep seven arrays of them for the
# backward pass. Checkpointed, it keeps their inputs, which others need as well.


@partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def _normalise(x: jax.Array, scale: jax.Array, eps: float, dtype: jnp.dtype) -> jax.Array:
    """RMSNorm's formula, computed in float32."""
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return (x * jax.lax.rsqrt(mean_square + eps) * scale).astype(dtype)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def _swiglu(gate: jax.Array, up: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """silu(gate) * up, computed in float32."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(dtype)
