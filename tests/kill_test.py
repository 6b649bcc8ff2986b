"""Killed at random moments and restarted, a run ends with the same bits as one left alone.

The short form runs in CI. The long form: `python tests/kill_test.py --kills 20`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from lcl.preemption import EXIT_PREEMPTED

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for the long form, run as a script


NUM_STEPS = 80
# Some blows fall while an annealed copy is trained beside the run.
BRANCHES = ("--gin.HeldOut.branches=@Branches()", "--gin.Branches.anneal_steps=6")


def command(root: pathlib.Path, run_dir: pathlib.Path, *more: str) -> list[str]:
    """`lcl train` of the tiny run."""
    return [
        *(sys.executable, "-m", "lcl.main", "train", f"--gin_file={HERE / 'tiny.gin'}"),
        *(f"--run_dir={run_dir}", f"--gin.Data.root='{root}'", *BRANCHES, *more),
    ]


def environment() -> dict[str, str]:
    """Ours, with the repository on the path."""
    return dict(os.environ) | {"PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu"}


def start(root: pathlib.Path, run_dir: pathlib.Path, *more: str) -> subprocess.Popen[str]:
    """Starts the run; its stderr goes to a file beside its directory."""
    log = open(f"{run_dir}.log", "a")  # noqa: SIM115 (closed with the child)
    with log:
        return subprocess.Popen(
            command(root, run_dir, *more), env=environment(), stderr=log, cwd=HERE.parent, text=True
        )


def finish(root: pathlib.Path, run_dir: pathlib.Path, *more: str) -> float:
    """Runs to the end; returns the seconds it took."""
    begin = time.monotonic()
    child = start(root, run_dir, *more)
    assert child.wait(timeout=900) == 0, pathlib.Path(f"{run_dir}.log").read_text()[-4000:]
    return time.monotonic() - begin


def result(run_dir: pathlib.Path) -> dict[str, object]:
    """What must be the same: every leaf of the last state by digest, and the logs to the byte."""
    from lcl.checkpoints import Checkpointer, CheckpointPolicy

    checkpointer = Checkpointer(run_dir, CheckpointPolicy(), read_only=True)
    assert checkpointer.steps()[-1] == NUM_STEPS
    leaves = checkpointer._read_document(NUM_STEPS)["leaves"]
    logs = {name: (run_dir / f"{name}.jsonl").read_text() for name in ("metrics", "evals")}
    steps = [json.loads(line)["step"] for line in logs["metrics"].splitlines()]
    assert steps == list(range(NUM_STEPS)), "a step is missing or written twice"
    return {"leaves": leaves} | logs


def phase(run_dir: pathlib.Path) -> str:
    """What the run was doing, as far as its files tell."""
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    log = pathlib.Path(f"{run_dir}.log").read_text().splitlines()
    saving = any(run_dir.glob("checkpoints/*tmp*"))
    last = log[-1][:50] if log else "starting"
    return f"{lines} steps logged, {'saving, ' if saving else ''}last said: {last}"


def kill_and_resume(
    root: pathlib.Path, run_dir: pathlib.Path, *, kills: int, seed: int, life: float
) -> int:
    """Kills the run `kills` times at random moments of its life; returns how many were struck.

    Args:
      life: seconds that a whole run takes; a blow falls anywhere within them.
    """
    chance = random.Random(seed)
    struck = finished = 0
    while struck < kills:
        child = start(root, run_dir)
        begin = time.monotonic()
        try:
            child.wait(timeout=chance.uniform(0.3, 1.1) * life)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            struck += 1
            print(f"kill {struck} after {time.monotonic() - begin:.1f} s: {phase(run_dir)}")
            continue
        # It came to its end before the blow: begin again, so that every kill strikes a live run.
        assert child.returncode == 0
        finished += 1
        run_dir.rename(run_dir.with_name(f"{run_dir.name}-finished-{finished}"))
    finish(root, run_dir)
    return struck


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Stores, and the run that nobody disturbed."""
    from tests import tiny

    base = tmp_path_factory.mktemp("kill")
    root = base / "stores"
    tiny.stores(root)
    life = finish(root, base / "undisturbed")
    return base, root, result(base / "undisturbed"), life


def test_sigkill_at_random_moments_changes_nothing(reference):
    """axolotl#2229, torchtitan#3008, KempnerForge#57: resumes that repeat, skip or drift."""
    base, root, want, life = reference
    kill_and_resume(root, base / "killed", kills=3, seed=1, life=life)
    assert result(base / "killed") == want


def test_sigterm_saves_and_exits_with_the_launchers_code_and_the_run_goes_on(reference):
    base, root, want, _ = reference
    run_dir = base / "terminated"
    child = start(root, run_dir)
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 10):
        assert child.poll() is None, pathlib.Path(f"{run_dir}.log").read_text()[-4000:]
        time.sleep(0.02)
    child.terminate()
    assert child.wait(timeout=60) == EXIT_PREEMPTED
    log = pathlib.Path(f"{run_dir}.log").read_text()
    assert "goes on from here" in log, log[-2000:]
    done = json.loads(metrics.read_text().splitlines()[-1])["step"] + 1
    assert 10 <= done < NUM_STEPS
    saved = sorted(int(p.name) for p in run_dir.glob("checkpoints/*") if p.name.isdigit())
    assert saved[-1] == done, "the last step that was logged is the one that was saved"
    finish(root, run_dir)
    assert result(run_dir) == want


def main() -> None:
    """The long form."""
    from tests import tiny

    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder)
        root = base / "stores"
        tiny.stores(root)
        finish(root, base / "undisturbed")
        life = finish(root, base / "again")  # with a warm compilation cache
        print(f"the undisturbed run: {life:.1f} s")
        struck = kill_and_resume(
            root, base / "killed", kills=arguments.kills, seed=arguments.seed, life=life
        )
        want, got = result(base / "undisturbed"), result(base / "killed")
        for part, value in want.items():
            assert got[part] == value, f"{part} differs"
        print(
            f"killed {struck} times: {len(want['leaves'])} leaves of parameters and optimizer "
            f"state, {NUM_STEPS} lines of metrics and the evaluations are bit-identical"
        )


if __name__ == "__main__":
    main()
