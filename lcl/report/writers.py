"""What a run writes as it goes: metrics.jsonl, evals.jsonl, timings.jsonl, TensorBoard events.

    metrics.jsonl   one line an update:     {"step": 41, "stage": "en", "loss": 2.31, ...}
    evals.jsonl     one line an evaluation: {"step": 50, "stage_index": 0, "kind": "interval", ...}
    timings.jsonl   anything that depends on the clock: tokens/s, MFU, seconds of a save, a compile
    tensorboard/    the same scalars, for the curves (and wherever a tracker sends them)

The first two hold nothing but what is a function of (config, seed, step), so that a run that was
killed and resumed leaves the same bytes as one that was not. `step` in metrics.jsonl is the 0-based
number of the update; in evals.jsonl it is the number of updates that came before the evaluation.

How exactly-once works. The checkpoint at step t is the only truth; `flush()` (fsync) is called
before it commits, so that every line of the updates before t is on disk when it does. On resume at
t

    metrics.jsonl, timings.jsonl   keep lines with step <  t          (t will be trained again)
    evals.jsonl                    keep lines with step <= t          (t was evaluated, or will be)

    metrics   0 1 2 3 4 | 5 6 7{"st       <- killed; the last line is torn; newest checkpoint: t = 5
    kept      0 1 2 3 4 |                 <- written to a temporary file, fsynced, renamed
    written   0 1 2 3 4 | 5 6 7 8 9

An evaluation at t itself may or may not have been written before the kill: `has_eval` tells, and
writing the same (step, stage, kind) again is a no-op, so it is there exactly once either way. A
branch (`"kind": "branch"`) is written when the trunk leaves it behind, at its "branch_from", which
is what counts here; its "step" is the one it was annealed to.

Floats. A float32 is written as the shortest decimal that reads back to the same float32 (0.1, not
0.10000000149011612); a Python float as its repr. JSON has no NaN and no infinity: such a value is
written as null and named in the line's "nonfinite": {"loss": "nan"}, so that the line stays strict
JSON and the fact is not lost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcl import files
from lcl.report.trackers import Guarded, Tracker, Tracking

FILES = ("metrics", "evals", "timings")
_NUMERIC = (int, float, np.integer, np.floating)
_AXES = ("step", "stage", "stage_index", "kind", "branch_from", "event", "nonfinite")


class WriterError(ValueError):
    """The run's log cannot be written (no permission, disk full), in one line with the mend."""


