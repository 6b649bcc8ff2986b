r"""Trunk and branch: an annealed copy of a run's state, and the run that goes on without it.

    trunk    ... s[t] ---------- s[t+1] ---------- s[t+2] ...      constant learning rate
                   \
    branch          b[0] = s[t] -- b[1] -- ... -- b[n] -> evaluated, then forgotten
                    the trunk's moments; the schedule's anneal, its clock at 0

    b[i+1] = step(b[i], stream[t+i])       the very batches that the trunk reads next

A copy, because the trunk's step donates its state: while a branch lasts, two states are there. The
trunk does not notice: its state, its logs and its batches are the same bits with and without.
What a stage does at its end (a method's sync, `on_exit`) is done to a branch at its end too, since
a branch answers the question "and if the stage had been brought to its end here?".

`annealed` and `anneal` are what the loop in lcl/train.py uses; `branch` is `lcl train --branch-at`,
which does the same from an old checkpoint of a run, into a small run directory of its own.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging as logs
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from lcl import cards, files
from lcl.assembly import Assembly, assemble
from lcl.checkpoints import Checkpointer, CheckpointPolicy
from lcl.evals.branches import check_branch
from lcl.evals.heldout import evaluate as evaluate_heldout
from lcl.parallel.run_ahead import RunAhead
from lcl.policies import read_left_out
from lcl.recorder import RUN_AHEAD, Recorder
from lcl.report import MetricsWriter, Progress
from lcl.stages import Span, clocks
from lcl.step import Metrics, TrainState

log = logs.getLogger("lcl")

Record = Callable[[int, Span, Metrics | None], None]


def annealed(run: Assembly, anneal_steps: int) -> Assembly:
    """The same run on its way down: its steps are those of the annealed optimizer.

    Stream, mesh, compiled evaluations: everything but the optimizer is shared with `run`.

    Args:
      run: the trunk.
      anneal_steps: length of the anneal.

    Raises:
      ValueError: the schedule has no constant phase; names the mend.
    """
    optimizer = run.optimizer.annealed(anneal_steps)
    return dataclasses.replace(
        run, optimizer=optimizer, chain=optimizer.build(), purpose="branch", _transforms={}
    )


def anneal(
    side: Assembly,
    at: int,
    state: TrainState,
    anneal_steps: int,
    *,
    left_out: frozenset[int] = frozenset(),
    record: Record | None = None,
) -> TrainState:
    """Trains a copy of `state` for `anneal_steps` steps from step `at` on; `state` stays as it is.

    Args:
      side: `annealed(run, anneal_steps)`.
      at: updates that `state` has seen.
      state: the trunk's, at `at`; not donated.
      anneal_steps: how many steps; they lie within one stage.
      left_out: steps that the run leaves out; so does the branch.
      record: takes (step, stage, metrics on the device) of each step, as `Recorder.add` does.

    Returns:
      The branch's state at its end, that of a stage which ends there.
    """
    span = side.span_at(at)
    assert span is not None and at + anneal_steps <= span.end_step
    train_step = side.train_step(span)
    copy = side.fork(state)
    batches = side.placed_batches(start=at)
    batch = next(batches)
    ahead = RunAhead(RUN_AHEAD)  # no more batches on the devices than the trunk has
    for step in range(at, at + anneal_steps):
        metrics = None
        if step in left_out:
            copy = side.skip_step(copy)
        else:
            with jax.transfer_guard("disallow"):
                copy, metrics = train_step(copy, batch)
            ahead.add(metrics["loss"])
        if record is not None:
            record(step, span, metrics)
        if step + 1 < at + anneal_steps:
            batch = next(batches)
    return side.exit(span, copy)


def evaluate_branch(
    side: Assembly, span: Span, state: TrainState, heldout: Any
) -> dict[str, dict[str, Any]]:
    """Held-out loss of every domain at a branch's end, by the optimizer's `eval_params`."""
    return evaluate_heldout(side.eval_step(span), side.eval_params(state), heldout)


def branch(
    *, at: int, anneal_steps: int | None = None, allow_changes: bool = False, **settings: Any
) -> pathlib.Path:
    """Branches from an old checkpoint of a run: anneals, evaluates, writes a small run directory.

    Args:
      at: the step of a checkpoint of the run.
      anneal_steps: length of the anneal; None = that of `HeldOut.branches`.
      allow_changes: branch although the configuration differs from the one the run began with.
      **settings: the other arguments of `train`, the run's own.

    Returns:
      RUN/branches/STEP-N: run card (which names the parent and the step), configuration, logs of
      the N steps, evaluations before ("start") and after ("stage_end"), and the annealed
      checkpoint. Nothing else under RUN is touched. A branch that is there already is left alone.

    Raises:
      ValueError: no such checkpoint, or a branch that does not fit into its stage or the constant
        phase; one line, with the mend.
    """
    anneal_steps = _length(anneal_steps, settings["evaluation"])
    parent = files.place(settings["run_dir"])
    run = assemble(**{name: settings[name] for name in inspect.signature(assemble).parameters})
    cards.check(parent, run.identity, allow_changes=allow_changes)
    span = run.span_at(at)
    if span is None:
        raise ValueError(
            f"no stage of the run trains step {at}, of {run.num_steps} steps in all; branch from "
            "an earlier checkpoint, or append a stage first"
        )
    optimizer, clock = run.optimizer, clocks(run.spans)[span.index]
    check_branch(at, anneal_steps, clock, optimizer.constant_from(), optimizer.constant_until())
    side = annealed(run, anneal_steps)
    folder = parent / "branches" / f"{at:08d}-{anneal_steps}"
    card = _card(side, span, parent, at, anneal_steps)
    card["config"] = settings.get("config_text")
    cards.check(folder, card["identity"], allow_changes=allow_changes)
    end = at + anneal_steps
    policy = CheckpointPolicy(every_steps=None, keep_last=1, asynchronous=False)
    with Checkpointer(folder, policy, read_only=True) as checkpoints:
        if end in checkpoints.steps():
            log.info("this branch is there already: %s", folder)
            return folder
    with Checkpointer(parent, settings["checkpoint"], read_only=True) as checkpoints:
        restored = checkpoints.restore(run.abstract_state, at)
    with Checkpointer(folder, policy) as checkpoints:
        if jax.process_index() == 0:
            cards.write(folder, card)
        state, tokens = _train(run, side, span, restored, folder, anneal_steps, settings)
        checkpoints.save(end, state, {"tokens": tokens}, blocking=True)
    return folder


def _train(
    run: Assembly,
    side: Assembly,
    span: Span,
    restored: Any,
    folder: pathlib.Path,
    anneal_steps: int,
    settings: dict[str, Any],
) -> tuple[TrainState, int]:
    """The branch's steps and its two evaluations, logged as those of any run."""
    at, logging = restored.step, settings["logging"]
    primary = jax.process_index() == 0
    # At a border the checkpoint holds the state before the stage's own policy.
    state = run.enter(span, restored.state) if at == span.first_step else restored.state
    heldout = side.heldout_batches(settings["evaluation"])
    writer = MetricsWriter(
        folder,
        None,
        tensorboard=logging.tensorboard,
        trackers=logging.trackers,
        primary=primary,
    )
    bar = Progress(
        at + anneal_steps,
        start_step=at,
        flop_convention=side.flop_convention,
        enabled=logging.progress and primary,
    )
    recorder = Recorder.of(side, writer, bar, restored.metadata["tokens"])
    left_out = read_left_out(settings["run_dir"])
    where = {"stage_index": 0, "stage": span.stage.name}

    def record(step: int, span: Span, metrics: Metrics | None) -> None:
        recorder.add(step, span, metrics)
        if (step + 1) % logging.every_steps == 0:
            recorder.drain()

    with writer, bar:
        before = evaluate_heldout(side.eval_step(span), run.eval_params(state), heldout)
        writer.evals({"step": at, **where, "kind": "start", "domains": before})
        state = anneal(side, at, state, anneal_steps, left_out=left_out, record=record)
        recorder.drain()
        after = evaluate_branch(side, span, state, heldout)
        line = {"step": at + anneal_steps, **where, "kind": "stage_end", "domains": after}
        writer.evals(line)
    return state, recorder.tokens


def _length(anneal_steps: int | None, evaluation: Any) -> int:
    if anneal_steps is None:
        if evaluation.branches is None:
            raise ValueError(
                "how long is the branch? give --anneal_steps N (the run's configuration has no "
                "HeldOut.branches that says it)"
            )
        return evaluation.branches.anneal_steps
    if anneal_steps < 1:
        raise ValueError(f"--anneal_steps {anneal_steps} must be 1 or more")
    return anneal_steps


def _card(
    side: Assembly, span: Span, parent: pathlib.Path, at: int, anneal_steps: int
) -> dict[str, Any]:
    """The branch's card: the run's, but for the one short stage, and whose branch it is."""
    card = side.card(at + anneal_steps)
    stage = card["stages"][span.index]
    stage |= {"first_step": at, "num_steps": anneal_steps}
    own = {"parent": parent.name, "from_step": at, "anneal_steps": anneal_steps}
    own["schedule"] = repr(getattr(side.optimizer, "schedule", side.optimizer))
    return card | {"stages": [stage], "identity": card["identity"] | {"branch": own}}
