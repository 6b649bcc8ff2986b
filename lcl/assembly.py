"""From a configuration to the things a run is made of: mesh, stream, state, compiled steps.

Nothing here loops and nothing here saves; `lcl.train` tells the story with these parts. All checks
that a configuration can fail happen in `assemble`, before the first compilation.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax

from lcl import cards
from lcl import stages as stages_lib
from lcl.attention import layouts
from lcl.checkpoints import run_card
from lcl.data import Batch, Data, Stream, build_stream
from lcl.describe import describe
from lcl.evals import HeldOut
from lcl.evals.heldout import EvalBatches
from lcl.models import DecoderConfig, num_parameters
from lcl.objectives import Accumulate, NextToken
from lcl.optim import AdamW, Optimizer
from lcl.parallel import MeshConfig, flops, rules
from lcl.parallel import mesh as mesh_lib
from lcl.policies import Guard
from lcl.programs import (
    Compiler,
    abstract_batch,
    abstract_state,
    boxed_state,
    check_splits,
    jit_eval_step,
    jit_train_step,
    laid_out,
    on_mesh,
    shardings,
)
from lcl.stages import Span, Stage
from lcl.step import Metrics, Objective, TrainState

__all__ = ["Assembly", "assemble", "named_key"]

# A model may pad its vocabulary up to this multiple of the tokenizer's, so that it splits evenly.
VOCABULARY_PADDING = 256
# Batches that the host prepares ahead of the device.
PREFETCH = 4
# Programs compiled at the same time; one uses two cores, and more than the cores hinder each other.
COMPILE_AT_ONCE = max(1, min(4, (os.cpu_count() or 1) // 2))


def named_key(seed: int, name: str) -> jax.Array:
    """The PRNG key called `name`: no key is ever split anonymously."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


