"""The programs of a run: the step and the evaluation, from their shapes alone.

Everything here works on shapes, dtypes and shardings; no data, and not even a device, is needed. So
the program that `lcl compile` builds for a pod that nobody has rented yet is, to the letter, the
one that `lcl train` runs:

    model, objective, optimizer, mesh, (B, T)  --abstract_step-->  jitted step, arguments' shapes
                                                                       |
             lcl train: .lower(...).compile() on this machine's devices, run
             lcl compile: .lower(...).compile() for a topology's devices, weighed
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging as logs
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lcl.attention import check_attention
from lcl.data import Batch
from lcl.models import Decoder, DecoderConfig
from lcl.optim import Optimizer
from lcl.parallel import rules
from lcl.step import Objective, TrainState, make_eval_step, make_train_step

log = logs.getLogger("lcl")


@contextlib.contextmanager
def on_mesh(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Within it, what is traced is for this mesh and lies as the logical rules say."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.LOGICAL_AXIS_RULES):
        yield


def laid_out(model: DecoderConfig, mesh: jax.sharding.Mesh, context_layout: str) -> DecoderConfig:
    """The model as it runs on `mesh`: rows that no context axis splits stay in order."""
    layout = context_layout if mesh.shape["context"] > 1 else "contiguous"
    return dataclasses.replace(model, context_layout=layout)


def boxed_state(
    model: DecoderConfig, chain: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """The initial state, its parameters (and so their moments) boxed with their logical axes."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    params = Decoder(model).init(key, tokens, tokens)["params"]
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=chain.init(params))


