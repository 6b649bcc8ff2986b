"""Cross-entropy with the output head inside: loss and gradients in one pass, logits never kept.

Legend: B batch, T sequence, D model dim, V vocabulary, C chunks, R rows of a chunk (B * T / C).

    hidden  [B, T, D] --+-- chunk 1 -- logits [R, V] -- loss, d hidden, += d kernel -- forgotten
                        +-- chunk 2 -- logits [R, V] -- ...
                        +-- ...
The logits are the largest array of a language model's step. The gradient of the loss with respect
to them is known as soon as they are (softmax - one-hot), so each chunk is turned at once into the
gradients of hidden and kernel; these two are the only residuals of size, and the backward pass
merely scales them.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec
from jax.typing import DTypeLike

from lcl.attention.ambient import (
    BATCH_AXES,
    CONTEXT_AXIS,
    TENSOR_AXIS,
    ambient_mesh,
    axis_size,
    present_axes,
)
from lcl.attention.matmul import materialized_transpose, plain_dot


def chunked_cross_entropy(
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk_size: int = 512,
    z_loss: float = 0.0,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log softmax(hidden @ kernel)[target], without a [T, V] array.

    With lse = logsumexp(logits), the sum over tokens of
        weight * (lse - logit[target] + z_loss * lse^2).

    Under an ambient mesh (`jax.set_mesh`) every device works on its own rows (axes data, fsdp,
    context) and its own part of the vocabulary (axis tensor, where it divides V): only per-token
    statistics and the gradients are summed across devices, the kernel's once per call.

    Args:
      hidden_BTD: float [B, T, D], after the final norm.
      kernel_DV: float [D, V], the output head.
      targets_BT: int32 [B, T], in 0 .. V-1 (also where the weight is 0).
      weights_BT: float32 [B, T]; 0 leaves a token out.
      chunk_size: tokens of a device that are worked on at once (at least one of each of its rows);
        a few times chunk_size * V * 4 bytes are alive.
      z_loss: coefficient of lse^2, which keeps the logits from drifting (PaLM, section 5).
      dtype: of the matmuls' operands; None is the promoted dtype of hidden and kernel. Logits,
        softmax and loss are float32 at least.

    Returns:
      The weighted sum (float32 scalar; z-loss included), differentiable once with respect to
      hidden, kernel and weights, and nll_BT (float32 [B, T]; unweighted, z-loss not included),
      through which no gradient flows.

    Raises:
      ValueError: shapes that do not fit, or a chunk size below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> targets, weights = jnp.array([[0, 3]]), jnp.array([[1.0, 0.5]])
      >>> total, nll = chunked_cross_entropy(
      ...     jnp.ones((1, 2, 8)), jnp.zeros((8, 4)), targets, weights
      ... )
      >>> round(float(total / jnp.log(4.0)), 5), nll.shape  # uniform: log 4 a token
      (1.5, (1, 2))
    """
    if hidden_BTD.ndim != 3 or kernel_DV.shape[:1] != hidden_BTD.shape[2:]:
        raise ValueError(
            f"hidden {hidden_BTD.shape} and kernel {kernel_DV.shape}: need [B, T, D] and [D, V]"
        )
    if not targets_BT.shape == weights_BT.shape == hidden_BTD.shape[:2]:
        raise ValueError(
            f"targets {targets_BT.shape} and weights {weights_BT.shape}: "
            f"need {hidden_BTD.shape[:2]}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1 token")
    dtype = jnp.promote_types(hidden_BTD.dtype, kernel_DV.dtype) if dtype is None else dtype
    settings = _Settings(chunk_size, z_loss, jnp.dtype(dtype).name)
    total, nll_BT = _cross_entropy(hidden_BTD, kernel_DV, targets_BT, weights_BT, settings)
    return total, lax.stop_gradient(nll_BT)


@dataclasses.dataclass(frozen=True)
class _Settings:
    chunk_size: int
    z_loss: float
    dtype: str


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden_BTD, kernel_DV, targets_BT, weights_BT, settings: _Settings):
    # Reached when nobody asks for gradients (evaluation): none are computed.
    args = hidden_BTD, kernel_DV, targets_BT, weights_BT
    total, nll_BT, _ = _over_the_mesh(*args, settings, with_gradients=False)
    return total, nll_BT


