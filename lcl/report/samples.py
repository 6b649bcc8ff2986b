"""The samples of a run on its page: how each stage's model goes on from held-out text, folded away.

The text is a model's: it may hold anything, so it is escaped, characters that a reader would not
see are shown as pictures of themselves, and none of it can turn the page's writing direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from lcl.report.read import Run


def samples_section(run: Run) -> list[str]:
    """Heading and one fold a stage with its continuations, as HTML; [] where none were written."""
    by_stage: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for line in run.samples:
        by_stage.setdefault((line.get("step", 0), str(line.get("stage", ""))), []).append(line)
    if not by_stage:
        return []
    parts = [
        "<h2>Samples</h2>",
        '<p class="soft">The same held-out beginnings after every stage. Marked: what the model '
        "adds. Below: what really stands there.</p>",
    ]
    for (step, stage), lines in sorted(by_stage.items()):
        body = "".join(_sample(line) for line in lines)
        count = f"{len(lines)} continuation{'' if len(lines) == 1 else 's'}"
        parts.append(
            f"<details><summary>After {escape(stage)}, step {step:,}: {count}</summary>"
            f"{body}</details>"
        )
    return parts


def visible(text: str) -> str:
    """Text as HTML: escaped, control characters as their pictures.

    >>> visible("a<b>&amp;"), visible(chr(0) + "tab" + chr(27))
    ('a&lt;b&gt;&amp;amp;', '␀tab␛')
    """
    shown = "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "␡" if c == "\x7f" else c
        for c in text
    )
    # Half a surrogate pair is valid JSON, and no UTF-8.
    return escape(shown.encode("utf-8", "replace").decode())


def _sample(line: Mapping[str, Any]) -> str:
    prompt, more = visible(_text(line, "prompt")), visible(_text(line, "continuation"))
    ended = " ⏹" if line.get("ended") else ""
    title = f"{_text(line, 'domain')}, document {line.get('document', '–')}"
    reference = _text(line, "reference")
    below = f'<pre class="sample soft">{visible(reference)}</pre>' if reference else ""
    shown = f'<pre class="sample">{prompt}<mark>{more}</mark>{ended}</pre>'
    return f"<h3>{escape(title)}</h3>{shown}{below}"


def _text(line: Mapping[str, Any], key: str) -> str:
    value = line.get(key)
    return "" if value is None else str(value)
