"""Near-duplicates: of documents that are almost the same, the first stays and the rest go.

    documents ->  signature of each  ->  the kept ones' index: is one like it there?
                                             yes -> dropped, counted      no -> kept, indexed

    A "the cat sat on the mat today"    kept
    B "the cat sat on the mat tonight"  near A: dropped
    C "a dog"                           kept

Done BEFORE the split into train and held-out, over the whole domain: no kept document has a near
copy (as far as the measure sees) among the kept, so none straddles the split. (The registry's
corpora are split when they are built: there the copy that comes first, in the order train then
held-out, stays, whichever side the others are on.) Two measures:

    MinHash(0.8)     share of common runs of five words (Jaccard), estimated from 128 minima of
                     hashes; Broder 1997. By the package rensa (Rust, MIT): pip install 'lcl[dedup]'
    Embedding(0.95)  cosine of embeddings: hashed word and word-pair counts, or your own callable.
                     Compared with every kept document: exact, and quadratic; up to ~ 200k documents

Memory: 512 bytes (MinHash) or 4 x 256 bytes (Embedding) a kept document, and the index.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

# Where words are not set apart by blanks, each character is a word.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
REASON = "near duplicate"
# Of a giant document only so many characters are looked at: its words must not fill the memory.
_LOOK_AT = 1 << 22


class DedupError(ValueError):
    """A near-duplicate stage that cannot be; one line with the mend."""


class Index(Protocol):
    """The kept documents' signatures."""

    def add_new(self, signatures: np.ndarray) -> np.ndarray:
        """Adds, in order, those that are near none that is there.

        Args:
            signatures: [N, width].

        Returns:
            bool [N]: True where one near it was there already (it was not added).
        """
        ...

    def add_kept(self, signatures: np.ndarray) -> None:
        """Adds all of them without a look: an earlier process kept them."""
        ...


class NearDuplicates(Protocol):
    """What `prepare(near_duplicates=...)` takes."""

    in_workers: bool

    def signatures(self, texts: Sequence[str]) -> np.ndarray:
        """One row a text; a function of each text alone."""
        ...

    def index(self) -> Index:
        """An empty index."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Plain values; part of the store's fingerprint."""
        ...


@dataclasses.dataclass(frozen=True)
class MinHash:
    """Near if the estimated Jaccard similarity of their runs of words reaches the threshold.

    The estimate's standard deviation is sqrt(J (1 - J) / num_hashes): .035 at J = .8. Candidates
    come from banding: signatures that agree in all hashes of some band; bands are as long as finds
    99.5% of the pairs at the threshold (and more above it).

    Attributes:
        threshold: share of common runs, 0 < t <= 1.
        num_hashes: minima a document.
        num_words: length of a run.
        seed: of the hashes.

    >>> MinHash(0.8).bands()
    (21, 6)
    """

    threshold: float = 0.8
    num_hashes: int = 128
    num_words: int = 5
    seed: int = 1

    in_workers = True

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise DedupError(f"threshold {self.threshold} must lie between 0 and 1: say 0.8")
        if self.num_hashes < 16 or self.num_words < 1:
            raise DedupError(
                f"MinHash(num_hashes={self.num_hashes}, num_words={self.num_words}) is too small; "
                "use at least 16 hashes and runs of 1 word"
            )
        _rensa()

    def bands(self) -> tuple[int, int]:
        """(number of bands, hashes in each): the longest that find 99.5% at the threshold."""
        for rows in range(min(16, self.num_hashes), 1, -1):
            bands = self.num_hashes // rows
            if 1.0 - (1.0 - self.threshold**rows) ** bands >= 0.995:
                return bands, rows
        return self.num_hashes, 1

    def signatures(self, texts: Sequence[str]) -> np.ndarray:
        """The minima: uint32 [N, num_hashes]."""
        rensa = _rensa()
        rows = np.empty((len(texts), self.num_hashes), np.uint32)
        for row, text in zip(rows, texts, strict=True):
            hashes = rensa.RMinHash(num_perm=self.num_hashes, seed=self.seed)
            hashes.update(_runs(text, self.num_words))
            row[:] = hashes.digest()
        return rows

    def index(self) -> _BandIndex:
        return _BandIndex(self)

    def settings(self) -> dict[str, Any]:
        # Another version of the algorithm gives other minima; so may other estimates.
        version = int(_rensa().RMinHash.ALGORITHM_VERSION)
        return {"near_duplicates": "minhash", "rensa": version, **dataclasses.asdict(self)}


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise DedupError(
            "near-duplicate removal by MinHash needs the package rensa: pip install 'lcl[dedup]'"
        ) from error
    return rensa


def _runs(text: str, num_words: int) -> list[str]:
    """The distinct runs of words of a text, case ignored; the whole of a shorter text.

    >>> sorted(_runs("To be or not to be", 3))
    ['be or not', 'not to be', 'or not to', 'to be or']
    """
    words = _WORD.findall(text[:_LOOK_AT].lower())
    if len(words) < num_words:
        return [" ".join(words) or text[:_LOOK_AT]]
    return list(
        {" ".join(run) for run in zip(*(words[i:] for i in range(num_words)), strict=False)}
    )


class _Rows:
    """Rows of one width in one array that doubles when it is full."""

    def __init__(self) -> None:
        self._rows: np.ndarray | None = None
        self._size = 0

    @property
    def array(self) -> np.ndarray:
        return self._rows[: self._size] if self._rows is not None else np.empty((0, 0))

    def append(self, row: np.ndarray) -> int:
        if self._rows is None:
            self._rows = np.empty((64, len(row)), row.dtype)
        if self._size == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[self._size] = row
        self._size += 1
        return self._size - 1


