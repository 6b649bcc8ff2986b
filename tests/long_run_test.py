"""Long rows on a context mesh, end to end: killed, resumed, and resumed on another mesh.

    undisturbed   data 2 x context 4   steps 0 ........................... 7
    disturbed     data 2 x context 4   steps 0 .. SIGKILL
                  data 2 x context 4            .. SIGTERM (saves, exit code 75)
                  data 4 x context 2                       .............. 7

Every step must read the same rows in both (by hash, whatever order the context axis holds a row
in), be bit-identical before the mesh changes, and agree to LOSS_BOUND after.

The short form runs in CI, on made-up documents. The long form prepares real ones first:

    python tests/long_run_test.py --rows 32768 --out long_run
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for the long form, run as a script

from lcl.parallel import host_device_environment  # noqa: E402
from lcl.preemption import EXIT_PREEMPTED  # noqa: E402

# Relative, on loss and gradient norm of every step: float32 sums taken in another order.
LOSS_BOUND = 2e-5
NUM_STEPS = 8
BEFORE, AFTER = {"data": 2, "context": 4}, {"data": 4, "context": 2}

# `lcl train` that also writes down a hash of every batch as the devices hold it, each row put back
# into its own order, and takes its time over it, so that signals find it running.
CHILD = """
import hashlib, sys, time
import jax
import numpy as np
from lcl import assembly
from lcl.main import main

batches, delay, *words = sys.argv[1:]
original = assembly.Assembly.put


def put(self, batch, step):
    placed = original(self, batch, step)
    fields = [np.asarray(jax.device_get(field)) for field in placed]
    order = np.argsort(fields.pop(), axis=1)
    digest = hashlib.sha256()
    for field in fields:
        digest.update(np.take_along_axis(field, order, axis=1).tobytes())
    with open(batches, "a") as file:
        file.write(f"{step} {digest.hexdigest()}\\n")
    time.sleep(float(delay))
    return placed


assembly.Assembly.put = put
sys.exit(main(words))
"""


class Run:
    """A run's directory, and the processes that work on it."""

    def __init__(self, root, run_dir, rows: int, domains, *, delay: float = 0.0) -> None:
        self.run_dir = pathlib.Path(run_dir)
        self._words = [
            *("train", f"--gin_file={HERE / 'long_run.gin'}", f"--run_dir={run_dir}"),
            f"--gin.Data.root='{root}'",
            f"--gin.Mixture.weights={dict.fromkeys(domains, 1.0)}",
            *(f"--gin.{name}={rows}" for name in ("StageData.sequence_length",)),
            f"--gin.HeldOut.sequence_length={rows}",
            f"--gin.DecoderConfig.context_length={rows}",
        ]
        self._delay = delay
        self.log = pathlib.Path(f"{run_dir}.log")
        self.batches = pathlib.Path(f"{run_dir}.batches")

    def start(self, mesh: dict[str, int]) -> subprocess.Popen[str]:
        """Starts or goes on, on eight CPU devices."""
        environment = dict(os.environ) | {"PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu"}
        environment["PYTHONFAULTHANDLER"] = "1"  # see `_wait`
        environment |= host_device_environment(8, environment)
        axes = [f"--gin.MeshConfig.{axis}={size}" for axis, size in mesh.items()]
        with open(self.log, "a") as log:
            return subprocess.Popen(
                [sys.executable, "-c", CHILD, str(self.batches), str(self._delay)]
                + self._words
                + axes,
                env=environment, stdout=log, stderr=log, cwd=HERE.parent, text=True,
            )  # fmt: skip

    def finish(self, mesh: dict[str, int], timeout: float) -> float:
        """Runs to the end; returns the seconds it took."""
        begin = time.monotonic()
        assert self._wait(self.start(mesh), timeout) == 0, self.log.read_text()[-4000:]
        return time.monotonic() - begin

    def _wait(self, child: subprocess.Popen[str], timeout: float) -> int:
        """The exit code; a child that stands still says where before it is ended."""
        try:
            return child.wait(timeout)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGABRT)  # every thread's stack, into the log
            child.wait(60)
            raise AssertionError(
                f"not done within {timeout:.0f} s\n{self.log.read_text()[-12000:]}"
            ) from None

    def signal_after(self, mesh: dict[str, int], steps: int, number: int, timeout: float) -> int:
        """Starts, sends a signal once so many steps are logged; returns the exit code."""
        child, end = self.start(mesh), time.monotonic() + timeout
        while self.num_logged() < steps:
            assert child.poll() is None, self.log.read_text()[-4000:]
            if time.monotonic() > end:
                self._wait(child, 0.0)
            time.sleep(0.02)
        child.send_signal(number)
        return self._wait(child, timeout)

    def num_logged(self) -> int:
        """Lines of metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def metrics(self) -> list[dict[str, float]]:
        """Every step's metrics; each step once."""
        lines = [json.loads(x) for x in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(NUM_STEPS))
        return lines

    def hashes(self) -> dict[int, str]:
        """The hash of every step's batch; one that was read again must be the same again."""
        seen: dict[int, str] = {}
        for line in self.batches.read_text().splitlines():
            step, digest = line.split()
            assert seen.setdefault(int(step), digest) == digest, f"step {step} changed"
        return seen