@dataclasses.dataclass
class Assembly:
    """A configuration, ready to run. Compilations are cached by what they depend on."""

    seed: int
    model: DecoderConfig
    data: Data
    objective: Objective
    optimizer: Optimizer
    mesh: jax.sharding.Mesh
    stream: Stream
    spans: tuple[Span, ...]
    chain: optax.GradientTransformation
    abstract_state: TrainState
    identity: Mapping[str, Any]
    flops_per_token: Mapping[int, Mapping[tuple[int, int], float]]  # by stage, then by shape
    peak_flops: float | None
    flop_convention: str
    compiler: Compiler
    branch_steps: tuple[int, ...] = ()  # where an annealed copy leaves (`HeldOut.branches`)
    purpose: str = "train"  # names its compiled steps; a branch's are others than its trunk's
    _transforms: dict[Any, Any] = dataclasses.field(default_factory=dict)
    _run_dir: pathlib.Path | None = None
    _config_text: str | None = None

    @property
    def num_steps(self) -> int:
        """Length of the whole run."""
        return self.spans[-1].end_step

    @property
    def num_sources(self) -> int:
        """New tokens of each domain, then replayed ones of each."""
        return 2 * len(self.stream.domains)

    # ---- where we are ------------------------------------------------------------------------

    def span_at(self, step: int) -> Span | None:
        """The stage that trains step `step`; None at the end of the run."""
        return next((s for s in self.spans if s.first_step <= step < s.end_step), None)

    def span_ending_at(self, step: int) -> Span | None:
        """The stage whose last update was the one before `step`, if any."""
        return next((s for s in self.spans if s.end_step == step), None)

    def flops_at(self, step: int) -> float:
        """Training FLOPs a token of step `step`."""
        return self.flops_per_token[self.stream.stage_at(step)][self.stream.batch_shape(step)]

    def describe_rows(self, step: int) -> str:
        """The rows of a step in a few words, for an error: which documents of which domains."""
        rows = []
        for domain, epoch, row, replayed, slices in self.stream.rows(step):
            documents = ", ".join(str(document) for document, _, _ in slices[:4])
            more = ", ..." if len(slices) > 4 else ""
            how = " replayed" if replayed else ""
            rows.append(f"{domain}[row {row}, epoch {epoch}{how}: documents {documents}{more}]")
        return "; ".join(rows)

    # ---- state -------------------------------------------------------------------------------

    def init_state(self) -> TrainState:
        """The state at step 0, born sharded."""
        with on_mesh(self.mesh):
            init = jax.jit(
                lambda key: rules.unbox(boxed_state(self.model, self.chain, key)),
                out_shardings=shardings(self.abstract_state),
            )
            key = named_key(self.seed, "params")
            with self.compiler.tracing:  # the first stage's step may be traced at this moment
                lowered = init.lower(key)
            return lowered.compile()(key)

    def enter(self, span: Span, state: TrainState) -> TrainState:
        """What the stage's policy makes of the state: moments, clock, parameter transform."""
        if not stages_lib.changes_state(span.stage):
            return state

        def entered(state: TrainState) -> TrainState:
            params, opt_state = stages_lib.enter(
                span.stage, state.params, state.opt_state, self.optimizer, self.chain
            )
            return dataclasses.replace(state, params=params, opt_state=opt_state)

        return self._transform(("enter", span.index), entered, state)

    def exit(self, span: Span, state: TrainState) -> TrainState:
        """What the optimizer's end of a stage and the stage's `on_exit` make of the state."""
        if span.stage.on_exit is None and not self.optimizer.changes_at_stage_end:
            return state

        def left(state: TrainState) -> TrainState:
            params, opt_state = stages_lib.leave(
                span.stage, state.params, state.opt_state, self.optimizer
            )
            return dataclasses.replace(state, params=params, opt_state=opt_state)

        return self._transform(("exit", span.stage.on_exit), left, state)

    def skip_step(self, state: TrainState) -> TrainState:
        """A step that is left out: the clocks go on, nothing is learned."""

        def skipped(state: TrainState) -> TrainState:
            opt_state = self.optimizer.skipped(state.opt_state)
            return dataclasses.replace(state, step=state.step + 1, opt_state=opt_state)

        return self._transform(("skip",), skipped, state)

    def fork(self, state: TrainState) -> TrainState:
        """A copy of a trunk's state for a branch: its clock at zero; `state` itself is kept."""

        def forked(state: TrainState) -> TrainState:
            # Without the copy, a jitted function hands the trunk's own buffers on, and they die.
            state = jax.tree.map(jnp.copy, state)
            opt_state = self.optimizer.carry_over(
                state.opt_state, self.chain.init(state.params), keep_moments=True, keep_clock=False
            )
            return dataclasses.replace(state, opt_state=opt_state)

        return self._transform(("fork",), forked, state, donate=False)

    def eval_params(self, state: TrainState) -> Any:
        """The parameters that evaluations judge: the trained ones, or what the optimizer says."""
        if not self.optimizer.changes_eval_params:
            return state.params
        key = ("eval params",)
        if key not in self._transforms:
            self._transforms[key] = jax.jit(
                lambda state: self.optimizer.eval_params(state.params, state.opt_state),
                out_shardings=shardings(self.abstract_state.params),
            )
        with on_mesh(self.mesh):
            return self._transforms[key](state)

    def _transform(
        self,
        key: Any,
        function: Callable[[TrainState], TrainState],
        state: TrainState,
        *,
        donate: bool = True,
    ) -> TrainState:
        if key not in self._transforms:
            self._transforms[key] = jax.jit(
                function,
                donate_argnums=(0,) if donate else (),
                out_shardings=shardings(self.abstract_state),
            )
        with on_mesh(self.mesh):
            return self._transforms[key](state)

    # ---- steps -------------------------------------------------------------------------------

    def train_step(self, span: Span) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """The compiled step of a stage, a program a shape; stages share them. None recompiles."""
        shapes = self.stream.shapes(span.index)

        def programs(first: int) -> list[Any]:
            order = shapes[first:] + shapes[:first]
            return [self._train_program(span, shape) for shape in order]

        for first in range(1, min(COMPILE_AT_ONCE, len(shapes))):  # what one makes, all have
            threading.Thread(target=programs, args=(first,), daemon=True).start()
        program_of = dict(zip(shapes, programs(0), strict=True))

        def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            return program_of[batch.tokens.shape](state, batch)

        return run if len(shapes) > 1 else program_of[shapes[0]]

    def _train_program(self, span: Span, shape: tuple[int, int]) -> Any:
        model = self.model_of(span)
        jitted = jit_train_step(
            model, self.objective, self.optimizer, self.chain, self.abstract_state, self.num_sources
        )
        example = (self.abstract_state, abstract_batch(model, self.mesh, shape))
        name = f"{self.purpose} step {shape[0]} x {shape[1]}"
        return self.compiler.compile(name, model, jitted, example)

    def eval_step(
        self, span: Span, num_sources: int | None = None
    ) -> Callable[[Any, Batch], Metrics]:
        """The compiled held-out forward under a stage's model; None: the run's own sources."""
        model, sources = self.model_of(span), num_sources or self.num_sources
        jitted = jit_eval_step(model, self.objective, sources)

        def run(params: Any, batch: Batch) -> Metrics:
            shape = batch.tokens.shape
            example = (self.abstract_state.params, abstract_batch(model, self.mesh, shape))
            name = f"evaluation {shape[0]} x {shape[1]}"
            key = (model, sources)
            return self.compiler.compile(name, key, jitted, example)(params, batch)

        return run

    def compile_ahead(self, span: Span) -> None:
        """Starts compiling a stage's steps in threads of their own; `train_step` waits for them."""
        threading.Thread(target=self.train_step, args=(span,), daemon=True).start()

    def model_of(self, span: Span) -> DecoderConfig:
        """The decoder of a stage, as it runs on the mesh."""
        if span.stage.rope is None:
            return self.model
        return dataclasses.replace(self.model, rope=span.stage.rope)

    # ---- data --------------------------------------------------------------------------------

    def batches(self, start: int) -> Iterator[Batch]:
        """Host batches from step `start` on; this process's rows, prefetched by Grain."""
        dataset = self.stream.dataset(
            start=start, rows=lambda batch_size: rules.process_rows(self.mesh, batch_size)
        ).map(self.lay_out)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
        yield from dataset.to_iter_dataset(options)

    def placed_batches(self, start: int) -> Iterator[Batch]:
        """Batches from step `start` on, on their way to the devices: ask while a step runs."""
        for step, batch in enumerate(self.batches(start), start=start):
            yield self.put(batch, step)

    def put(self, batch: Batch, step: int) -> Batch:
        """Places the rows that `batches` gave this process on the mesh, as part of the batch."""
        batch_size, _ = self.stream.batch_shape(step)
        rows = rules.process_rows(self.mesh, batch_size)
        return rules.put_batch(batch, self.mesh, rows=rows, batch_size=batch_size)

    def heldout_batches(self, evaluation: HeldOut) -> EvalBatches:
        """The fixed held-out batches of every domain."""
        batches = evaluation.batches(self.data, self.stream.domains)
        return batches.with_put(lambda batch: rules.put_batch(self.lay_out(batch), self.mesh))

    def lay_out(self, batch: Batch) -> Batch:
        """The host's rows, permuted as the mesh's context axis holds them (`MeshConfig`)."""
        if self.model.context_layout == "contiguous":
            return batch
        length, context = batch.tokens.shape[1], self.mesh.shape["context"]
        return batch.permuted(layouts.permutation(self.model.context_layout, length, context))

    # ---- the run card ------------------------------------------------------------------------

    def claim(self, run_dir: pathlib.Path, config_text: str | None, *, allow_changes: bool) -> None:
        """Writes the run card, or refuses a directory that holds a run of another configuration."""
        self._run_dir, self._config_text = run_dir, config_text
        cards.check(run_dir, self.identity, allow_changes=allow_changes)
        if jax.process_index() == 0:
            cards.write(run_dir, self.card(step=0))

    def update_card(self, step: int) -> None:
        """Writes the run card again, with the token ledger and the compilations so far."""
        assert self._run_dir is not None
        if jax.process_index() == 0:
            run_card.write_card(self._run_dir, self.card(step))

    def card(self, step: int) -> dict[str, Any]:
        """What the run is, and what it has read after `step` updates."""
        domains = self.stream.domains
        return {
            "identity": dict(self.identity),
            "config": self._config_text,
            "versions": run_card.versions(),
            "git_revision": run_card.git_revision(),
            "seed": self.seed,
            "mesh": mesh_lib.describe(self.mesh),
            "domains": list(domains),
            "data": {d: self.data.open(d, "train").fingerprint for d in domains},
            "stages": [
                cards.stage_card(span, self.stream, self.flops_per_token[span.index])
                for span in self.spans
            ],
            "num_parameters": num_parameters(self.model),
            "flops": {
                "convention": self.flop_convention,
                "per_token": {
                    self.spans[i].stage.name: cards.mean_flops(by_shape, self.stream, i)
                    for i, by_shape in self.flops_per_token.items()
                },
            },
            "ledger": self.stream.ledger(step),
            "step": step,
            "compiles": dict(self.compiler.seconds),
        }


