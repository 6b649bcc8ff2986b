"""Whole runs with dataset decomposition: one program a bucket, and a resume from any step."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from lcl.assembly import Assembly, assemble
from lcl.checkpoints import Checkpointer, CheckpointPolicy
from lcl.data import Decomposition, GrowP2, Mixture, Replay, SkyLadder, StageData
from lcl.parallel import MeshConfig
from lcl.recorder import Recorder
from lcl.stages import Stage
from lcl.train import train
from tests import tiny

NUM_STEPS = 14
SHAPES = [(3, 64), (6, 32), (12, 16)]  # longest rows first


def stages() -> tuple[Stage, ...]:
    """Seven decomposed steps of one language, then seven of another with a third replayed."""
    decomposition = Decomposition(4, 6, curriculum=GrowP2(), cycles=2)

    def data(domain: str, replay: Replay | None = None) -> StageData:
        mixture = Mixture({domain: 1.0})
        return StageData(mixture, 64, 3, replay=replay, decomposition=decomposition)

    return (
        Stage(name="alpha", data=data("alpha"), steps=7),
        Stage(name="beta", data=data("beta", Replay(1 / 3, "substitute")), steps=7),
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("stores") / "byte"
    tiny.stores(path)
    return path


def settings(root: pathlib.Path, run_dir: pathlib.Path, **changes):
    policy = CheckpointPolicy(every_steps=3, keep_last=20)
    return tiny.settings(root, run_dir, **{"stages": stages(), "checkpoint": policy} | changes)


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory) -> pathlib.Path:
    return train(**settings(root, tmp_path_factory.mktemp("runs") / "finished"))


def digests(run_dir: pathlib.Path) -> dict:
    checkpointer = Checkpointer(run_dir, CheckpointPolicy(), read_only=True)
    return checkpointer._read_document(NUM_STEPS)["leaves"]


def card_of(run_dir: pathlib.Path) -> dict:
    return json.loads((run_dir / "run_card.json").read_text())


def test_one_program_a_bucket_all_before_the_loop(root, finished, tmp_path):
    """Peers: a recompilation in the middle of the run. Each bucket's step is compiled once."""
    compiles = card_of(finished)["compiles"]
    programs = [name for name in compiles if name.startswith("train step")]
    assert sorted(programs) == sorted(f"train step {b} x {t}" for b, t in SHAPES)

    arguments = settings(root, tmp_path / "unused")
    for name in ("run_dir", "checkpoint", "logging"):
        arguments.pop(name)
    run = assemble(**arguments)
    assert run.stream.shapes(0) == tuple(SHAPES)
    train_step = run.train_step(run.spans[0])
    assert len(run.compiler) == len(SHAPES)  # all are there before a step was made
    events = []

    def listen(event: str, duration: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    state = run.init_state()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        shapes = []
        for _, batch in zip(range(7), run.placed_batches(0), strict=False):
            state, _ = train_step(state, batch)
            shapes.append(batch.tokens.shape)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not events and set(shapes) == set(SHAPES)
    assert shapes[0] == SHAPES[0], "the longest bucket comes first"
    assert len(run.compiler) == len(SHAPES)


def test_tokens_a_step_are_constant_and_the_card_has_the_buckets(finished):
    card = card_of(finished)
    for stage in card["stages"]:
        assert {bucket["batch_rows"] * bucket["row_length"] for bucket in stage["buckets"]} == {
            3 * 64
        }
        assert sum(bucket["num_steps"] for bucket in stage["buckets"]) == 7
        assert tuple(stage["batch_shape"]) == SHAPES[0]
        each = {(b["batch_rows"], b["row_length"]): b["flops_per_token"] for b in stage["buckets"]}
        assert set(each) == set(SHAPES)
        assert each[3, 64] > each[6, 32] > each[12, 16]  # short rows cost less attention
        assert each[3, 64] > card["flops"]["per_token"][stage["name"]] > each[12, 16]
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    total = sum(v["new_tokens"] + v["replayed_tokens"] for v in card["ledger"].values())
    assert json.loads(lines[-1])["tokens"] == total


@pytest.mark.parametrize("steps", [3, 7, 9])  # in a stage, at the border, in the next
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(root, finished, tmp_path, monkeypatch, steps):
    """And double buffering: batch t + 1 is sent off while step t runs, before any wait for it."""
    events: list[tuple[str, int]] = []
    put, add = Assembly.put, Recorder.add

    def put_and_tell(self, batch, step):
        events.append(("put", step))
        return put(self, batch, step)

    def add_and_tell(self, step, *rest):
        events.append(("await", step))
        add(self, step, *rest)

    monkeypatch.setattr(Assembly, "put", put_and_tell)
    monkeypatch.setattr(Recorder, "add", add_and_tell)
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for path in (run_dir / "checkpoints").iterdir():
        if path.name > f"{steps:08d}":
            path.rename(path.with_name(f"gone-{path.name}"))
    train(**settings(root, run_dir))
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert (run_dir / name).read_text() == (finished / name).read_text(), f"{name} differs"
    assert digests(run_dir) == digests(finished)
    last = NUM_STEPS - 1
    overlapped = [
        (kind, t + (kind == "put")) for t in range(steps, last) for kind in ("put", "await")
    ]
    assert events == [("put", steps), *overlapped, ("await", last)]


def test_another_curriculum_is_another_run(root, finished, tmp_path):
    """The fingerprint of the data is in the run card: another one is refused unless allowed."""
    changed = []
    for stage in stages():
        decomposition = dataclasses.replace(stage.data.decomposition, cycles=3)
        data = dataclasses.replace(stage.data, decomposition=decomposition)
        changed.append(dataclasses.replace(stage, data=data))
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    with pytest.raises(ValueError, match=r"decomposition.cycles: 2 -> 3") as error:
        train(**settings(root, run_dir, stages=tuple(changed)))
    assert "allow_changes" in str(error.value)
    train(**settings(root, run_dir, stages=tuple(changed), allow_changes=True))


def test_a_bucket_that_does_not_split_over_the_devices_is_refused(root, tmp_path, monkeypatch):
    """The longest bucket has the fewest rows: it is the one that must split."""
    from lcl.parallel import rules

    def two_devices(mesh, batch_size, sequence_length):
        if batch_size % 4:
            raise ValueError(f"batch of {batch_size} rows does not split over data 4")

    monkeypatch.setattr(rules, "check_batch_shape", two_devices)
    with pytest.raises(ValueError, match="stage 'alpha', rows of 64 tokens: batch of 3 rows"):
        train(**settings(root, tmp_path / "run", mesh=MeshConfig()))


def test_a_growing_window_compiles_once(root, tmp_path):
    """SkyLadder's windows are segment ids, which are data."""
    stage = tiny.stage("alpha", steps=5)
    data = dataclasses.replace(stage.data, transforms=(SkyLadder(start=8, steps=4),))
    run_dir = train(
        **settings(root, tmp_path / "run", stages=(dataclasses.replace(stage, data=data),))
    )
    assert sum(name.startswith("train step") for name in card_of(run_dir)["compiles"]) == 1
    losses = [
        json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 5 and np.isfinite(losses).all()