class MetricsWriter:
    """Appends lines to the run's logs, exactly once a step, whatever was killed before.

    Args:
        run_dir: the run directory, made if missing; in a bucket, the files appear at `flush`.
        resume_step: updates the restored state has seen; lines after it are dropped. 0 or None =
            a new run: all lines of an earlier try in this directory are dropped.
        tensorboard: also write TensorBoard events (tensorboardX is imported only then).
        trackers: send the same scalars there too (`lcl.report.trackers`).
        primary: False on every process but the first: then nothing is written.

    Raises:
        WriterError: no permission, full disk, or a log whose early lines are not ours.

    >>> import tempfile
    >>> run_dir = tempfile.mkdtemp()
    >>> with MetricsWriter(run_dir, 0, tensorboard=False) as writer:
    ...     for step in range(3):
    ...         writer.metrics({"step": step, "stage": "en", "loss": np.float32(0.1)})
    >>> with MetricsWriter(run_dir, 2, tensorboard=False) as writer:  # restored at step 2
    ...     writer.metrics({"step": 2, "stage": "en", "loss": float("nan")})
    >>> print((Path(run_dir) / "metrics.jsonl").read_text(), end="")
    {"step": 0, "stage": "en", "loss": 0.1}
    {"step": 1, "stage": "en", "loss": 0.1}
    {"step": 2, "stage": "en", "loss": null, "nonfinite": {"loss": "nan"}}
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        resume_step: int | None = None,
        *,
        tensorboard: bool = True,
        trackers: Sequence[Tracker] = (),
        primary: bool = True,
    ) -> None:
        self.run_dir = files.place(run_dir)
        self._mirror: files.Mirror | None = None
        self.primary = primary
        self._logs: dict[str, _Log] = {}
        self._evals_written: set[tuple[int, Any, Any, Any]] = set()
        self._tensorboard: Any = None
        self._trackings: list[Tracking] = []
        self._scalars_written: set[tuple[str, int]] = set()
        if not primary:
            return
        resume = resume_step or 0
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            folder = self.run_dir
            if files.is_remote(run_dir):
                self._mirror = files.Mirror(run_dir)
                self._mirror.fetch(*(f"{name}.jsonl" for name in FILES))
                folder = self._mirror.folder
            for name in FILES:
                last = resume if name == "evals" and resume else resume - 1
                self._logs[name] = _Log(folder / f"{name}.jsonl", keep_through=last)
            if tensorboard:
                earlier = self.run_dir / "tensorboard"
                number = len(list(earlier.iterdir())) if earlier.is_dir() else 0
                self._tensorboard = _open_tensorboard(folder / "tensorboard", resume, number)
        except OSError as error:
            raise WriterError(_explain(error, self.run_dir)) from error
        for line in self._logs["evals"].kept:
            self._evals_written.add(_eval_key(line))
            if line["step"] >= resume:
                self._evals_scalars(line)  # TensorBoard's purge drops steps >= resume.
        for log in self._logs.values():
            log.kept.clear()
        # Only now: what is sent to TensorBoard again is not sent to a tracker again.
        try:
            for tracker in trackers:
                opened = Guarded(tracker.open(run_dir, resume), type(tracker).__name__)
                self._trackings.append(opened)
        except BaseException:
            self.close()
            raise

    def metrics(self, line: Mapping[str, Any]) -> None:
        """One update: {"step", "stage", "loss", ...}; only what (config, seed, step) decides."""
        self._append("metrics", line)
        self._scalars(line, "train")

    def evals(self, line: Mapping[str, Any]) -> bool:
        """One evaluation: {"step", "stage_index", "stage", "kind", "domains"}; once, see above.

        Returns:
            False when this (step, stage_index, kind) is already in the file (of a branch: also its
            "branch_from"): nothing is written.
        """
        if not self.primary:
            return True
        key = _eval_key(line)
        if key in self._evals_written:
            return False
        self._append("evals", line)
        self._evals_written.add(key)
        self._evals_scalars(line)
        return True

    def has_eval(self, line: Mapping[str, Any]) -> bool:
        """Is this evaluation in evals.jsonl already? `line` is as for `evals`, without "domains".

        Only the first process knows. An evaluation is a joint computation, so with several
        processes run it again and let `evals` drop the second line.
        """
        return _eval_key(line) in self._evals_written

    def timings(self, line: Mapping[str, Any]) -> None:
        """Anything the clock decides: {"step", "tokens_per_second", ...} or {"event", ...}."""
        self._append("timings", line)
        self._scalars(line, "perf")

    def flush(self) -> None:
        """Force every line to disk (fsync). Call before a checkpoint commits."""
        try:
            for log in self._logs.values():
                log.fsync()
            if self._tensorboard is not None:
                self._tensorboard.flush()
            if self._mirror is not None:
                self._mirror.push()
        except OSError as error:
            raise WriterError(_explain(error, self.run_dir)) from error

    def close(self) -> None:
        """Flush and close; safe to call twice."""
        self.flush()
        for log in self._logs.values():
            log.close()
        self._logs = {}
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        for tracking in self._trackings:
            tracking.close()
        self._trackings = []
        if self._mirror is not None:
            self._mirror.push()
            self._mirror.close()
            self._mirror = None
        self.primary = False

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if not self.primary:
            return
        try:
            self._logs[name].append(encode(line))
        except OSError as error:
            raise WriterError(_explain(error, self._logs[name].path)) from error

    def _evals_scalars(self, line: Mapping[str, Any]) -> None:
        group = "annealed" if line.get("kind") == "branch" else "heldout"
        step, scalars = line["step"], {}
        for domain, values in (line.get("domains") or {}).items():
            for unit in ("nats_per_token", "bits_per_byte"):
                name, value = f"{group}/{domain}/{unit}", values.get(unit)
                # A step may be both an interval and a stage's end.
                if value is not None and (name, step) not in self._scalars_written:
                    self._scalars_written.add((name, step))
                    scalars[name] = value
        self._event(scalars, step)

    def _scalars(self, line: Mapping[str, Any], group: str) -> None:
        if "step" not in line or not (self._tensorboard or self._trackings):
            return
        scalars = {
            tag(group, key): value
            for key, value in line.items()
            if key not in _AXES and _is_number(value)
        }
        self._event(scalars, line["step"])

    def _event(self, scalars: Mapping[str, Any], step: int) -> None:
        """One event for all scalars of a line: a third of the cost of one event each."""
        if not scalars:
            return
        for tracking in self._trackings:
            tracking.scalars({name: float(v) for name, v in scalars.items()}, int(step))
        if self._tensorboard is None:
            return
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=float(v)) for name, v in scalars.items()]
        self._tensorboard.file_writer.add_summary(Summary(value=values), int(step))


def _is_number(value: Any) -> bool:
    """A number of Python or NumPy, or an array of none but one, as a device's scalar comes back."""
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "iuf"
    return isinstance(value, _NUMERIC) and not isinstance(value, bool)


def tag(group: str, key: str) -> str:
    """The TensorBoard tag of a line's key.

    >>> tag("train", "loss"), tag("train", "replay_loss/en"), tag("perf", "mfu")
    ('train/loss', 'train/replay_loss_by_domain/en', 'perf/mfu')
    """
    name, slash, domain = key.partition("/")
    return f"{group}/{name}_by_domain/{domain}" if slash else f"{group}/{key}"


