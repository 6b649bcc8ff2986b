"""launch/worker.sh on a machine: which exit codes it starts again on, and what a signal does."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import time

import pytest

from lcl.preemption import EXIT_PREEMPTED

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "launch" / "worker.sh"


@pytest.fixture
def worker(tmp_path):
    """`worker(codes)` gives a function that starts worker.sh with an `lcl` that leaves so."""

    def make(body: str):
        lcl = tmp_path / "lcl"
        lcl.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>"{tmp_path}/calls"\n{body}\n')
        lcl.chmod(0o755)
        environment = {**os.environ, "LCL": str(lcl), "LCL_STATE": str(tmp_path / "state")}
        environment |= {"LCL_POLL": "0.1", "LCL_MAX_RESTARTS": "3"}

        def start(*words: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [str(SCRIPT), *words],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            started.append(process)
            return process

        return start

    started: list[subprocess.Popen[str]] = []
    yield make
    for process in started:
        process.stdout.close()
        process.wait(timeout=30)


def leaves(codes: list[int], folder: pathlib.Path) -> str:
    """A body that leaves with the next of `codes` each time it is called."""
    listed = " ".join(map(str, codes))
    return f'codes=({listed})\nn=$(wc -l <"{folder}/calls")\nexit "${{codes[n - 1]}}"'


def saves(how: str, folder: pathlib.Path) -> str:
    """A body that trains until SIGTERM, saves and leaves; `up` says that it listens."""
    trap = f'trap "{how}; exit {EXIT_PREEMPTED}" TERM'
    return f'{trap}\ntouch "{folder}/up"\nwhile :; do sleep 0.05; done'


def calls(folder: pathlib.Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("codes", "end", "times"),
    [
        ([0], 0, 1),
        ([EXIT_PREEMPTED, EXIT_PREEMPTED, 0], 0, 3),
        ([EXIT_PREEMPTED, 1, 0], 1, 2),
        ([EXIT_PREEMPTED] * 9, EXIT_PREEMPTED, 4),
    ],
)
def test_it_starts_again_on_75_only_and_not_for_ever(worker, tmp_path, codes, end, times):
    process = worker(leaves(codes, tmp_path))("run", "--run_dir=/x y", "--gin.A.b='c'")
    process.communicate(timeout=30)
    assert process.returncode == end
    assert calls(tmp_path) == ["train --run_dir=/x y --gin.A.b='c'"] * times


def test_a_signal_is_passed_on_and_nothing_is_started_again(worker, tmp_path):
    process = worker(saves("sleep 0.2", tmp_path))("run")
    wait_until((tmp_path / "up").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == EXIT_PREEMPTED
    assert len(calls(tmp_path)) == 1


def test_detached_training_is_followed_found_again_and_stopped(worker, tmp_path):
    start = worker(saves("echo saved", tmp_path))
    assert start("start", "long", "--a=1").wait(timeout=30) == 0
    wait_until((tmp_path / "up").exists)
    again = start("start", "long", "--a=1")
    assert "runs already" in again.communicate(timeout=30)[0]
    waiting = start("wait", "long")
    assert start("stop", "long").wait(timeout=30) == 0
    output, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == EXIT_PREEMPTED
    assert "saved" in output
    assert len(calls(tmp_path)) == 1


def test_a_worker_that_lost_its_training_says_so(worker, tmp_path):
    start = worker("sleep 60")
    start("start", "long").wait(timeout=30)
    pid = int((tmp_path / "state/long/pid").read_text())
    os.killpg(pid, signal.SIGKILL)  # a session of its own: it and its child
    waiting = start("wait", "long")
    waiting.communicate(timeout=30)
    assert waiting.returncode == 255


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("fly",), "worker.sh needs one of"),
        (("start", "a b"), "needs a name"),
        (("wait", "never"), "nothing called never"),
    ],
)
def test_mistakes_are_one_line(worker, words, text):
    process = worker("exit 0")(*words)
    assert text in process.communicate(timeout=30)[0].splitlines()[-1]
    assert process.returncode == 1


def wait_until(condition) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come up")
