"""The journal of an unfinished domain: what became of each part of its documents.

    [length | hash | head]  [length | hash | record 0]  [length | hash | record 1]  [torn...

Written by `lcl.data.building`, which says how it is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import shutil
from typing import Any

import numpy as np

JOURNAL = "journal"


@dataclasses.dataclass
class Record:
    """What became of a part; a line of the journal.

    Attributes:
        key: of its documents.
        fates: for each document its split, or why it was dropped.
        num_tokens: stored, or of a dropped document.
        cut: tokens cut off its end.
        num_bytes: that its tokens stand for.
        signatures: of the stored documents, if near duplicates are looked for.
        checksums: of the tokens written, by split.
        last: nothing after this part is wanted: the limits are reached.
    """

    key: bytes
    fates: list[str]
    num_tokens: list[int]
    cut: list[int]
    num_bytes: list[int]
    signatures: np.ndarray | None
    checksums: dict[str, int] = dataclasses.field(default_factory=dict)
    last: bool = False

    def tokens_of(self, split: str) -> int:
        """How many tokens it wrote to a split."""
        return sum(n for n, fate in zip(self.num_tokens, self.fates, strict=True) if fate == split)


class Journal:
    """A file of records, each with its length and hash before it; a torn end is no record.

    First `head` is compared: another one (other inputs) empties the folder. Then records are read
    one by one, until `append` cuts off what was not read.
    """

    def __init__(self, folder: str, head: Any):
        """Opens the folder's journal, or begins it."""
        path = os.path.join(folder, JOURNAL)
        if self.head(folder) != head:
            shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder, exist_ok=True)
        self._file = open(path, "r+b" if os.path.exists(path) else "w+b")
        self._reading = True
        if self.next() is None:
            self.append(head)
            self._reading = False

    @staticmethod
    def head(folder: str) -> Any:
        """The head of a folder's journal; None if it has none."""
        try:
            with open(os.path.join(folder, JOURNAL), "rb") as file:
                return _read_frame(file)
        except OSError:
            return None

    def next(self) -> Any:
        """The next whole record; None when there is none (and ever after)."""
        if not self._reading:
            return None
        start = self._file.tell()
        value = _read_frame(self._file)
        if value is None:
            self._file.seek(start)
            self._reading = False
        return value

    def back(self, place: int) -> None:
        """Stops reading at a `tell()` before the record that was read last: it does not fit."""
        self._file.seek(place)
        self._reading = False

    def append(self, value: Any) -> None:
        """Writes a record after those that were read and accepted."""
        data = pickle.dumps(value, protocol=5)
        self._file.write(len(data).to_bytes(8, "little") + _hash(data) + data)
        self._file.truncate()
        self._file.flush()

    def tell(self) -> int:
        """Where the next record begins: for `back`."""
        return self._file.tell()

    def close(self) -> None:
        """Closes the file; its records stay."""
        self._file.close()


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _read_frame(file: Any) -> Any:
    head = file.read(24)
    length = int.from_bytes(head[:8], "little")
    data = file.read(length) if len(head) == 24 else b""
    if len(head) < 24 or len(data) < length or _hash(data) != head[8:]:
        return None
    return pickle.loads(data)