def encode(line: Mapping[str, Any]) -> bytes:
    r"""A line as strict JSON with a newline: shortest floats, null for what JSON cannot hold.

    >>> encode({"step": 3, "loss": np.float32(2.3)})
    b'{"step": 3, "loss": 2.3}\n'
    """
    nonfinite: dict[str, str] = {}
    plain = {key: _plain(value, key, nonfinite) for key, value in line.items()}
    if nonfinite:
        plain["nonfinite"] = nonfinite
    return (json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(value: Any, path: str, nonfinite: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{path}.{k}", nonfinite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{path}.{i}", nonfinite) for i, v in enumerate(value)]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if not isinstance(value, (float, np.generic)):
        value = np.asarray(value)[()]  # A 0-d array, of NumPy or of a device.
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), path, nonfinite)
    if isinstance(value, (np.bool_, np.integer)):
        return value.item()
    if not np.isfinite(value):
        nonfinite[path] = "nan" if np.isnan(value) else ("inf" if value > 0 else "-inf")
        return None
    # str() of a NumPy scalar is the shortest decimal that round-trips in its own precision.
    return float(value) if isinstance(value, float) else float(str(value))


def _eval_key(line: Mapping[str, Any]) -> tuple[int, Any, Any, Any]:
    branch_from = line.get("branch_from") if line.get("kind") == "branch" else None
    return (int(line["step"]), line.get("stage_index"), line.get("kind"), branch_from)


def written_at(line: Mapping[str, Any]) -> int | None:
    """The run's step at which a line is written; None for an event without one.

    >>> written_at({"step": 60, "kind": "branch", "branch_from": 40}), written_at({"step": 60})
    (40, 60)
    """
    return line["branch_from"] if line.get("kind") == "branch" else line.get("step")


class _Log:
    """One append-only jsonl file; opening it drops what a resumed run will write again."""

    def __init__(self, path: Path, *, keep_through: int) -> None:
        self.path = path
        self.kept = _truncate(path, keep_through)
        # Unbuffered and append-only: a line is in the kernel's hands when append() returns, so a
        # SIGKILL can only tear the line being written, never lose the ones before it.
        self._file: Any = open(path, "ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    def append(self, line: bytes) -> None:
        try:
            done = 0
            while done < len(line):
                done += self._file.write(line[done:])
        except OSError:
            # A disk that fills up mid-line: take the torn half back, the file stays whole lines.
            os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size += len(line)

    def fsync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _truncate(path: Path, keep_through: int) -> list[dict[str, Any]]:
    """Keeps the lines with step <= keep_through, atomically; returns them.

    A line without a step (an event) is kept on a resume and dropped by a new run. What does not
    parse is a torn tail; before lines we must keep, it is an error.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    kept: list[dict[str, Any]] = []
    out: list[bytes] = []
    torn: int | None = None
    for number, raw in enumerate(data.split(b"\n"), start=1):
        if not raw:
            continue
        line = parse_line(raw)
        if line is None:
            torn = torn or number
            continue
        step = written_at(line)
        if step is not None and step > keep_through:
            continue
        if step is None and (keep_through < 0 or torn):
            continue
        if torn:
            raise WriterError(
                f"{path}:{torn} is not a log line, yet lines of earlier steps follow it: "
                "mend or move the file, or resume from an earlier checkpoint"
            )
        kept.append(line)
        out.append(raw + b"\n")
    whole = b"".join(out)
    if whole != data:
        _replace(path, whole)
    return kept


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """A log line, or None where it is torn or not one.

    >>> parse_line(b'{"step": 1}'), parse_line(b'{"ste')
    ({'step': 1}, None)
    """
    try:
        line = json.loads(raw)
    except ValueError:  # Both a JSONDecodeError and a UnicodeDecodeError.
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step", 0), int):
        return None
    if line.get("kind") == "branch" and not isinstance(line.get("branch_from"), int):
        return None
    return line


def _replace(path: Path, data: bytes) -> None:
    """Writes data in path's place; after a crash either the old or the new file is there, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _open_tensorboard(logdir: Path, resume_step: int, number: int) -> Any:
    """The writer of the run's TensorBoard events, of which there are `number` files already."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(
        str(logdir),
        # Makes TensorBoard forget the events at and after this step, which are written again.
        purge_step=resume_step if number else None,
        # Names hold whole seconds: without a number, a quick restart overwrites the last.
        filename_suffix=f".{number:04d}",
        flush_secs=30,
    )


def _explain(error: OSError, path: Path) -> str:
    reason = error.strerror or str(error)
    if isinstance(error, PermissionError):
        mend = "give a --run_dir you may write to"
    elif isinstance(error, (FileExistsError, NotADirectoryError)):
        mend = "a file is in the way: give another --run_dir"
    else:
        mend = "free some space and start again; the run resumes from its last checkpoint"
    return f"cannot write the run's log {error.filename or path}: {reason}; {mend}"
