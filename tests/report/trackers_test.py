"""Trackers: what TensorBoard gets, they get; a run goes on in the same curves, or without them."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
import types

import numpy as np
import pytest

from lcl import config
from lcl.policies import Logging
from lcl.report import MetricsWriter, Tracker, WandB
from lcl.report.trackers import Guarded, Tracking
from lcl.train import train
from tests import tiny


class FakeRun:
    """The part of wandb's Run that is used."""

    def __init__(self, given):
        self.given, self.logged, self.metrics, self.finished = given, [], [], False

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, data, step=None, commit=None):
        assert not self.finished and step is None, "its own count would refuse a step sent again"
        self.logged.append(dict(data))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module of wandb's surface, in wandb's place; `runs` are those that were begun."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    module.runs = []

    def init(*, project, entity, name, id, resume, mode, dir, tags, config):
        module.runs.append(FakeRun(dict(locals())))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_run_is_sent_as_tensorboard_shows_it(wandb, tmp_path):
    root, run_dir = tmp_path / "stores", tmp_path / "run"
    logging = Logging(
        every_steps=2,
        tensorboard=False,
        progress=False,
        report=False,
        trackers=(WandB(project="lcl"),),
    )
    stages = (tiny.stage("alpha", steps=3),)
    train(**tiny.settings(root, run_dir, stages=stages, logging=logging))
    (run,) = wandb.runs
    assert run.finished and ("*", "step") in run.metrics
    assert (run.given["project"], run.given["mode"], run.given["name"]) == ("lcl", "online", "run")
    assert run.given["config"]["model.num_layers"] == tiny.MODEL.num_layers
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {one["step"]: one["train/loss"] for one in run.logged if "train/loss" in one}
    assert losses == {line["step"]: pytest.approx(line["loss"], rel=1e-6) for line in metrics}
    names = {name for one in run.logged for name in one}
    assert {"train/loss_by_domain/alpha", "heldout/alpha/nats_per_token"} <= names
    assert "perf/tokens_per_second" in names
    assert all(type(value) in (int, float) for one in run.logged for value in one.values())


def write(run_dir, start, stop, trackers=(WandB(project="lcl"),)):  # noqa: B008
    with MetricsWriter(run_dir, start, tensorboard=False, trackers=trackers) as writer:
        for step in range(start, stop):
            writer.metrics({"step": step, "stage": "en", "loss": np.float32(1 / (step + 1))})


def test_a_resumed_run_keeps_its_id_and_a_new_one_gets_another(wandb, tmp_path):
    write(tmp_path, 0, 5)
    write(tmp_path, 3, 6)
    write(tmp_path, 0, 2)
    first, resumed, new = (run.given["id"] for run in wandb.runs)
    assert first == resumed != new
    assert [one["step"] for one in wandb.runs[1].logged] == [3, 4, 5]
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] == new


def test_an_evaluation_is_sent_once_over_a_resume(wandb, tmp_path):
    line = {"step": 4, "stage_index": 0, "stage": "en", "kind": "interval"}
    line |= {"domains": {"en": {"nats_per_token": 2.0, "bits_per_byte": None}}}
    branch = line | {"kind": "branch", "branch_from": 4, "step": 9}
    for resume in (0, 4):
        with MetricsWriter(
            tmp_path, resume, tensorboard=False, trackers=[WandB(project="lcl")]
        ) as writer:
            writer.evals(line)
            writer.evals(branch)
    sent = [one for run in wandb.runs for one in run.logged]
    assert sent == [
        {"heldout/en/nats_per_token": 2.0, "step": 4},
        {"annealed/en/nats_per_token": 2.0, "step": 9},
    ]


def test_only_the_first_process_sends(wandb, tmp_path):
    writer = MetricsWriter(tmp_path, 0, trackers=[WandB(project="lcl")], primary=False)
    writer.metrics({"step": 0, "loss": 1.0})
    assert wandb.runs == []


def test_one_that_fails_on_the_way_is_told_once_and_the_run_goes_on(wandb, tmp_path, caplog):
    def log(self, data):
        raise RuntimeError("the network\nis gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeRun, "log", log)
        write(tmp_path, 0, 5)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert [r.message for r in caplog.records if "WandB has failed (the network)" in r.message] == [
        "WandB has failed (the network): no more is sent to it; the run's own logs go on"
    ]


def test_one_that_cannot_begin_is_a_line_with_the_mend(wandb, tmp_path):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty).\ncall wandb.login")

    wandb.init = init
    with pytest.raises(
        ValueError, match=r"\(api_key not configured \(no-tty\)\.\): .*offline"
    ) as error:
        write(tmp_path, 0, 1)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "wandb.json").exists()


def test_without_the_package_nothing_is_begun(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    logging = Logging(trackers=(WandB(project="lcl"),))
    with pytest.raises(ValueError, match="pip install 'lcl\\[wandb\\]'") as error:
        train(**tiny.settings(tmp_path / "stores", tmp_path / "run", logging=logging))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given, named",
    [
        ({"project": ""}, "WandB.project=''"),
        ({"project": "me/lcl"}, "WandB.entity"),
        ({"project": "lcl", "mode": "disabled"}, "'online' or 'offline'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(given, named):
    with pytest.raises(ValueError, match=named) as error:
        WandB(**given)
    assert "\n" not in str(error.value)


def test_gin_may_name_it():
    loaded = config.load(
        ["tests/tiny.gin"],
        ["Data.root='x'", "Logging.trackers=[@WandB()]", "WandB.project='lcl'"],
    )
    assert loaded.kwargs("train", run_dir="x")["logging"].trackers == (WandB(project="lcl"),)


def test_another_tracker_is_a_class_of_two_methods(tmp_path):
    sent = []

    class Kept(Tracker, Tracking):
        def open(self, run_dir, resume_step):
            return self

        def scalars(self, values, step):
            sent.append((step, values))

        def close(self):
            sent.append("closed")

    write(tmp_path, 0, 2, trackers=[Kept()])
    assert sent == [(0, {"train/loss": 1.0}), (1, {"train/loss": 0.5}), "closed"]
    Guarded(Kept(), "Kept").close()
    assert sent[-1] == "closed"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_one_offline(tmp_path):
    """The surface of the fake is the real one's; offline needs no account and no network."""
    write(tmp_path, 0, 5, trackers=[WandB(project="lcl", mode="offline", tags=("test",))])
    known = json.loads((tmp_path / "wandb.json").read_text())
    write(tmp_path, 3, 6, trackers=[WandB(project="lcl", mode="offline")])
    assert json.loads((tmp_path / "wandb.json").read_text()) == known
    files = [p for p in (tmp_path / "wandb").rglob("*.wandb") if known["id"] in p.name]
    assert files and all(pathlib.Path(p).stat().st_size for p in files)
