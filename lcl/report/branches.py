"""Branch points on the page: what the weights were worth, annealed, where branches left the run.

The trunk's loss at a high constant rate says little of what was learned; the branch's says it. Both
are compared at one step, so after equal data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from lcl.evals.loss_matrix import UNITS, format_loss
from lcl.report import page
from lcl.report.read import Branch, Run


def branches_section(run: Run, unit: str) -> list[str]:
    """Heading and table of a run's branches, as HTML; [] where it has none.

    Args:
        run: the run.
        unit: "bits_per_byte" or "nats_per_token".
    """
    trunks = {}
    for domain in run.domains:
        steps, values = run.heldout(domain, unit)
        trunks[domain] = dict(zip(steps.tolist(), values.tolist(), strict=True))
    if not run.branches or not trunks:
        return []
    last = {branch.stage: branch for branch in run.branches}
    shown = [branch for branch in run.branches if last[branch.stage] is branch]
    caption = (
        f"Held-out loss, {escape(UNITS[unit])}, of annealed copies beside that of the run itself "
        "at the step where the branch ended, so after equal data. Small: the run where the branch "
        "left; the difference, below 0 = annealing lowered it. –: not evaluated."
    )
    parts = ["<h2>Branches: annealed and judged</h2>"]
    if len(shown) < len(run.branches):
        caption += " The last branch of each stage."
        every = _table(run.branches, trunks, unit, "Every branch, as above.")
        folded = f"<summary>All {len(run.branches)} branches</summary>{every}"
        return [*parts, _table(shown, trunks, unit, caption), f"<details>{folded}</details>"]
    return [*parts, _table(shown, trunks, unit, caption)]


def _table(
    branches: Sequence[Branch], trunks: Mapping[str, Mapping[int, float]], unit: str, caption: str
) -> str:
    """A line for each branch and domain; `trunks` are the run's own losses by domain and step."""
    rows = []
    for branch in branches:
        for domain, trunk in trunks.items():
            then, now = trunk.get(branch.branch_from), trunk.get(branch.step)
            loss = branch.loss(domain, unit)
            gain = None if loss is None or now is None else loss - now
            rows.append(
                (
                    f"{branch.branch_from:,} + {branch.anneal_steps:,}",
                    [
                        page.name_cell(domain),
                        f"{format_loss(now)}<small>from {format_loss(then)}</small>",
                        f"{format_loss(loss)}<small>{page.signed(gain)}</small>",
                    ],
                )
            )
    head = [
        "branched at + anneal steps",
        page.NAME_HEAD,
        "run",
        "annealed",
    ]
    return page.table(caption, head, rows)
