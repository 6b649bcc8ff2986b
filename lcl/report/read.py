"""A run directory, read back: card, metrics, evaluations and timings, finished or running.

    RUN/run_card.json   what was configured           RUN/metrics.jsonl   one line an update
    RUN/config.gin      the same as gin text          RUN/evals.jsonl     one line an evaluation
    RUN/checkpoints/    (only listed here)            RUN/timings.jsonl   what the clock decided
    RUN/branches/       side runs, made afterwards    RUN/samples.jsonl   continuations, as text

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
from lcl.evals.stability_gap import StabilityGap
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


class Branch(NamedTuple):
    """An annealed copy that was evaluated, in the loop (`HeldOut.branches`) or from a checkpoint.

    stage: its name; branch_from, step: updates done where it left the run and where it ended;
    domains: as in evals.jsonl, {domain: {unit: loss}}, a loss that was no number being None.
    """

    stage: str
    branch_from: int
    step: int
    domains: Mapping[str, Any]

    @property
    def anneal_steps(self) -> int:
        """Updates between the two ends."""
        return self.step - self.branch_from

    def loss(self, domain: str, unit: str) -> float | None:
        """The branch's held-out loss; None: not measured, or not finite."""
        value = (self.domains.get(domain) or {}).get(unit)
        return float(value) if isinstance(value, (int, float)) and np.isfinite(value) else None


@dataclass(eq=False)
class Run:
    """What a run has written so far.

    Attributes:
        path: its directory. name: the directory's name, or what tells it from its neighbours.
        card: run_card.json ({} when missing).
        metrics, evals, timings: the lines of the logs, oldest first.
        stages: as configured, the ones that have not begun included.
        samples: the lines of samples.jsonl.
        branches: annealed side runs, by where they left.
    """

    path: Path
    name: str
    card: dict[str, Any]
    metrics: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    stages: tuple[StageInfo, ...] = field(default=())
    samples: list[dict[str, Any]] = field(default_factory=list)
    branches: tuple[Branch, ...] = field(default=())

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
            names = ("metrics", "evals", "timings", "samples")
            metrics, evals, timings, samples = (_read_lines(path / f"{n}.jsonl") for n in names)
            branches = _branches(path, evals)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"cannot read {error.filename or path}: {reason}") from error
        return cls(
            path=path,
            name=name or path.resolve().name,
            card=card,
            metrics=metrics,
            evals=evals,
            timings=timings,
            stages=_stages(card, metrics),
            samples=samples,
            branches=branches,
        )

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
        """Do the evaluations know bits/byte? One that came out as no number says nothing of it."""
        values = [v for line in self.evals for v in (line.get("domains") or {}).values()]
        known = [(v.get("nats_per_token"), v.get("bits_per_byte")) for v in values]
        known = [(nats, bits) for nats, bits in known if nats is not None or bits is not None]
        return bool(known) and all(bits is not None for _, bits in known)

    def loss_matrix(self, unit: str = "nats_per_token") -> LossMatrix:
        """The matrix of the stages that have ended; its columns know the stages still to come."""
        return LossMatrix.from_evals(
            self.evals, [s.name for s in self.stages], [s.domains for s in self.stages], unit=unit
        )

    def stability_gap(self, unit: str = "nats_per_token") -> StabilityGap:
        """What each stage does to the domains before it, between its two ends, so far."""
        # Without a card the stages are those of the metrics, and an evaluation may know of more.
        known = [e for e in self.evals if int(e.get("stage_index") or 0) < max(1, len(self.stages))]
        return StabilityGap.from_evals(
            known, [s.name for s in self.stages], [s.domains for s in self.stages], unit=unit
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


def _branches(path: Path, evals: Sequence[Mapping[str, Any]]) -> tuple[Branch, ...]:
    """Those of the loop, then those of RUN/branches/STEP-N that the loop has not made itself."""
    found = {
        (line["branch_from"], line["step"]): Branch(
            str(line.get("stage", "")), line["branch_from"], line["step"], line.get("domains") or {}
        )
        for line in evals
        if line.get("kind") == "branch"
    }
    for log in sorted(path.glob("branches/*/evals.jsonl")):
        # A side run that was cut short has no end.
        ends = {line.get("kind"): line for line in _read_lines(log)}
        start, end = ends.get("start"), ends.get("stage_end")
        if start and end:
            key = (start["step"], end["step"])
            found.setdefault(key, Branch(str(end.get("stage", "")), *key, end.get("domains") or {}))
    return tuple(found[key] for key in sorted(found))


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
