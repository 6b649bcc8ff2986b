"""Reports for a terminal: the loss matrix, runs side by side, and what a run directory holds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lcl.evals.loss_matrix import SIGNS, UNITS, LossMatrix, format_loss
from lcl.report.plots import common_unit
from lcl.report.progress import duration, human
from lcl.report.read import Run, load_runs

# Two runs are comparable in what these lines say is equal; (label, what of a run).
_HELD = (
    ("new tokens", lambda run: run.tokens()[0]),
    ("all trained tokens", lambda run: run.tokens()[1]),
    ("steps", lambda run: run.steps_done),
    ("parameters", lambda run: run.card.get("num_parameters")),
    ("seed", lambda run: run.card.get("seed")),
    ("training data", lambda run: run.card.get("data")),
    ("stages and mixtures", lambda run: [(s.name, s.num_steps, s.domains) for s in run.stages]),
    ("replay", lambda run: [s.replay for s in run.stages]),
)


def matrix_text(run_dirs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> str:
    """The loss matrix of one run in both units, or what several runs kept and forgot side by side.

    Args:
        run_dirs: run directories, finished or not.

    Returns:
        Text for a terminal, without a newline at the end.

    Raises:
        ValueError: something that is not a run directory.
    """
    runs = load_runs([run_dirs] if isinstance(run_dirs, (str, os.PathLike)) else run_dirs)
    if len(runs) > 1:
        return _side_by_side(runs)
    (run,) = runs
    units = ["nats_per_token", "bits_per_byte"] if run.has_bytes else ["nats_per_token"]
    tables = [run.loss_matrix(unit).table(signs=False) for unit in units]
    parts = [*tables, SIGNS]
    if not run.evals:
        parts = ["no evaluation yet"]
    if not run.finished:
        parts.append(f"{run.name} is at step {run.steps_done} of {run.num_steps}")
    return "\n\n".join(parts)


def held_equal(runs: Sequence[Run]) -> tuple[list[str], dict[str, list[Any]]]:
    """What a comparison of runs holds equal, and what differs.

    Returns:
        The labels that are equal in all runs, and {label: a value a run} of those that are not.
        What a run does not say is in neither.
    """
    equal: list[str] = []
    different: dict[str, list[Any]] = {}
    for label, get in _HELD:
        values = [get(run) for run in runs]
        if any(v is None for v in values):
            continue
        if all(v == values[0] for v in values):
            equal.append(label)
        else:
            different[label] = values
    return equal, different


def held_sentence(runs: Sequence[Run]) -> str:
    """`held equal: new tokens, steps; not: all trained tokens (737,280 | 901,120)`."""
    equal, different = held_equal(runs)
    said = []
    for label, values in different.items():
        plain = [f"{v:,}" for v in values if isinstance(v, int)]
        said.append(f"{label} ({' | '.join(plain)})" if len(plain) == len(values) else label)
    text = f"held equal: {', '.join(equal) or 'nothing'}"
    return f"{text}; not: {', '.join(said)}" if said else text


def info_text(run_dir: str | os.PathLike[str]) -> str:
    """What a run directory holds: where it is, its stages, checkpoints, data and configuration."""
    run = Run.load(run_dir)
    card = run.card
    state = "finished" if run.finished else f"at step {run.steps_done} of {run.num_steps}"
    lines = [f"{run.name}: {state}"]
    facts = {
        "parameters": f"{card['num_parameters']:,}" if "num_parameters" in card else None,
        "mesh": card.get("mesh"),
        "seed": card.get("seed"),
        "git revision": card.get("git_revision"),
        "versions": _joined(card.get("versions")),
        "checkpoints": ", ".join(map(str, run.checkpoints())) or "none",
    }
    rate, mfu, seconds = run.speed()
    if rate:
        facts["speed"] = f"{human(rate)} tokens/s" + (f", MFU {100 * mfu:.0f}%" if mfu else "")
    if seconds:
        facts["training time"] = duration(seconds)
    lines += [f"  {k:14s} {v}" for k, v in facts.items() if v is not None]
    lines.append("stages")
    for index, stage in enumerate(run.stages):
        at = run.steps_done
        mark = "done" if at >= stage.end_step else ("running" if at > stage.first_step else "")
        lines.append(f"  {index + 1} {stage_line(stage)}  {mark}".rstrip())
    if card.get("data"):
        lines.append("data")
        lines += [f"  {d:22s} {f}" for d, f in card["data"].items()]
    text = config_text(run)
    if text:
        lines += ["configuration", *(f"  {line}" for line in text.strip().splitlines())]
    return "\n".join(lines)


def stage_line(stage: Any) -> str:
    """`python  steps 0-119  python 100%  8 x 256  + 25% replay (add)`."""
    total = sum(stage.domains.values()) or 1.0
    mixture = ", ".join(f"{d} {100 * w / total:.0f}%" for d, w in stage.domains.items())
    parts = [stage.name, f"steps {stage.first_step}-{stage.end_step - 1}", mixture]
    if stage.batch_shape:
        parts.append(" x ".join(map(str, stage.batch_shape)))
    if stage.replay:
        fraction = 100 * float(stage.replay.get("fraction", 0))
        parts.append(f"+ {fraction:.0f}% replay ({stage.replay.get('mode', 'add')})")
    return "  ".join(p for p in parts if p)


def config_text(run: Run) -> str:
    """The run's configuration as text: the card's gin text, else config.gin, else its identity."""
    config = run.card.get("config")
    if isinstance(config, Mapping):
        return "\n".join(f"{k} = {v}" for k, v in config.items())
    if config:
        return str(config)
    path = run.path / "config.gin"
    if path.is_file():
        return path.read_text()
    return "\n".join(f"{k} = {v}" for k, v in (run.card.get("identity") or {}).items())


def _joined(values: Any) -> str | None:
    if not isinstance(values, Mapping):
        return None
    return ", ".join(f"{k} {v}" for k, v in values.items()) or None


def _side_by_side(runs: Sequence[Run]) -> str:
    """Retained and forgetting of every domain, a column a run, and the difference to the first."""
    unit = common_unit(runs)
    matrices = [run.loss_matrix(unit) for run in runs]
    domains = list(dict.fromkeys(d for m in matrices for d in m.domains))
    first = max(12, *(len(d) + 3 for d in domains))
    width = max(10, *(len(run.name) + 2 for run in runs))
    with_difference = len(runs) == 2
    lines = []
    for title, pick, mean, signed in TABLES:
        head = f"{title}, {UNITS[unit]}"
        lines.append(head)
        columns = "".join(run.name.rjust(width) for run in runs)
        lines.append(" " * first + columns + ("difference".rjust(13) if with_difference else ""))
        rows = [(d, [pick(m).get(d) for m in matrices]) for d in domains]
        rows.append(("mean", [mean(m) for m in matrices]))
        for name, values in rows:
            if name == "mean":
                size = first + width * len(runs) + (13 if with_difference else 0)
                lines.append("-" * size)
            text = "".join(format_loss(v, signed).rjust(width) for v in values)
            if with_difference:
                text += format_loss(difference(values[0], values[1]), True).rjust(13)
            lines.append(f"{name:{first}}{text}")
        lines.append("")
    lines.append(held_sentence(runs))
    for run in runs:
        if not run.finished:
            lines.append(f"{run.name} is at step {run.steps_done} of {run.num_steps}")
    return "\n".join([*lines, SIGNS])


def difference(a: float | None, b: float | None) -> float | None:
    """b - a, or None where either is missing."""
    return None if a is None or b is None else b - a


def _forgetting(m: LossMatrix) -> Mapping[str, float | None]:
    return m.forgetting


def _retained(m: LossMatrix) -> Mapping[str, float | None]:
    return m.retained


def _learned(m: LossMatrix) -> Mapping[str, float | None]:
    return m.learned


# (title, values by domain, mean, signed): the tables of a comparison.
TABLES: Any = (
    ("forgetting", _forgetting, lambda m: m.mean_forgetting, True),
    ("retained", _retained, lambda m: m.mean_retained, False),
    ("learned", _learned, lambda m: m.mean_learned, True),
)
