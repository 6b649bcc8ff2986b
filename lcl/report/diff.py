"""Every line in which two runs differ: what they are, then what came of it.

    what decides the result   identity: configuration, stores' fingerprints, a branch's origin
    configuration             the gin text's lines, cadences and logging too, where both have one
    seed, versions, revision, data, mesh
    ledger                    tokens by domain, new and replayed, and the updates behind them
    left out                  steps that rollbacks crossed out
    training                  the first update whose line differs
    held-out loss             by domain, at every evaluation that both have

What the clock decides (speed, compilations, times) is no difference. Two runs of one configuration
are to differ in nothing: losses are compared as they are written, not within a tolerance.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lcl.report.read import Run, load_runs

# Sections of the run card, in the order of the text: (title, key).
_CARD = (
    ("what decides the result", "identity"),
    ("configuration", "config"),
    ("seed", "seed"),
    ("versions", "versions"),
    ("git revision", "git_revision"),
    ("data fingerprints", "data"),
    ("mesh", "mesh"),
    ("ledger", "ledger"),
)
# Bindings that say where a run is, not what it is.
_ELSEWHERE = ("train.run_dir", "train.allow_changes", "train.config_text")
_UNITS = ("nats_per_token", "bits_per_byte")
_BINDING = re.compile(r"\s*(\S+)\s*=\s*(.*)")
ABSENT = "absent"


@dataclass(frozen=True)
class Line:
    """One line in which the runs differ; a value of one that the other has not is `ABSENT`."""

    name: str
    a: Any
    b: Any

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.a)} -> {_shown(self.b)}"


@dataclass(frozen=True)
class Score:
    """A domain's held-out loss at an evaluation that both runs have, equal or not.

    Attributes:
        step: updates before the evaluation; of a branch, those it was annealed to.
        kind: "start", "interval", "stage_end" or "branch".
        branch_from: where a branch left its trunk; else None.
        domain, unit: what was scored, "nats_per_token" or "bits_per_byte".
        a, b: the losses; b - a above zero: the second run is worse. None: not finite.
    """

    step: int
    kind: str
    branch_from: int | None
    domain: str
    unit: str
    a: float | None
    b: float | None

    @property
    def difference(self) -> float | None:
        """b - a."""
        return None if self.a is None or self.b is None else self.b - self.a


@dataclass(frozen=True)
class Diff:
    """What `diff_runs` found.

    Attributes:
        names: what the two runs are called.
        sections: {title: the lines in which they differ}; a title without any is not there.
        scores: every held-out loss that both have.
    """

    names: tuple[str, str]
    sections: Mapping[str, list[Line]]
    scores: list[Score] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether the runs differ in no line and in no loss."""
        return not self.sections and all(score.a == score.b for score in self.scores)

    def to_json(self) -> str:
        """Everything as JSON."""
        found = {
            "runs": list(self.names),
            "same": self.same,
            "differences": {
                title: [{"name": line.name, "a": line.a, "b": line.b} for line in lines]
                for title, lines in self.sections.items()
            },
            "heldout": [vars(score) | {"difference": score.difference} for score in self.scores],
        }
        return json.dumps(found, indent=2, ensure_ascii=False)

    def text(self) -> str:
        """For a terminal: a section a title, then a table of the stages' ends."""
        a, b = self.names
        blocks = [f"{a} -> {b}"]
        told = {_tail(line) for line in self.sections.get(_CARD[0][0], ())}
        for title, lines in self.sections.items():
            if title == "configuration":  # which says much of the identity again, in other names
                lines = [line for line in lines if _tail(line) not in told]
            if lines:
                blocks.append("\n".join([title, *(f"  {line}" for line in lines)]))
        blocks.append(self._table())
        if self.same:
            blocks.append("no line differs")
        return "\n\n".join(blocks)

    def _table(self) -> str:
        """The losses at the start, at stages' ends and of branches, and at the last evaluation."""
        scores = [score for score in self.scores if score.unit == _UNITS[0]]
        if not scores:
            return "held-out loss: no evaluation that both runs have"
        if all(score.a == score.b for score in scores):
            evaluations = len({(s.step, s.kind, s.branch_from) for s in scores})
            return f"held-out loss: equal at all {evaluations} evaluations that both runs have"
        last = max(score.step for score in scores if score.kind != "branch")
        shown = [s for s in scores if s.kind != "interval" or s.step == last]
        width = max(len("domain"), *(len(s.domain) for s in shown))
        head = f"  {'step':>8s}  {'what':20s} {'domain':{width}s} {'a':>9s} {'b':>9s} {'b - a':>9s}"
        rows = ["held-out loss, nats/token (a, b: the runs in order)", head]
        for score in shown:
            what = score.kind.replace("_", " ")
            if score.branch_from is not None:
                what = f"branch from {score.branch_from}"
            numbers = (score.a, score.b, score.difference)
            cells = ("not finite" if n is None else f"{n:9.4f}" for n in numbers[:2])
            change = "" if numbers[2] is None else f"{numbers[2]:+9.4f}"
            rows.append(
                f"  {score.step:8d}  {what:20s} {score.domain:{width}s} {' '.join(cells)} {change}"
            )
        return "\n".join(rows)


