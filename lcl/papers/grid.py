"""The runs of a paper: each an ordinary call of `train`, then what is measured on it; cached.

    OUT/runs/<arm>-seed<k>-<hash>/     run_card.json, metrics.jsonl, checkpoints, ...
                                       result.json    <- written last; there = finished

The hash is that of everything that decides the numbers: the configuration of the run, the stores'
fingerprints, what is measured, and the code that computes (`lcl.papers.code`). Another setting or
another code is another directory, so a stale result cannot be read; a run that was killed goes on
from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging as logs
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lcl import files
from lcl.assembly import Assembly, assemble
from lcl.checkpoints import Checkpointer, CheckpointPolicy
from lcl.data import Batch
from lcl.data.fingerprints import fingerprint
from lcl.describe import describe
from lcl.evals import HeldOut
from lcl.models import Decoder, DecoderConfig
from lcl.objectives import NextToken
from lcl.papers import code
from lcl.papers.measures import Measure
from lcl.parallel import MeshConfig, rules
from lcl.policies import Guard, Logging
from lcl.step import make_eval_step
from lcl.train import train

log = logs.getLogger("lcl")

RESULT_FILE = "result.json"
# Arguments of `train` that decide no number.
_NO_RESULT = ("run_dir", "logging", "checkpoint", "mesh", "allow_changes", "config_text")


@dataclasses.dataclass(frozen=True)
class Probe:
    """What is measured on a finished run: named losses, each over marked targets of fixed batches.

    Attributes:
      batches: {name: batches}; a batch's source_ids are marks 0 .. len(marks) - 1 here.
      marks: names of the marks, in order.
      version: raised when the same settings are measured differently.
      settings: what decides the batches, for the hash.
    """

    batches: Mapping[str, Sequence[Batch]]
    marks: Sequence[str]
    version: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PaperRun:
    """One run of a paper's grid.

    Attributes:
      arm: which row of the table.
      seed: which repetition; runs of one seed are compared with one another.
      settings: arguments of `train`, run_dir aside.
      probe: losses that are measured afterwards on batches of its own; None = none.
      measures: what is read off the files that the run has written (`lcl.papers.measures`).
    """

    arm: str
    seed: int
    settings: Mapping[str, Any]
    probe: Probe | None = None
    measures: Sequence[Measure] = ()

    def __post_init__(self) -> None:
        """Refuses a run of which nothing is measured."""
        if self.probe is None and not self.measures:
            raise ValueError(f"nothing is measured on {self.arm!r}; give a probe or measures")

    @property
    def name(self) -> str:
        """The run's directory."""
        arm = re.sub(r"[^a-zA-Z0-9.]+", "_", self.arm).strip("_")
        return f"{arm}-seed{self.seed}-{self.hash[:10]}"

    @functools.cached_property
    def hash(self) -> str:
        """A hash of everything that decides the run's numbers."""
        deciding = {k: v for k, v in self.settings.items() if k not in (*_NO_RESULT, "data")}
        deciding["diagnostics"] = getattr(self.settings["logging"], "diagnostics", ())
        data = self.settings["data"]
        stores = {
            f"{domain}/{split}": data.open(domain, split).fingerprint
            for domain in data.domains()
            for split in ("train", "heldout")
        }
        measured: list[Any] = [
            [type(one).__qualname__, one.version, describe(one.settings)] for one in self.measures
        ]
        if self.probe is not None:
            probe = self.probe
            measured.append([probe.version, describe(probe.settings), list(probe.marks)])
        lines = describe(deciding)
        return fingerprint(lines, stores, measured, code.code_hash(), self._own_code(lines))

    def _own_code(self, lines: Mapping[str, Any]) -> dict[str, str]:
        """Code of a paper's own file that the run uses: functions among its settings, measures."""
        modules = {type(one).__module__ for one in self.measures}
        modules |= {
            value.rpartition(".")[0]
            for value in lines.values()
            if isinstance(value, str) and value.startswith("lcl.papers.")
        }
        hashes = {module: code.module_hash(module) for module in modules}
        return {module: found for module, found in hashes.items() if found is not None}


