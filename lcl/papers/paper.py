"""A paper as an object, and the one way to reproduce it: runs, table, verdicts, figure.

    paper.runs(seed, out)  ->  run_one(...)   ->  values[arm][seed][metric]
                               (or its result)        |-> derive        what is fitted over runs
                                                      |-> table.txt     mean and 95% interval
                                                      |-> verdicts      claims.RULE
                                                      |-> results.json  everything, machine readable
                                                      '-> figure.png, figure.svg

A table is of the runs that the code and the configuration of this moment ask for: where one of them
has changed, the old table is taken away before the first run begins.

A paper's file declares what it claims, the runs that decide it and what these hold equal; nothing
else in this room knows a paper.
"""

from __future__ import annotations

import abc
import json
import logging as logs
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lcl import files
from lcl.checkpoints import run_card
from lcl.papers import code, figures
from lcl.papers.claims import RULE, Claim, Values, Verdict, table_text
from lcl.papers.grid import PaperRun, is_done, run_one, write_json
from lcl.papers.registry import nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logs.getLogger("lcl")

TABLE_FILE, RESULTS_FILE = "table.txt", "results.json"
FIGURE_FILES = ("figure.png", "figure.svg")


class Paper(abc.ABC):
    """What a paper's file gives: a frozen dataclass of sizes, so that a tier is another instance.

    name: its file in lcl/papers. title: with the paper's number. equal: what the compared runs
    have in common, in one sentence. claims: what is to be decided. columns: metric -> heading of
    the table.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str: ...

    @property
    @abc.abstractmethod
    def title(self) -> str: ...

    @property
    @abc.abstractmethod
    def equal(self) -> str: ...

    @property
    @abc.abstractmethod
    def claims(self) -> Sequence[Claim]: ...

    @property
    @abc.abstractmethod
    def columns(self) -> Mapping[str, str]: ...

    @abc.abstractmethod
    def runs(self, seed: int, out: pathlib.Path) -> Sequence[PaperRun]:
        """The runs of one repetition; what they share (a corpus) is made under `out`."""

    def derive(self, values: Values, out: pathlib.Path) -> Values:
        """Arms that are no runs: what is fitted or interpolated over the runs of a seed."""
        del values, out
        return {}

    def remarks(self, out: pathlib.Path) -> Sequence[str]:
        """Lines for the report on what was not a run: costs, orders, what a layout drops."""
        del out
        return ()

    def draw(self, values: Values) -> Figure:
        """The paper's figure from what was measured; one panel for each of the first columns."""
        panels = list(self.columns.items())[:2]
        return figures.bars(panels, values)


class Outcome(NamedTuple):
    """What a reproduction has found: values[arm][seed][metric], verdicts, and the report's text."""

    values: Values
    verdicts: tuple[Verdict, ...]
    text: str


def reproduce(
    paper: Paper,
    *,
    seeds: int,
    out: str | os.PathLike[str],
    claims: Sequence[str] = (),
    say: Callable[[str], None] = log.info,
) -> Outcome:
    """Runs what has not been run yet, then decides every claim and writes the report.

    Args:
      paper: which.
      seeds: repetitions 0 .. seeds - 1; below 3 nothing is decided.
      out: directory of the runs and of the report; a second call goes on where the first stopped.
      claims: names of claims; only their runs are made then, and nothing is written beside these.
        Empty = all claims, and the report.
      say: takes progress lines.

    Returns:
      The outcome; the same is in OUT/table.txt, OUT/results.json and OUT/figure.png (and .svg).

    Raises:
      ValueError: no seeds, or a claim that the paper does not have; one line names the nearest.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; give 1 or more, 3 for a verdict")
    known = [claim.name for claim in paper.claims]
    for name in claims:
        nearest(f"claim of {paper.name}", name, known)
    chosen = [claim for claim in paper.claims if claim.name in claims or not claims]
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    runs = [run for seed in range(seeds) for run in paper.runs(seed, out)]
    if claims:
        runs = _needed(runs, chosen)
    else:
        _remove_stale(out, runs, say)
    values, results = _run_all(paper, runs, out, say)
    if not claims or _asks_for_derived(runs, chosen):
        for arm, found in paper.derive(values, out).items():
            values[arm] = {seed: dict(one) for seed, one in found.items()}
    verdicts = tuple(claim.decide(values) for claim in chosen)
    remarks = [] if claims else list(paper.remarks(out))
    text = report_text(paper, values, verdicts, remarks, seeds)
    if not claims:
        _write(paper, out, Outcome(values, verdicts, text), results, remarks, seeds)
    return Outcome(values, verdicts, text)


def _run_all(
    paper: Paper, runs: Sequence[PaperRun], out: pathlib.Path, say: Callable[[str], None]
) -> tuple[dict[str, dict[int, dict[str, float]]], list[dict[str, Any]]]:
    """values[arm][seed][metric] of all runs, and their results."""
    values: dict[str, dict[int, dict[str, float]]] = {}
    results: list[dict[str, Any]] = []
    begin, trained = time.monotonic(), 0
    cached = sum(is_done(run, out) for run in runs)
    if cached:
        say(f"{cached} of {len(runs)} runs are finished: same configuration, same code")
    for number, run in enumerate(runs, 1):
        if not is_done(run, out):
            trained += 1
            say(f"run {number} of {len(runs)}: {run.arm}, seed {run.seed}")
        result = run_one(run, out)
        results.append(result)
        values.setdefault(run.arm, {})[run.seed] = result["values"]
        if trained:
            shown = ", ".join(f"{k} {result['values'][k]:.4f}" for k in _first(paper, result))
            left = (time.monotonic() - begin) / trained * (len(runs) - cached - trained)
            say(f"  {shown}; {result['tokens']:,} tokens, about {left / 60:.0f} minutes left")
    return values, results


def _needed(runs: Sequence[PaperRun], claims: Sequence[Claim]) -> list[PaperRun]:
    """The runs of the claims' arms; all, where an arm is derived from others."""
    if _asks_for_derived(runs, claims):
        return list(runs)
    arms = {arm for claim in claims for arm in (claim.better, claim.worse)}
    return [run for run in runs if run.arm in arms]


