"""A page as a reader of it sees it, for the tests of reports."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Checks nesting as it parses, and collects images, links, scripts and text."""

    VOID = ("meta", "img", "source", "br", "wbr", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)
        assert self.open == [], self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]