def common_settings(
    *, model: DecoderConfig, sequence_length: int, batch_size: int, every_steps: int = 25
) -> dict[str, Any]:
    """Arguments of `train` that every run of a small experiment shares; one device, quiet."""
    return {
        "model": model,
        "objective": NextToken(),
        "mesh": MeshConfig(),
        "checkpoint": CheckpointPolicy(every_steps=None, keep_last=1),
        "evaluation": HeldOut(
            rows_per_domain=batch_size, sequence_length=sequence_length, batch_size=batch_size
        ),
        "logging": Logging(
            every_steps=every_steps, tensorboard=False, progress=False, report=False
        ),
        "guard": Guard(),
    }


def is_done(run: PaperRun, out: str | os.PathLike[str]) -> bool:
    """Whether `run_one` would only read what an earlier call has found."""
    return (pathlib.Path(out) / "runs" / run.name / RESULT_FILE).exists()


def run_one(run: PaperRun, out: str | os.PathLike[str]) -> dict[str, Any]:
    """Trains and measures a run, or reads what an earlier call has found.

    Args:
      run: which.
      out: the paper's directory.

    Returns:
      {"arm", "seed", "hash", "values": {metric: value}, "tokens", "steps", "cpu_seconds",
      "wall_seconds"}; a metric of the probe is "<batches>/<mark>" or "<batches>/all", in
      nats/token, and those of the measures have their own names. The seconds are those of the
      whole call (compilations and evaluations included) and decide nothing.
    """
    run_dir = pathlib.Path(out) / "runs" / run.name
    path = run_dir / RESULT_FILE
    if path.exists():
        return json.loads(path.read_text())
    begin, cpu = time.monotonic(), time.process_time()
    train(run_dir=run_dir, **run.settings)
    spent = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.monotonic() - begin}
    values: dict[str, float] = {}
    if run.probe is not None:
        assembly, params, _ = trained(run.settings, run_dir)
        values |= measure(assembly, params, run.probe)
    for one in run.measures:
        values |= one.measure(run_dir)
    last = _last_line(run_dir / "metrics.jsonl")
    tokens, steps = last["tokens"], last["step"] + 1
    result = {
        "arm": run.arm,
        "seed": run.seed,
        "hash": run.hash,
        "values": values | {"tokens": tokens, "steps": steps},
        "tokens": tokens,
        "steps": steps,
        **{name: round(seconds, 2) for name, seconds in spent.items()},
    }
    write_json(path, result)
    return result


def trained(
    settings: Mapping[str, Any], run_dir: str | os.PathLike[str]
) -> tuple[Assembly, Any, int]:
    """A finished run's parts, its parameters, and how many steps they have seen."""
    names = ("seed", "model", "data", "stages", "optimizer", "objective", "mesh", "evaluation")
    assembly = assemble(**{name: settings[name] for name in (*names, "guard")})
    with Checkpointer(run_dir, settings["checkpoint"], read_only=True) as checkpoints:
        restored = checkpoints.restore(assembly.abstract_state)
    return assembly, assembly.eval_params(restored.state), restored.step


def measure(assembly: Assembly, params: Any, probe: Probe) -> dict[str, float]:
    """The probe's losses in nats/token: "<batches>/<mark>" where a mark occurs, and "/all"."""
    count = len(probe.marks)
    step = make_eval_step(Decoder(assembly.model), assembly.objective, count)
    jitted = jax.jit(step)
    values: dict[str, float] = {}
    for name, batches in probe.batches.items():
        nll, weight = np.zeros(count), np.zeros(count)
        for batch in batches:
            with jax.set_mesh(assembly.mesh), nn.logical_axis_rules(rules.LOGICAL_AXIS_RULES):
                sums = jax.device_get(jitted(params, rules.put_batch(batch, assembly.mesh)))
            nll += np.asarray(sums["nll_sum_by_source"], np.float64)
            weight += np.asarray(sums["weight_by_source"], np.float64)
        for mark, total, tokens in zip(probe.marks, nll, weight, strict=True):
            if tokens:
                values[f"{name}/{mark}"] = float(total / tokens)
        values[f"{name}/all"] = float(nll.sum() / weight.sum())
    return values


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that a reader, or a kill, sees all of it or nothing."""
    files.write_whole(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def _last_line(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text().splitlines()[-1])
