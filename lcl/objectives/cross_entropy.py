"""Cross-entropy with the output head inside: loss and gradients at once, logits never kept.

Legend: B batch, T sequence, D model dim, E a device's part of D, V vocabulary (a device's part),
C chunks of tokens, R rows of such a chunk (B * T / C), W columns of a chunk of the vocabulary.

The logits are the largest array of a language model's step. The gradient of the loss with respect
to them is known as soon as they are (softmax - one-hot), so each piece of them is turned at once
into gradients of hidden and kernel; these two are the only residuals of size, and the backward pass
merely scales them. There are two orders in which the pieces are taken.

**One pass over the tokens**, where the head lies whole on a device anyway or is small:

    hidden  [B, T, D] --+-- chunk 1 -- logits [R, V] -- loss, d hidden, += d kernel -- forgotten
                        +-- chunk 2 -- logits [R, V] -- ...

6 R D V FLOPs; the kernel and its float32 gradient, [D, V] each, are alive.

**Two passes over the vocabulary**, where the mesh cuts the kernel along D (fsdp, context) and the
whole would be large (Llama-3-8B: 1.05 GB in bfloat16 and 2.1 GB of gradient, on every chip):

    pass 1   kernel [E, V] --+-- gather [D, W] -- logits [R, W] -- max, sum of exp, target's logit
                             +-- ...                               so far (online log-sum-exp)
    pass 2   kernel [E, V] --+-- gather [D, W] -- logits again -- += d hidden [B, T, D] float32
                             +-- ...                           -- d kernel [D, W] -> scatter [E, W]

No more than two gathered chunks (nothing waits for the next, so that a compiler that is asked for
asynchronous collectives may fetch it meanwhile; by default libtpu does not), one chunk of the
gradient and [R, W] logits exist. What it costs: 8 R D V FLOPs (the logits are made twice); the
head travels twice in the compute dtype and its gradient once in `gradient_dtype`, whatever the
number of tokens; and d hidden is read and written once a chunk of the vocabulary, by arithmetic
about 4% of the matmuls' time on a TPU v5p. With `keep_head` the pieces that pass 1 has gathered
stay for pass 2: one journey fewer for the whole head's memory. The other order, tokens outside and
vocabulary inside, would fetch the whole head anew for every chunk of tokens.
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
from lcl.parallel.rules import axes_of

# Of a head that the mesh cuts along D: with a float32 gradient [D, V] up to this size it is
# gathered whole, one pass being cheaper; beyond it is worked on in chunks of the second size.
WHOLE_HEAD_BYTES = 256 * 2**20
HEAD_CHUNK_BYTES = 64 * 2**20
_LANES = 128  # a chunk's columns are a multiple of a TPU register's


def chunked_cross_entropy(
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk_size: int = 512,
    vocab_chunk: int | None = None,
    keep_head: bool = False,
    z_loss: float = 0.0,
    dtype: DTypeLike | None = None,
    gradient_dtype: DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log softmax(hidden @ kernel)[target], without a [T, V] array.

    With lse = logsumexp(logits), the sum over tokens of
        weight * (lse - logit[target] + z_loss * lse^2).

    Under an ambient mesh (`jax.set_mesh`) every device works on its own rows (axes data, fsdp,
    context) and its own part of the vocabulary (axis tensor, where it divides V). The kernel lies
    cut along D over fsdp and context, and so does its gradient, which is reduce-scattered. The
    result does not depend on mesh and chunks beyond float32 round-off.

    Args:
      hidden_BTD: float [B, T, D], after the final norm.
      kernel_DV: float [D, V], the output head.
      targets_BT: int32 [B, T], in 0 .. V-1 (also where the weight is 0).
      weights_BT: float32 [B, T]; 0 leaves a token out.
      chunk_size: tokens of a device that are worked on at once (at least one of each of its rows);
        a few times chunk_size * V * 4 bytes are alive. In two passes, so many more tokens that
        [R, W] logits take a quarter of that: fewer, larger matmuls.
      vocab_chunk: columns of a device's part of the head that are worked on at once, in two passes
        (top of this file). None: one pass over the whole, except where the mesh cuts the kernel
        along D and a device's [D, V] in float32 exceeds 256 MiB; then chunks of up to 64 MiB.
      keep_head: of two passes, the second takes the gathered head of the first, which is kept for
        it: D V values of `dtype` on every device, for half of the head's gathers.
      z_loss: coefficient of lse^2, which keeps the logits from drifting (PaLM, section 5).
      dtype: of the matmuls' operands; None is the promoted dtype of hidden and kernel. Logits,
        softmax and loss are float32 at least.
      gradient_dtype: in which the devices' parts of the kernel's gradient are summed over a mesh
        (each part is accumulated in float32).

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
    if vocab_chunk is not None and vocab_chunk < 1:
        raise ValueError(f"vocab_chunk={vocab_chunk}: must be at least 1 column, or None")
    dtype = jnp.dtype(dtype or jnp.promote_types(hidden_BTD.dtype, kernel_DV.dtype))
    rounds = jnp.dtype(gradient_dtype).itemsize < 4
    summed_in = gradient_dtype if rounds else jnp.promote_types(dtype, jnp.float32)
    settings = _Settings(
        chunk_size, vocab_chunk, keep_head, z_loss, dtype.name, jnp.dtype(summed_in).name
    )
    total, nll_BT = _cross_entropy(hidden_BTD, kernel_DV, targets_BT, weights_BT, settings)
    return total, lax.stop_gradient(nll_BT)


@dataclasses.dataclass(frozen=True)
class _Settings:
    chunk_size: int
    vocab_chunk: int | None
    keep_head: bool
    z_loss: float
    dtype: str
    gradient_dtype: str


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
    head = PartitionSpec(places.cut, places.vocab)
    return jax.shard_map(
        partial(run, places=places),
        mesh=mesh,
        in_specs=(rows, head, rows, rows),
        out_specs=(PartitionSpec(), rows, (rows, head, rows) if with_gradients else None),
        check_vma=False,
    )(hidden, kernel, targets, weights)


@dataclasses.dataclass(frozen=True)
class _Places:
    """Which mesh axes hold which dim; an axis that does not divide its dim is left out."""

    batch: tuple[str, ...] | None = None
    context: str | None = None
    vocab: str | None = None
    cut: tuple[str, ...] | None = None  # the kernel's and its gradient's model dim

    @classmethod
    def on(cls, mesh: AbstractMesh, hidden_shape, kernel_shape) -> _Places:
        def those_that_divide(names, dim: int) -> tuple[str, ...]:
            axes: tuple[str, ...] = ()
            for name in present_axes(mesh, names):
                if dim % axis_size(mesh, (*axes, name)) == 0:
                    axes = (*axes, name)
            return axes

        batch = those_that_divide(BATCH_AXES, hidden_shape[0])
        (context,) = those_that_divide((CONTEXT_AXIS,), hidden_shape[1]) or (None,)
        (vocab,) = those_that_divide((TENSOR_AXIS,), kernel_shape[1]) or (None,)
        cut = those_that_divide(axes_of("embed"), kernel_shape[0])
        return cls(batch or None, context, vocab, cut or None)

    @property
    def token_axes(self) -> tuple[str, ...]:
        return (*(self.batch or ()), *((self.context,) if self.context else ()))

    def sum_over_vocab(self, x):
        return lax.psum(x, self.vocab) if self.vocab else x

    def max_over_vocab(self, x):
        return lax.pmax(x, self.vocab) if self.vocab else x

    def sum_over_tokens(self, x):
        return lax.psum(x, self.token_axes) if self.token_axes else x

    def gather(self, kernel_EV):
        return lax.all_gather(kernel_EV, self.cut, tiled=True) if self.cut else kernel_EV

    def scatter(self, dkernel_DV):
        """Sums over the devices that hold other tokens, and keeps the own part: [E, V]."""
        if not self.cut:
            return dkernel_DV
        for name in self.cut:
            if name not in self.token_axes:  # the same tokens all along this axis: count them once
                dkernel_DV = jnp.where(lax.axis_index(name) == 0, dkernel_DV, 0.0)
        return lax.psum_scatter(dkernel_DV, self.cut, scatter_dimension=0, tiled=True)

    def sum_over_copies(self, dkernel_EV):
        """The rest of the sum: over axes along which the kernel is whole."""
        rest = tuple(name for name in self.token_axes if name not in (self.cut or ()))
        return lax.psum(dkernel_EV, rest) if rest else dkernel_EV


def _one_device(
    hidden_BTD,
    kernel_EV,
    targets_BT,
    weights_BT,
    *,
    settings: _Settings,
    with_gradients: bool,
    places: _Places = _Places(),  # noqa: B008  (frozen)
):
    """The loss of one device's tokens in the order that suits them.

    Returns:
      The sum over all devices, nll_BT, and (d hidden, d kernel [E, V], d weights) or None.
    """
    dim, vocab = hidden_BTD.shape[2], kernel_EV.shape[1]
    columns = settings.vocab_chunk
    if columns is None and places.cut and 4 * dim * vocab > WHOLE_HEAD_BYTES:
        num_chunks = -(-4 * dim * vocab // HEAD_CHUNK_BYTES)
        columns = -(-vocab // (num_chunks * _LANES)) * _LANES
    if columns is None:
        work = _one_pass
    else:
        work = partial(_two_passes, columns=min(columns, vocab))
    return work(hidden_BTD, kernel_EV, targets_BT, weights_BT, settings, with_gradients, places)


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """A device's tokens in chunks of `rows` or a little less, each with a piece of every row."""

    shape: tuple[int, int]
    rows: int

    @property
    def number_and_length(self) -> tuple[int, int]:
        batch, length = self.shape
        number = max(1, -(-batch * length // max(self.rows, batch)))
        piece = -(-length // number)
        return -(-length // piece), piece

    def split(self, x_BTx):
        """[B, T, ...] -> [C, R, ...]; the last chunk is filled up with zeros."""
        (batch, length), (number, piece), rest = self.shape, self.number_and_length, x_BTx.shape[2:]
        x_BTx = jnp.pad(x_BTx, [(0, 0), (0, number * piece - length)] + [(0, 0)] * len(rest))
        x_CBTx = jnp.moveaxis(x_BTx.reshape(batch, number, piece, *rest), 1, 0)
        return x_CBTx.reshape(number, batch * piece, *rest)

    def join(self, x_CRx):
        """[C, R, ...] -> [B, T, ...]."""
        (batch, length), (number, piece), rest = self.shape, self.number_and_length, x_CRx.shape[2:]
        x_BCTx = jnp.moveaxis(x_CRx.reshape(number, batch, piece, *rest), 0, 1)
        return x_BCTx.reshape(batch, number * piece, *rest)[:, :length]


def _one_pass(hidden_BTD, kernel_EV, targets_BT, weights_BT, settings, with_gradients, places):
    """The scan over chunks of tokens, each with the device's whole part of the vocabulary."""
    kernel_DV = places.gather(kernel_EV)
    chunks_of = _Chunks(targets_BT.shape, settings.chunk_size)
    split, join = chunks_of.split, chunks_of.join

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
    dkernel_DV = dkernel_DV.astype(settings.gradient_dtype)
    dkernel_EV = places.sum_over_copies(places.scatter(dkernel_DV))
    return total, join(nll_CR), (join(dhidden_CRD), dkernel_EV, objective_BT)


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


def _two_passes(
    hidden_BTD,
    kernel_EV,
    targets_BT,
    weights_BT,
    settings,
    with_gradients,
    places,
    *,
    columns: int,
):
    """Scans over chunks of the vocabulary: first the statistics of every token, then gradients."""
    vocab = kernel_EV.shape[1]
    num_chunks = -(-vocab // columns)
    tokens = _Chunks(targets_BT.shape, settings.chunk_size * max(1, num_chunks // 4))
    accum = jnp.promote_types(settings.dtype, jnp.float32)
    kernel_EV = jnp.pad(kernel_EV, ((0, 0), (0, num_chunks * columns - vocab)))
    kernel_nEW = jnp.moveaxis(kernel_EV.reshape(-1, num_chunks, columns), 1, 0)
    first = lax.axis_index(places.vocab) * vocab if places.vocab else 0
    hidden_CRD = tokens.split(hidden_BTD)
    # Another device's target must not be found among the columns that fill up the last chunk.
    targets_BT = jnp.where(targets_BT - first < vocab, targets_BT - first, -1)
    targets_CR, weights_CR = tokens.split(targets_BT), tokens.split(weights_BT.astype(accum))

    def fetch(n):
        return places.gather(lax.dynamic_index_in_dim(kernel_nEW, n % num_chunks, keepdims=False))

    def logits_of(n, kernel_DW, hidden_RD, targets_R):
        """The piece of the logits, and where in it the targets stand."""
        logits_RW = plain_dot(hidden_RD, kernel_DW)
        column_RW = n * columns + lax.broadcasted_iota(jnp.int32, logits_RW.shape, 1)
        if num_chunks * columns != vocab:
            logits_RW = jnp.where(column_RW < vocab, logits_RW, -jnp.inf)
        return logits_RW, column_RW == targets_R[:, None]

    def statistics(kernel_DW, so_far, n):
        """The online log-sum-exp with one more piece of the vocabulary."""

        def of_chunk(args):
            hidden_RD, targets_R, (top_R, total_R, target_R) = args
            logits_RW, hit_RW = logits_of(n, kernel_DW, hidden_RD, targets_R)
            new_R = jnp.maximum(top_R, jnp.max(logits_RW, axis=1))
            exp_R = jnp.sum(jnp.exp(logits_RW - new_R[:, None]), axis=1)
            total_R = total_R * jnp.exp(top_R - new_R) + exp_R
            return new_R, total_R, target_R + jnp.sum(jnp.where(hit_RW, logits_RW, 0.0), axis=1)

        return lax.map(of_chunk, (hidden_CRD, targets_CR, so_far))

    def pass_1(carry, n):
        kernel_DW, so_far = carry
        ahead = fetch(n + 1)  # nothing below waits for it
        return (ahead, statistics(kernel_DW, so_far, n)), kernel_DW if keep else None

    zeros, keep = jnp.zeros(targets_CR.shape, accum), settings.keep_head and with_gradients
    start = fetch(0), (jnp.full_like(zeros, -jnp.inf), zeros, zeros)
    # The last piece is fetched by the one before it; what follows fetches the first one again,
    # for pass 2, unless that has them all.
    num_fetching = num_chunks - 1 if keep else num_chunks
    (kernel_DW, so_far), kept_nDW = lax.scan(pass_1, start, jnp.arange(num_fetching))
    if keep:
        so_far = statistics(kernel_DW, so_far, num_chunks - 1)
    top_CR, total_CR, target_CR = so_far
    highest_CR = places.max_over_vocab(top_CR)
    total_CR = places.sum_over_vocab(total_CR * jnp.exp(top_CR - highest_CR))
    lse_CR = jnp.log(total_CR) + highest_CR
    nll_CR = lse_CR - places.sum_over_vocab(target_CR)
    objective_BT = tokens.join(nll_CR + settings.z_loss * jnp.square(lse_CR))
    total = places.sum_over_tokens(jnp.sum(weights_BT * objective_BT))
    if not with_gradients:
        return total, tokens.join(nll_CR), None
    slope_CR = weights_CR * (1.0 + 2.0 * settings.z_loss * lse_CR)

    def gradients(kernel_DW, dhidden_CRD, n):
        """d hidden with one more piece of the vocabulary, and the piece's d kernel [E, W]."""
        kernel_WD = materialized_transpose(kernel_DW)

        def of_chunk(c, sums):
            dhidden_CRD, dkernel_DW = sums
            hidden_RD, targets_R, lse_R, slope_R, weights_R = (
                x[c] for x in (hidden_CRD, targets_CR, lse_CR, slope_CR, weights_CR)
            )
            logits_RW, hit_RW = logits_of(n, kernel_DW, hidden_RD, targets_R)
            dlogits_RW = jnp.exp(logits_RW - lse_R[:, None]) * slope_R[:, None]
            dlogits_RW -= jnp.where(hit_RW, weights_R[:, None], 0.0)
            dlogits_RW = dlogits_RW.astype(settings.dtype)
            dkernel_DW += plain_dot(materialized_transpose(hidden_RD), dlogits_RW)
            return dhidden_CRD.at[c].add(plain_dot(dlogits_RW, kernel_WD)), dkernel_DW

        sums = dhidden_CRD, jnp.zeros(kernel_DW.shape, accum)
        dhidden_CRD, dkernel_DW = lax.fori_loop(0, hidden_CRD.shape[0], of_chunk, sums)
        return dhidden_CRD, places.scatter(dkernel_DW.astype(settings.gradient_dtype))

    def pass_2(carry, n):
        kernel_DW, dhidden_CRD = carry
        ahead = fetch(n + 1)
        dhidden_CRD, dkernel_EW = gradients(kernel_DW, dhidden_CRD, n)
        return (ahead, dhidden_CRD), dkernel_EW

    dhidden_CRD = jnp.zeros(hidden_CRD.shape, accum)
    if keep:
        dhidden_CRD, last_EW = gradients(kernel_DW, dhidden_CRD, num_chunks - 1)
        dhidden_CRD, dkernel_nEW = lax.scan(
            lambda sums, piece: gradients(piece[1], sums, piece[0]),
            dhidden_CRD,
            (jnp.arange(num_chunks - 1), kept_nDW),
        )
        dkernel_nEW = jnp.concatenate([dkernel_nEW, last_EW[None]])
    else:
        (_, dhidden_CRD), dkernel_nEW = lax.scan(
            pass_2, (kernel_DW, dhidden_CRD), jnp.arange(num_chunks)
        )
    dkernel_EV = jnp.moveaxis(dkernel_nEW, 0, 1).reshape(-1, num_chunks * columns)[:, :vocab]
    dhidden_BTD = tokens.join(places.sum_over_vocab(dhidden_CRD))
    gradients_of_all = dhidden_BTD, places.sum_over_copies(dkernel_EV), objective_BT
    return total, tokens.join(nll_CR), gradients_of_all
