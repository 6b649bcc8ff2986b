"""Documents before they are tokens: where they come from, which are dropped, which are held out.

    read -> drop (too short, null bytes, ...) -> drop exact duplicates -> train | heldout
              |                                    |
              +---------- the ledger ---------------+

Every document that was read is in the ledger exactly once: stored in a split, or dropped for a
named reason. Duplicates go BEFORE the split, so no held-out text was trained on, and the split
hangs on a hash of each document's group alone: adding documents moves none of the others, and
a page and its translations, which share a group, are on the same side.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

TRAIN, HELDOUT = "train", "heldout"
DEFAULT_PATTERNS = ("*.txt", "*.md")


class SourceError(ValueError):
    """A source of text that cannot be used; the message is one line and says the mend."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        name: its name within the source: a path, or "file:line". Provenance.
        text: its text.
        source: what it came from: a package, a folder, a file.
        group: documents of one group (a page and its translations) are on one side of the split;
            default: the name.
        extras: numbers to keep with it, e.g. {"language_share": 0.97}.
    """

    name: str
    text: str
    source: str
    group: str = ""
    extras: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def id(self) -> int:
        """A hash of source and name: the same document has the same id in every store; int63."""
        return stable_hash(self.source, self.name) >> 1


@dataclasses.dataclass
class Ledger:
    """The account of what was read: read == sum(dropped) + sum(stored).

    Attributes:
        read: documents seen.
        dropped: reason -> number of documents.
        stored: split -> number of documents.
        notes: anything else worth counting (encodings, lines removed); outside the sum.
    """

    read: int = 0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    stored: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    notes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def drop(self, reason: str) -> None:
        """Counts a document that was read and is not kept."""
        self.read += 1
        self.dropped[reason] += 1

    def store(self, split: str) -> None:
        """Counts a document that was read and is kept."""
        self.read += 1
        self.stored[split] += 1

    def check(self) -> None:
        """Raises if a document got lost on the way: a bug, not bad input."""
        accounted = sum(self.dropped.values()) + sum(self.stored.values())
        assert self.read == accounted, f"ledger: {self.read} read, {accounted} accounted for"

    def to_json(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "dropped": dict(sorted(self.dropped.items())),
            "stored": dict(sorted(self.stored.items())),
            "notes": dict(sorted(self.notes.items())),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        return cls(
            value["read"],
            collections.Counter(value["dropped"]),
            collections.Counter(value["stored"]),
            collections.Counter(value["notes"]),
        )

    def __str__(self) -> str:
        dropped = ", ".join(f"{n:,} {why}" for why, n in sorted(self.dropped.items()))
        stored = ", ".join(f"{self.stored[s]:,} {s}" for s in (TRAIN, HELDOUT))
        notes = "".join(f"; {n:,} {what}" for what, n in sorted(self.notes.items()))
        return f"read {self.read:,} = {stored} + dropped ({dropped or 'none'}){notes}"


def stable_hash(*parts: str | int) -> int:
    """A 64-bit hash that is the same in every process and on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


def is_heldout(group: str, heldout_fraction: float, seed: int) -> bool:
    """Whether a group of documents is held out: its hash is in the lowest share of all hashes."""
    return stable_hash("split", seed, group) < heldout_fraction * 2.0**64


def keep_and_split(
    documents: Iterable[Document],
    ledger: Ledger,
    *,
    heldout_fraction: float,
    seed: int,
    min_characters: int = 1,
    only_heldout: str | None = None,
) -> Iterator[tuple[str, Document]]:
    """Drops unfit documents and exact duplicates, and says the split of each that is left.

    Streaming: remembers 16 bytes a document.

    Args:
        documents: in the source's order; of equal texts the first stays.
        ledger: gets every document.
        heldout_fraction: share of the groups to hold out, 0 < f < 1.
        seed: another seed holds out other groups.
        min_characters: shorter texts (blanks at the ends do not count) are dropped.
        only_heldout: hold out this group and no other, whatever the hashes say.

    Yields:
        ("train" | "heldout", document).
    """
    seen: set[bytes] = set()
    for document in documents:
        if "\0" in document.text:
            ledger.drop("null bytes (not text)")
            continue
        length = len(document.text.strip())
        if length < max(1, min_characters):
            ledger.drop(f"shorter than {min_characters} characters" if length else "empty")
            continue
        try:
            data = document.text.encode("utf-8")
        except UnicodeEncodeError:
            ledger.drop("half a surrogate pair (not Unicode text)")
            continue
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in seen:
            ledger.drop("exact duplicate")
            continue
        seen.add(digest)
        group = document.group or document.name
        if only_heldout is None:
            held = is_heldout(group, heldout_fraction, seed)
        else:
            held = group == only_heldout
        split = HELDOUT if held else TRAIN
        ledger.store(split)
        yield split, document


