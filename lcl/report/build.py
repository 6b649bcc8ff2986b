"""From run directories to one page: report/index.html, with its figures beside it as files.

    RUN/report/index.html          everything, images inline: this one file can be sent around
    RUN/report/heldout.png, ...    the figures, light and dark, each as PNG and as SVG
    RUN/report/summary.png, .svg   curves and matrix in one picture, for a README or a talk

What a run does not have (a second stage, branches, diagnostics, samples) the page does not mention.

Several runs are compared on one page, tables first, in RUN/report/compare/ of the first of them.
A run that is still going is reported as far as it has come. The same logs give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lcl import files
from lcl.evals.loss_matrix import UNITS, format_loss
from lcl.report import heat, page, plots, retention, text
from lcl.report.alignment import alignment_section
from lcl.report.branches import branches_section
from lcl.report.figures import put_figure, put_files
from lcl.report.progress import duration, human
from lcl.report.read import Run, load_runs
from lcl.report.samples import samples_section


def build_report(
    run_dirs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
) -> Path:
    """Builds the page of one run, or of several side by side.

    Args:
        run_dirs: run directories, finished or not.
        out: where to; None = RUN/report, or RUN/report/compare of the first of several.

    Returns:
        The path of index.html.

    Raises:
        ValueError: something that is not a run directory, or a place one cannot write to.
    """
    runs = load_runs([run_dirs] if isinstance(run_dirs, (str, os.PathLike)) else run_dirs)
    if out is None:
        out = runs[0].path / "report"
        out = out if len(runs) == 1 else out / "compare"
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        body = _one(runs[0], folder) if len(runs) == 1 else _several(runs, folder)
        summary = ""
        if any(run.evals for run in runs):
            summary = put_files(
                folder, "summary", lambda theme: heat.draw_summary(runs, theme), dark=False
            )
        body.append(_footer(summary))
        title = " and ".join(run.name for run in runs)
        files.write_whole(folder / "index.html", page.document(f"{title} · lcl", body).encode())
    except OSError as error:
        raise ValueError(
            f"cannot write the report to {error.filename or folder}: "
            f"{error.strerror or error}; give another --out"
        ) from error
    return folder / "index.html"


def _one(run: Run, folder: Path) -> list[str]:
    """The page of a single run."""
    return [
        f"<header><h1>{escape(run.name)}</h1>{_subtitle(run)}</header>",
        "<main>",
        *_sections(run, folder, prefix=""),
        "</main>",
    ]


def _several(runs: Sequence[Run], folder: Path) -> list[str]:
    """The page of a comparison: tables, curves, matrices, then each run by itself."""
    unit = plots.common_unit(runs)
    names = " and ".join(run.name for run in runs)
    parts = [
        f"<header><h1>{escape(names)}</h1>",
        f'<p class="soft">{retention.sentence(text.held_sentence(runs))}</p></header>',
        "<main>",
        "<h2>What each kept and what it forgot</h2>",
        '<div class="groups">',
        *(_comparison_table(runs, unit, *one) for one in text.TABLES),
        "</div>",
    ]
    if any(run.evals for run in runs):
        shown = ", ".join(dict.fromkeys(d for run in runs for d in run.domains))
        parts += [
            "<h2>Held-out loss, run by run</h2>",
            put_figure(
                folder,
                "comparison",
                lambda theme, narrow: plots.draw_comparison(runs, theme, unit, narrow),
                f"Held-out loss over the steps of {names}, one panel each for {shown}.",
                f"One panel a domain; stages as bands. {retention.interval(runs[0])}",
            ),
            "<h2>Loss matrices</h2>",
            f'<p class="soft">{retention.HEAT.format(unit=UNITS[unit])}</p>',
            '<div class="groups">',
            *(
                retention.heat_html(run, unit, f"<strong>{escape(run.name)}</strong>")
                for run in runs
            ),
            "</div>",
            retention.signs(),
        ]
    for index, run in enumerate(runs):
        parts += [
            '<section class="run">',
            f"<h2>{escape(run.name)}</h2>{_subtitle(run)}",
            *_sections(run, folder, prefix=f"{index + 1}_", matrices=False),
            "</section>",
        ]
    return [*parts, "</main>"]


def _sections(run: Run, folder: Path, *, prefix: str, matrices: bool = True) -> list[str]:
    """Everything about one run, in the order one asks for it."""
    parts: list[str] = []
    unit = plots.common_unit([run])
    if run.evals:
        parts += [
            _tiles(run, unit),
            *retention.learned_section(run, folder, unit, prefix, matrix=matrices),
            "<h2>Held-out loss over the run</h2>",
            put_figure(
                folder,
                f"{prefix}heldout",
                lambda theme, narrow: plots.draw_heldout(run, theme, unit, narrow),
                _curves_alt(run, unit),
                f"Stages as bands. {_branch_note(run)}{retention.interval(run)}",
            ),
            *retention.gap_section(run, unit),
            *branches_section(run, unit),
        ]
    else:
        parts.append('<p class="soft">No evaluation has been written yet.</p>')
    if run.metrics:
        parts += [
            "<h2>Training loss and learning rate</h2>",
            put_figure(
                folder,
                f"{prefix}training",
                lambda theme, narrow: plots.draw_training(run, theme, narrow),
                f"Training loss by domain and learning rate over {run.steps_done} steps.",
                "By domain of the trained tokens; replayed tokens dashed. Faint: every step; "
                "strong: a running mean.",
            ),
        ]
    parts += alignment_section(run, folder, prefix)
    parts += _ledger(run)
    parts += samples_section(run)
    parts += _card(run)
    return parts


def _branch_note(run: Run) -> str:
    return "Diamonds: annealed branches, from where they left. " if run.branches else ""


def _subtitle(run: Run) -> str:
    state = "finished" if run.finished else "still running, or stopped"
    new, total = run.tokens()
    parameters = run.card.get("num_parameters")
    said = [
        f"{state}: step {run.steps_done:,} of {run.num_steps:,}",
        f"{human(parameters)} parameters" if parameters else "",
        f"{human(total)} trained tokens" if total else "",
        f"{len(run.stages)} stage{'' if len(run.stages) == 1 else 's'}",
    ]
    return f'<p class="soft">{escape(" · ".join(s for s in said if s))}</p>'


def _tiles(run: Run, unit: str) -> str:
    matrix = run.loss_matrix(unit)
    items = [
        ("learned", format_loss(matrix.mean_learned, True), "mean; negative = learned"),
        ("forgetting", format_loss(matrix.mean_forgetting, True), "mean; positive = forgot"),
        ("retained", format_loss(matrix.mean_retained), "mean loss at the end"),
        ("forward transfer", format_loss(matrix.fwt, True), "negative = helped ahead"),
    ]
    worst = run.stability_gap(unit).worst_gap
    if worst is not None:
        said = f"{worst.domain} in {worst.stage}; positive = it rose"
        items.append(("worst stability gap", format_loss(worst.gap, True), said))
    return page.tiles([(a, b, f"{UNITS[unit]}, {c}") for a, b, c in items])


def _comparison_table(
    runs: Sequence[Run], unit: str, title: str, pick: Any, mean: Any, signed: bool
) -> str:
    matrices = [run.loss_matrix(unit) for run in runs]
    domains = dict.fromkeys(d for m in matrices for d in m.domains)
    rows = [(d, [pick(m).get(d) for m in matrices]) for d in domains]
    rows.append(("mean", [mean(m) for m in matrices]))
    head = ["", *(page.breakable(run.name) for run in runs)]
    if len(runs) == 2:
        head.append("difference")
    shown = []
    for name, values in rows:
        cells = [format_loss(v, signed) for v in values]
        if len(runs) == 2:
            cells.append(page.signed(text.difference(*values)))
        shown.append((name, cells))
    caption = f"<strong>{title.capitalize()}</strong>, {UNITS[unit]}. {_MEANING[title]}"
    return page.table(caption, head, shown, mean=True)


_MEANING = {
    "forgetting": "Loss at the end above the best before the last stage; lower is better.",
    "retained": "Loss at the end; lower is better.",
    "learned": "Loss right after its own stage, less the loss at the start; lower is better.",
}


def _ledger(run: Run) -> list[str]:
    ledger = run.ledger()
    if not ledger:
        return []
    most = max(v.get("new_tokens", 0) + v.get("replayed_tokens", 0) for v in ledger.values())
    rows = []
    order = [d for d in run.domains if d in ledger]
    for domain in [*order, *(d for d in ledger if d not in order)]:
        line = ledger[domain]
        new, again = int(line.get("new_tokens", 0)), int(line.get("replayed_tokens", 0))
        epochs = line.get("epochs")
        bars = page.bar(new / most if most else 0) + page.bar(
            again / most if most else 0, "replayed"
        )
        rows.append(
            (
                domain,
                [
                    f"{new:,}",
                    f"{again:,}",
                    f"{epochs:.2f}" if isinstance(epochs, (int, float)) else "–",
                    f'<td style="text-align:left" aria-hidden="true">{bars}</td>',
                ],
            )
        )
    new_total, total = run.tokens()
    rows.append(("total", [f"{new_total:,}", f"{(total or 0) - (new_total or 0):,}", "", ""]))
    caption = (
        "Trained tokens by source: new (strong) and replayed (pale), and passes over the text."
    )
    head = ["", "new tokens", "replayed", "epochs", ""]
    return ["<h2>Where the tokens came from</h2>", page.table(caption, head, rows, mean=True)]


def _card(run: Run) -> list[str]:
    card = run.card
    rate, mfu, seconds = run.speed()
    flops = card.get("flops") or {}
    per_token = flops.get("per_token")
    if isinstance(per_token, dict):
        values = sorted(set(per_token.values()))
        per_token = "–".join(human(v) for v in values[:: max(1, len(values) - 1)])
    elif isinstance(per_token, (int, float)):
        per_token = human(per_token)
    speed = ""
    if rate:
        speed = f"{human(rate)} tokens/s (median)"
        speed += f", MFU {100 * mfu:.0f}%" if mfu else ""
        speed += f", {duration(seconds)} in training steps" if seconds else ""
    items = {
        "speed": speed,
        "FLOPs a token": per_token,
        "FLOP convention": flops.get("convention"),
        "mesh": _flat(card.get("mesh")),
        "seed": card.get("seed"),
        "git revision": card.get("git_revision"),
        "compiled": _flat(card.get("compiles"), " s"),
    }
    stages = "\n".join(f"{i + 1}  {text.stage_line(s)}" for i, s in enumerate(run.stages))
    parts = ["<h2>Run card</h2>", page.facts(items)]
    for summary, content in (
        ("Stages", stages),
        ("Configuration", text.config_text(run)),
        ("Versions", _lines(card.get("versions"))),
        ("Data fingerprints", _lines(card.get("data"))),
    ):
        if content:
            parts.append(page.folded(summary, content))
    return parts


def _flat(value: Any, unit: str = "") -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}{unit}" for k, v in value.items())
    return value


def _lines(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{k}  {v}" for k, v in value.items())
    return "" if value is None else str(value)


def _curves_alt(run: Run, unit: str) -> str:
    """What the curves show, in words: where each domain started, was at best, and ended."""
    said = []
    for domain in run.domains:
        _, values = run.heldout(domain, unit)
        if len(values):
            said.append(f"{domain} {values[0]:.2f}, best {values.min():.2f}, last {values[-1]:.2f}")
    return f"Held-out loss over {run.steps_done} steps in {UNITS[unit]}: {'; '.join(said)}."


def _footer(summary: str) -> str:
    """`summary`: links to the one picture, if there is one."""
    picture = f" In one picture: {summary}." if summary else ""
    return (
        '<footer class="soft">Written by <code>lcl report</code> from the run’s own logs. '
        "Losses are means over held-out documents; bits/byte compares tokenizers and languages, "
        f"nats/token does not.{picture}</footer>"
    )


def summary_png(run_dirs: Iterable[str | os.PathLike[str]], path: str | os.PathLike[str]) -> Path:
    """Writes the one-picture summary of one or two runs to `path` (report/summary.png is this)."""
    plots.save(heat.draw_summary(load_runs(list(run_dirs))), path)
    return Path(path)
