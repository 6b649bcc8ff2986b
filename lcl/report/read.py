"""A run directory, read back: card, metrics, evaluations and timings, finished or running.

    RUN/run_card.json   what was configured           RUN/metrics.jsonl   one line an update
    RUN/config.gin      the same as gin text          RUN/evals.jsonl     one line an evaluation
    RUN/checkpoints/    (only listed here)            RUN/timings.jsonl   what the clock decided

Every part but one of the card and the metrics may be missing: reports are made of what is there. A
torn last line (the run is writing it, or was killed) is passed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lcl.evals.loss_matrix import LossMatrix
from lcl.report.writers import parse_line

CARD = "run_card.json"


class StageInfo(NamedTuple):
    """A stage as the run card tells it; `domains` are its weights, `first_step` is 0-based."""

    name: str
    first_step: int
    num_steps: int
    domains: Mapping[str, float]
    sequence_length: int | None = None
    batch_shape: tuple[int, ...] | None = None
    replay: Mapping[str, Any] | None = None

    @property
    def end_step(self) -> int:
        """The first step after the stage."""
        return self.first_step + self.num_steps


@dataclass(eq=False)
class Run:
    """What a run has written so far.

    Attributes:
        path: its directory. name: the directory's name, or what tells it from its neighbours.
        card: run_card.json ({} when missing).
        metrics, evals, timings: the lines of the logs, oldest first.
        stages: as configured, the ones that have not begun included.
    """

    path: Path
    name: str
    card: dict[str, Any]
    metrics: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    stages: tuple[StageInfo, ...] = field(default=())

    @classmethod
    def load(cls, run_dir: str | os.PathLike[str], name: str | None = None) -> Run:
        """Reads a run directory.

        Raises:
            ValueError: not a run directory (runs nearby are named), or one that cannot be read.
        """
        path = Path(run_dir)
        if not (path / CARD).is_file() and not (path / "metrics.jsonl").is_file():
            raise ValueError(_not_a_run(path))
        try:
            card = _read_card(path / CARD)
            logs = [_read_lines(path / f"{n}.jsonl") for n in ("metrics", "evals", "timings")]
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"cannot read {error.filename or path}: {reason}") from error
        metrics, evals, timings = logs
        stages = _stages(card, metrics)
        return cls(path, name or path.resolve().name, card, metrics, evals, timings, stages)

    @property
    def num_steps(self) -> int:
        """Updates of the whole run, as planned."""
        return max((s.end_step for s in self.stages), default=self.steps_done)

    @property
    def steps_done(self) -> int:
        """Updates that have been logged."""
        return self.metrics[-1]["step"] + 1 if self.metrics else 0

    @property
    def finished(self) -> bool:
        """Has every planned update been logged?"""
        return bool(self.metrics) and self.steps_done >= self.num_steps

    @property
    def domains(self) -> tuple[str, ...]:
        """Evaluated domains in the order of their training, then those never trained."""
        return self.loss_matrix().domains

    @property
    def has_bytes(self) -> bool:
        """Do the evaluations know bits/byte?"""
        values = [v for line in self.evals for v in (line.get("domains") or {}).values()]
        return bool(values) and all(v.get("bits_per_byte") is not None for v in values)

    def loss_matrix(self, unit: str = "nats_per_token") -> LossMatrix:
        """The matrix of the stages that have ended; its columns know the stages still to come."""
        return LossMatrix.from_evals(
            self.evals, [s.name for s in self.stages], [s.domains for s in self.stages], unit=unit
        )

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a key of metrics.jsonl, where it has a finite number."""
        return _series(self.metrics, lambda line: line.get(key))

    def heldout(self, domain: str, unit: str = "nats_per_token") -> tuple[np.ndarray, np.ndarray]:
        """(updates done, held-out loss) of a domain, one point an evaluation of the run itself.

        A branch is none: it ends at a step of the trunk, with another model.
        """
        trunk = [line for line in self.evals if line.get("kind") != "branch"]
        steps, values = _series(
            trunk, lambda line: (line.get("domains") or {}).get(domain, {}).get(unit)
        )
        steps, first = np.unique(steps, return_index=True)  # A stage's end may be an interval too.
        return steps, values[first]

    def trained_domains(self, prefix: str = "loss") -> tuple[str, ...]:
        """The domains with a `loss/<domain>` (or `replay_loss/<domain>`) in the metrics."""
        found = {k for line in self.metrics for k in line if k.startswith(prefix + "/")}
        names = {k.partition("/")[2] for k in found}
        known = [d for d in self.domains if d in names]
        return tuple(known + sorted(names - set(known)))

    def ledger(self) -> dict[str, dict[str, Any]] | None:
        """{domain: {"new_tokens", "replayed_tokens", "epochs"}}; None until the card has one."""
        ledger = self.card.get("ledger")
        if not isinstance(ledger, Mapping) or not ledger:
            return None
        if self.card.get("step") == 0 and self.steps_done > 0:
            return None  # Written before the first step.
        return {d: dict(v) for d, v in ledger.items()}

    def tokens(self) -> tuple[int | None, int | None]:
        """(new, all) trained tokens by the ledger; without it (None, what the metrics say)."""
        ledger = self.ledger()
        if ledger is None:
            last = next((m["tokens"] for m in reversed(self.metrics) if "tokens" in m), None)
            return None, last
        new = sum(int(v.get("new_tokens") or 0) for v in ledger.values())
        return new, new + sum(int(v.get("replayed_tokens") or 0) for v in ledger.values())

    def speed(self) -> tuple[float | None, float | None, float | None]:
        """(median tokens/s, median MFU, seconds spent in training steps) by timings.jsonl."""
        rates = [t["tokens_per_second"] for t in self.timings if t.get("tokens_per_second")]
        mfus = [t["mfu"] for t in self.timings if t.get("mfu") is not None]
        seconds, before = 0.0, 0
        for line in self.timings:
            if "seconds_per_step" in line and "step" in line:
                seconds += line["seconds_per_step"] * max(0, line["step"] + 1 - before)
                before = max(before, line["step"] + 1)
        return (
            float(np.median(rates)) if rates else None,
            float(np.median(mfus)) if mfus else None,
            seconds or None,
        )

    def checkpoints(self) -> list[int]:
        """The steps that lie under checkpoints/ (complete or not; the checkpointer decides)."""
        folder = self.path / "checkpoints"
        if not folder.is_dir():
            return []
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def load_runs(run_dirs: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Loads several runs under names that tell them apart.

    Raises:
        ValueError: no run at all, one named twice, or one that is not a run directory.
    """
    if isinstance(run_dirs, (str, os.PathLike)):
        run_dirs = [run_dirs]
    if not run_dirs:
        raise ValueError("no run to report on: give one or more run directories")
    paths = [Path(p).resolve() for p in run_dirs]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is given twice: name each run once")
    names = [p.name for p in paths]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(p.parts[-depth:]) for p in paths]
    return [Run.load(p, n) for p, n in zip(run_dirs, names, strict=True)]


def _series(lines: Iterable[Mapping[str, Any]], get: Any) -> tuple[np.ndarray, np.ndarray]:
    points = [
        (line["step"], value)
        for line in lines
        if isinstance(value := get(line), (int, float)) and np.isfinite(value)
    ]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0].astype(np.int64), array[:, 1]


def _read_card(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        card = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON: {error}; move it away, the rest of the report does without it"
        ) from error
    return card if isinstance(card, dict) else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = (parse_line(raw) for raw in path.read_bytes().split(b"\n") if raw)
    return [line for line in lines if line is not None]


def _stages(card: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> tuple[StageInfo, ...]:
    listed = card.get("stages")
    if isinstance(listed, Sequence) and listed:
        stages, first = [], 0
        for index, one in enumerate(listed):
            first = int(one.get("first_step", first))
            stage = StageInfo(
                name=str(one.get("name", f"stage {index + 1}")),
                first_step=first,
                num_steps=int(one.get("num_steps", 0)),
                domains={d: float(w) for d, w in (one.get("domains") or {}).items()},
                sequence_length=one.get("sequence_length"),
                batch_shape=tuple(one["batch_shape"]) if one.get("batch_shape") else None,
                replay=one.get("replay"),
            )
            stages.append(stage)
            first = stage.end_step
        return tuple(stages)
    # Without a card: the stages that the metrics name, and the domains they have a loss of.
    spans: dict[str, list[int]] = {}
    seen: dict[str, set[str]] = {}
    for line in metrics:
        name = str(line.get("stage", "run"))
        span = spans.setdefault(name, [line["step"], line["step"]])
        span[1] = line["step"]
        seen.setdefault(name, set()).update(k[5:] for k in line if k.startswith("loss/"))
    return tuple(
        StageInfo(n, a, b - a + 1, {d: 1.0 for d in sorted(seen[n])}) for n, (a, b) in spans.items()
    )


def _not_a_run(path: Path) -> str:
    """One line: what is wrong and which runs are near."""
    if not path.exists():
        problem = f"{path} does not exist"
    elif not path.is_dir():
        problem = f"{path} is not a directory"
    else:
        problem = f"{path} is not a run directory (no {CARD} or metrics.jsonl in it)"
    near: list[str] = []
    for folder in (path, path.parent):
        if not near and folder.is_dir():
            children = sorted(p for p in folder.iterdir() if p.is_dir())
            near = [
                str(p) for p in children if (p / CARD).exists() or (p / "metrics.jsonl").exists()
            ]
    mend = f"runs nearby: {', '.join(near[:5])}" if near else "give the --run_dir of a run"
    return f"{problem}; {mend}"
