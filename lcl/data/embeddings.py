"""Embeddings: one vector a document, so that documents about the same thing point the same way.

Four kinds, each a frozen object with `embed(store)` and `settings()`:

    HashedTfidf       built in, no weights: the n-grams of a document's tokens, rare ones more
    Precomputed       a .npy file: the model's own states (`mean_pooled`), or anybody's vectors
    FromFunction      a function of the store, for a script
    SentenceEncoder   a sentence encoder on the disk (extra `sentence`)

Before they are compared, vectors are rounded to small whole numbers (`quantise`). The products of
such vectors are exact in float32 on any machine, in any block size and in any order of summation:
which documents are neighbours is a table of integers like everything in this room.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from lcl.data.fingerprints import fingerprint, new_digest
from lcl.data.ordering import named_key

_BLOCK_TOKENS = 1 << 21  # tokens that are hashed at once
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_BYTE_VOCABULARY = 1024  # vocabularies up to this size are bytes or characters, not words
_LARGEST_NORM = 4096.0  # products of vectors no longer than this are below 2**24: exact in float32


class Embedder(Protocol):
    """Gives every document of a store a vector."""

    def embed(self, store: Any, *, start: int = 0) -> Iterator[np.ndarray]:
        """Yield float[n, D] blocks in document order, from document `start` on."""

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the vectors, as plain values."""


