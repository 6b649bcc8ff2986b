"""Corpora from the distribution's packages: manuals, help pages, books, formal mathematics."""

from __future__ import annotations

import gzip
import re
from collections.abc import Collection, Iterator, Sequence

from lcl.data.corpora.apt import Package, read_files
from lcl.data.corpora.corpus import check_language
from lcl.data.corpora.html_text import html_to_text
from lcl.data.corpora.roff import roff_to_text
from lcl.data.sources import Document, Ledger

# Closing sections that are the same, word for word, on hundreds of pages.
_FOOTERS = frozenset(
    "COLOPHON TRADUCTION ÜBERSETZUNG TRADUCCIÓN 翻訳 この文書について この文書について.".split()
)
_CODING = re.compile(rb"coding:\s*([A-Za-z0-9_-]+)")
_OFFICE = {
    "skip": ("noteicon", "iconcell"),
    "preformatted": ("bascode", "pycode", "code", "codeintable", "smathcode"),
}
_DOCBOOK = {"skip": ("docnav", "toc", "banner", "title"), "inline": ("url",)}
# A paragraph this long that equals one of the English edition was not translated; shorter ones
# are commands and names that no language changes.
_MIN_PROSE = 60

# The tables by which Metamath prints its symbols: HTML and LaTeX, no mathematics.
_TYPESETTING = re.compile(r"^\s*(?:alt)?htmldef\b", re.MULTILINE)
_SECTION = re.compile(
    r"^\s*\$\(\n(?:#\*#\*|=-=-|-\.-\.|####)[^\n]*\n\s*(?P<title>[^\n]*)\n", re.MULTILINE
)


def decode(data: bytes, ledger: Ledger, *, language: str = "en") -> str:
    """Decodes a page, and counts as what: a coding cookie, UTF-8, EUC-JP (ja), Latin-1.

    Latin-1 accepts every byte, and EUC-JP many Latin-1 texts, so the order matters.
    """
    cookie = _CODING.search(data[:400])
    guesses = [cookie[1].decode().lower()] if cookie else []
    guesses += ["utf-8", *(["euc-jp"] if language == "ja" else []), "latin-1"]
    for guess in guesses:
        try:
            text = data.decode(guess)
        except (UnicodeDecodeError, LookupError):
            continue
        ledger.notes[f"decoded as {guess}"] += 1
        return text
    raise AssertionError("Latin-1 decodes everything")


def man_pages(packages: Sequence[Package], ledger: Ledger, *, language: str) -> Iterator[Document]:
    """Manual pages. A page and its translations are one group, by name and section: ls.1."""
    folder = "./usr/share/man/" + ("" if language == "en" else f"{language}/")
    pattern = re.compile(re.escape(folder) + r"man\d[^/]*/(?P<page>[^/]+?)(?:\.gz)?$")
    for package in packages:
        for path, data in read_files(package, "./usr/share/man/"):
            match = pattern.match(path)
            if not match:
                continue
            if data is None:
                ledger.drop("link to another page")
                continue
            page = match["page"]
            data = gzip.decompress(data) if path.endswith(".gz") else data
            text = without_footer(roff_to_text(decode(data, ledger, language=language)))
            if not text:
                ledger.drop("includes another page (.so)")
                continue
            document = Document(page, text, package.name, group=f"man/{page}")
            checked = document if language == "en" else check_language(document, language, ledger)
            if checked:
                yield checked


def without_footer(text: str) -> str:
    """Cuts a manual page before its colophon or the note about its translation."""
    blocks = text.split("\n\n")
    for i, block in enumerate(blocks):
        if block.strip() in _FOOTERS and i >= len(blocks) // 2:
            return "\n\n".join(blocks[:i])
    return text


def office_help(
    packages: Sequence[Package], ledger: Ledger, *, language: str, folder: str
) -> Iterator[Document]:
    """LibreOffice's help: the same topics, by file name, in each language."""
    prefix = f"./usr/share/libreoffice/help/{folder}/text/"
    for package in packages:
        for path, data in read_files(package, prefix):
            if not path.endswith(".html"):
                continue
            if data is None:
                ledger.drop("link to another page")
                continue
            topic = path.removeprefix(prefix)
            text = html_to_text(decode(data, ledger), **_OFFICE)
            document = Document(topic, text, package.name, group=f"libreoffice-help/{topic}")
            checked = document if language == "en" else check_language(document, language, ledger)
            if checked:
                yield checked


def handbook(
    packages: Sequence[Package], ledger: Ledger, *, language: str, folder: str
) -> Iterator[Document]:
    """The Debian Administrator's Handbook, one document a section.

    Its translations are unfinished: paragraphs equal to the English edition's are left out and
    counted.
    """
    (package,) = packages
    root = "./usr/share/doc/debian-handbook/html/"
    pages: dict[str, dict[str, str]] = {"en-US": {}, folder: {}}
    for path, data in read_files(package, root):
        edition, _, name = path.removeprefix(root).partition("/")
        if edition not in pages or "/" in name or not name.endswith(".html"):
            continue
        if data is None:
            ledger.drop("link to another page")
        else:
            counts = ledger if edition == folder else Ledger()
            pages[edition][name] = html_to_text(decode(data, counts), **_DOCBOOK)
    english = {line for text in pages["en-US"].values() for line in text.split("\n")}
    for name, text in sorted(pages[folder].items()):
        if language != "en":
            text = _without(text, english, ledger)
        document = Document(name, text, package.name, group=f"debian-handbook/{name}")
        checked = document if language == "en" else check_language(document, language, ledger)
        if checked:
            yield checked


def _without(text: str, english: Collection[str], ledger: Ledger) -> str:
    kept = []
    for line in text.split("\n"):
        if len(line) > _MIN_PROSE and line in english:
            ledger.notes["untranslated paragraphs left out"] += 1
            ledger.notes["bytes of untranslated paragraphs left out"] += len(line.encode())
        else:
            kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def long_prose(packages: Sequence[Package], ledger: Ledger) -> Iterator[Document]:
    """An Anarchist FAQ: long English prose, of a political kind; up to 438 KB a document."""
    prefix = "./usr/share/doc/anarchism/html/"
    for package in packages:
        for path, data in read_files(package, prefix):
            if not path.endswith(".html"):
                continue
            if data is None:
                ledger.drop("link to another page")
                continue
            text = html_to_text(decode(data, ledger))
            lines = text.split("\n")
            if lines[-1].startswith("‹ ") or lines[-1].endswith(" ›"):  # Previous, up, next.
                text = "\n".join(lines[:-1]).rstrip()
            yield Document(path.removeprefix(prefix), text, package.name)


def metamath(packages: Sequence[Package], ledger: Ledger) -> Iterator[Document]:
    """Metamath's set.mm, one document a section: definitions, theorems, their formal proofs."""
    for package in packages:
        for path, data in read_files(package, "./usr/share/metamath/databases/set.mm"):
            if data is None or not path.endswith("/set.mm"):
                continue
            text = decode(data, ledger)
            starts = [match.start() for match in _SECTION.finditer(text)]
            titles = [match["title"].strip() for match in _SECTION.finditer(text)]
            borders = [0, *starts, len(text)]
            for i, title in enumerate(["(beginning)", *titles]):
                section = text[borders[i] : borders[i + 1]].strip("\n")
                if len(_TYPESETTING.findall(section)) > 20:
                    ledger.drop("typesetting tables")
                    continue
                yield Document(f"set.mm#{i}: {title}", section, package.name)
