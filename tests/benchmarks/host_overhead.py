"""What the loop costs beside the step: host milliseconds a step, at a nano model.

Two loops over the same steps take turns: the bare compiled step on batches that already lie on the
device, and the loop of a run (Grain's next batch, placing it, the step, the recorder with its
transfers, checks and writes). The difference is the host's overhead.

    python tests/benchmarks/host_overhead.py [--steps 200] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))


def main() -> None:
    """Measures, prints a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    from lcl.assembly import assemble
    from lcl.recorder import Recorder
    from lcl.report import MetricsWriter, Progress
    from tests import tiny

    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder)
        stages = (tiny.stage("alpha", steps=arguments.steps * arguments.rounds),)
        settings = tiny.settings(base / "stores", base / "run", stages=stages)
        for name in ("run_dir", "checkpoint", "logging"):
            settings.pop(name)
        run = assemble(**settings)
        span = run.spans[0]
        train_step = run.train_step(span)
        placed = [run.put(run.stream.batch(step), step) for step in range(arguments.steps)]

        def bare(state):
            begin = time.perf_counter(), time.process_time()
            for batch in placed:
                state, metrics = train_step(state, batch)
            metrics["loss"].block_until_ready()
            return state, time.perf_counter() - begin[0], time.process_time() - begin[1]

        writer = MetricsWriter(base / "run", None, tensorboard=True)
        bar = Progress(run.num_steps, enabled=False)
        recorder = Recorder(writer, bar, domains=run.stream.domains, describe_rows=str)
        batches = run.placed_batches(start=0)
        done = 0

        def whole(state):
            nonlocal done
            begin = time.perf_counter(), time.process_time()
            for _ in range(arguments.steps):
                state, metrics = train_step(state, next(batches))
                recorder.add(done, span, metrics)
                done += 1
                if done % 10 == 0:
                    recorder.drain()
            recorder.drain()
            return state, time.perf_counter() - begin[0], time.process_time() - begin[1]

        state = run.init_state()
        state, _, _ = bare(state)  # warm
        rows = []
        for _ in range(arguments.rounds):
            state, bare_wall, bare_cpu = bare(state)
            state, whole_wall, whole_cpu = whole(state)
            rows.append((bare_wall, whole_wall, bare_cpu, whole_cpu))
        per_step = [[1e3 * value / arguments.steps for value in row] for row in rows]
        bare_ms, whole_ms, bare_cpu, whole_cpu = (
            statistics.median(column) for column in zip(*per_step, strict=True)
        )
        extra = statistics.median(row[1] - row[0] for row in per_step)
        print(f"                     wall ms/step   cpu ms/step   (medians of {arguments.rounds})")
        print(f"the step by itself   {bare_ms:12.3f}   {bare_cpu:11.3f}")
        print(f"the loop             {whole_ms:12.3f}   {whole_cpu:11.3f}")
        print(f"the host's overhead  {extra:12.3f}   {whole_cpu - bare_cpu:11.3f}")
        print(json.dumps({"bare_ms": bare_ms, "loop_ms": whole_ms, "overhead_ms": extra}))


if __name__ == "__main__":
    main()