def check(root, base: pathlib.Path, rows: int, domains, *, delay: float, timeout: float) -> str:
    """The whole story; returns what was found, in a few lines."""
    whole = Run(root, base / "undisturbed", rows, domains)
    seconds = whole.finish(BEFORE, timeout)
    other = Run(root, base / "disturbed", rows, domains, delay=delay)
    assert other.signal_after(BEFORE, 3, signal.SIGKILL, timeout) == -signal.SIGKILL
    assert other.signal_after(BEFORE, 5, signal.SIGTERM, timeout) == EXIT_PREEMPTED
    changed_at = other.num_logged()
    assert 5 <= changed_at < NUM_STEPS, "it came to its end before the mesh could change"
    other.finish(AFTER, timeout)

    hashes = whole.hashes()
    assert sorted(hashes) == list(range(NUM_STEPS)) and len(set(hashes.values())) == NUM_STEPS
    assert other.hashes() == hashes, "the disturbed run read other rows"
    want, got = whole.metrics(), other.metrics()
    assert got[:changed_at] == want[:changed_at], "not bit for bit on the same mesh"
    pick = [[[line["loss"], line["grad_norm"]] for line in lines] for lines in (want, got)]
    difference = np.abs(np.array(pick[1]) / np.array(pick[0]) - 1)
    assert difference.max() <= LOSS_BOUND, difference
    return (
        f"{NUM_STEPS} steps of 4 rows of {rows} tokens: {seconds:.0f} s undisturbed; loss "
        f"{want[0]['loss']:.4f} -> {want[-1]['loss']:.4f}\n"
        f"SIGKILL, resumed; SIGTERM (exit code {EXIT_PREEMPTED}) after step {changed_at - 1}, "
        f"resumed on data 4 x context 2\n"
        f"batches: {NUM_STEPS} hashes equal; steps 0 to {changed_at - 1} bit-identical; after that "
        f"the largest relative difference is {difference.max():.1e} (bound {LOSS_BOUND})"
    )


def test_a_long_run_goes_on_on_another_context_mesh(tmp_path, monkeypatch):
    from lcl.data.testing import make_stores
    from tests.conftest import QUICK_COMPILE

    monkeypatch.setenv("XLA_FLAGS", QUICK_COMPILE)
    make_stores(tmp_path / "stores", {"alpha": 40, "beta": 40}, seed=3)
    print(check(tmp_path / "stores", tmp_path, 512, ["alpha", "beta"], delay=0.2, timeout=400))


def main() -> None:
    """The long form: prepares real documents with `lcl prepare` and goes through the story."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32768, help="tokens a row")
    parser.add_argument("--out", default="long_run", help="stores and runs go here")
    parser.add_argument("--corpora", nargs="+", default=["pydoc", "python"])
    arguments = parser.parse_args()
    base = pathlib.Path(arguments.out).resolve()
    base.mkdir(parents=True, exist_ok=True)
    prepare = [sys.executable, "-m", "lcl.main", "prepare", *arguments.corpora]
    subprocess.run(
        [*prepare, "--root", str(base / "stores")],
        check=True, cwd=HERE.parent, env=dict(os.environ) | {"PYTHONPATH": str(HERE.parent)},
    )  # fmt: skip
    print(check(base / "stores", base, arguments.rows, arguments.corpora, delay=0.0, timeout=3600))


if __name__ == "__main__":
    main()
