"""The story of a run, top to bottom.

    state[t+1], metrics[t] = train_step(state[t], stream[t])

Everything that decides a result is an argument of `train`; nothing is remembered between two calls
but what lies in the run's directory. Read it in this order: `train` (what a run is), `_go` (the
loop, and what happens at the border of two stages), then `make_train_step` in lcl/step.py (the
step). `assemble` in lcl/assembly.py turns the configuration into the things the loop needs.

"Step" t is the number of updates before it, so step 0 is the first and a checkpoint at t holds the
state after t updates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging as logs
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lcl import files
from lcl.analysis import Diagnostics
from lcl.assembly import Assembly, assemble
from lcl.branches import anneal, annealed, evaluate_branch
from lcl.checkpoints import Checkpointer, CheckpointPolicy
from lcl.data import Batch, Data
from lcl.evals import HeldOut
from lcl.evals.heldout import evaluate as evaluate_heldout
from lcl.models import DecoderConfig
from lcl.optim import Optimizer
from lcl.parallel import MeshConfig
from lcl.policies import Guard, Logging, NonFiniteError, leave_out, read_left_out
from lcl.preemption import Preemption
from lcl.recorder import Recorder
from lcl.report import MetricsWriter, Progress
from lcl.sampling import Sampler
from lcl.stages import Span, Stage
from lcl.step import Objective, TrainState, make_eval_step, make_train_step

__all__ = ["evaluate", "make_eval_step", "make_train_step", "train"]
CONFIGURABLES = ("train",)

log = logs.getLogger("lcl")


def train(
    *,
    run_dir: str | os.PathLike[str],
    seed: int,
    model: DecoderConfig,
    data: Data,
    stages: Sequence[Stage],
    optimizer: Optimizer,
    objective: Objective,
    mesh: MeshConfig,
    checkpoint: CheckpointPolicy,
    evaluation: HeldOut,
    logging: Logging,
    guard: Guard,
    allow_changes: bool = False,
    config_text: str | None = None,
) -> pathlib.Path:
    """Trains `model` through `stages`, or goes on where this run's directory says it was.

    Args:
      run_dir: the run's directory, here or in a bucket (gs://bucket/run): logs, checkpoints, run
        card, report. A run that was killed goes on from its newest good checkpoint, bit for bit.
      seed: the one seed; every key and every order is derived from it by name.
      model: sizes and dtypes of the decoder.
      data: where the tokenised stores are.
      stages: what is learned, in order.
      optimizer: the Optax chain and its schedule.
      objective: the loss.
      mesh: how devices are laid out; changes no batch and, up to float32 rounding, no loss.
      checkpoint: how often the state is saved, and what is kept.
      evaluation: which held-out rows are scored, and how often.
      logging: what is shown and how often.
      guard: what happens on a NaN.
      allow_changes: go on although the configuration differs from the one this run began with.
      config_text: the whole configuration as gin text, kept beside the run for `lcl evaluate` and
        the report; None where the objects were made in Python.

    Returns:
      The run's directory.

    Raises:
      ValueError: a configuration that cannot run, in one line that names the mend.
      NonFiniteError: see `lcl.policies.Guard`.
      SystemExit: after SIGTERM or Ctrl-C, once the state is saved; codes in lcl.preemption.
    """
    for tracker in logging.trackers:
        tracker.check()
    folder = files.place(run_dir)
    run = assemble(
        seed=seed,
        model=model,
        data=data,
        stages=stages,
        optimizer=optimizer,
        objective=objective,
        mesh=mesh,
        evaluation=evaluation,
        guard=guard,
    )
    run.claim(folder, config_text, allow_changes=allow_changes)
    with Preemption() as preemption:
        while True:
            try:
                finished = _go(run, folder, checkpoint, evaluation, logging, preemption)
                break
            except NonFiniteError as error:
                # A rollback is a resume in which one step is crossed out.
                if not guard.rolls_back or len(read_left_out(run_dir)) >= guard.max_rollbacks:
                    raise
                log.warning("%s", error)
                log.warning(
                    "rolling back to the last checkpoint and leaving step %d out", error.step
                )
                leave_out(run_dir, error.step)
    if not finished:
        log.info("stopped by a signal; the same command goes on from here")
        raise SystemExit(preemption.exit_code)  # which its launcher reads
    elif logging.report and jax.process_index() == 0:
        from lcl.report import build_report  # Matplotlib: seconds that a start should not pay

        with files.here([run_dir]) as folders:
            build_report(folders)
        log.info("report: %s", folder / "report" / "index.html")
    return folder


def _go(
    run: Assembly,
    run_dir: pathlib.Path,
    checkpoint: CheckpointPolicy,
    evaluation: HeldOut,
    logging: Logging,
    preemption: Preemption,
) -> bool:
    """Restores, then trains to the end (True) or to a signal (False)."""
    primary = jax.process_index() == 0
    with Checkpointer(run_dir, checkpoint) as checkpoints:
        with preemption.nothing_to_save():
            restored = checkpoints.restore_latest(run.abstract_state)
            first_span = run.span_at(restored.step if restored else 0)
            if first_span is not None:
                run.compile_ahead(first_span)  # while the state is made and evaluated
            if restored is None:
                step, state, tokens = 0, run.init_state(), 0
            else:
                step, state, tokens = restored.step, restored.state, restored.metadata["tokens"]
                log.info("resuming at step %d of %d", step, run.num_steps)
            heldout = run.heldout_batches(evaluation)
            sampler = Sampler(run, run_dir, evaluation) if evaluation.samples else None
            resume_step = step if restored else None
            writer = MetricsWriter(
                run_dir,
                resume_step,
                tensorboard=logging.tensorboard,
                trackers=logging.trackers,
                primary=primary,
            )
        bar = Progress(
            run.num_steps,
            start_step=step,
            flop_convention=run.flop_convention,
            enabled=logging.progress and primary,
        )
        recorder = Recorder.of(run, writer, bar, tokens)
        left_out = read_left_out(run_dir)
        with writer, bar:
            looks = Diagnostics(
                logging.diagnostics,
                objective=run.objective,
                num_sources=run.num_sources,
                mesh=run.mesh,
            )
            loop = _Loop(
                run, checkpoints, writer, recorder, preemption, heldout, left_out, looks, sampler
            )
            return loop.run_from(step, state, evaluation, logging)


@dataclasses.dataclass
class _Loop:
    """The loop, with the things it uses. Its only memory is (step, state) and what it has saved."""

    run: Assembly
    checkpoints: Checkpointer
    writer: MetricsWriter
    recorder: Recorder
    preemption: Preemption
    heldout: Any
    left_out: frozenset[int]
    diagnostics: Diagnostics  # what is looked at beside the loss, where something is
    sampler: Sampler | None = None  # continuations at stage ends, where some are asked for
    side: Assembly | None = None  # the run on its way down, once a branch was asked for

    def run_from(self, step: int, state: TrainState, evaluation: HeldOut, logging: Logging) -> bool:
        """Trains from `step` on; True at the end of the run, False when a signal stopped it."""
        run, first = self.run, step
        batches = run.placed_batches(start=step)
        batch = next(batches, None)
        train_step = None
        while True:
            ended = run.span_ending_at(step)
            span = run.span_at(step)

            # ---- the border: exit, evaluate, save ------------------------------------------
            # A checkpoint holds the state after `on_exit` and before the next stage's `on_enter`.
            if ended and step > first:
                state = run.exit(ended, state)
            if ended or step == 0 or evaluation.due(step):
                with self._nothing_to_save_at(step == first):
                    self._evaluate(step, state, ended, span)
            stopping = self.preemption.should_stop(step)
            branching = step in run.branch_steps
            if step > first and (
                ended or stopping or branching or self.checkpoints.policy.due(step)
            ):
                last = step == run.num_steps
                self._save(step, state, blocking=stopping or branching or last)
                if ended:
                    run.update_card(step)
            if stopping or span is None:
                return span is None

            # ---- a stage begins: its policy, and its step's compilation ---------------------
            if step == span.first_step:
                state = run.enter(span, state)
            if train_step is None or step == span.first_step:
                train_step = self._compile(span)

            # ---- a branch: an annealed copy is evaluated; the trunk goes on without it -------
            if branching:
                self._branch(step, state, span, evaluation)

            # ---- the step --------------------------------------------------------------------
            looked = None
            if step in self.left_out:
                state, metrics = run.skip_step(state), None
            else:
                if self.diagnostics.due(step):
                    looked = self._look(step, span, state, batch)
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, batch)
            batch = next(batches, None)  # the next one goes to the devices while this step runs
            self.recorder.add(step, span, metrics, looked)
            step += 1
            self.checkpoints.check()
            if step % logging.every_steps == 0 or step == span.end_step:
                self.recorder.drain()

    def _look(self, step: int, span: Span, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        """What the diagnostics see just before the update; its time is none of the training's."""
        jax.block_until_ready(state)
        begin = time.monotonic()
        model = self.run.model_of(span)
        looked = jax.block_until_ready(self.diagnostics.measure(step, model, state.params, batch))
        self.recorder.exclude(time.monotonic() - begin)
        return looked

    def _nothing_to_save_at(self, start: bool) -> contextlib.AbstractContextManager[None]:
        """Before the first step a signal ends the process at once: all there is is on disk."""
        return self.preemption.nothing_to_save() if start else contextlib.nullcontext()

    def _evaluate(
        self, step: int, state: TrainState, ended: Span | None, span: Span | None
    ) -> None:
        """Held-out loss of every domain, written once; a signal cuts it short (it is redone)."""
        self.recorder.drain()
        begin = time.monotonic()
        where = ended or span
        assert where is not None
        eval_step = self.run.eval_step(where)

        def unless_stopped(params: Any, batch: Batch) -> Mapping[str, jax.Array]:
            # Many processes evaluate together, so none of them may leave by itself.
            if self.preemption.requested and jax.process_count() == 1:
                raise InterruptedError
            return eval_step(params, batch)

        try:
            params = self.run.eval_params(state)
            domains = evaluate_heldout(unless_stopped, params, self.heldout)
        except InterruptedError:
            return
        kind = "stage_end" if ended else "start" if step == 0 else "interval"
        self.writer.evals(
            {
                "step": step,
                "stage_index": where.index,
                "stage": where.stage.name,
                "kind": kind,
                "domains": domains,
            }
        )
        if ended and self.sampler is not None:
            self.sampler.write(step, ended, params)
        self.recorder.exclude(time.monotonic() - begin)

    def _branch(self, step: int, state: TrainState, span: Span, evaluation: HeldOut) -> None:
        """Held-out loss of an annealed copy, written once; a signal leaves at once (see branches).

        The trunk was saved here, so a run that is killed meanwhile comes back to this very step.
        """
        assert evaluation.branches is not None
        anneal_steps = evaluation.branches.anneal_steps
        line = {
            "step": step + anneal_steps,
            "stage_index": span.index,
            "stage": span.stage.name,
            "kind": "branch",
            "branch_from": step,
        }
        # Only the first process knows what is written; many processes branch again together.
        if jax.process_count() == 1 and self.writer.has_eval(line):
            return
        self.recorder.drain()
        begin = time.monotonic()
        log.info("branch: annealing a copy over the steps %d to %d", step, line["step"])
        with self.preemption.nothing_to_save():
            side = self.side = self.side or annealed(self.run, anneal_steps)
            copy = anneal(side, step, state, anneal_steps, left_out=self.left_out)
            domains = evaluate_branch(side, span, copy, self.heldout)
        self.writer.evals(line | {"domains": domains})
        seconds = time.monotonic() - begin
        self.writer.timings({"step": step, "event": "branch", "branch_seconds": round(seconds, 3)})
        self.recorder.exclude(seconds)

    def _save(self, step: int, state: TrainState, *, blocking: bool) -> None:
        """Logs first, then the state: whatever a checkpoint stands on is on disk before it."""
        self.recorder.drain()
        begin = time.monotonic()
        self.writer.flush()
        metadata = {"tokens": self.recorder.tokens}
        self.checkpoints.save(step, state, metadata, blocking=blocking)
        self.recorder.exclude(time.monotonic() - begin)

    def _compile(self, span: Span) -> Any:
        """The compiled step of a stage; a signal meanwhile ends the process, all being saved."""
        begin = time.monotonic()
        self.checkpoints.wait()
        with self.preemption.nothing_to_save():
            compiled = self.run.train_step(span)
        self.recorder.exclude(time.monotonic() - begin)
        return compiled


def evaluate(*, step: int | None = None, **settings: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    """Held-out loss of every domain at a checkpoint of a run; writes nothing.

    Args:
      step: which checkpoint; None = the newest.
      **settings: the arguments of `train`.

    Returns:
      The checkpoint's step and {domain: {"nats_per_token", "bits_per_byte", "tokens", "bytes"}}.
    """
    run = assemble(**{name: settings[name] for name in inspect.signature(assemble).parameters})
    evaluation = settings["evaluation"]
    with Checkpointer(settings["run_dir"], settings["checkpoint"], read_only=True) as checkpoints:
        restored = checkpoints.restore(run.abstract_state, step)
    where = run.span_ending_at(restored.step) or run.span_at(restored.step)
    assert where is not None
    batches = run.heldout_batches(evaluation)
    params = run.eval_params(restored.state)
    return restored.step, evaluate_heldout(run.eval_step(where), params, batches)
