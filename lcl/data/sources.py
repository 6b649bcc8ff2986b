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
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

TRAIN, HELDOUT = "train", "heldout"


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


def _counter() -> Any:
    return dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass
class Ledger:
    """The account of what was read, in documents and in tokens. Both sums must match:

        documents  read == sum(dropped) + sum(stored)                  (a cut document is stored)
        tokens     read == sum(dropped) + truncated + sum(stored)      (bos and eos included)

    What holds no text (a line that is no JSON) has no tokens. Documents that were never tokenised
    (beyond `limit_documents`; dropped when a corpus was built) are named in `uncounted`.

    Attributes:
        read: documents seen.
        dropped: reason -> number of documents.
        stored: split -> number of documents.
        notes: anything else worth counting (encodings, lines removed); outside the sums.
        truncated: how many of the stored documents were cut.
        tokens_read: tokens of the documents that were tokenised.
        tokens_dropped: reason -> tokens of its documents.
        tokens_truncated: tokens cut from the ends of stored documents.
        tokens_stored: split -> tokens.
        uncounted: reason -> dropped documents whose tokens were not counted.

    >>> ledger = Ledger()
    >>> ledger.drop("empty"), ledger.store("train", tokens=10, cut=3)
    (None, None)
    >>> ledger.check(), ledger.read, ledger.tokens_read
    (None, 2, 13)
    """

    read: int = 0
    dropped: collections.Counter[str] = _counter()
    stored: collections.Counter[str] = _counter()
    notes: collections.Counter[str] = _counter()
    truncated: int = 0
    tokens_read: int = 0
    tokens_dropped: collections.Counter[str] = _counter()
    tokens_truncated: int = 0
    tokens_stored: collections.Counter[str] = _counter()
    uncounted: collections.Counter[str] = _counter()

    def drop(self, reason: str, tokens: int = 0) -> None:
        """Counts a document that was read and is not kept."""
        self.read += 1
        self.dropped[reason] += 1
        self.tokens_read += tokens
        if tokens:
            self.tokens_dropped[reason] += tokens

    def store(self, split: str, tokens: int = 0, cut: int = 0) -> None:
        """Counts a document that was read and is kept: `tokens` stored, `cut` off its end."""
        self.read += 1
        self.stored[split] += 1
        self.count_stored(split, tokens, cut)

    def count_stored(self, split: str, tokens: int, cut: int = 0) -> None:
        """Counts the tokens of a document that is in the ledger as stored."""
        self.tokens_read += tokens + cut
        self.tokens_truncated += cut
        self.truncated += cut > 0
        if tokens:
            self.tokens_stored[split] += tokens

    def check(self) -> None:
        """Raises if a document or a token got lost on the way: a bug, not bad input."""
        accounted = sum(self.dropped.values()) + sum(self.stored.values())
        assert self.read == accounted, f"ledger: {self.read} read, {accounted} accounted for"
        tokens = sum(self.tokens_dropped.values()) + sum(self.tokens_stored.values())
        tokens += self.tokens_truncated
        assert self.tokens_read == tokens, f"ledger: {self.tokens_read} tokens, {tokens} accounted"

    def to_json(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "dropped": dict(sorted(self.dropped.items())),
            "stored": dict(sorted(self.stored.items())),
            "notes": dict(sorted(self.notes.items())),
            "truncated": self.truncated,
            "tokens": {
                "read": self.tokens_read,
                "dropped": dict(sorted(self.tokens_dropped.items())),
                "truncated": self.tokens_truncated,
                "stored": dict(sorted(self.tokens_stored.items())),
                "uncounted_documents": dict(sorted(self.uncounted.items())),
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """Reads a ledger back; one of an older store has no tokens."""
        tokens = value.get("tokens") or {}
        return cls(
            value["read"],
            collections.Counter(value["dropped"]),
            collections.Counter(value["stored"]),
            collections.Counter(value["notes"]),
            value.get("truncated", 0),
            tokens.get("read", 0),
            collections.Counter(tokens.get("dropped", {})),
            tokens.get("truncated", 0),
            collections.Counter(tokens.get("stored", {})),
            collections.Counter(tokens.get("uncounted_documents", {})),
        )

    def __str__(self) -> str:
        dropped = ", ".join(f"{n:,} {why}" for why, n in sorted(self.dropped.items()))
        stored = ", ".join(f"{self.stored[s]:,} {s}" for s in (TRAIN, HELDOUT))
        notes = "".join(f"; {n:,} {what}" for what, n in sorted(self.notes.items()))
        text = f"read {self.read:,} = {stored} + dropped ({dropped or 'none'}){notes}"
        if self.truncated:
            text += f"; {self.truncated:,} truncated"
        if self.tokens_read:
            gone = ", ".join(f"{n:,} {why}" for why, n in sorted(self.tokens_dropped.items()))
            kept = ", ".join(f"{self.tokens_stored[s]:,} {s}" for s in (TRAIN, HELDOUT))
            text += f"; tokens: read {self.tokens_read:,} = {kept} + dropped ({gone or 'none'})"
            text += f" + truncated ({self.tokens_truncated:,})" if self.tokens_truncated else ""
        if self.uncounted:
            what = ", ".join(f"{n:,} {why}" for why, n in sorted(self.uncounted.items()))
            text += f"; never tokenised: {what}"
        return text


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
    for document, _, reason in judge(documents, min_characters=min_characters):
        if reason is not None:
            ledger.drop(reason)
            continue
        split = split_of(document, heldout_fraction, seed, only_heldout)
        ledger.store(split)
        yield split, document


def split_of(
    document: Document, heldout_fraction: float, seed: int, only_heldout: str | None = None
) -> str:
    """The side of the split that a document is on; see `keep_and_split`."""
    group = document.group or document.name
    if only_heldout is None:
        held = is_heldout(group, heldout_fraction, seed)
    else:
        held = group == only_heldout
    return HELDOUT if held else TRAIN


class Judged(NamedTuple):
    """A document, its text as UTF-8, and why it is dropped (None: it is not)."""

    document: Document
    data: bytes
    reason: str | None


def judge(documents: Iterable[Document], *, min_characters: int = 1) -> Iterator[Judged]:
    """Says of each document whether it is fit and new: not empty, no binary, no exact duplicate.

    Streaming: remembers 16 bytes a document. Of equal texts the first stays.
    """
    seen: set[bytes] = set()
    for document in documents:
        try:
            data = document.text.encode("utf-8")
        except UnicodeEncodeError:
            yield Judged(document, b"", "half a surrogate pair (not Unicode text)")
            continue
        if b"\0" in data:
            yield Judged(document, data, "null bytes (not text)")
            continue
        if not data or document.text.isspace():
            yield Judged(document, data, "empty")
            continue
        if min_characters > 1 and len(document.text.strip()) < min_characters:
            yield Judged(document, data, f"shorter than {min_characters} characters")
            continue
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in seen:
            yield Judged(document, data, "exact duplicate")
            continue
        seen.add(digest)
        yield Judged(document, data, None)


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
