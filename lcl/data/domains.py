"""A domain to make: where its documents come from, before anything is tokenised.

    corpus_domain       a corpus of the registry: packages -> ArrayRecord -> documents, split
    own_domain          your own text: a folder, jsonl, parquet, ArrayRecord, TFDS, a SeqIO task

Each says at once what it would read (settings, files), and reads when it is opened; so `prepare`
can tell what is up to date without reading anything.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lcl.data import corpora as registry
from lcl.data import readers
from lcl.data.corpora import apt, builder
from lcl.data.progress import ProgressBar
from lcl.data.readers import DEFAULT_PATTERNS, Meter
from lcl.data.sources import (
    HELDOUT,
    TRAIN,
    Document,
    Ledger,
    first_heldout_group,
    keep_and_split,
)


@dataclasses.dataclass
class Domain:
    """A domain to make: where its documents come from, and what is known before they are read.

    Attributes:
        name: of the domain.
        place: what its user named: a path, a builder, a task.
        licence: one line.
        settings: what decides its documents; goes into the store's fingerprint.
        inputs: what else must be unchanged for the store to be up to date (files, their times).
        split: heldout_fraction and seed.
        open: begins to read the documents.
        streams: whether the documents are read as they are asked for (a limit then saves time).
    """

    name: str
    place: str
    licence: str
    settings: dict[str, Any]
    inputs: Any
    split: Mapping[str, Any]
    open: Callable[[], Opened]
    streams: bool

    def training_texts(self) -> Iterator[str]:
        """The texts of its training split, copies left out: what tokenizers learn from."""
        opened = self.open()
        if not self.streams:
            yield from (document.text for split, document in opened.documents if split == TRAIN)
            return
        # A small source may fall on one side of the split; see `building`.
        group, sides = None, set()
        for side, _ in keep_and_split(_plain(opened), Ledger(), **self.split):
            sides.add(side)
            if len(sides) == 2:
                break
        if len(sides) < 2:
            group = first_heldout_group(_plain(self.open()), seed=self.split["seed"])
        kept = keep_and_split(_plain(self.open()), Ledger(), only_heldout=group, **self.split)
        yield from (document.text for split, document in kept if split == TRAIN)


def _plain(opened: Opened) -> Iterator[Document]:
    return (document for _, document in opened.documents)


@dataclasses.dataclass
class Opened:
    """An open domain.

    Attributes:
        documents: in the source's order, with the split that each is in; None: not split yet.
        ledger: gets what the reader drops, as it reads.
        meter: how far the reader is.
        copyrights: package -> its copyright file.
    """

    documents: Iterator[tuple[str | None, Document]]
    ledger: Ledger
    meter: Meter
    copyrights: Mapping[str, str] = dataclasses.field(default_factory=dict)


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
        with ProgressBar(f"{name}: reading") as bar:
            built = builder.build(
                corpus,
                packages,
                os.path.join(cache_dir, "corpora"),
                progress=bar.watch,
                **split,
            )
        meter = Meter(total=sum(map(len, built.splits.values())), unit=" documents")

        def documents() -> Iterator[tuple[str, Document]]:
            for side in (TRAIN, HELDOUT):
                for document in built.documents(side):
                    meter.done += 1
                    yield side, document

        # What was dropped when the corpus was built was never tokenised; what it stored is read
        # again now, and counted anew.
        gone = built.ledger.dropped
        ledger = Ledger(sum(gone.values()), gone.copy(), notes=built.ledger.notes.copy())
        ledger.uncounted.update(gone)
        return Opened(documents(), ledger, meter, built.copyrights)

    settings = builder.settings(corpus, packages, **split)
    return Domain(name, name, corpus.licence, settings, None, split, read_corpus, streams=False)


def own_domain(
    kind: str, name: str, place: str, split: dict[str, Any], *, field: str = "text"
) -> Domain:
    """Text of one's own as the domain `name`.

    Args:
        kind: one of OWN_KINDS.
        name: of the domain.
        place: a path or pattern; "builder[:split]" for tfds; "task[:split]" for seqio.
            An arrayrecord path may end in ":split", too.
        split: heldout_fraction and seed.
        field: the key, column or feature that holds the text.

    Raises:
        SourceError: there is nothing there.
    """
    source = _OWN[kind](place, field)

    def open_text() -> Opened:
        total = sum(_stamp(file)[0] for file in source.files)
        ledger, meter = Ledger(), Meter(total=total or None)
        documents = source.read(ledger, meter)
        return Opened(((None, document) for document in documents), ledger, meter)

    inputs = source.inputs
    if source.files:
        base = os.path.dirname(os.path.abspath(source.path))
        inputs = [(os.path.relpath(file, base), *_stamp(file)) for file in source.files]
    settings = {"source": kind, **source.settings, "split": split}
    return Domain(name, place, "your own text", settings, inputs, split, open_text, streams=True)


def name_and_split(place: str) -> tuple[str, str]:
    """Cuts a split off the end of a name or path; "train" if it names none.

    >>> name_and_split("c4/en:3.1.0:train[:10%]"), name_and_split("my_task")
    (('c4/en:3.1.0', 'train[:10%]'), ('my_task', 'train'))
    """
    found = re.fullmatch(r"(.+?)(?::([A-Za-z_][^:/\[]*(?:\[.*\])?))?", place, re.DOTALL)
    assert found is not None
    return found[1], found[2] or "train"


@dataclasses.dataclass
class _Source:
    """What there is at a place: the files, if it is files, or what else is known of it."""

    path: str
    read: Callable[[Ledger, Meter], Iterator[Document]]
    settings: dict[str, Any]
    files: Sequence[str] = ()
    inputs: Any = None


def _folder(path: str, field: str) -> _Source:
    return _Source(
        path,
        lambda ledger, meter: readers.folder_documents(path, ledger, meter=meter),
        {"patterns": list(DEFAULT_PATTERNS)},
        [file for file, _ in readers.folder_files(path)],
    )


def _jsonl(path: str, field: str) -> _Source:
    return _Source(
        path,
        lambda ledger, meter: readers.jsonl_documents(path, ledger, field=field, meter=meter),
        {"field": field},
        readers.jsonl_files(path),
    )


def _parquet(path: str, field: str) -> _Source:
    return _Source(
        path,
        lambda ledger, meter: readers.parquet_documents(path, ledger, field=field, meter=meter),
        {"field": field},
        readers.parquet_files(path),
    )


def _arrayrecord(place: str, field: str) -> _Source:
    path, part = (place, "train") if os.path.exists(place) else name_and_split(place)
    return _Source(
        path,
        lambda ledger, meter: readers.arrayrecord_documents(
            path, ledger, field=field, split=part, meter=meter
        ),
        {"field": field, "split_of_dataset": part},
        readers.arrayrecord_files(path),
    )


def _tfds(place: str, field: str) -> _Source:
    name, part = name_and_split(place)
    return _Source(
        name,
        lambda ledger, meter: readers.tfds_documents(
            name, ledger, field=field, split=part, meter=meter
        ),
        {
            "field": field,
            "split_of_dataset": part,
            "builder": readers.tfds_builder(name).info.full_name,
        },
    )


def _seqio(place: str, field: str) -> _Source:
    from lcl.data import seqio_bridge

    task, part = name_and_split(place)
    return _Source(
        task,
        lambda ledger, meter: seqio_bridge.task_documents(task, ledger, split=part, meter=meter),
        {"task": task, "split_of_dataset": part},
        inputs=seqio_bridge.task_inputs(task, part),
    )


_OWN: dict[str, Callable[[str, str], _Source]] = {
    "folder": _folder,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "arrayrecord": _arrayrecord,
    "tfds": _tfds,
    "seqio": _seqio,
}
# Kinds of text of one's own, in the order in which `prepare` makes them.
OWN_KINDS = tuple(_OWN)


def _stamp(file: str) -> tuple[int, int]:
    stat = os.lstat(file)
    return stat.st_size, stat.st_mtime_ns