def first_heldout_group(documents: Iterable[Document], *, seed: int, **fitness: Any) -> str | None:
    """The group that would be held out first as the fraction grows from 0.

    A small corpus may have all its groups on one side of the split; then this one alone is held
    out, so that there is something to train and to evaluate on. None if fewer than two groups are
    fit to be stored.
    """
    groups = {
        document.group or document.name
        for _, document in keep_and_split(
            documents, Ledger(), heldout_fraction=0.5, seed=seed, **fitness
        )
    }
    if len(groups) < 2:
        return None
    return min(groups, key=lambda group: stable_hash("split", seed, group))


# ---- your own text


def folder_files(path: str, patterns: Iterable[str] = DEFAULT_PATTERNS) -> list[tuple[str, str]]:
    """Files under a folder, sorted: (full path, path within the folder). Follows no links.

    Args:
        path: a folder, or a folder and a pattern ("notes/**/*.rst").
        patterns: names to take if `path` is a folder alone.

    Raises:
        SourceError: no such folder, or no file that matches.
    """
    if glob.has_magic(path) and not os.path.isdir(path):
        base = path
        while glob.has_magic(base):
            base = os.path.dirname(base)
        base = base or "."
        found = [f for f in glob.glob(path, recursive=True) if os.path.isfile(f)]
        what = repr(path)
    elif os.path.isdir(path):
        base, patterns = path, tuple(patterns)
        found = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if any(fnmatch.fnmatch(name.lower(), pattern) for pattern in patterns)
        ]
        what = f"{path!r} ({' or '.join(patterns)})"
    else:
        raise SourceError(f"no folder {path!r}; give a folder of text files or a pattern")
    if not found:
        raise SourceError(f"no file in {what}; give another pattern, e.g. {path}/**/*.rst")
    return sorted((file, os.path.relpath(file, base)) for file in found)


def folder_documents(
    path: str, ledger: Ledger, *, patterns: Iterable[str] = DEFAULT_PATTERNS
) -> Iterator[Document]:
    """Reads every text file under a folder as one document.

    Links and files that are not UTF-8 are dropped and counted; a file that cannot be opened is an
    error, since a corpus that depends on permissions is no corpus.
    """
    for file, name in folder_files(path, patterns):
        if os.path.islink(file):
            ledger.drop("symbolic link")
            continue
        try:
            with open(file, "rb") as stream:
                data = stream.read()
        except OSError as error:
            raise SourceError(f"{file!r}: {error.strerror}; mend or move it") from error
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            ledger.drop("not UTF-8")
            continue
        yield Document(name=name, text=text, source=os.path.basename(os.path.abspath(path)))


def jsonl_files(path: str) -> list[str]:
    """The file, or the files of a folder or pattern, sorted."""
    if os.path.isdir(path):
        path = os.path.join(path, "**", "*.jsonl*")
    files = sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))
    if not files and os.path.isfile(path):
        files = [path]
    if not files:
        raise SourceError(f"no file {path!r}; give a .jsonl or .jsonl.gz file, or a pattern")
    return files


def jsonl_documents(path: str, ledger: Ledger, *, field: str = "text") -> Iterator[Document]:
    """Reads one document a line, streaming: {"text": "..."}; .gz is unpacked on the way.

    A line that is no JSON object, is not UTF-8 or has no such field is dropped and counted. A file
    in which no line has the field, and a gzip file that ends too early, are errors.
    """
    for file in jsonl_files(path):
        fields: set[str] = set()
        good = 0
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                ledger.drop("not UTF-8")
                continue
            except (ValueError, RecursionError):
                ledger.drop("not JSON")
                continue
            if not isinstance(value, dict):
                ledger.drop("no JSON object")
            elif not isinstance(value.get(field), str):
                fields.update(list(value)[:20])
                ledger.drop(f"no text in field {field!r}")
            else:
                good += 1
                yield Document(
                    name=f"{os.path.basename(file)}:{number}",
                    text=value[field],
                    source=os.path.basename(file),
                )
        if fields and not good:
            raise SourceError(
                f"no line of {file!r} has text in the field {field!r}; its fields are "
                f"{', '.join(sorted(fields))}; rename the one that holds the text to {field!r}"
            )


def _lines(file: str) -> Iterator[bytes]:
    opener: Callable[[str, str], Any] = gzip.open if file.endswith(".gz") else open
    try:
        with opener(file, "rb") as stream:
            yield from stream
    except EOFError as error:
        raise SourceError(f"{file!r} ends in the middle (truncated gzip); copy it again") from error
    except (OSError, zlib.error) as error:
        raise SourceError(f"{file!r} cannot be read ({error}); copy it again or mend it") from error
