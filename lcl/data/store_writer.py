"""Writing a store: tokens go straight to the disk, the rest when it is whole, then one rename.

    with StoreWriter(path, ...) as writer:
        writer.add(text, ...)                                   one document
        writer.write(tokens); writer.record(lengths, ...)       many, tokenised elsewhere

The files are described in `lcl.data.store`, which reads them.
"""

from __future__ import annotations

import array
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from lcl.data.fingerprints import fingerprint, new_digest
from lcl.data.tokenising import encode_pieces
from lcl.data.tokenizers import Tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "heldout")
META_FILE = "meta.json"

_HEADER_BYTES = 128  # Fixed, so that the shape can be written when it is known: at the end.


class StoreError(ValueError):
    """A store that is missing or unfit; the message is one line and says the mend."""


class StoreWriter:
    """Writes one store, a document at a time, and publishes it in one rename.

    Memory does not grow with the text: tokens go straight to the disk, a document of hundreds of
    megabytes in pieces. If the block is left by an exception, or the process is killed, nothing is
    visible under `path`. What was written can be gone on with: with `keep`, the unfinished store
    stays in a folder beside it, and `recall` takes from there what an earlier process had written.

    >>> with StoreWriter(path, tokenizer=ByteTokenizer(), domain="en", split="train") as writer:
    ...     writer.add("hello", document_id=7)  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer,
        domain: str,
        split: str,
        tokenizer_spec: str | None = None,
        licence: str = "not recorded",
        settings: Mapping[str, Any] | None = None,
        inputs: str = "",
        keep: bool = False,
    ):
        """Opens a store for writing.

        Args:
            path: directory of the finished store; must not exist when the block ends.
            tokenizer: encodes every text.
            domain: name of the domain, e.g. "manpages-fr".
            split: "train" or "heldout".
            tokenizer_spec: what to record; a relative file name counts from the store's root.
            licence: one line.
            settings: whatever else made these documents; JSON, part of the fingerprint.
            inputs: a hash by which `prepare` knows whether the store is up to date; no part of the
                fingerprint.
            keep: leave an unfinished store as it is, to go on with by `recall`.
        """
        if split not in SPLITS:
            raise StoreError(f"unknown split {split!r}; use {' or '.join(SPLITS)}")
        self.path = os.fspath(path)
        self.tokenizer = tokenizer
        self.ledger: dict[str, Any] = {}
        self._meta: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "domain": domain,
            "split": split,
            "tokenizer_spec": tokenizer.spec if tokenizer_spec is None else tokenizer_spec,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "licence": licence,
            "settings": dict(settings or {}),
            "inputs": inputs,
        }
        self._keep = keep
        self._partial = f"{self.path}.partial" + ("" if keep else f"-{os.getpid()}")
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._offsets, self._ids = array.array("q", [0]), array.array("q")
        self._bytes, self._sources = array.array("q"), array.array("i")
        self._source_names: dict[str, int] = {}
        self._extras: dict[str, array.array] = {}
        self._digest = new_digest()
        self._checksum = 0
        self._before_recall: tuple[int, Any] | None = None
        self._file: BinaryIO | None = None

    @property
    def num_documents(self) -> int:
        return len(self._ids)

    @property
    def num_tokens(self) -> int:
        return self._offsets[-1]

    def __enter__(self) -> StoreWriter:
        path = os.path.join(self._partial, "tokens.npy")
        if not self._keep:
            shutil.rmtree(self._partial, ignore_errors=True)
        os.makedirs(self._partial, exist_ok=True)
        self._file = open(path, "r+b" if os.path.exists(path) else "w+b", buffering=1 << 20)
        self._file.seek(0)
        self._file.write(b"\0" * _HEADER_BYTES)
        return self

    def add(
        self,
        text: str,
        *,
        document_id: int,
        source: str = "",
        extras: Mapping[str, float] | None = None,
    ) -> int:
        """Appends one document.

        Args:
            text: its text; must be encodable as UTF-8.
            document_id: any int64; provenance and error messages name it.
            source: where it came from (package, folder).
            extras: numbers to keep for each document; the same names for all of them.

        Returns:
            The number of tokens stored, bos and eos included.
        """
        num_tokens, _, num_bytes = self.write_text(text)
        self.record([num_tokens], [num_bytes], [document_id], [source], [extras or {}])
        return num_tokens

    def write_text(self, text: str, max_tokens: int | None = None) -> tuple[int, int, int]:
        """Writes a document's tokens, a piece at a time; `record` must follow.

        Returns:
            Tokens written, bos and eos included; tokens cut off because they are more than
            `max_tokens`; UTF-8 bytes that those written stand for.
        """
        tokenizer, room = self.tokenizer, (max_tokens or 1 << 62) - 2
        written = cut = num_bytes = 0
        self.write(np.asarray([tokenizer.bos_id]))
        for ids in encode_pieces(tokenizer, text):
            kept = ids[: max(0, room - written)]
            self.write(kept)
            written, cut = written + len(kept), cut + len(ids) - len(kept)
            num_bytes += int(tokenizer.token_num_bytes[kept].sum()) if max_tokens else 0
        self.write(np.asarray([tokenizer.eos_id]))
        return written + 2, cut, num_bytes if cut else len(text.encode("utf-8"))

    def write(self, ids: np.ndarray) -> None:
        """Writes tokens of the documents that the next `record` names."""
        assert self._file is not None, "use StoreWriter in a with block"
        data = np.ascontiguousarray(ids, dtype=self._dtype).data
        self._file.write(data)
        self._digest.update(data)
        self._checksum = zlib.crc32(data, self._checksum)

    def record(
        self,
        num_tokens: Sequence[int],
        num_bytes: Sequence[int],
        document_ids: Sequence[int],
        sources: Sequence[str],
        extras: Sequence[Mapping[str, float]],
    ) -> None:
        """Names the documents whose tokens were written (or recalled), in their order."""
        self._before_recall = None
        end = self._offsets[-1]
        for length in num_tokens:
            end += length
            self._offsets.append(end)
        self._ids.extend(document_ids)
        self._bytes.extend(num_bytes)
        names = self._source_names
        self._sources.extend([names.setdefault(source, len(names)) for source in sources])
        for mapping in extras:
            for name, value in mapping.items():
                self._extras.setdefault(name, array.array("d")).append(float(value))

    def flush(self) -> int:
        """Hands what was written to the system; the checksum of it since the last call."""
        assert self._file is not None
        self._file.flush()
        checksum, self._checksum = self._checksum, 0
        return checksum

    def recall(self, num_tokens: int, checksum: int) -> bool:
        """Goes over tokens that an earlier process wrote here; False if they are not the same."""
        assert self._file is not None
        start, digest, found = self._file.tell(), self._digest.copy(), 0
        self._before_recall = start, self._digest
        left = num_tokens * self._dtype.itemsize
        while left:
            data = self._file.read(min(left, 1 << 24))
            if not data:
                break
            digest.update(data)
            found = zlib.crc32(data, found)
            left -= len(data)
        self._digest = digest
        return not left and found == checksum

    def unrecall(self) -> None:
        """Goes back to before the last `recall`, unless a `record` came after it."""
        assert self._file is not None
        if self._before_recall is not None:
            place, self._digest = self._before_recall
            self._file.seek(place)
            self._before_recall = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        try:
            if kind is None:
                self._publish()
        finally:
            self._file.close()
            if not self._keep:
                shutil.rmtree(self._partial, ignore_errors=True)

    def _publish(self) -> None:
        assert self._file is not None
        self._file.truncate()  # An earlier process may have written more than was recalled.
        self._file.seek(0)
        self._file.write(_npy_header(self._dtype, self.num_tokens))
        self._file.flush()
        os.fsync(self._file.fileno())
        arrays: dict[str, np.ndarray] = {
            "offsets": np.asarray(self._offsets, dtype=np.int64),
            "document_ids": np.asarray(self._ids, dtype=np.int64),
            "document_bytes": np.asarray(self._bytes, dtype=np.int64),
            "sources": np.asarray(self._sources, dtype=np.int32),
            "token_num_bytes": self.tokenizer.token_num_bytes.astype(np.int32),
        }
        for name, numbers in self._extras.items():
            assert len(numbers) == self.num_documents, f"extra {name} is missing for some documents"
            arrays[f"extra_{name}"] = np.asarray(numbers, dtype=np.float32)
        for name, values in arrays.items():
            np.save(os.path.join(self._partial, f"{name}.npy"), values)
            self._digest.update(values.tobytes())
        meta = self._meta | {
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "num_bytes": int(arrays["document_bytes"].sum()),
            "source_names": list(self._source_names),
            "extras": sorted(self._extras),
            "ledger": self.ledger,
            "content_fingerprint": self._digest.hexdigest(),
        }
        meta["fingerprint"] = fingerprint(
            meta["domain"],
            meta["split"],
            meta["tokenizer_fingerprint"],
            meta["settings"],
            meta["source_names"],
            meta["content_fingerprint"],
        )
        with open(os.path.join(self._partial, META_FILE), "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        try:
            os.rename(self._partial, self.path)
        except OSError as error:
            raise StoreError(
                f"a store is already at {self.path!r}; remove it or use `lcl prepare --force`"
            ) from error


def _npy_header(dtype: np.dtype, length: int) -> bytes:
    """The .npy 1.0 header of a flat array, padded to _HEADER_BYTES."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({length},), }}"
    body = text.encode("latin1").ljust(_HEADER_BYTES - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body
