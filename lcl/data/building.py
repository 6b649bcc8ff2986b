"""From the documents of a domain to its two stores; can be killed at any moment and gone on with.

    read -> fit? new? -> parts -> filters, tokens, signatures -> near duplicate? -> train | heldout
      |        |         (a MB)       (several processes)             |                  |
      +--------+------------------------- the ledger -----------------+------------------+

The unfinished domain is a folder with the tokens written so far and a *journal*: for each part, in
order, a hash of its documents, what became of each, and a checksum of its tokens, appended when
they are written. After a kill the source is read again from its beginning (reading is cheap), and
as long as the documents of a part hash to what the journal says, its tokens are not made again but
checked; from the first part that is torn, missing or other, all is made anew. So each document is
in the finished store exactly once, and its bytes are those of a run that nobody killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lcl.data.dedup import REASON, Index
from lcl.data.domains import Domain, Opened
from lcl.data.journal import Journal, Record
from lcl.data.progress import ProgressBar
from lcl.data.readers import Meter
from lcl.data.sources import (
    Document,
    Judged,
    Ledger,
    SourceError,
    judge,
    split_of,
    stable_hash,
)
from lcl.data.store_writer import SPLITS, StoreWriter
from lcl.data.tokenising import Encoded, Part, Work, Workers, encode_pieces

# A part ends when it has one of these. They decide nothing but speed and how much a kill costs.
PART_BYTES = 1 << 20
PART_DOCUMENTS = 4096
# A longer document is never held as tokens, nor sent to another process: it is a part by itself.
GIANT_BYTES = 1 << 24

OVER_LIMIT = "over limit_documents"


class Tagged(NamedTuple):
    """A part on its way: its documents, the ledger's growth while they were read, where we were."""

    documents: list[tuple[str | None, Judged]]
    read: Ledger
    at: Meter

    def key(self) -> bytes:
        """A hash of the documents: what the journal knows the part by."""
        digest = hashlib.blake2b(digest_size=16)
        for split, (document, data, reason) in self.documents:
            head = (split, document.name, document.source, document.group, reason, len(data))
            digest.update(repr(head).encode("utf-8", "surrogatepass"))
            digest.update(data)
        return digest.digest()


class _Lopsided(Exception):
    """All documents fell on one side of the split."""

    def __init__(self, group: str):
        super().__init__(group)
        self.group = group


def build(
    domain: Domain,
    folder: str,
    work: Work,
    *,
    writer_settings: Mapping[str, Any],
    processes: int = 1,
    limit_documents: int | None = None,
    log: Callable[[str], None] | None = None,
) -> tuple[Opened, Ledger]:
    """Writes the two stores of a domain under `folder`, going on where an earlier call was killed.

    Args:
        domain: what to read.
        folder: of the unfinished domain; on return it holds train/ and heldout/.
        work: what is done to each document.
        writer_settings: further arguments of `StoreWriter`; `inputs` says whether what lies in
            the folder is the beginning of this very domain.
        processes: how many tokenise.
        limit_documents: at most so many, held-out ones included.
        log: gets a line now and then.

    Returns:
        The opened domain, and the account of its documents. The journal is still in the folder.

    Raises:
        SourceError: no document for one of the splits, or the source cannot be read.
    """
    group: str | None = None
    while True:
        opened = domain.open()
        limits = _limits(domain, limit_documents)
        head = ("lcl journal 1", writer_settings["inputs"], group)
        # A killed second pass goes on as such.
        there = Journal.head(folder)
        if group is None and there is not None and there[:2] == head[:2]:
            head = there
        try:
            ledger = _Builder(domain, opened, folder, work, limits, head, log).run(
                processes, writer_settings
            )
        except _Lopsided as error:
            # A small source may have all its groups on one side of the split. Then that group is
            # held out which would be first as the fraction grows from 0, and no other.
            group = error.group
            shutil.rmtree(folder, ignore_errors=True)
            continue
        return opened, ledger


def _limits(domain: Domain, limit_documents: int | None) -> dict[str, float]:
    if limit_documents is None:
        return dict.fromkeys(SPLITS, float("inf"))
    fraction = domain.split["heldout_fraction"]
    heldout = min(limit_documents - 1, max(1, round(limit_documents * fraction)))
    return {"train": limit_documents - heldout, "heldout": heldout}


