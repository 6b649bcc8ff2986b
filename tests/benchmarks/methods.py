"""What a method costs a step: none, Reptile every 500, replay of 25% in the place of new rows.

All arms train the second of two stages with the same shapes, and take turns, a few steps each, the
order turning by one every round; so whatever else the machine does meets all alike. A step is
Grain's next batch, placing it, and the compiled step. The figure is the median over the rounds of
an arm's time over that of `none` in the same round. Reptile's sync is chosen by `where`, so each of
its steps costs the same, synced or not.

    python tests/benchmarks/methods.py [--steps 20] [--rounds 15] [--width 128] [--layers 4]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

NONE = "none"


def arms(base: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Arm -> its assembled run."""
    from lcl.assembly import assemble
    from lcl.data import Mixture, Replay, StageData
    from lcl.optim import Reptile
    from lcl.stages import Stage
    from tests import tiny

    settings = tiny.settings(base / "stores", "unused")
    for name in ("run_dir", "checkpoint", "logging"):
        settings.pop(name)
    settings["model"] = dataclasses.replace(
        tiny.MODEL,
        num_layers=options.layers,
        embed_dim=options.width,
        mlp_dim=3 * options.width,
        num_kv_heads=4,
        context_length=options.length,
    )

    def stages(replay: Replay | None) -> tuple[Stage, ...]:
        steps = options.steps * (options.rounds + 2)

        def data(name: str) -> StageData:
            return StageData(Mixture({name: 1.0}), options.length, options.batch, replay=replay)

        return tuple(Stage(name, data(name), steps=steps) for name in ("alpha", "beta"))

    changes = {
        NONE: {"stages": stages(None)},
        "Reptile, every 500": {
            "stages": stages(None),
            "optimizer": Reptile(settings["optimizer"], every=500, step_size=0.1),
        },
        "replay 25%, substitute": {"stages": stages(Replay(0.25, mode="substitute"))},
    }
    return {arm: assemble(**settings | change) for arm, change in changes.items()}


class Arm:
    """A run's second stage, step by step."""

    def __init__(self, run: Any) -> None:
        """Compiles, and opens the stream where the stage begins."""
        self.run, span = run, run.spans[1]
        self.step = run.train_step(span)
        self.memory = self.step.memory_analysis()
        self.state = run.init_state()
        self.batches = run.placed_batches(start=span.first_step)

    def go(self, steps: int) -> tuple[float, float]:
        """Trains so many steps: (wall, CPU) seconds a step."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, next(self.batches))
            metrics["loss"].block_until_ready()
        return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def main() -> None:
    """Measures, prints a table and a JSON line."""
    import jax

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="a turn")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=12)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        runs = arms(pathlib.Path(folder), options)
        running = {name: Arm(run) for name, run in runs.items()}
        names = list(running)
        for arm in running.values():
            arm.go(options.steps)  # warm
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for number in range(options.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                seconds[name].append(running[name].go(options.steps))

    params = jax.tree.leaves(runs[NONE].abstract_state.params)
    copy = sum(leaf.size * leaf.dtype.itemsize for leaf in params)
    base = running[NONE].memory
    results: dict[str, dict[str, float]] = {}
    for name, arm in running.items():
        pairs = list(zip(seconds[name], seconds[NONE], strict=True))
        wall, cpu = ([own[i] / none[i] - 1.0 for own, none in pairs] for i in (0, 1))
        arguments = arm.memory.argument_size_in_bytes - base.argument_size_in_bytes
        temp = arm.memory.temp_size_in_bytes - base.temp_size_in_bytes
        results[name] = {
            "wall_ms": 1e3 * statistics.median(own for own, _ in seconds[name]),
            "cpu_ms": 1e3 * statistics.median(own for _, own in seconds[name]),
            "wall_percent": 100 * statistics.median(wall),
            "cpu_percent": 100 * statistics.median(cpu),
            "argument_bytes": arguments,
            "temp_bytes": temp,
            "parameter_copies": (arguments + temp) / copy,
        }
    print(
        f"{options.batch} x {options.length} tokens, {copy / 4e6:.2f} M parameters, "
        f"{options.rounds} rounds of {options.steps} steps in turns; medians; % against {NONE!r}"
    )
    print(f"{'':24}{'wall ms':>10}{'%':>8}{'CPU ms':>10}{'%':>8}{'more memory':>26}")
    for name, got in results.items():
        print(
            f"{name:24}{got['wall_ms']:10.2f}{got['wall_percent']:+8.2f}{got['cpu_ms']:10.2f}"
            f"{got['cpu_percent']:+8.2f}{got['parameter_copies']:12.4f} parameter copies"
        )
    print(json.dumps({"options": vars(options), "parameter_bytes": copy, "arms": results}))


if __name__ == "__main__":
    main()