def _asks_for_derived(runs: Sequence[PaperRun], claims: Sequence[Claim]) -> bool:
    arms = {arm for claim in claims for arm in (claim.better, claim.worse)}
    return bool(arms - {run.arm for run in runs})


def _remove_stale(out: pathlib.Path, runs: Sequence[PaperRun], say: Callable[[str], None]) -> None:
    """Takes a report away that is not of these runs: another code, configuration or number."""
    path = out / RESULTS_FILE
    if not path.exists():
        return
    before = {run["hash"] for run in json.loads(path.read_text())["runs"]}
    wanted = {run.hash for run in runs}
    if before == wanted:
        return
    for name in (TABLE_FILE, RESULTS_FILE, *FIGURE_FILES):
        (out / name).unlink(missing_ok=True)
    if not wanted & before:
        say("the report here was of another code or configuration: all runs are made anew")


def _write(
    paper: Paper,
    out: pathlib.Path,
    outcome: Outcome,
    results: Sequence[Mapping[str, Any]],
    remarks: Sequence[str],
    seeds: int,
) -> None:
    """The report's files; results.json is the last, so where it is, the others are too."""
    files.write_whole(out / TABLE_FILE, f"{outcome.text}\n".encode())
    figures.save(paper.draw(outcome.values), out / FIGURE_FILES[0])
    run_arms = {result["arm"] for result in results}
    write_json(
        out / RESULTS_FILE,
        {
            "paper": paper.name,
            "title": paper.title,
            "equal": paper.equal,
            "rule": RULE,
            "seeds": seeds,
            "runs": list(results),
            "derived": {a: dict(v) for a, v in outcome.values.items() if a not in run_arms},
            "remarks": list(remarks),
            "verdicts": [verdict.as_dict() for verdict in outcome.verdicts],
            "code": code.code_hash(),
            "git_revision": run_card.git_revision(),
            "versions": run_card.versions(),
        },
    )


def report_text(
    paper: Paper,
    values: Values,
    verdicts: Sequence[Verdict],
    remarks: Sequence[str],
    seeds: int,
) -> str:
    """The report as text: what is equal, the table, the rule, and each claim with its verdict."""
    published = [line for verdict in verdicts if (line := verdict.published_line())]
    return "\n".join(
        [
            paper.title,
            f"equal: {paper.equal}",
            f"losses in nats/token, mean ± half of the 95% interval over {seeds} seeds",
            "",
            table_text(values, paper.columns),
            "",
            *(f"* {remark}" for remark in remarks),
            *([""] if remarks else []),
            RULE,
            "",
            *(verdict.line() for verdict in verdicts),
            *(["", "published:", *published] if published else []),
        ]
    )


def _first(paper: Paper, result: Mapping[str, Any]) -> list[str]:
    return [metric for metric in paper.columns if metric in result["values"]][:2]