def abstract_state(
    model: DecoderConfig, chain: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the whole state on a mesh."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    boxed = jax.eval_shape(lambda key: boxed_state(model, chain, key), key)
    return rules.abstract_state(boxed, mesh)


def abstract_batch(
    model: DecoderConfig, mesh: jax.sharding.Mesh, batch_shape: Sequence[int]
) -> Batch:
    """Shapes, dtypes and shardings of a batch; `row_index` is there where rows are permuted."""
    sharding = rules.batch_sharding(mesh)
    ints = jax.ShapeDtypeStruct(tuple(batch_shape), np.int32, sharding=sharding)
    floats = jax.ShapeDtypeStruct(tuple(batch_shape), np.float32, sharding=sharding)
    row_index = None if model.context_layout == "contiguous" else ints
    return Batch(ints, ints, ints, ints, floats, ints, row_index)


def shardings(tree: Any) -> Any:
    """The sharding of every leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def jit_train_step(
    model: DecoderConfig,
    objective: Objective,
    optimizer: Optimizer,
    chain: optax.GradientTransformation,
    state: TrainState,
    num_sources: int,
) -> Any:
    """The jitted step; its state is donated and comes back lying as it lay.

    Args:
      model: the decoder as it runs on the mesh (`laid_out`).
      objective: the loss.
      optimizer: knows the schedule.
      chain: `optimizer.build()`.
      state: the abstract state.
      num_sources: twice the number of domains.
    """
    step = make_train_step(Decoder(model), objective, optimizer, chain, num_sources)
    return jax.jit(_by_the_rules(step), donate_argnums=0, out_shardings=(shardings(state), None))


def jit_eval_step(model: DecoderConfig, objective: Objective, num_sources: int) -> Any:
    """The jitted held-out forward; arguments as of `jit_train_step`."""
    return jax.jit(_by_the_rules(make_eval_step(Decoder(model), objective, num_sources)))


def abstract_step(
    model: DecoderConfig,
    objective: Objective,
    optimizer: Optimizer,
    mesh: jax.sharding.Mesh,
    batch_shape: Sequence[int],
    *,
    context_layout: str = "zigzag",
    num_sources: int = 2,
) -> tuple[Any, tuple[TrainState, Batch]]:
    """The real train step with shapes for arguments: no data and no devices are needed.

    Args:
      model: sizes and choices of the decoder.
      objective: the loss.
      optimizer: the Optax chain and its schedule.
      mesh: of this machine's devices, or of an ahead-of-time topology's.
      batch_shape: (B, T) of the global batch.
      context_layout: how rows are permuted where the mesh's context axis splits them
        (`MeshConfig.context_layout`).
      num_sources: twice the number of domains; changes next to nothing.

    Returns:
      The jitted step and its arguments as ShapeDtypeStructs with shardings: lower it under
      `jax.set_mesh(mesh)`.

    Raises:
      ValueError: sizes that the mesh or the attention cannot split, in one line.

    Example:
      >>> from lcl.objectives import NextToken
      >>> from lcl.optim import AdamW, constant
      >>> from lcl.parallel import MeshConfig
      >>> model = DecoderConfig(384, num_layers=2, embed_dim=64, mlp_dim=192, num_heads=4)
      >>> mesh = MeshConfig().build(jax.devices()[:1])
      >>> step, (state, batch) = abstract_step(
      ...     model, NextToken(), AdamW(schedule=constant(rate=1e-3)), mesh, (2, 256)
      ... )
      >>> with jax.set_mesh(mesh):
      ...     next_state, metrics = jax.eval_shape(step, state, batch)
      >>> metrics["loss"].shape, batch.tokens.shape
      ((), (2, 256))
    """
    check_splits(model, objective, mesh, batch_shape, context_layout)
    model = laid_out(model, mesh, context_layout)
    chain = optimizer.build()
    state = abstract_state(model, chain, mesh)
    jitted = jit_train_step(model, objective, optimizer, chain, state, num_sources)
    return jitted, (state, abstract_batch(model, mesh, batch_shape))


def check_splits(
    model: DecoderConfig,
    objective: Objective | None,
    mesh: jax.sharding.Mesh,
    batch_shape: Sequence[int],
    context_layout: str,
) -> None:
    """Refuses a batch shape that the mesh, the layout, the attention or the loss cannot split.

    Args:
      model: the decoder.
      objective: the loss that is trained; None: forward only.
      mesh: of devices, or of an ahead-of-time topology's.
      batch_shape: (B, T) of the global batch.
      context_layout: see `abstract_step`.

    Raises:
      ValueError: one line that names the value and the mend.
    """
    batch_size, length = batch_shape
    rules.check_model_splits(model, mesh)
    rules.check_batch_shape(mesh, batch_size, length)
    pieces = getattr(objective, "pieces", 1)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (pieces * rows):
        fits = [n for n in range(1, batch_size // rows + 1) if (batch_size // rows) % n == 0]
        raise ValueError(
            f"Accumulate.pieces={pieces} does not split {batch_size} rows over data x fsdp = "
            f"{rows} devices: use {', '.join(map(str, fits))} pieces, or another batch size"
        )
    check_rows = getattr(objective, "check_rows", None)
    if check_rows is not None:
        check_rows(batch_size, rows)
    check_attention(
        model.attention,
        mask=model.mask,
        layout=context_layout if mesh.shape["context"] > 1 else "contiguous",
        row_length=length,
        context=mesh.shape["context"],
        tensor=mesh.shape["tensor"],
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        block_sizes=model.attention_blocks,
        platform=mesh.abstract_mesh.abstract_device.platform,
        dtype=model.dtype,
    )


def _by_the_rules(function: Any) -> Any:
    """`function`, traced under the logical rules wherever it is traced."""

    def traced(*args: Any) -> Any:
        with nn.logical_axis_rules(rules.LOGICAL_AXIS_RULES):
            return function(*args)

    return traced


class Compiler:
    """Compiles each program once, whichever thread asks first.

    Attributes:
      seconds: how long each compilation took, by name.
      tracing: held while a program is traced. Flax makes classes of lifted modules as it traces,
        and changes their base's table of fields meanwhile, so no two threads may; XLA's part of a
        compilation runs beside it.
    """

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self.seconds: dict[str, float] = {}
        self._mesh = mesh
        self._executables: dict[Any, concurrent.futures.Future[Any]] = {}
        self._lock = threading.Lock()
        self.tracing = threading.Lock()

    def __len__(self) -> int:
        """How many programs there are, those under way included."""
        return len(self._executables)

    def compile(self, name: str, key: Any, jitted: Any, example: tuple[Any, ...]) -> Any:
        """The executable of `jitted` for arguments such as `example`.

        Args:
          name: shown in the log and the run card.
          key: what else, beside the name, tells programs apart.
          jitted: the function.
          example: its arguments' shapes, dtypes and shardings.
        """
        with self._lock:
            future = self._executables.get((name, key))
            if future is not None:
                wait = True
            else:
                wait, future = False, concurrent.futures.Future()
                self._executables[name, key] = future
        if wait:
            return future.result()
        begin = time.monotonic()
        try:
            with on_mesh(self._mesh):
                with self.tracing:
                    lowered = jitted.lower(*example)
                future.set_result(lowered.compile())
        except BaseException as error:
            future.set_exception(error)
            raise
        seconds = time.monotonic() - begin
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 2)
        log.info("compiled the %s in %.1f s", name, seconds)
        return future.result()