def _forward(hidden_BTD, kernel_DV, targets_BT, weights_BT, settings: _Settings):
    args = hidden_BTD, kernel_DV, targets_BT, weights_BT
    total, nll_BT, gradients = _over_the_mesh(*args, settings, with_gradients=True)
    dhidden, dkernel, dweights = gradients
    residuals = (
        dhidden.astype(hidden_BTD.dtype),
        dkernel.astype(kernel_DV.dtype),
        dweights.astype(weights_BT.dtype),
    )
    return (total, nll_BT), residuals


def _backward(settings: _Settings, residuals, cotangents):
    dhidden, dkernel, dweights = residuals
    g, _ = cotangents

    def scaled(gradient):
        return (gradient * g).astype(gradient.dtype)

    return scaled(dhidden), scaled(dkernel), None, scaled(dweights)


_cross_entropy.defvjp(_forward, _backward)


def _over_the_mesh(hidden, kernel, targets, weights, settings: _Settings, with_gradients: bool):
    """Runs the pass on every device's own block of the batch and of the vocabulary."""
    hidden, kernel = hidden.astype(settings.dtype), kernel.astype(settings.dtype)
    run = partial(_one_device, settings=settings, with_gradients=with_gradients)
    mesh = ambient_mesh()
    if mesh is None:
        return run(hidden, kernel, targets, weights)
    places = _Places.on(mesh, hidden.shape, kernel.shape)
    rows = PartitionSpec(places.batch, places.context)
    head = PartitionSpec(None, places.vocab)
    gradients = (rows, PartitionSpec(places.scatter, places.vocab), rows)
    return jax.shard_map(
        partial(run, places=places),
        mesh=mesh,
        in_specs=(rows, head, rows, rows),
        out_specs=(PartitionSpec(), rows, gradients if with_gradients else None),
        check_vma=False,
    )(hidden, kernel, targets, weights)


@dataclasses.dataclass(frozen=True)
class _Places:
    """Which mesh axes hold which dim; an axis that does not divide its dim is left out."""

    batch: tuple[str, ...] | None = None
    context: str | None = None
    vocab: str | None = None
    scatter: str | None = None  # the model dim of the kernel's gradient comes back split over this

    @classmethod
    def on(cls, mesh: AbstractMesh, hidden_shape, kernel_shape) -> _Places:
        batch: tuple[str, ...] = ()
        for name in present_axes(mesh, BATCH_AXES):
            if hidden_shape[0] % axis_size(mesh, (*batch, name)) == 0:
                batch = (*batch, name)

        def if_divides(name: str, dim: int) -> str | None:
            size = axis_size(mesh, name)
            return name if size > 1 and dim % size == 0 else None

        scatter = if_divides("fsdp", kernel_shape[0]) if "fsdp" in batch else None
        context = if_divides(CONTEXT_AXIS, hidden_shape[1])
        return cls(batch or None, context, if_divides(TENSOR_AXIS, kernel_shape[1]), scatter)

    @property
    def token_axes(self) -> tuple[str, ...]:
        return (*(self.batch or ()), *((self.context,) if self.context else ()))

    def sum_over_vocab(self, x):
        return lax.psum(x, self.vocab) if self.vocab else x

    def max_over_vocab(self, x):
        return lax.pmax(x, self.vocab) if self.vocab else x

    def sum_over_tokens(self, x):
        return lax.psum(x, self.token_axes) if self.token_axes else x

    def sum_kernel_gradient(self, dkernel_DV):
        if self.scatter:
            dkernel_DV = lax.psum_scatter(dkernel_DV, self.scatter, scatter_dimension=0, tiled=True)
        rest = tuple(name for name in self.token_axes if name != self.scatter)
        return lax.psum(dkernel_DV, rest) if rest else dkernel_DV


