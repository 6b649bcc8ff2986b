"""From `lcl train` to the first step: seconds, with a cold and with a warm compilation cache.

    python tests/benchmarks/startup.py [--root data/byte] [--rounds 3]

Each round starts the quickstart in a process of its own and waits for the first line of its
metrics: imports, configuration, stream, state, evaluation at step 0, compilation, step. One device:
several CPU devices use no compilation cache (lcl/parallel/host_devices.py), so there both are cold.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def first_step(root: str, run_dir: pathlib.Path, cache: pathlib.Path, devices: int) -> float:
    """Seconds from the start of the process to the first line of metrics.jsonl."""
    command = [
        *(sys.executable, "-m", "lcl.main", "train", "--gin_file=configs/runs/quickstart.gin"),
        *(f"--gin.Data.root={root!r}", f"--run_dir={run_dir}"),
        *("--gin.Logging.every_steps=1", "--gin.Logging.progress=False"),
    ]
    environment = dict(os.environ) | {
        "PYTHONPATH": str(REPOSITORY),
        "XDG_CACHE_HOME": str(cache),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    metrics = run_dir / "metrics.jsonl"
    begin = time.monotonic()
    child = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE)
    while not (metrics.exists() and metrics.stat().st_size):
        if child.poll() is not None:
            assert child.stderr is not None
            sys.exit(child.stderr.read().decode())
        time.sleep(0.02)
    seconds = time.monotonic() - begin
    child.kill()
    child.wait()
    return seconds


def main() -> None:
    """Measures, prints a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data/byte", help="stores of `lcl prepare`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder)
        for number in range(arguments.rounds):
            cache = base / f"cache-{number}"
            for kind in ("cold", "warm"):
                run_dir = base / f"{kind}-{number}"
                seconds[kind].append(first_step(arguments.root, run_dir, cache, arguments.devices))
    for kind, times in seconds.items():
        middle = statistics.median(times)
        print(f"{kind} compilation cache: first step after {middle:.1f} s", end=" ")
        print(f"({min(times):.1f}..{max(times):.1f}, {len(times)} rounds)")
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
