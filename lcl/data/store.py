"""The tokenised store: every token of a domain in one flat array, documents as offsets into it.

    <root>/<domain>/<split>/          split is train or heldout
        tokens.npy                    uint16 (vocabularies up to 65536) or uint32, flat
        offsets.npy                   int64[documents + 1]
        document_ids.npy              int64[documents]    ids of the corpus, kept for provenance
        document_bytes.npy            int64[documents]    UTF-8 bytes of the text
        sources.npy                   int32[documents]    index into meta.json's source_names
        token_num_bytes.npy           int32[vocab_size]   the tokenizer's table
        extra_<name>.npy              float32[documents]  e.g. extra_language_share.npy
        meta.json                     tokenizer, fingerprints, ledger, licence, settings

A stored document is [bos] + tokens + [eos]:

    tokens   B h e l l o E B y o E
             ^             ^       ^
    offsets  0             7       11        lengths 7, 4

so a document of n stored tokens has n - 1 transitions (input i, target i + 1). Everything is
memory-mapped: opening costs no time and a terabyte store needs no memory. A store is written under
another name and renamed when it is whole, so a store that can be seen is complete.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import shutil
from collections.abc import Mapping
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from lcl.data.fingerprints import fingerprint, new_digest
from lcl.data.tokenizers import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "heldout")
META_FILE = "meta.json"

_HEADER_BYTES = 128  # Fixed, so that the shape can be written when it is known: at the end.
_CHUNK_CHARACTERS = 1 << 20  # Longer texts are encoded piece by piece.


class StoreError(ValueError):
    """A store that is missing or unfit; the message is one line and says the mend."""


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """One domain's tokens of one split, memory-mapped.

    Attributes:
        path: its directory.
        meta: the content of meta.json.
    """

    path: str
    meta: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Opens the store at `path`; arrays are mapped when they are first asked for."""
        path = os.fspath(path)
        try:
            with open(os.path.join(path, META_FILE), encoding="utf-8") as file:
                meta = json.load(file)
        except OSError as error:
            raise StoreError(
                f"no store at {path!r} ({error.strerror}); make one with `lcl prepare`"
            ) from error
        except ValueError as error:
            raise StoreError(
                f"{META_FILE} of the store {path!r} is torn; run `lcl prepare --force` again"
            ) from error
        if meta.get("format") != FORMAT_VERSION:
            raise StoreError(
                f"store {path!r} has format {meta.get('format')!r}, this version reads "
                f"{FORMAT_VERSION}; run `lcl prepare --force` again"
            )
        return cls(path, meta)

    def _array(self, name: str, *, mmap: bool = False) -> np.ndarray:
        try:
            return np.load(os.path.join(self.path, name), mmap_mode="r" if mmap else None)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{name} of the store {self.path!r} is missing or torn; "
                "run `lcl prepare --force` again"
            ) from error

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """All stored tokens, uint16 or uint32 [num_tokens], memory-mapped, read-only."""
        return self._array("tokens.npy", mmap=True)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Where each document begins, and the end: int64[num_documents + 1]."""
        return self._array("offsets.npy")

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Stored tokens of each document, bos and eos included: int64[num_documents]."""
        return np.diff(self.offsets)

    @functools.cached_property
    def document_ids(self) -> np.ndarray:
        """Ids of the documents: int64[num_documents]."""
        return self._array("document_ids.npy")

    @functools.cached_property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document's text: int64[num_documents]."""
        return self._array("document_bytes.npy")

    @functools.cached_property
    def sources(self) -> np.ndarray:
        """Index into `source_names` of each document: int32[num_documents]."""
        return self._array("sources.npy")

    @functools.cached_property
    def token_num_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, specials 0: int32[vocab_size]."""
        return self._array("token_num_bytes.npy")

    def extra(self, name: str) -> np.ndarray:
        """A number for each document that the corpus recorded: float32[num_documents]."""
        if name not in self.meta["extras"]:
            known = ", ".join(self.meta["extras"]) or "none"
            raise StoreError(f"store {self.path!r} has no extra {name!r}; it has {known}")
        return self._array(f"extra_{name}.npy")

    @property
    def num_documents(self) -> int:
        return int(self.meta["num_documents"])

    @property
    def num_tokens(self) -> int:
        """Stored tokens, bos and eos included."""
        return int(self.meta["num_tokens"])

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return int(self.meta["num_bytes"])

    @property
    def vocab_size(self) -> int:
        return int(self.meta["vocab_size"])

    @property
    def bos_id(self) -> int:
        return int(self.meta["bos_id"])

    @property
    def eos_id(self) -> int:
        return int(self.meta["eos_id"])

    @property
    def domain(self) -> str:
        return str(self.meta["domain"])

    @property
    def split(self) -> str:
        return str(self.meta["split"])

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer, the corpus with its settings, and every stored token."""
        return str(self.meta["fingerprint"])

    @property
    def tokenizer_fingerprint(self) -> str:
        return str(self.meta["tokenizer_fingerprint"])

    @property
    def tokenizer_spec(self) -> str:
        """What `load_tokenizer` takes; files are named by their place in the store's root."""
        kind, _, path = str(self.meta["tokenizer_spec"]).partition(":")
        root = os.path.dirname(os.path.dirname(os.path.abspath(self.path)))
        return f"{kind}:{os.path.join(root, path)}" if path else kind

    @property
    def source_names(self) -> list[str]:
        return list(self.meta["source_names"])

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer that made this store; refuses another one under its name."""
        tokenizer = load_tokenizer(self.tokenizer_spec)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise StoreError(
                f"tokenizer {self.tokenizer_spec!r} changed since the store {self.path!r} was "
                "made; put the old file back or run `lcl prepare --force`"
            )
        return tokenizer

    def document(self, index: int) -> np.ndarray:
        """Stored tokens of one document, [bos] + tokens + [eos]: a read-only view."""
        if not 0 <= index < self.num_documents:
            raise IndexError(
                f"document {index} of the store {self.path!r}: it has {self.num_documents}"
            )
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class StoreWriter:
    """Writes one store, a document at a time, and publishes it in one rename.

    Memory does not grow with the text: tokens go straight to the disk, a document of hundreds of
    megabytes in pieces. If the block is left by an exception, or the process is killed, nothing is
    visible under `path`.

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
        self._partial = f"{self.path}.partial-{os.getpid()}"
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._offsets, self._ids, self._bytes, self._sources = [0], [], [], []  # type: ignore[var-annotated]
        self._source_names: dict[str, int] = {}
        self._extras: dict[str, list[float]] = {}
        self._digest = new_digest()
        self._file: BinaryIO | None = None

    @property
    def num_documents(self) -> int:
        return len(self._ids)

    @property
    def num_tokens(self) -> int:
        return self._offsets[-1]

    def __enter__(self) -> StoreWriter:
        shutil.rmtree(self._partial, ignore_errors=True)
        os.makedirs(self._partial)
        self._file = open(os.path.join(self._partial, "tokens.npy"), "wb")
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
        tokenizer = self.tokenizer
        num_tokens = self._write(np.asarray([tokenizer.bos_id]))
        num_bytes = 0
        for piece in _pieces(text) if tokenizer.can_chunk else (text,):
            num_bytes += len(piece.encode("utf-8"))
            num_tokens += self._write(tokenizer.encode(piece))
        num_tokens += self._write(np.asarray([tokenizer.eos_id]))
        self._offsets.append(self._offsets[-1] + num_tokens)
        self._ids.append(document_id)
        self._bytes.append(num_bytes)
        self._sources.append(self._source_names.setdefault(source, len(self._source_names)))
        for name, value in (extras or {}).items():
            self._extras.setdefault(name, []).append(float(value))
        return num_tokens

    def _write(self, ids: np.ndarray) -> int:
        assert self._file is not None, "use StoreWriter in a with block"
        data = np.ascontiguousarray(ids, dtype=self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        return len(ids)

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
            shutil.rmtree(self._partial, ignore_errors=True)

    def _publish(self) -> None:
        assert self._file is not None
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
        for name, values in self._extras.items():
            assert len(values) == self.num_documents, f"extra {name} is missing for some documents"
            arrays[f"extra_{name}"] = np.asarray(values, dtype=np.float32)
        for name, array in arrays.items():
            np.save(os.path.join(self._partial, f"{name}.npy"), array)
            self._digest.update(array.tobytes())
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


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the stores are: a root directory with one folder a domain.

    Attributes:
        root: the directory that `lcl prepare --root ROOT` filled.
    """

    root: str

    def domains(self) -> list[str]:
        """Names of the domains under the root, sorted."""
        try:
            names = os.listdir(self.root)
        except OSError:
            return []
        return sorted(
            name
            for name in names
            if not name.startswith(".")
            and ".partial-" not in name
            and any(
                os.path.exists(os.path.join(self.root, name, split, META_FILE)) for split in SPLITS
            )
        )

    def open(self, domain: str, split: str = "train") -> Store:
        """Opens one domain's store.

        Raises:
            StoreError: unknown domain (names the nearest), unknown split, or a root whose stores
                were made with different tokenizers.
        """
        if split not in SPLITS:
            raise StoreError(f"unknown split {split!r}; use {' or '.join(SPLITS)}")
        known = self.domains()
        if domain not in known:
            near = difflib.get_close_matches(domain, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            there = f"there are {', '.join(known)}" if known else "there are none yet"
            raise StoreError(
                f"unknown domain {domain!r} in {self.root!r}{hint} ({there}; "
                f"`lcl prepare CORPUS --root {self.root}` makes more)"
            )
        self._one_tokenizer()
        return Store.open(os.path.join(self.root, domain, split))

    def tokenizer(self) -> Tokenizer:
        """The one tokenizer of all stores under the root."""
        return self._one_tokenizer().tokenizer()

    def _one_tokenizer(self) -> Store:
        """Checks that all stores share one tokenizer; returns one of the stores."""
        stores = {
            f"{domain}/{split}": Store.open(os.path.join(self.root, domain, split))
            for domain in self.domains()
            for split in SPLITS
            if os.path.exists(os.path.join(self.root, domain, split, META_FILE))
        }
        if not stores:
            raise StoreError(f"no store in {self.root!r}; make one with `lcl prepare`")
        first_name, first = next(iter(stores.items()))
        for name, store in stores.items():
            if store.tokenizer_fingerprint != first.tokenizer_fingerprint:
                raise StoreError(
                    f"stores in {self.root!r} were made with different tokenizers: {first_name} "
                    f"with {first.meta['tokenizer_spec']}, {name} with "
                    f"{store.meta['tokenizer_spec']}; prepare them again into one root"
                )
        return first


def _pieces(text: str) -> list[str] | tuple[str, ...]:
    r"""Cuts a very long text where a line begins with a letter: there, tokens do not cross.

    "one\n two\nthree"  ->  "one\n two\n" | "three"        (had it been a million characters)
    """
    if len(text) <= _CHUNK_CHARACTERS:
        return (text,)
    pieces, start = [], 0
    while len(text) - start > _CHUNK_CHARACTERS:
        end = start + _CHUNK_CHARACTERS
        cut = text.rfind("\n", start, end)
        while cut > start and text[cut + 1 : cut + 2].isspace():
            cut = text.rfind("\n", start, cut)
        cut = cut + 1 if cut > start else end
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def _npy_header(dtype: np.dtype, length: int) -> bytes:
    """The .npy 1.0 header of a flat array, padded to _HEADER_BYTES."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({length},), }}"
    body = text.encode("latin1").ljust(_HEADER_BYTES - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body