def assemble(
    *,
    seed: int,
    model: DecoderConfig,
    data: Data,
    stages: Sequence[Stage],
    optimizer: Optimizer,
    objective: Objective,
    mesh: MeshConfig,
    evaluation: HeldOut,
    guard: Guard,
) -> Assembly:
    """Builds and checks everything that does not need a compilation. Arguments as for `train`.

    Raises:
      ValueError: whatever cannot run, in one line that names the value and the mend.
    """
    spans = stages_lib.timeline(stages)
    device_mesh = mesh.build()
    own_model, layout = model, mesh.context_layout
    model = laid_out(model, device_mesh, layout)
    stream = build_stream(
        data,
        [(span.stage.name, span.stage.data, span.stage.num_steps) for span in spans],
        seed=seed,
        domains=evaluation.domains,
        plan_dir=pathlib.Path(data.root) / "plans",
    )
    for span in spans:
        for shape in stream.shapes(span.index):
            where = f"stage {span.stage.name!r}, rows of {shape[1]} tokens"
            _check_splits(where, model, objective, device_mesh, shape, layout)
        _check_length(model, f"stage {span.stage.name!r}", span.stage.data.sequence_length)
        for transform in span.stage.data.transforms:
            target = getattr(transform, "target_length", span.stage.data.sequence_length)
            _check_length(model, f"transform {type(transform).__name__}", target)
    shape = (evaluation.batch_size, evaluation.sequence_length)
    _check_splits("the evaluation", model, None, device_mesh, shape, layout)
    _check_length(model, "the evaluation", evaluation.sequence_length)
    stages_lib.check_rows_seen(stages, evaluation.sequence_length)
    if evaluation.samples is not None:
        shape = (evaluation.batch_size, evaluation.samples.row_length)
        _check_splits("the samples", model, None, device_mesh, shape, layout)
        _check_length(model, "Samples (prompt_length + length)", shape[1])
    for domain in stream.domains:
        _check_vocabulary(model, data, domain)
    check_stages = getattr(objective, "check_stages", None)
    if check_stages is not None:
        check_stages(stages)
    branch_steps: tuple[int, ...] = ()
    if evaluation.branches is not None:
        branch_steps = evaluation.branches.begin(
            stages_lib.clocks(spans),
            constant_from=optimizer.constant_from(),
            constant_until=optimizer.constant_until(),
        )
    chain = optimizer.build()
    peak = flops.chip_peak_flops(device_mesh.devices.flat[0], model.dtype)
    total = None if not peak.flops_per_second else peak.flops_per_second * device_mesh.size
    # Accumulation changes no result, so what it sums is the objective that decides.
    summed = objective.objective if isinstance(objective, Accumulate) else objective
    identity = describe(
        {
            "seed": seed,
            "model": own_model,
            "optimizer": optimizer,
            "objective": summed,
            "evaluation": evaluation,
            "guard": guard,
            "stages": tuple(stages),
            "data": {d: data.open(d, "train").fingerprint for d in stream.domains} | stream.scores,
        }
    )
    # Two methods may have settings of the same names; the usual ones need no word.
    for name, method, usual in (
        ("optimizer", optimizer, AdamW),
        ("objective", summed, NextToken),
    ):
        if type(method) is not usual:
            identity[f"{name}.kind"] = type(method).__name__
    return Assembly(
        seed=seed,
        model=model,
        data=data,
        objective=objective,
        optimizer=optimizer,
        mesh=device_mesh,
        stream=stream,
        spans=spans,
        chain=chain,
        abstract_state=abstract_state(model, chain, device_mesh),
        identity=cards.what_decides(identity),
        flops_per_token={span.index: _flops(model, stream, span) for span in spans},
        peak_flops=total,
        flop_convention=f"{flops.CONVENTION}; peak: {peak.source}",
        compiler=Compiler(device_mesh),
        branch_steps=branch_steps,
    )