def diff_runs(run_a: str | os.PathLike[str], run_b: str | os.PathLike[str]) -> Diff:
    """Compares two run directories, finished or not.

    Args:
        run_a, run_b: their paths.

    Returns:
        A Diff; `.same` if nothing but time and place tells them apart.

    Raises:
        ValueError: a path that holds no run, in one line; or one path given twice.

    Example:
        >>> import tempfile
        >>> from lcl.report.testing import write_run
        >>> one, other = tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> for folder in (one, other):
        ...     _ = write_run(folder, steps_per_stage=5)
        >>> diff_runs(one, other).same
        True
    """
    a, b = load_runs([run_a, run_b])
    sections: dict[str, list[Line]] = {}

    def add(title: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        if lines := differing(before, after):
            sections[title] = lines

    for title, key in _CARD:
        if key != "config" or (a.card.get(key) and b.card.get(key)):
            add(title, _part(a, key), _part(b, key))
    add("progress", {"updates done": a.steps_done}, {"updates done": b.steps_done})
    add("left out", _left_out(a), _left_out(b))
    if (line := _first_difference(a, b)) is not None:
        sections["training"] = [line]
    ours, theirs = _evaluations(a), _evaluations(b)
    add(
        "evaluations",
        {_named(key): "evaluated" for key in ours},
        {_named(key): "evaluated" for key in theirs},
    )
    both = [key for key in ours if key in theirs]
    add(
        "evaluated domains",
        {domain: "evaluated" for key in both for domain in ours[key]},
        {domain: "evaluated" for key in both for domain in theirs[key]},
    )
    scores = [score for key in both for score in _scores(key, ours[key], theirs[key])]
    return Diff((a.name, b.name), sections, scores)


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Line]:
    """The lines of two flat mappings that are not equal.

    >>> [str(line) for line in differing({"seed": 0, "x": 1}, {"seed": 1, "x": 1, "y": "z"})]
    ['seed: 0 -> 1', 'y: absent -> z']
    """
    names = [*before, *(name for name in after if name not in before)]
    return [
        Line(name, before.get(name, ABSENT), after.get(name, ABSENT))
        for name in names
        if before.get(name, ABSENT) != after.get(name, ABSENT)
    ]


def _part(run: Run, key: str) -> dict[str, Any]:
    """A part of the card as flat lines."""
    value = run.card.get(key)
    if key == "config":
        return _bindings(value or "")
    if key == "ledger":
        value = run.ledger()
    return _flat(value, "" if isinstance(value, Mapping) else key) if value is not None else {}


def _flat(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        pairs: Iterable[tuple[str, Any]] = (
            (f"{name}.{key}" if name else str(key), item) for key, item in value.items()
        )
    elif isinstance(value, list) and value:
        pairs = ((f"{name}[{index}]", item) for index, item in enumerate(value))
    else:
        return {name: value}
    return {path: leaf for key, item in pairs for path, leaf in _flat(item, key).items()}


def _bindings(text: str) -> dict[str, str]:
    """The bindings of a gin text, one a line, a value over several lines put together."""
    found: dict[str, str] = {}
    name = None
    for raw in text.splitlines():
        if not raw.strip() or raw.lstrip().startswith("#"):
            continue
        binding = None if name is not None and raw[0].isspace() else _BINDING.match(raw)
        if binding is not None:
            name = binding.group(1)
            found[name] = binding.group(2).strip()
        elif name is not None:
            found[name] = f"{found[name]} {raw.strip()}".strip()
    return {key: value for key, value in found.items() if key not in _ELSEWHERE}


def _left_out(run: Run) -> dict[str, Any]:
    path = run.path / "left_out_steps.json"
    return {"steps": json.loads(path.read_text())} if path.is_file() else {}


def _first_difference(a: Run, b: Run) -> Line | None:
    """The first update that both have logged, and whose lines differ."""
    for ours, theirs in zip(a.metrics, b.metrics, strict=False):
        if ours != theirs:
            line = differing(ours, theirs)[0]
            return Line(f"first difference, in update {ours['step']}: {line.name}", line.a, line.b)
    return None


def _evaluations(run: Run) -> dict[tuple[int, str, int | None], Mapping[str, Any]]:
    """{(step, kind, branch_from): domains} of every evaluation."""
    return {
        (line["step"], str(line.get("kind")), line.get("branch_from")): line.get("domains") or {}
        for line in run.evals
    }


def _named(key: tuple[int, str, int | None]) -> str:
    step, kind, branch_from = key
    origin = "" if branch_from is None else f", from step {branch_from}"
    return f"step {step} ({kind.replace('_', ' ')}{origin})"


def _scores(
    key: tuple[int, str, int | None], ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> list[Score]:
    return [
        Score(*key, domain, unit, ours[domain].get(unit), theirs[domain].get(unit))
        for domain, unit in itertools.product(ours, _UNITS)
        if domain in theirs and unit in ours[domain] and unit in theirs[domain]
    ]


def _tail(line: Line) -> tuple[str, str, str]:
    """What the identity's and the gin text's line for one setting have in common."""
    tail = line.name.rpartition(".")[2]
    return tail, str(line.a).strip("'\""), str(line.b).strip("'\"")


def _shown(value: Any, limit: int = 160) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."