class _Builder:
    """One pass over a domain's documents."""

    def __init__(
        self,
        domain: Domain,
        opened: Opened,
        folder: str,
        work: Work,
        limits: Mapping[str, float],
        head: tuple[str, str, str | None],
        log: Callable[[str], None] | None,
    ):
        self.domain, self.opened, self.folder, self.work = domain, opened, folder, work
        self.limits, self.log, self.only_heldout = limits, log, head[2]
        self.ledger = Ledger.from_json(opened.ledger.to_json())
        self.before = Ledger.from_json(opened.ledger.to_json())
        self.journal = Journal(folder, head)
        self.writers: dict[str, StoreWriter] = {}
        near = work.near_duplicates
        self.index: Index | None = near.index() if near is not None else None
        self.giant: Tagged | None = None
        self.finished = False
        self.groups: set[str] = set()  # At most two: enough to know that there are two.
        self.first_group: tuple[int, str] | None = None
        # Without these, what is kept is known when it is read: a limit then ends the reading.
        self.known_when_read = not work.filters and near is None
        self.limited = min(limits.values()) < float("inf")
        self.fit = dict.fromkeys(SPLITS, 0)
        self.bar: ProgressBar

    def run(self, processes: int, writer_settings: Mapping[str, Any]) -> Ledger:
        """Reads and writes everything; the stores are then whole."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.journal.close)
            for split in SPLITS:
                path = os.path.join(self.folder, split)
                if os.path.exists(path):  # Killed when one of the two was whole already.
                    os.rename(path, f"{path}.partial")
                writer = StoreWriter(
                    path,
                    tokenizer=self.work.tokenizer,
                    domain=self.domain.name,
                    split=split,
                    keep=True,
                    **writer_settings,
                )
                self.writers[split] = stack.enter_context(writer)
            self._fill(processes)
            self._settle()
        return self.ledger

    def _fill(self, processes: int) -> None:
        source = self._tagged()
        title = f"{self.domain.name}: tokens"
        with ProgressBar(title, self.log) as self.bar, Workers(self.work, processes) as workers:
            while not self.finished:
                for tagged, encoded in workers.map(self._parts(source)):
                    if not self.finished:
                        self._commit(tagged, encoded)
                if self.giant is None:
                    break
                if not self.finished:
                    self._commit_giant(self.giant)
                self.giant = None
        if not self.finished:  # Else what was read ahead of the end is as if it had not been.
            self._add(self._growth())

    # ---- reading

    def _judged(self) -> Iterator[tuple[str | None, Judged]]:
        """Documents with the split that their source gave them, judged; up to the limits."""
        splits: list[str | None] = []

        def documents() -> Iterator[Document]:
            for split, document in self.opened.documents:
                splits.append(split)
                yield document

        # The registry's corpora are judged when they are built.
        given = judge(documents())
        for judged in given:
            split = splits.pop()
            if self.limited and self.known_when_read and judged.reason is None:
                side = self._side(split, judged.document)
                if self.fit[side] >= self.limits[side]:
                    self.opened.ledger.drop(OVER_LIMIT)
                    self.opened.ledger.uncounted[OVER_LIMIT] += 1
                    self._see_group(judged.document)
                    if self.domain.streams and all(self.fit[s] >= self.limits[s] for s in SPLITS):
                        return
                    continue
                self.fit[side] += 1
            yield split, judged

    def _tagged(self) -> Iterator[Tagged]:
        """Documents in parts; where a part ends hangs on the documents alone."""
        documents: list[tuple[str | None, Judged]] = []
        size = 0
        meter = self.opened.meter

        def part() -> Tagged:
            return Tagged(documents, self._growth(), dataclasses.replace(meter))

        for split, judged in self._judged():
            if len(judged.data) > GIANT_BYTES:
                if documents:
                    yield part()
                documents, size = [(split, judged)], 0
                yield part()
                documents = []
                continue
            documents.append((split, judged))
            size += len(judged.data)
            if size >= PART_BYTES or len(documents) >= PART_DOCUMENTS:
                yield part()
                documents, size = [], 0
        if documents:
            yield part()

    def _parts(self, source: Iterator[Tagged]) -> Iterator[tuple[Tagged, Part]]:
        """Parts that are still to do, up to the next giant; those in the journal are done."""
        for tagged in source:
            if self.finished:
                return
            if self._recall(tagged):
                continue
            if len(tagged.documents[0][1].data) > GIANT_BYTES:
                self.giant = tagged
                return
            judged = [one for _, one in tagged.documents]
            yield tagged, Part([one.data for one in judged], [one.reason is None for one in judged])

    # ---- deciding and writing

    def _recall(self, tagged: Tagged) -> bool:
        """Whether the journal and the files have this part; it is then in the account."""
        at = self.journal.tell()
        record = self.journal.next()
        if record is None:
            return False
        fits = record.key == tagged.key()
        for split, writer in self.writers.items():
            fits = fits and writer.recall(record.tokens_of(split), record.checksums[split])
        if not fits:
            self.journal.back(at)
            for writer in self.writers.values():
                writer.unrecall()
            return False
        if self.index is not None and record.signatures is not None:
            self.index.add_kept(record.signatures)
        self._account(tagged, record, fresh=False)
        return True

    def _commit(self, tagged: Tagged, encoded: Encoded) -> None:
        """Decides what becomes of a part's documents, writes their tokens, and says so."""
        judged = [one for _, one in tagged.documents]
        reasons = [
            one.reason if one.reason is not None else why
            for one, why in zip(judged, encoded.reasons, strict=True)
        ]
        passed = [i for i, reason in enumerate(reasons) if reason is None]
        signatures = encoded.signatures
        near = self.work.near_duplicates
        if near is not None and signatures is None:
            signatures = near.signatures([judged[i].document.text for i in passed])
        record = self._decide(tagged, reasons, signatures)
        record.num_tokens = encoded.num_tokens[: len(record.fates)].tolist()
        record.cut = encoded.cut[: len(record.fates)].tolist()
        record.num_bytes = encoded.num_bytes[: len(record.fates)].tolist()
        ends = np.cumsum(encoded.num_tokens[passed])
        for split, writer in self.writers.items():
            runs = [
                encoded.tokens[end - encoded.num_tokens[i] : end]
                for i, end in zip(passed, ends, strict=True)
                if i < len(record.fates) and record.fates[i] == split
            ]
            writer.write(np.concatenate(runs) if runs else encoded.tokens[:0])
        self._publish_part(tagged, record)

    def _commit_giant(self, tagged: Tagged) -> None:
        """The same for a document too long to be held as tokens: written a piece at a time."""
        ((split, judged),) = tagged.documents
        text = judged.document.text
        reason = judged.reason or self.work.reason(text)
        near, signatures = self.work.near_duplicates, None
        if near is not None:
            signatures = near.signatures([text] if reason is None else [])
        record = self._decide(tagged, [reason], signatures)
        if record.fates and record.fates[0] in self.writers:
            writer = self.writers[record.fates[0]]
            numbers = writer.write_text(text, self.work.max_tokens)
        else:
            total = 2 + sum(map(len, encode_pieces(self.work.tokenizer, text)))
            kept = min(total, self.work.max_tokens or total)
            numbers = kept, total - kept, 0
        record.num_tokens, record.cut, record.num_bytes = ([number] for number in numbers)
        self._publish_part(tagged, record)

    def _decide(
        self, tagged: Tagged, reasons: list[str | None], signatures: np.ndarray | None
    ) -> Record:
        """The fates of a part's documents, in their order."""
        fates: list[str] = []
        stored = {split: writer.num_documents for split, writer in self.writers.items()}
        new: np.ndarray | None = None
        near = iter(())
        if self.index is not None:
            assert signatures is not None
            found = self.index.add_new(signatures)
            new, near = signatures[~found], iter(found.tolist())
        full = False
        for (given, judged), reason in zip(tagged.documents, reasons, strict=True):
            if not self.known_when_read and self.domain.streams:
                full = all(stored[split] >= self.limits[split] for split in SPLITS)
                if full:
                    break  # Documents from here on are as if they had not been read.
            if reason is None and next(near, False):
                reason = REASON
            if reason is None:
                split = self._side(given, judged.document)
                self._see_group(judged.document)
                if stored[split] < self.limits[split]:
                    stored[split] += 1
                    fates.append(split)
                    continue
                reason = OVER_LIMIT
            fates.append(reason)
        return Record(tagged.key(), fates, [], [], [], new, last=full)

    def _publish_part(self, tagged: Tagged, record: Record) -> None:
        record.checksums = {split: writer.flush() for split, writer in self.writers.items()}
        self.journal.append(record)
        self._account(tagged, record, fresh=True)

    # ---- the account

    def _account(self, tagged: Tagged, record: Record, *, fresh: bool) -> None:
        """Enters a part that is written into the ledger and the stores' tables."""
        self._add(tagged.read)
        tables: dict[str, list[tuple[int, int, Document]]] = {split: [] for split in SPLITS}
        columns = zip(record.fates, record.num_tokens, record.cut, record.num_bytes, strict=True)
        judged = (one for _, one in tagged.documents)
        for (document, _, _), (fate, tokens, cut, num_bytes) in zip(judged, columns, strict=False):
            if not fresh and (fate in tables or fate == OVER_LIMIT):
                self._see_group(document)
            if fate in tables:
                self.ledger.store(fate, tokens, cut)
                tables[fate].append((tokens, num_bytes, document))
            else:
                self.ledger.drop(fate, tokens + cut)
        for split, table in tables.items():
            self.writers[split].record(
                [tokens for tokens, _, _ in table],
                [num_bytes for _, num_bytes, _ in table],
                [document.id for _, _, document in table],
                [document.source for _, _, document in table],
                [document.extras for _, _, document in table],
            )
        self.finished = record.last
        num_tokens = sum(record.num_tokens)
        self.bar.at(tagged.at, len(record.fates), num_tokens, fresh=fresh)

    def _growth(self) -> Ledger:
        """What the reader entered into its ledger since the last call."""
        now = self.opened.ledger
        growth = Ledger(
            now.read - self.before.read,
            now.dropped - self.before.dropped,
            notes=now.notes - self.before.notes,
            uncounted=now.uncounted - self.before.uncounted,
        )
        self.before = Ledger.from_json(now.to_json())
        return growth

    def _add(self, growth: Ledger) -> None:
        self.ledger.read += growth.read
        self.ledger.dropped += growth.dropped
        self.ledger.notes += growth.notes
        self.ledger.uncounted += growth.uncounted

    def _side(self, given: str | None, document: Document) -> str:
        if given is not None:
            return given
        split = self.domain.split
        return split_of(document, split["heldout_fraction"], split["seed"], self.only_heldout)

    def _see_group(self, document: Document) -> None:
        """Remembers the group that would be held out first."""
        group = document.group or document.name
        if len(self.groups) < 2:
            self.groups.add(group)
        if all(writer.num_documents for writer in self.writers.values()):
            return  # Both sides have documents: it will not be asked for.
        place = stable_hash("split", self.domain.split["seed"], group), group
        if self.first_group is None or place < self.first_group:
            self.first_group = place

    def _settle(self) -> None:
        """Holds the account against the stores; both splits must have a document."""
        ledger, name = self.ledger, self.domain.name
        ledger.check()
        for split, writer in self.writers.items():
            assert writer.num_documents == ledger.stored[split], f"{name}: ledger is off"
            assert writer.num_tokens == ledger.tokens_stored[split], f"{name}: tokens are off"
            writer.ledger = ledger.to_json()
        empty = [split for split, writer in self.writers.items() if not writer.num_documents]
        if not empty:
            return
        given = not self.domain.streams
        if not given and len(self.groups) == 2 and self.only_heldout is None:
            assert self.first_group is not None
            raise _Lopsided(self.first_group[1])
        if given or len(self.groups) == 2:
            raise SourceError(f"domain {name!r} has no {empty[0]} document ({ledger}); add text")
        raise SourceError(
            f"{self.domain.place!r} has {len(self.groups) or 'no'} document to use, and two are "
            f"needed, one of them to hold out ({ledger}); add text or cut the document into several"
        )