def _flops(model: DecoderConfig, stream: Stream, span: Span) -> dict[tuple[int, int], float]:
    """Training FLOPs a token by the batch's shape, attention as the documents' masks leave it."""
    return {
        shape: flops.train_flops_per_token(
            model, shape[1], flops.mean_context(stream.batch(step).segment_ids)
        )
        for shape, step in stream.first_steps(span.index).items()
    }


def _check_splits(
    where: str,
    model: DecoderConfig,
    objective: Objective | None,
    mesh: jax.sharding.Mesh,
    shape: tuple[int, int],
    layout: str,
) -> None:
    """Refuses a batch shape that cannot run on the mesh, and says whose it is."""
    try:
        check_splits(model, objective, mesh, shape, layout)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_length(model: DecoderConfig, what: str, sequence_length: int) -> None:
    if sequence_length > model.context_length:
        raise ValueError(
            f"{what} has rows of {sequence_length} tokens, but DecoderConfig.context_length is "
            f"{model.context_length}; shorten the rows or lengthen the context"
        )


def _check_vocabulary(model: DecoderConfig, data: Data, domain: str) -> None:
    needed = data.open(domain, "train").vocab_size
    roof = -(-needed // VOCABULARY_PADDING) * VOCABULARY_PADDING
    if not needed <= model.vocab_size <= roof:
        raise ValueError(
            f"DecoderConfig.vocab_size={model.vocab_size} does not fit the store {domain!r}, whose "
            f"tokenizer has {needed} tokens; set it between {needed} and {roof}, or prepare the "
            f"corpus with another tokenizer"
        )