@dataclasses.dataclass(frozen=True)
class HashedTfidf:
    """Hashed TF-IDF under a sparse random projection: no weights, no vocabulary, no dense matrix.

    Every n-gram of tokens is hashed to a bucket. Its weight in a document is (1 + log count) times
    log((1 + N) / (1 + documents that have it)) + 1. Each bucket goes, with a keyed sign, to
    `num_signs` keyed places of the vector: a sparse Johnson-Lindenstrauss transform (Kane and
    Nelson 2014), so the product of two vectors is that of the TF-IDF vectors give or take
    1 / sqrt(dim). Two passes over the tokens, in blocks; memory does not grow with the store.

        tokens      the cat the dog        1-grams, buckets   5 2 5 7    counts 5:2 2:1 7:1
        projection  bucket 5 -> +3 -0,  bucket 2 -> -1 +3,  ...          (num_signs 2)

    Attributes:
        dim: D, width of the vectors. The noise of a cosine, 1 / sqrt(D), must be well below those
            of related documents: among 12,732 sections of manuals, 30% of the ten nearest were of
            the same page at 256, 47% at 1024 and 51% at 2048. Search takes time in proportion.
        ngrams: lengths of the n-grams; None: (4, 5) over bytes or characters (vocabularies up to
            1024), (1, 2) over words.
        num_tokens: tokens read of each document, from its start; the paper reads 512 (words).
        num_buckets: of the hash, a power of two.
        num_signs: places to which a bucket goes.
        seed: of the hash and the signs.
    """

    dim: int = 1024
    ngrams: Sequence[int] | None = None
    num_tokens: int = 4096
    num_buckets: int = 1 << 20
    num_signs: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dim < 1 or self.num_signs < 1 or self.num_tokens < 1:
            raise ValueError(
                f"HashedTfidf has dim {self.dim}, num_signs {self.num_signs} and num_tokens "
                f"{self.num_tokens}; give 1 or more of each"
            )
        if self.num_buckets < 2 or self.num_buckets & (self.num_buckets - 1):
            raise ValueError(f"num_buckets is {self.num_buckets}; give a power of two")
        if self.ngrams is not None and (not self.ngrams or min(self.ngrams) < 1):
            raise ValueError(f"ngrams is {self.ngrams!r}; give lengths of 1 or more, like (1, 2)")

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the vectors."""
        values = dataclasses.asdict(self)
        return {"embedder": "hashed tf-idf", **values, "ngrams": list(self.ngrams or ())}

    def embed(self, store: Any, *, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the vectors, float32[n, dim], a block of documents at a time.

        Args:
            store: has `tokens`, `offsets`, `num_documents`, `vocab_size`.
            start: the first document to give; rarity is counted over all of them.
        """
        num_documents = store.num_documents
        frequency = np.zeros(self.num_buckets, np.int64)
        for first, last in self._blocks(store, 0):
            _, bucket, _ = self._counts(store, first, last)
            frequency += np.bincount(bucket, minlength=self.num_buckets)
        rarity = np.log((1 + num_documents) / (1 + frequency)) + 1.0
        place, sign = self._projection()
        for first, last in self._blocks(store, start):
            document, bucket, count = self._counts(store, first, last)
            weight = (1.0 + np.log(count)) * rarity[bucket]
            vectors = np.zeros((last - first) * self.dim)
            for j in range(self.num_signs):
                cell = document * self.dim + place[bucket, j]
                vectors += np.bincount(cell, weight * sign[bucket, j], minlength=len(vectors))
            yield vectors.reshape(-1, self.dim).astype(np.float32)

    def _blocks(self, store: Any, start: int) -> Iterator[tuple[int, int]]:
        """Ranges of documents of about _BLOCK_TOKENS read tokens each."""
        read = np.minimum(np.diff(store.offsets[start:]), self.num_tokens)
        block = (np.cumsum(read) - read) // _BLOCK_TOKENS
        borders = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(read)]
        pairs = zip(borders[:-1], borders[1:], strict=True)
        return ((start + a, start + b) for a, b in pairs if b > a)

    def _counts(
        self, store: Any, first: int, last: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document - first, bucket, how often) of every n-gram kind, int64 each, sorted."""
        starts = np.asarray(store.offsets[first : last + 1], np.int64)
        length = np.minimum(np.diff(starts), self.num_tokens)
        ends = np.cumsum(length)
        document = np.repeat(np.arange(last - first), length)
        within = np.arange(ends[-1]) - np.repeat(ends - length, length)
        tokens = np.asarray(store.tokens[np.repeat(starts[:-1], length) + within])
        remaining = np.repeat(length, length) - within
        del within
        tokens = tokens.astype(np.uint64)
        keys = []
        for n in self._lengths(store.vocab_size):
            if len(tokens) < n:
                continue
            size = len(tokens) - n + 1
            hashed = np.full(size, named_key("n-gram", self.seed, n), np.uint64)
            for offset in range(n):
                hashed = (hashed ^ tokens[offset : offset + size]) * _MULTIPLIER
                hashed ^= hashed >> np.uint64(29)
            hashed *= _MIX
            hashed >>= np.uint64(64 - (self.num_buckets.bit_length() - 1))
            whole = remaining[:size] >= n  # an n-gram does not run into the next document
            keys.append(document[:size][whole] * self.num_buckets + hashed[whole].astype(np.int64))
        key = np.sort(np.concatenate(keys)) if keys else np.zeros(0, np.int64)
        begins = np.flatnonzero(np.diff(key, prepend=-1))
        count = np.diff(begins, append=len(key))
        document, bucket = np.divmod(key[begins], self.num_buckets)
        return document, bucket, count

    def _lengths(self, vocab_size: int) -> Sequence[int]:
        if self.ngrams is not None:
            return self.ngrams
        return (4, 5) if vocab_size <= _BYTE_VOCABULARY else (1, 2)

    def _projection(self) -> tuple[np.ndarray, np.ndarray]:
        """Places int64[num_buckets, num_signs] and signs float32 of the same shape."""
        shape = (self.num_buckets, self.num_signs)
        key = named_key("projection", self.seed, self.dim, self.num_signs, bits=128)
        words = np.random.Philox(key=key).random_raw(math.prod(shape)).reshape(shape)
        sign = np.where(words >> np.uint64(63), np.float32(1), np.float32(-1))
        return ((words >> np.uint64(16)) % np.uint64(self.dim)).astype(np.int64), sign


@dataclasses.dataclass(frozen=True)
class Precomputed:
    """Vectors in a .npy file, one row a document of the store, in its order.

    The door for the model's own states: `np.save(path, mean_pooled(hidden_fn, store))`.

    Attributes:
        path: float[N, D], memory-mapped.
    """

    path: str

    def settings(self) -> dict[str, Any]:
        """Return a hash of the file's content: the same vectors under another name are the same."""
        digest = new_digest()
        vectors = self._open()
        for first in range(0, len(vectors), 65536):
            digest.update(np.ascontiguousarray(vectors[first : first + 65536]).tobytes())
        shape = [str(vectors.dtype), *vectors.shape]
        return {"embedder": "precomputed", "content": fingerprint(digest.digest(), shape)}

    def _open(self) -> np.ndarray:
        try:
            vectors = np.load(self.path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot read embeddings from {self.path!r} ({error}); write them with np.save"
            ) from error
        return vectors

    def embed(self, store: Any, *, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the file's rows; refuses a file made for another store."""
        yield from _in_blocks(self._open(), store, f"the embeddings in {self.path!r}", start)


@dataclasses.dataclass(frozen=True)
class FromFunction:
    """Vectors that a function of the store computes.

    Attributes:
        function: store -> float[N, D].
        name: stands for the function in fingerprints: give another one when it changes.
    """

    function: Callable[[Any], Any]
    name: str

    def settings(self) -> dict[str, Any]:
        """Return the name; a function's code cannot be hashed."""
        return {"embedder": "function", "name": self.name}

    def embed(self, store: Any, *, start: int = 0) -> Iterator[np.ndarray]:
        """Yield what the function returns."""
        vectors = np.asarray(self.function(store))
        yield from _in_blocks(vectors, store, f"what {self.name!r} returned", start)


@dataclasses.dataclass(frozen=True)
class SentenceEncoder:
    """A sentence encoder through `sentence-transformers` (extra `sentence`), e.g. Contriever.

    Attributes:
        path: a folder with the model, or a name that the library knows how to find.
        num_tokens: tokens of our tokenizer that are decoded and given to it; it cuts further.
        batch_size: documents at once.
    """

    path: str
    num_tokens: int = 4096
    batch_size: int = 64

    def settings(self) -> dict[str, Any]:
        """Return the settings; the model is known by its path only."""
        return {"embedder": "sentence encoder", "path": self.path, "num_tokens": self.num_tokens}

    def embed(self, store: Any, *, start: int = 0) -> Iterator[np.ndarray]:
        """Yield the encoder's vectors, float32[n, D]."""
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(
                "SentenceEncoder needs sentence-transformers; `pip install lcl[sentence]`, or use "
                "HashedTfidf()"
            ) from error
        model = SentenceTransformer(self.path)
        tokenizer = store.tokenizer()
        for first in range(start, store.num_documents, self.batch_size):
            last = min(first + self.batch_size, store.num_documents)
            # Without the leading bos; a document's eos has no text either.
            texts = [
                tokenizer.decode(store.document(i)[1 : 1 + self.num_tokens])
                for i in range(first, last)
            ]
            yield np.asarray(model.encode(texts, show_progress_bar=False), np.float32)


def _in_blocks(vectors: np.ndarray, store: Any, what: str, start: int) -> Iterator[np.ndarray]:
    if vectors.ndim != 2 or len(vectors) != store.num_documents:
        raise ValueError(
            f"{what} has the shape {list(vectors.shape)}; the store has {store.num_documents} "
            "documents: give [documents, D]"
        )
    for first in range(start, len(vectors), 65536):
        yield np.asarray(vectors[first : first + 65536])


def mean_pooled(
    hidden_fn: Callable[[np.ndarray, np.ndarray], Any],
    store: Any,
    *,
    num_tokens: int = 512,
    batch_size: int = 64,
) -> np.ndarray:
    """Return the mean of a model's states over each document's first tokens, float32[N, D].

    The paper's encoder: mean pool of the last layer over the first 512 tokens. Every batch has the
    same shape, so a jitted `hidden_fn` is compiled once.

    Args:
        hidden_fn: (tokens int32[B, T], segment_ids int32[B, T], 1 where there is a token and 0 at
            padding) -> states float[B, T, D]. This room knows no model: give it, say,
            `jax.jit(lambda tokens, ids: model.apply({"params": p}, tokens, positions, ids,
            method="hidden"))`.
        store: has `document(i)` and `num_documents`.
        num_tokens: T.
        batch_size: B.

    Example:
        >>> mean_pooled(lambda tokens, ids: tokens[..., None], store)  # doctest: +SKIP
        array([[104.25], ...], dtype=float32)
    """
    means = []
    for first in range(0, store.num_documents, batch_size):
        last = min(first + batch_size, store.num_documents)
        tokens = np.zeros((batch_size, num_tokens), np.int32)
        segment_ids = np.zeros((batch_size, num_tokens), np.int32)
        for row, i in enumerate(range(first, last)):
            document = store.document(i)[:num_tokens]
            tokens[row, : len(document)] = document
            segment_ids[row, : len(document)] = 1
        states = np.asarray(hidden_fn(tokens, segment_ids), np.float32)
        total = np.einsum("btd,bt->bd", states, segment_ids.astype(np.float32))
        mean = total / np.maximum(segment_ids.sum(axis=1, keepdims=True), 1)
        means.append(mean[: last - first].astype(np.float32))
    return np.concatenate(means) if means else np.zeros((0, 1), np.float32)


def quantise(vectors_ND: Any) -> np.ndarray:
    """Round vectors to int8, each with its own scale: directions to about half a degree.

    A cosine moves by some 0.001. In return products of vectors are whole numbers below 2**24, so
    float32 (and bfloat16 inputs on a TPU) computes them without rounding, whatever the order of the
    sum: neighbours do not depend on the machine, the block size or the library.

    Args:
        vectors_ND: float[N, D], finite; their lengths do not matter. A zero vector stays zero: it
            has the similarity 0 to everything.

    Returns:
        int8[N, D].

    Example:
        >>> quantise([[0.5, -1.0, 0.0]]).tolist()
        [[64, -127, 0]]
    """
    vectors = np.asarray(vectors_ND, np.float64)
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if wrong.size:
        raise ValueError(f"the embedding of document {wrong[0]} is not finite; mend the encoder")
    largest = np.abs(vectors).max(axis=1, initial=0.0, keepdims=True)
    length = np.sqrt(np.square(vectors).sum(axis=1, keepdims=True))
    # Rounding may lengthen a vector by at most sqrt(D) / 2.
    room = _LARGEST_NORM - math.sqrt(vectors.shape[1]) / 2
    scale = np.minimum(127.0 / np.maximum(largest, 1e-300), room / np.maximum(length, 1e-300))
    return np.where(largest > 0, np.rint(vectors * scale), 0.0).astype(np.int8)
