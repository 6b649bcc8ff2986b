"""A domain to make: where its documents come from, before anything is tokenised.

    corpus_domain    a corpus of the registry: packages -> ArrayRecord -> documents
    folder_domain    your own text files
    jsonl_domain     your own lines of {"text": ...}

Each says at once what it would read (settings, files), and reads when it is opened; so `prepare`
can tell what is up to date without reading anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lcl.data import corpora as registry
from lcl.data.corpora import apt, builder
from lcl.data.sources import (
    DEFAULT_PATTERNS,
    HELDOUT,
    TRAIN,
    Document,
    Ledger,
    SourceError,
    first_heldout_group,
    folder_documents,
    folder_files,
    jsonl_documents,
    jsonl_files,
    keep_and_split,
)


@dataclasses.dataclass
class Domain:
    """A domain to make: where its documents come from, and what is known before they are read.

    Attributes:
        name: of the domain.
        licence: one line.
        settings: what decides its documents; goes into the store's fingerprint.
        inputs: what else must be unchanged for the store to be up to date (files, their times).
        open: begins to read the documents.
        streams: whether the documents are read as they are asked for (a limit then saves time).
    """

    name: str
    licence: str
    settings: dict[str, Any]
    inputs: Any
    open: Callable[[], Opened]
    streams: bool


@dataclasses.dataclass
class Opened:
    """An open domain.

    Attributes:
        documents: (split, document) pairs, deduplicated.
        ledger: where they are counted; complete when all have been read.
        copyrights: package -> its copyright file.
        total: number of documents, if known.
    """

    documents: Iterator[tuple[str, Document]]
    ledger: Ledger
    copyrights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    total: int | None = None


def corpus_domain(
    name: str, split: dict[str, Any], cache_dir: str, log: Callable[[str], None]
) -> Domain:
    """The corpus `name` of the registry; its packages are looked up now, downloaded when opened.

    Args:
        name: of the corpus.
        split: heldout_fraction and seed.
        cache_dir: for packages and built corpora.
        log: told about downloads.
    """
    corpus = registry.get(name)
    package_dir = os.path.join(cache_dir, "packages")
    packages = apt.resolve(corpus.packages, package_dir, log=log) if corpus.needs_apt else []

    def read_corpus() -> Opened:
        apt.fetch(packages, package_dir, log=log)
        with ProgressBar(f"{name}: reading", None) as bar:
            built = builder.build(
                corpus,
                packages,
                os.path.join(cache_dir, "corpora"),
                progress=bar.watch,
                **split,
            )
        documents = ((s, d) for s in (TRAIN, HELDOUT) for d in built.documents(s))
        total = sum(len(source) for source in built.splits.values())
        return Opened(documents, built.ledger, built.copyrights, total)

    settings = builder.settings(corpus, packages, **split)
    return Domain(name, corpus.licence, settings, None, read_corpus, streams=False)


def folder_domain(name: str, path: str, split: dict[str, Any]) -> Domain:
    """The text files under a folder, or those that match a pattern, as the domain `name`."""
    files = [file for file, _ in folder_files(path)]

    def read(ledger: Ledger) -> Iterator[Document]:
        return folder_documents(path, ledger)

    settings = {"source": "folder", "patterns": list(DEFAULT_PATTERNS)}
    return _own_text(name, path, files, read, settings, split)


def jsonl_domain(name: str, path: str, split: dict[str, Any]) -> Domain:
    """The lines of a .jsonl(.gz) file, of a folder or a pattern of them, as the domain `name`."""

    def read(ledger: Ledger) -> Iterator[Document]:
        return jsonl_documents(path, ledger)

    settings = {"source": "jsonl", "field": "text"}
    return _own_text(name, path, jsonl_files(path), read, settings, split)


def _own_text(
    name: str,
    path: str,
    files: Sequence[str],
    read: Callable[[Ledger], Iterator[Document]],
    settings: dict[str, Any],
    split: dict[str, Any],
) -> Domain:
    def open_text() -> Opened:
        # Usually one pass. A small source may fall on one side of the split: then it is read again.
        ledger = Ledger()
        sides: set[str] = set()
        for side, _ in keep_and_split(read(ledger), ledger, **split):
            sides.add(side)
            if len(sides) == 2:
                break
        group = None
        if len(sides) < 2:
            group = first_heldout_group(read(Ledger()), seed=split["seed"])
            if group is None:
                raise SourceError(
                    f"{path!r} has {len(sides) or 'no'} document to use, and two are needed, one "
                    f"of them to hold out ({ledger}); add text or cut the document into several"
                )
        ledger = Ledger()
        return Opened(keep_and_split(read(ledger), ledger, only_heldout=group, **split), ledger)

    stamps = [
        (os.path.relpath(file, os.path.dirname(os.path.abspath(path))), *_stamp(file))
        for file in files
    ]
    settings = settings | {"split": split}
    return Domain(name, "your own text", settings, stamps, open_text, streams=True)


def _stamp(file: str) -> tuple[int, int]:
    stat = os.lstat(file)
    return stat.st_size, stat.st_mtime_ns


class ProgressBar(contextlib.AbstractContextManager):
    """A progress bar on a terminal: documents, and tokens a second."""

    def __init__(self, title: str, total: int | None):
        import tqdm

        self._tqdm = tqdm.tqdm(
            total=total,
            desc=title,
            unit=" documents",
            disable=None,
            leave=False,
            dynamic_ncols=True,
        )
        self._tokens, self._started = 0, time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._tqdm.close()

    def watch(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self._tqdm.update()
            yield document

    def count(self, num_tokens: int) -> None:
        self._tokens += num_tokens
        if self._tqdm.update():
            rate = self._tokens / max(1e-9, time.monotonic() - self._started)
            self._tqdm.set_postfix_str(f"{rate / 1e6:.1f}M tokens/s", refresh=False)
