"""What a run learned, kept, forgot and carried over, on the page: between stages and within them.

    learned_section     the loss matrix as a heat map, and forgetting and transfer by domain
    gap_section         the stability gap: what a border does before the next matrix row sees it

Every number rests on evaluations, so how often there was one is said beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from lcl.evals.loss_matrix import SIGNS, UNITS, LossMatrix, format_loss
from lcl.evals.stability_gap import Gap, StabilityGap
from lcl.report import heat, page
from lcl.report.figures import put_files
from lcl.report.read import Run

HEAT = (
    "Held-out loss, {unit}. A stronger colour is a lower loss within its column; the outlined cell "
    "is the stage that trained the domain."
)


def learned_section(
    run: Run, folder: Path, unit: str, prefix: str = "", matrix: bool = True
) -> list[str]:
    """Matrix and transfer in the leading unit; the other unit folded away. HTML.

    Args:
        run: with at least one evaluation.
        folder: where the page lies; the heat map's files are written there.
        unit: "bits_per_byte" or "nats_per_token".
        prefix: of the files' names.
        matrix: whether the page shows the matrix here (a comparison has it elsewhere).
    """
    shown = run.loss_matrix(unit)
    files = put_files(
        folder, f"{prefix}matrix", lambda theme: heat.draw_matrix(shown, theme, UNITS[unit])
    )
    caption = f"{HEAT.format(unit=UNITS[unit])} {files}"
    parts = [
        "<h2>What it learned and what it forgot</h2>",
        '<div class="groups">',
        heat_html(run, unit, caption) if matrix else "",
        _domain_tables(run, unit),
        "</div>",
        _averages(run, unit),
        signs(),
    ]
    if unit == "bits_per_byte":
        nats = "nats_per_token"
        table = heat_html(run, nats, f"Held-out loss, {UNITS[nats]}.") if matrix else ""
        parts.append(
            f"<details><summary>The same in {UNITS[nats]}</summary>"
            f'<div class="groups">{table}{_domain_tables(run, nats)}</div>{_averages(run, nats)}'
            "</details>"
        )
    return parts


def heat_html(run: Run, unit: str, caption: str) -> str:
    """The loss matrix as a table whose cells are tinted; `caption` is HTML."""
    matrix = run.loss_matrix(unit)
    return page.heat_table(matrix, heat.shares(matrix), caption)


def signs() -> str:
    """The signs of all these numbers, as a paragraph."""
    return f'<p class="soft">{sentence(SIGNS)}</p>'


def sentence(line: str) -> str:
    """A plain line as a sentence of HTML."""
    return f"{page.capital(escape(' '.join(line.split())))}."


def interval(run: Run) -> str:
    """How often the run was evaluated, as a sentence: part of what its curves can show."""
    return sentence(run.stability_gap().interval_text)


def _domain_tables(run: Run, unit: str) -> str:
    """What was learned and what became of it: two tables, each narrow enough for a phone.

    A line is a domain. A column that no domain has (one stage forgets nothing), and a table
    without one, is left out.
    """
    matrix = run.loss_matrix(unit)
    best = {
        domain: None if kept is None or lost is None else kept - lost
        for (domain, lost), kept in zip(
            matrix.forgetting.items(), matrix.retained.values(), strict=True
        )
    }
    # (head, by domain, mean, signed, tinted); forgetting, backward and forward are differences.
    columns: list[tuple[str, Mapping[str, float | None], float | None, bool, bool]] = [
        ("learned", matrix.learned, matrix.mean_learned, True, False),
        ("retained", matrix.retained, matrix.mean_retained, False, False),
        ("best before", best, None, False, False),
        ("forgetting", matrix.forgetting, matrix.mean_forgetting, True, True),
        ("backward", matrix.backward, matrix.bwt, True, True),
        ("forward", matrix.forward, matrix.fwt, True, True),
    ]
    known = [one for one in columns if any(v is not None for v in one[1].values())]
    after = ""
    if not run.finished and matrix.stages:
        after = f" After {len(matrix.stages)} of {len(run.stages)} stages."
    tables = []
    for title, some in (
        (f"By domain, {UNITS[unit]}", [one for one in known if one[0] in _LEARNED]),
        (f"Forgetting and transfer, {UNITS[unit]}", [one for one in known if one[0] in _KEPT]),
    ):
        if not some:
            continue
        rows = [
            (domain, [_cell(by[domain], signed, tint) for _, by, _, signed, tint in some])
            for domain in matrix.domains
        ]
        means = ["" if head == "best before" else _cell(m, s, t) for head, _, m, s, t in some]
        rows.append(("mean, trained" if matrix.never_trained else "mean", means))
        heads = [head for head, *_ in some]
        said = "; ".join(f"{head}: {(_LEARNED | _KEPT)[head]}" for head in heads)
        caption = f"{title}. {page.capital(said)}.{after}"
        tables.append(page.table(caption, ["", *heads], rows, mean=True))
    return "".join(tables)


# What the columns of the two tables mean.
_LEARNED = {
    "learned": "after its own stage less at the start",
    "retained": "at the end",
}
_KEPT = {
    "best before": "the lowest before the last stage",
    "forgetting": "retained less that, > 0 = forgot",
    "backward": "retained less after its own stage, > 0 = forgot (mean: BWT)",
    "forward": "just before its first stage less at the start, < 0 = helped (mean: FWT)",
}


def _averages(run: Run, unit: str) -> str:
    """The averages, each with what it is over; those that need a second stage only with one."""
    matrix, gaps = run.loss_matrix(unit), run.stability_gap(unit)
    items = {
        "average loss after each stage": ", ".join(
            f"{format_loss(value)} ({stage})"
            for stage, value in zip(matrix.stages, matrix.average, strict=True)
        ),
        "average incremental": _known(matrix.average_incremental if _several(matrix) else None),
        "anytime": _known(gaps.anytime),
        "ZSCL transfer, average, last": (
            ", ".join(format_loss(v) for v in matrix.zscl.values()) if _several(matrix) else ""
        ),
        "evaluation interval": gaps.interval_text,
    }
    if not any(v for k, v in items.items() if k != "evaluation interval"):
        return ""
    note = (
        f"{UNITS[unit]}, lower is better. Averages run over the domains trained by then; anytime: "
        "over all evaluations too, those within stages included."
    )
    return f'{page.facts(items)}<p class="soft">{page.capital(escape(note))}</p>'


def gap_section(run: Run, unit: str) -> list[str]:
    """The stability gap of every border and earlier domain, as HTML; [] for a run without any."""
    gaps = run.stability_gap(unit)
    found = gaps.gaps
    if not found:
        return []
    rows = [
        (
            one.stage,
            [
                page.name_cell(one.domain),
                f"{format_loss(one.worst)}<small>step +{one.worst_step:,}</small>",
                f"{page.signed(one.gap)}<small>from {format_loss(one.start)}</small>",
                f"{page.signed(one.lasting)}<small>{_recovery(one)}</small>",
            ],
        )
        for one in found
    ]
    worst = gaps.worst_gap
    assert worst is not None
    caption = (
        f"Loss of earlier domains within each stage, {UNITS[unit]}, {gaps.interval_text}: a peak "
        f"between two evaluations is not seen. Worst gap {page.signed(worst.gap)}, "
        f"{escape(worst.domain)} in {escape(worst.stage)}; mean {page.signed(gaps.mean_gap)}. "
        "Worst: and how many steps from the border; gap: worst less at the border; lasting: at the "
        "stage’s end less at the border; recovery: steps from the border until the loss was back, "
        "if it was within the stage."
    )
    if any(one.num_evaluations == 1 for one in found):
        caption += " Where a stage was evaluated only once, the gap is no more than what lasted."
    head = ["in stage", page.NAME_HEAD, "worst", "gap", "lasting; recovery"]
    return [
        "<h2>Within the stages: the stability gap</h2>",
        page.table(caption, head, rows),
        '<div class="groups">',
        _worst_cases(gaps),
        _windows(gaps),
        "</div>",
    ]


def _recovery(gap: Gap) -> str:
    if gap.recovery_steps is None:
        return "not back"
    return f"back at +{gap.recovery_steps:,}" if gap.recovery_steps else "never rose"


def _worst_cases(gaps: StabilityGap) -> str:
    """max-LOSS and WC-LOSS of each stage that has ended, the first excepted."""
    rows = [
        (stage, [format_loss(gaps.max_loss[stage]), format_loss(gaps.wc_loss[stage])])
        for stage in gaps.max_loss
        if gaps.max_loss[stage] is not None
    ]
    if not rows:
        return ""
    caption = (
        f"The mirrors of min-ACC and WC-ACC, {gaps.unit}: max-LOSS is the mean of the earlier "
        "domains’ highest losses since they were learned; WC-LOSS weighs in the stage’s own."
    )
    return page.table(caption, ["after stage", "max-LOSS", "WC-LOSS"], rows)


def _windows(gaps: StabilityGap) -> str:
    """The steepest rise and fall of each domain."""
    if gaps.interval is None:
        return ""
    window = 5 * gaps.interval[1]
    rises, falls = gaps.windowed_forgetting(window), gaps.windowed_plasticity(window)
    rows = [
        (domain, [format_loss(rises[domain], True), format_loss(falls[domain])])
        for domain in gaps.domains
    ]
    caption = (
        f"Greatest rise (WF) and fall (WP) of each domain within {window:,} steps, {gaps.unit}: "
        "five evaluation intervals."
    )
    return page.table(caption, ["", "WF", "WP"], rows)


def _cell(value: float | None, signed: bool, tint: bool) -> str:
    return page.signed(value) if tint else format_loss(value, signed)


def _several(matrix: LossMatrix) -> bool:
    return matrix.num_stages > 1


def _known(value: float | None) -> str:
    return "" if value is None else format_loss(value)
