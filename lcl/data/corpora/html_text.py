"""HTML documentation to plain text: headings, paragraphs, lists, tables, code.

    <h2>Wildcards</h2><ul><li><p>A <b>?</b></p></li></ul>          Wildcards
    <table><tr><td>*</td><td>any run</td></tr></table>      ->
                                                                   • A ?
                                                                   *  any run

For well-formed pages that a documentation tool wrote; not a browser.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection

_TOKEN = re.compile(
    r"<!--.*?-->"
    r"|<(?P<raw>script|style)\b.*?</(?P=raw)\s*>"
    r"|<(?P<close>/?)(?P<tag>[a-zA-Z][a-zA-Z0-9]*)(?P<attributes>(?:[^>\"']|\"[^\"]*\"|'[^']*')*)>"
    r"|<[!?][^>]*>"
    r"|(?P<text>[^<]+|<)",
    re.DOTALL,
)
_ATTRIBUTE = re.compile(r"\b(class|id|hidden)\s*=\s*(?:\"([^\"]*)\"|'([^']*)')")

_SKIPPED_TAGS = frozenset("head nav header footer aside noscript form button select svg".split())
_VOID_TAGS = frozenset("br img hr input meta link area base col embed source track wbr".split())
_PARAGRAPH_TAGS = frozenset(
    "p h1 h2 h3 h4 h5 h6 pre table ul ol dl blockquote section article main body figure".split()
)
_LINE_TAGS = frozenset("div li tr dt dd br hr caption thead tbody option".split())
_CELL_TAGS = frozenset("td th".split())
_WIDE_GAP = re.compile(
    r"(?<=[\u3000-\u9fff\uff00-\uffef])[ \t]*\n\s*(?=[\u3000-\u9fff\uff00-\uffef])"
)


def html_to_text(
    source: str,
    *,
    skip: Collection[str] = (),
    preformatted: Collection[str] = (),
    inline: Collection[str] = (),
) -> str:
    r"""Returns the text of a page, without its navigation.

    Args:
        source: the page.
        skip: classes and ids of elements to leave out with all that is in them.
        preformatted: classes whose text keeps its line ends, as <pre> does.
        inline: classes of block elements that stay in the line (a <div> used as a link).

    >>> html_to_text("<p>Fish &amp;\n chips</p><script>no()</script><p>1 < 2</p>")
    'Fish & chips\n\n1 < 2'
    """
    page = _Page(frozenset(skip), frozenset(preformatted), frozenset(inline))
    for match in _TOKEN.finditer(source):
        if match["tag"]:
            page.tag(match["tag"].lower(), bool(match["close"]), match["attributes"])
        elif match["text"]:
            page.words(match["text"])
    return page.text()


class _Page:
    """What has come out so far, and the elements we are in."""

    def __init__(self, skip: frozenset[str], preformatted: frozenset[str], inline: frozenset[str]):
        self.skip, self.preformatted, self.inline = skip, preformatted, inline
        self.out: list[str] = []
        self.gap = 0  # Line ends wanted before the next text.
        self.marker = ""  # What the next text begins with (a bullet, a cell border).
        self.skipping = ("", 0)  # The tag of the element left out, and how deep in such tags.
        self.verbatim = ("", 0)  # The same for a preformatted element.
        self.within = ("", 0)  # The same for a block element that stays in its line.
        self.cells = 0

    def tag(self, name: str, closing: bool, attributes: str) -> None:
        if self.skipping[1]:
            self.skipping = _deeper(self.skipping, name, closing, attributes)
            return
        found = {m[1]: m[2] or m[3] or "" for m in _ATTRIBUTE.finditer(attributes)}
        names = {*found.get("class", "").split(), found.get("id", "")}
        if not closing and name not in _VOID_TAGS and not attributes.endswith("/"):
            hidden = found.get("hidden") == "true" and "class" in found
            if name in _SKIPPED_TAGS or names & self.skip or hidden:
                self.skipping = (name, 1)
                return
        if self.verbatim[1]:
            self.verbatim = _deeper(self.verbatim, name, closing, attributes)
            if name == "br" or (name in ("p", "div") and closing):
                self.out.append("\n")
            return
        if not closing and (name == "pre" or names & self.preformatted):
            self.verbatim = (name, 1)
        if self.within[1]:
            self.within = _deeper(self.within, name, closing, attributes)
            self.structure(name, closing, inline=True)
            return
        if names & self.inline and not closing:
            self.within = (name, 1)
        self.structure(name, closing, inline=bool(self.within[1]))

    def structure(self, name: str, closing: bool, inline: bool) -> None:
        if name in _CELL_TAGS:
            self.cells = max(0, self.cells + (-1 if closing else 1))
            self.marker = "  "
        elif name == "tr":
            self.cells, self.gap, self.marker = 0, max(self.gap, 1), ""
        elif inline or self.cells:
            if name in _PARAGRAPH_TAGS | _LINE_TAGS:
                self.marker = self.marker or " "
        elif name in _PARAGRAPH_TAGS:
            self.gap = max(self.gap, 2)
        elif name in _LINE_TAGS:
            self.gap = max(self.gap, 1)
            self.marker = "• " if name == "li" and not closing else self.marker

    def words(self, text: str) -> None:
        if self.skipping[1]:
            return
        text = html.unescape(text)
        if self.verbatim[1]:
            if self.out and self.gap:
                self.out.append("\n" * self.gap)
                self.gap, text = 0, text.lstrip("\n")
            self.out.append(text)
            return
        text = re.sub(r"[ \t\r\n]+", " ", _WIDE_GAP.sub("", text))
        if text == " ":
            if not self.gap and not self.marker:
                self.out.append(text)
        elif text:
            if self.gap or self.marker:
                begins_line = bool(self.gap) or not self.out
                if self.marker == " " and self.out and self.out[-1].endswith(" "):
                    self.marker = ""
                self.out.append("\n" * self.gap if self.out else "")
                self.out.append(self.marker.lstrip() if begins_line else self.marker)
                text = text.lstrip(" ")
            self.gap, self.marker = 0, ""
            self.out.append(text)

    def text(self) -> str:
        text = "".join(self.out)
        text = re.sub(r"[ \t]+\n", "\n", text)
        return re.sub(r"\n{3,}", "\n\n", text).strip()


def _deeper(state: tuple[str, int], name: str, closing: bool, attributes: str) -> tuple[str, int]:
    """Follows nested elements of the same tag; depth 0 means that the outermost was closed."""
    tag, depth = state
    if name == tag and not attributes.endswith("/"):
        depth += -1 if closing else 1
    return (tag, depth)
