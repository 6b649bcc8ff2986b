"""`lcl train` by two processes of four devices each, against one process of eight."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from lcl.parallel import host_device_environment
from lcl.parallel.distributed import COORDINATOR, NUM_PROCESSES, PROCESS_ID
from lcl.preemption import EXIT_PREEMPTED
from tests import tiny
from tests.conftest import QUICK_COMPILE

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
NUM_STEPS = 24
# Float32 sums over processes may be taken in another order than over one process's devices.
LOSS_BOUND = 2e-5
MESH = {"data": 2, "context": 4}


def start(root: pathlib.Path, run_dir: pathlib.Path, count: int) -> list[subprocess.Popen[bytes]]:
    """Starts the tiny run in `count` processes, which share eight devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for process in range(count):
        environment = dict(os.environ) | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
        environment |= host_device_environment(8 // count, environment)
        if count > 1:
            environment |= {
                COORDINATOR: f"127.0.0.1:{port}",
                NUM_PROCESSES: str(count),
                PROCESS_ID: str(process),
            }
        with open(f"{run_dir}.{process}.log", "a") as log:
            children.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "lcl.main", "train", "--gin_file=tests/tiny.gin"),
                        *(f"--run_dir={run_dir}", f"--gin.Data.root='{root}'"),
                        *(f"--gin.MeshConfig.{axis}={size}" for axis, size in MESH.items()),
                        *(f"--gin.Stage.steps={NUM_STEPS // 2}", "--gin.Logging.every_steps=1"),
                        # Quick to compile: gloo gives up on a process that compiles for long.
                        *("--gin.DecoderConfig.attention='all_gather'",),
                    ],
                    env=environment,
                    stdout=log,
                    stderr=log,
                    cwd=REPOSITORY,
                )  # fmt: skip
            )
    return children


def codes(children: list[subprocess.Popen[bytes]], timeout: float = 400) -> list[int]:
    """Every process's exit code; none is left behind."""
    try:
        return [child.wait(timeout) for child in children]
    finally:
        for child in children:
            child.kill()


def logs(run_dir: pathlib.Path) -> str:
    return "".join(p.read_text()[-3000:] for p in run_dir.parent.glob(f"{run_dir.name}.*.log"))


def lines(run_dir: pathlib.Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def test_two_processes_train_stop_together_and_go_on_as_one_process_does(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", QUICK_COMPILE)
    root = tmp_path / "stores"
    tiny.stores(root)
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert codes(start(root, alone, 1)) == [0], logs(alone)

    children = start(root, together, 2)
    metrics = together / "metrics.jsonl"
    end = time.monotonic() + 400
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert all(child.poll() is None for child in children), logs(together)
        assert time.monotonic() < end, logs(together)
        time.sleep(0.01)
    children[1].terminate()  # one is told; both must leave at the same step, with one checkpoint
    assert codes(children) == [EXIT_PREEMPTED] * 2, logs(together)
    done = lines(together, "metrics")[-1]["step"] + 1
    assert done < NUM_STEPS, "it came to its end before the signal"
    saved = sorted(int(p.name) for p in together.glob("checkpoints/*") if p.name.isdigit())
    assert saved[-1] == done
    assert codes(start(root, together, 2)) == [0, 0], logs(together)

    want, got = lines(alone, "metrics"), lines(together, "metrics")
    assert [line["step"] for line in got] == list(range(NUM_STEPS))
    for key in ("loss", "grad_norm"):
        values = [[line[key] for line in run] for run in (got, want)]
        np.testing.assert_allclose(*values, rtol=LOSS_BOUND, err_msg=key)
    for one, other in zip(lines(together, "evals"), lines(alone, "evals"), strict=True):
        assert (one["step"], one["kind"]) == (other["step"], other["kind"])
        for domain, scores in other["domains"].items():
            found = one["domains"][domain]["nats_per_token"]
            assert found == pytest.approx(scores["nats_per_token"], rel=LOSS_BOUND)
