"""A paper as an object, and the one way to reproduce it: runs, table, verdicts, figure.

    paper.runs(seed, out)  ->  run_one(...)   ->  values[arm][seed][metric]
                               (or its result)        |-> table.txt     mean and 95% interval
                                                      |-> verdicts      claims.RULE
                                                      |-> results.json  everything, machine readable
                                                      '-> figure.png

A paper's file declares what it claims, the runs that decide it and what these hold equal; nothing
else in this room knows a paper.
"""

from __future__ import annotations

import argparse
import logging as logs
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lcl.checkpoints import run_card
from lcl.papers.claims import RULE, Claim, Values, Verdict, table_text
from lcl.papers.grid import PaperRun, run_one, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logs.getLogger("lcl")

TABLE_FILE, RESULTS_FILE, FIGURE_FILE = "table.txt", "results.json", "figure.png"


class Paper(Protocol):
    """What a paper's file gives; a frozen dataclass, so that a test can make a smaller one.

    name: as in `lcl.papers.<name>`. title: with the paper's number. equal: what the compared runs
    have in common, in one sentence. claims: what is to be decided. columns: metric -> heading of
    the table.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def equal(self) -> str: ...
    @property
    def claims(self) -> Sequence[Claim]: ...
    @property
    def columns(self) -> Mapping[str, str]: ...

    def runs(self, seed: int, out: pathlib.Path) -> Sequence[PaperRun]:
        """The runs of one repetition; what they share (a corpus) is made under `out`."""
        ...

    def remarks(self, out: pathlib.Path) -> Sequence[str]:
        """Lines for the report on what was not a run: costs, orders, what a layout drops."""
        ...

    def draw(self, values: Values) -> Figure:
        """The paper's figure from what was measured."""
        ...


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
    say: Callable[[str], None] = log.info,
) -> Outcome:
    """Runs what has not been run yet, then decides every claim and writes the report.

    Args:
      paper: which.
      seeds: repetitions 0 .. seeds - 1; below 3 nothing is decided.
      out: directory of the runs and of the report; a second call goes on where the first stopped.
      say: takes progress lines.

    Returns:
      The outcome; the same is in OUT/table.txt, OUT/results.json and OUT/figure.png.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; give 1 or more, 3 for a verdict")
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    values: dict[str, dict[int, dict[str, float]]] = {}
    results: list[dict[str, Any]] = []
    begin = time.monotonic()
    for seed in range(seeds):
        runs = paper.runs(seed, out)
        for place, run in enumerate(runs):
            number, total = seed * len(runs) + place + 1, seeds * len(runs)
            say(f"run {number} of {total}: {run.arm}, seed {seed}")
            result = run_one(run, out)
            results.append(result)
            values.setdefault(run.arm, {})[seed] = result["values"]
            shown = ", ".join(f"{k} {result['values'][k]:.4f}" for k in _first(paper, result))
            left = (time.monotonic() - begin) / number * (total - number)
            say(f"  {shown}; {result['tokens']:,} tokens, about {left / 60:.0f} minutes left")
    verdicts = tuple(claim.decide(values) for claim in paper.claims)
    remarks = list(paper.remarks(out))
    text = report_text(paper, values, verdicts, remarks, seeds)
    (out / TABLE_FILE).write_text(text + "\n")
    write_json(
        out / RESULTS_FILE,
        {
            "paper": paper.name,
            "title": paper.title,
            "equal": paper.equal,
            "rule": RULE,
            "seeds": seeds,
            "runs": results,
            "remarks": remarks,
            "verdicts": [verdict.as_dict() for verdict in verdicts],
            "git_revision": run_card.git_revision(),
            "versions": run_card.versions(),
        },
    )
    from lcl.report import plots

    plots.save(paper.draw(values), out / FIGURE_FILE)
    return Outcome(values, verdicts, text)


def report_text(
    paper: Paper,
    values: Values,
    verdicts: Sequence[Verdict],
    remarks: Sequence[str],
    seeds: int,
) -> str:
    """The report as text: what is equal, the table, the rule, and each claim with its verdict."""
    return "\n".join(
        [
            paper.title,
            f"equal: {paper.equal}",
            f"losses in nats/token, mean ± half of the 95% interval over {seeds} seeds",
            "",
            table_text(values, paper.columns),
            "",
            *(f"* {remark}" for remark in remarks),
            "",
            RULE,
            "",
            *(verdict.line() for verdict in verdicts),
        ]
    )


def main(paper: Paper, argv: Sequence[str] | None = None) -> int:
    """The command of a paper: `python -m lcl.papers.NAME --seeds 3 --out DIR`.

    Returns:
      0, or 2 for a mistake that is explained in one line on stderr.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m lcl.papers.{paper.name}", description=paper.title
    )
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument(
        "--out",
        default=f"runs/papers/{paper.name}",
        help="where runs and report go; finished runs there are not run again",
    )
    arguments = parser.parse_args(argv)
    logs.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    log.setLevel(logs.INFO)
    _prepare_jax(pathlib.Path(arguments.out))
    try:
        outcome = reproduce(paper, seeds=arguments.seeds, out=arguments.out)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(outcome.text)
    return 0


def bars(
    panels: Sequence[tuple[str, str]], values: Values, reference: float | None = None
) -> Figure:
    """Arms by metric: one panel a metric, a dot a seed, the mean and its 95% interval.

    Args:
      panels: (metric, title) of each panel.
      values: arm -> seed -> metric -> value; an arm without the metric is left out of its panel.
      reference: a dashed line across, such as the loss of knowing nothing.
    """
    from matplotlib.figure import Figure

    from lcl.papers.claims import interval
    from lcl.report.plots import LIGHT, colour

    figure = Figure(figsize=(3.5 * len(panels) + 1.2, 0.42 * len(values) + 1.3), dpi=130)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for column, (metric, title) in enumerate(panels):
        panel = axes[column]
        arms = list(values)
        for place, arm in enumerate(arms):
            found = [one[metric] for one in values[arm].values() if metric in one]
            if not found:
                continue
            shade = colour(LIGHT, place)
            mean = interval(found)
            panel.plot(found, [place] * len(found), "o", color=shade, markersize=3.5, alpha=0.55)
            half = mean.half if len(found) > 1 else 0.0
            panel.errorbar(
                [mean.mean], [place], xerr=[half], fmt="|", color=shade, markersize=13, capsize=3
            )
        if reference is not None:
            panel.axvline(reference, color=LIGHT.soft, linestyle=(0, (4, 3)), linewidth=0.8)
        panel.set_title(title, fontsize=9, loc="left", color=LIGHT.ink)
        panel.set_yticks(range(len(arms)), arms if column == 0 else [""] * len(arms), fontsize=8)
        panel.set_ylim(len(arms) - 0.4, -0.6)
        panel.tick_params(labelsize=8, colors=LIGHT.soft)
        panel.grid(axis="x", color=LIGHT.line, linewidth=0.5)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.supxlabel("nats/token, lower is better", fontsize=8.5, color=LIGHT.soft)
    return figure


def _first(paper: Paper, result: Mapping[str, Any]) -> list[str]:
    return [metric for metric in paper.columns if metric in result["values"]][:2]


def _prepare_jax(out: pathlib.Path) -> None:
    """Compiled steps are kept beside the runs: the runs of a grid share them."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
