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
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcl.data.store_writer import FORMAT_VERSION, META_FILE, SPLITS, StoreError, StoreWriter
from lcl.data.tokenizers import Tokenizer, load_tokenizer

__all__ = ["FORMAT_VERSION", "META_FILE", "SPLITS", "Data", "Store", "StoreError", "StoreWriter"]


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
