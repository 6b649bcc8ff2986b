"""What reaches the logs: every step, losses by domain, a speed without what was no training."""

from __future__ import annotations

import io
import json
import time

import jax.numpy as jnp
import pytest

from lcl.policies import NonFiniteError
from lcl.recorder import Recorder
from lcl.report import MetricsWriter, Progress
from lcl.stages import timeline
from tests import tiny

SPAN = timeline([tiny.stage("alpha", steps=4)])[0]


def metrics(loss: float = 2.0, weight: float = 100.0):
    return {
        "loss": jnp.float32(loss),
        "grad_norm": jnp.float32(1.5),
        "learning_rate": jnp.float32(1e-3),
        "weight": jnp.float32(weight),
        "nll_sum_by_source": jnp.array([120.0, 0.0, 0.0, 60.0]),
        "weight_by_source": jnp.array([60.0, 0.0, 0.0, 40.0]),
    }


@pytest.fixture
def recorder(tmp_path):
    with MetricsWriter(tmp_path, None, tensorboard=False) as writer:
        bar = Progress(4, stream=io.StringIO())
        yield Recorder(
            writer, bar, domains=("alpha", "beta"), describe_rows=lambda step: f"rows of {step}"
        )


def lines(tmp_path, name):
    return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]


def test_losses_are_split_by_domain_and_by_replay(recorder, tmp_path):
    recorder.add(0, SPAN, metrics())
    recorder.add(1, SPAN, None)
    recorder.add(2, SPAN, metrics())
    recorder.drain()
    first, left_out, third = lines(tmp_path, "metrics")
    assert first["loss/alpha"] == 2.0 and first["replay_loss/beta"] == 1.5
    assert "loss/beta" not in first and "replay_loss/alpha" not in first
    assert left_out == {"step": 1, "stage": "alpha", "left_out": True, "tokens": 100}
    assert third["tokens"] == 200


def test_a_bad_step_raises_after_the_steps_before_it_are_written(recorder, tmp_path):
    recorder.add(0, SPAN, metrics())
    recorder.add(1, SPAN, metrics(loss=float("nan")))
    with pytest.raises(NonFiniteError, match="rows of 1"):
        recorder.drain()
    assert [line["step"] for line in lines(tmp_path, "metrics")] == [0]


def test_time_that_was_no_training_is_not_in_the_speed(recorder, tmp_path):
    recorder.add(0, SPAN, metrics())
    recorder.drain()
    time.sleep(0.3)  # an evaluation, say
    recorder.exclude(0.3)
    recorder.add(1, SPAN, metrics())
    time.sleep(0.05)
    recorder.drain()
    seconds = lines(tmp_path, "timings")[1]["seconds_per_step"]
    assert 0.04 < seconds
    assert seconds < 0.3, "the excluded time counts"
