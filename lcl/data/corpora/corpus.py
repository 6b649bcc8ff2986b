"""What a corpus is: where its documents come from and what may be done with them."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lcl.data.corpora.apt import Package
from lcl.data.corpora.languages import language_bytes
from lcl.data.sources import Document, Ledger

MIN_LANGUAGE_SHARE = 0.5
# A paragraph of some length in more documents than this is boilerplate ("This is free software:
# you are free to change and redistribute it"): learnt by heart in a moment, it would make every
# held-out loss look better than it is.
MAX_REPEATS = 50
MIN_BOILERPLATE = 60  # Characters.


@dataclasses.dataclass(frozen=True)
class CorpusInfo:
    """One corpus of the registry.

    Attributes:
        name: its name on the command line, and the domain's name in the store.
        description: one line.
        language: ISO 639-1 code; "code" or "maths" where it is no language.
        licence: one line; the packages' copyright files are kept beside the store.
        read: gives its documents, in a fixed order, from its packages; counts what it drops.
        packages: names of the distribution's packages; none: the text is always there.
        version: raised whenever `read` gives other documents from the same packages.
        min_characters: shorter documents are dropped.
        keeps_repeats: whether a line in many documents belongs there (code); see
            `without_boilerplate`.
        settings: what else `read` was told.
    """

    name: str
    description: str
    language: str
    licence: str
    read: Callable[[Sequence[Package], Ledger], Iterator[Document]]
    packages: tuple[str, ...] = ()
    version: int = 1
    min_characters: int = 200
    keeps_repeats: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def needs_apt(self) -> bool:
        """Whether it comes from the distribution's packages."""
        return bool(self.packages)

    @property
    def is_translation(self) -> bool:
        """Whether some of its lines may have been left in English."""
        return self.language in ("fr", "de", "es", "ja", "ru", "zh")


def without_boilerplate(documents: Iterable[Document], ledger: Ledger) -> Iterator[Document]:
    """Leaves out the paragraphs that are the same in more than MAX_REPEATS documents; counts them.

    Holds the documents in memory. An emptied document is left for others to drop.
    """
    documents = list(documents)
    counts = collections.Counter(
        line
        for document in documents
        for line in {line for line in document.text.split("\n") if len(line) > MIN_BOILERPLATE}
    )
    boilerplate = {line for line, count in counts.items() if count > MAX_REPEATS}
    for document in documents:
        lines = document.text.split("\n")
        kept = [line for line in lines if line not in boilerplate]
        if len(kept) == len(lines):
            yield document
            continue
        ledger.notes["boilerplate paragraphs left out"] += len(lines) - len(kept)
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
        yield dataclasses.replace(document, text=text)


def check_language(document: Document, language: str, ledger: Ledger) -> Document | None:
    """Measures which share of a translated document is in its language.

    Args:
        document: the document.
        language: the language that it should be in.
        ledger: gets the bytes of the lines of both kinds, and the document if it is dropped.

    Returns:
        The document with extras["language_share"] = bytes of its lines in the language / bytes of
        those in the language or in English (1 if neither kind of line was found); None if more than
        half of it is English.
    """
    translated, english = language_bytes(document.text, language)
    share = translated / (translated + english) if translated + english else 1.0
    if share < MIN_LANGUAGE_SHARE:
        ledger.drop("mostly untranslated")
        return None
    ledger.notes[f"bytes of lines in {language}"] += translated
    ledger.notes["bytes of untranslated lines"] += english
    return dataclasses.replace(document, extras={**document.extras, "language_share": share})