def _one_device(
    hidden_BTD,
    kernel_DV,
    targets_BT,
    weights_BT,
    *,
    settings: _Settings,
    with_gradients: bool,
    places: _Places = _Places(),  # noqa: B008  (frozen)
):
    """The scan over chunks of one device's tokens."""
    batch, length, _ = hidden_BTD.shape
    num_chunks = max(1, -(-batch * length // max(settings.chunk_size, batch)))
    chunk_length = -(-length // num_chunks)
    num_chunks = -(-length // chunk_length)

    def split(x_BTx):
        padding = [(0, 0), (0, num_chunks * chunk_length - length)] + [(0, 0)] * (x_BTx.ndim - 2)
        x_BTx = jnp.pad(x_BTx, padding)
        x_BCTx = x_BTx.reshape(batch, num_chunks, chunk_length, *x_BTx.shape[2:])
        return jnp.moveaxis(x_BCTx, 1, 0).reshape(
            num_chunks, batch * chunk_length, *x_BTx.shape[2:]
        )

    def join(x_CRx):
        x_CBTx = x_CRx.reshape(num_chunks, batch, chunk_length, *x_CRx.shape[2:])
        x_BTx = jnp.moveaxis(x_CBTx, 0, 1).reshape(
            batch, num_chunks * chunk_length, *x_CRx.shape[2:]
        )
        return x_BTx[:, :length]

    def loss(chunk):
        hidden_RD, targets_R, _ = chunk
        logits = _Logits.of(plain_dot(hidden_RD, kernel_DV), targets_R, places)
        nll_R = logits.lse_R - logits.target_R
        return logits, nll_R, nll_R + settings.z_loss * jnp.square(logits.lse_R)

    accum = jnp.promote_types(settings.dtype, jnp.float32)
    chunks = split(hidden_BTD), split(targets_BT), split(weights_BT.astype(accum))
    if not with_gradients:
        nll_CR, objective_CR = lax.map(lambda chunk: loss(chunk)[1:], chunks)
        total = jnp.sum(weights_BT * join(objective_CR))
        return places.sum_over_tokens(total), join(nll_CR), None

    # Once, outside the scan: in bfloat16 on CPU the transpose is a real copy.
    kernel_VD = materialized_transpose(kernel_DV)

    def loss_and_gradients(dkernel_DV, chunk):
        hidden_RD, _, weights_R = chunk
        logits, nll_R, objective_R = loss(chunk)
        dlogits_RV = logits.gradient(weights_R, settings.z_loss).astype(settings.dtype)
        dhidden_RD = places.sum_over_vocab(plain_dot(dlogits_RV, kernel_VD))
        dkernel_DV = dkernel_DV + plain_dot(materialized_transpose(hidden_RD), dlogits_RV)
        return dkernel_DV, (nll_R, objective_R, dhidden_RD)

    start = jnp.zeros(kernel_DV.shape, accum)
    dkernel_DV, (nll_CR, objective_CR, dhidden_CRD) = lax.scan(loss_and_gradients, start, chunks)
    objective_BT = join(objective_CR)
    total = places.sum_over_tokens(jnp.sum(weights_BT * objective_BT))
    gradients = join(dhidden_CRD), places.sum_kernel_gradient(dkernel_DV), objective_BT
    return total, join(nll_CR), gradients


@dataclasses.dataclass(frozen=True)
class _Logits:
    """A chunk's logits, one device's part of the vocabulary, and statistics over all of it."""

    exp_RV: jax.Array  # exp(logits - max)
    total_R: jax.Array  # sum of exp_RV over the whole vocabulary
    lse_R: jax.Array
    target_R: jax.Array  # the target's logit
    hit_RV: jax.Array  # one-hot of the target, as truth values

    @classmethod
    def of(cls, logits_RV: jax.Array, targets_R: jax.Array, places: _Places) -> _Logits:
        size = logits_RV.shape[1]
        first = lax.axis_index(places.vocab) * size if places.vocab else 0
        hit_RV = lax.broadcasted_iota(jnp.int32, logits_RV.shape, 1) == (targets_R - first)[:, None]
        top_R = places.max_over_vocab(jnp.max(logits_RV, axis=1))
        exp_RV = jnp.exp(logits_RV - top_R[:, None])
        total_R = places.sum_over_vocab(jnp.sum(exp_RV, axis=1))
        target_R = places.sum_over_vocab(jnp.sum(jnp.where(hit_RV, logits_RV, 0.0), axis=1))
        return cls(exp_RV, total_R, jnp.log(total_R) + top_R, target_R, hit_RV)

    def gradient(self, weights_R: jax.Array, z_loss: float) -> jax.Array:
        """d (weight * (lse - target + z lse^2)) / d logits."""
        slope_R = weights_R * (1.0 + 2.0 * z_loss * self.lse_R) / self.total_R
        return self.exp_RV * slope_R[:, None] - jnp.where(self.hit_RV, weights_R[:, None], 0.0)