class _BandIndex:
    """Documents by the bytes of each band of their signatures."""

    def __init__(self, minhash: MinHash):
        self._layout = minhash.bands()
        # A count of equal minima, against the same share of their number.
        self._enough = minhash.threshold * minhash.num_hashes - 1e-9
        self._rows = _Rows()
        self._bands: dict[bytes, list[int]] = {}

    def add_new(self, signatures: np.ndarray) -> np.ndarray:
        near = np.zeros(len(signatures), bool)
        for i, signature in enumerate(signatures):
            keys = self._keys(signature)
            found = {row for key in keys for row in self._bands.get(key, ())}
            if found:
                equal = self._rows.array[sorted(found)] == signature
                if equal.sum(axis=1).max() >= self._enough:
                    near[i] = True
                    continue
            self._add(signature, keys)
        return near

    def add_kept(self, signatures: np.ndarray) -> None:
        for signature in signatures:
            self._add(signature, self._keys(signature))

    def _add(self, signature: np.ndarray, keys: list[bytes]) -> None:
        row = self._rows.append(signature)
        for key in keys:
            self._bands.setdefault(key, []).append(row)

    def _keys(self, signature: np.ndarray) -> list[bytes]:
        bands, rows = self._layout
        return [
            band.to_bytes(2, "little") + signature[band * rows : (band + 1) * rows].tobytes()
            for band in range(bands)
        ]


@dataclasses.dataclass(frozen=True)
class Embedding:
    """Near if the cosine of their embeddings reaches the threshold.

    Attributes:
        threshold: cosine, 0 < t <= 1.
        embed: texts -> float [N, D], a function of each text alone; rows need no normalisation.
            Default: `hashed_embedding`. It runs in the main process.
    """

    threshold: float = 0.95
    embed: Callable[[Sequence[str]], np.ndarray] | None = None

    in_workers = False

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise DedupError(f"threshold {self.threshold} must lie between 0 and 1: say 0.95")

    def signatures(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 [N, D]."""
        rows = np.asarray((self.embed or hashed_embedding)(texts), np.float32)
        if rows.ndim != 2 or len(rows) != len(texts) or not np.isfinite(rows).all():
            raise DedupError(
                f"embed gave {rows.dtype} {rows.shape} for {len(texts)} texts; it must give one "
                "finite row a text"
            )
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    def index(self) -> _CosineIndex:
        return _CosineIndex(self.threshold)

    def settings(self) -> dict[str, Any]:
        embed = self.embed or hashed_embedding
        name = f"{getattr(embed, '__module__', '?')}:{getattr(embed, '__qualname__', repr(embed))}"
        return {"near_duplicates": "embedding", "threshold": self.threshold, "embed": name}


class _CosineIndex:
    """All kept unit vectors; exact, in one matrix product for a block of documents."""

    def __init__(self, threshold: float):
        self._threshold = threshold - 1e-5  # Rounding: a copy has a cosine of 1 - 1e-7.
        self._rows = _Rows()

    def add_new(self, signatures: np.ndarray) -> np.ndarray:
        near = np.zeros(len(signatures), bool)
        if not len(signatures):
            return near
        kept = self._rows.array
        if len(kept):
            near = (signatures @ kept.T).max(axis=1) >= self._threshold
        inside = signatures @ signatures.T >= self._threshold
        for i in np.flatnonzero(~near):
            near[i] = bool((inside[i, :i] & ~near[:i]).any())
            if not near[i]:
                self._rows.append(signatures[i])
        return near

    def add_kept(self, signatures: np.ndarray) -> None:
        for signature in signatures:
            self._rows.append(signature)


def hashed_embedding(texts: Sequence[str], num_dims: int = 256) -> np.ndarray:
    """Words and pairs of words, hashed to signed coordinates: float32 [N, num_dims].

    Each counts log(1 + how often); the sign, from the hash, keeps the products of different words
    at zero on average (Weinberger et al. 2009, 0902.2206). No statistics of the corpus: a function
    of the text alone.

    >>> a, b, c = hashed_embedding(["one two three", "one two three", "uno dos tres"])
    >>> bool((a == b).all()), abs(float(a @ c)) < 0.3 * float(a @ a)
    (True, True)
    """
    rows = np.zeros((len(texts), num_dims), np.float32)
    for row, text in zip(rows, texts, strict=True):
        words = _WORD.findall(text[:_LOOK_AT].lower())
        counts = collections.Counter(words)
        counts.update(f"{a} {b}" for a, b in zip(words, words[1:], strict=False))
        for word, count in counts.items():
            code = zlib.crc32(word.encode("utf-8", "surrogatepass"))
            row[code % num_dims] += math.log1p(count) * (1.0 if code >> 31 else -1.0)
    return rows


def parse_near_duplicates(text: str) -> NearDuplicates:
    """`minhash[:THRESHOLD]` or `embedding[:THRESHOLD]` of the command line.

    >>> parse_near_duplicates("embedding:0.9")
    Embedding(threshold=0.9, embed=None)
    """
    name, colon, value = text.partition(":")
    kinds: dict[str, Any] = {"minhash": MinHash, "embedding": Embedding}
    if name not in kinds:
        raise DedupError(f"unknown near-duplicate measure {text!r}; use minhash or embedding[:T]")
    try:
        threshold = [float(value)] if colon else []
    except ValueError as error:
        raise DedupError(f"near-duplicate threshold {value!r} is no number; say 0.8") from error
    return kinds[name](*threshold)
