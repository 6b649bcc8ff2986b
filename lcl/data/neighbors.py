"""Nearest neighbours of documents: exact blocked top-k in JAX, and near-duplicates told apart.

    vectors [N, D]     queries, a block of rows      x     all documents, block after block
                       similarities [Q, B]           ->    best K so far [Q, K]
                       |  group maxima: only the K best groups of columns can hold the K best
                       v
                       ids [N, K], similarity [N, K]      nearest first, ties to the lowest number

Never more than Q x B similarities exist. JAX is imported when neighbours are computed, not with
this module: this is the one place of the room that uses it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

INDEXES = ("exact", "approximate", "faiss")
FAISS_WORTH_IT = 200_000  # documents; above, exact search takes minutes to hours on a CPU

_LOG = logging.getLogger(__name__)
_QUERIES = 1024  # rows whose neighbours are sought at once
_BASE = 16_384  # columns they are compared with at once
_GROUP = 64  # columns that share a maximum
_DEVICE_BYTES = 2 << 30  # vectors up to this size are put on the device once


class Neighbors(NamedTuple):
    """Lists, nearest first. ids: int32[N, K], -1 for none; similarity: float32[N, K], 0 there."""

    ids: np.ndarray
    similarity: np.ndarray


def nearest(vectors_ND: np.ndarray, num_neighbors: int, **options: Any) -> Neighbors:
    """Find the documents with the largest cosine to each document, itself apart.

    Args:
        vectors_ND: [N, D]. int8 from `lcl.data.embeddings.quantise`: every similarity is exact, the
            result the same on every machine. float: compared in float32 after normalising.
        num_neighbors: K.
        **options: see `nearest_in_blocks`.

    Returns:
        Neighbors with one row for each of the rows asked for; ties go to the lowest number.

    Example:
        >>> nearest(np.eye(3, dtype=np.float32)[[0, 1, 0, 0]], 2).ids.tolist()
        [[2, 3], [0, 2], [0, 3], [0, 2]]
    """
    blocks = list(nearest_in_blocks(vectors_ND, num_neighbors, **options))
    if not blocks:
        shape = (0, num_neighbors)
        return Neighbors(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
    return Neighbors(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def nearest_in_blocks(
    vectors_ND: np.ndarray,
    num_neighbors: int,
    *,
    index: str = "exact",
    rows: np.ndarray | None = None,
    among: np.ndarray | None = None,
    block: tuple[int, int] = (_QUERIES, _BASE),
) -> Iterator[Neighbors]:
    """Yield what `nearest` returns, some rows at a time: for what is kept as it is found.

    Args:
        vectors_ND: [N, D].
        num_neighbors: K.
        index: "exact"; "approximate": `lax.approx_max_k`, a TPU's own operation, recall 0.95 there
            (elsewhere exact); "faiss": clusters of documents, of which the nearest 8 are searched
            (extra `faiss`), for more than some 200,000 documents on a CPU.
        rows: int[R], the documents whose neighbours are sought; default all.
        among: bool[N], the documents that may be neighbours; default all.
        block: (queries, documents) compared at once; no part of the result.

    Raises:
        ValueError: vectors that are no [N, D] or not finite, K < 1, an unknown index, no faiss.
    """
    vectors = np.asarray(vectors_ND)
    if vectors.ndim != 2 or vectors.dtype.kind not in "fi":
        raise ValueError(f"vectors_ND is {vectors.dtype}{list(vectors.shape)}; give float[N, D]")
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors is {num_neighbors}; give 1 or more")
    check_index(index)
    num_documents = len(vectors)
    rows = np.arange(num_documents) if rows is None else np.asarray(rows, np.int64)
    allowed = np.ones(num_documents, bool) if among is None else np.asarray(among, bool)
    if index == "exact" and min(num_documents, len(rows)) > FAISS_WORTH_IT:
        _LOG.info("%d documents: index='faiss' is faster on a CPU, and nearly exact", num_documents)
    search = _faiss_search if index == "faiss" else functools.partial(_jax_search, index, block)
    inverse = _inverse_lengths(vectors)
    for ids, similarity in search(vectors, inverse, rows, allowed, num_neighbors):
        real = ids >= 0
        yield Neighbors(ids.astype(np.int32), np.where(real, similarity, 0).astype(np.float32))


def check_index(index: str) -> None:
    """Refuse an index that is unknown or not installed, in one line."""
    if index not in INDEXES:
        raise ValueError(f"index {index!r} is unknown; use {', '.join(INDEXES)}")
    if index == "faiss" and not importlib.util.find_spec("faiss"):
        raise ValueError("index 'faiss' needs faiss; `pip install lcl[faiss]`, or use 'exact'")


def _inverse_lengths(vectors: np.ndarray) -> np.ndarray:
    """1 / length of each vector, float32[N]; 0 for a zero vector. Refuses what is not finite."""
    inverse = np.zeros(len(vectors), np.float32)
    for first in range(0, len(vectors), 65536):
        part = np.asarray(vectors[first : first + 65536], np.float64)
        length = np.sqrt(np.square(part).sum(axis=1))
        wrong = np.flatnonzero(~np.isfinite(length))
        if wrong.size:
            raise ValueError(f"the vector of document {first + wrong[0]} is not finite")
        inverse[first : first + len(part)] = np.where(length > 0, 1 / np.maximum(length, 1e-300), 0)
    return inverse


def _jax_search(index, block, vectors, inverse, rows, allowed, num_neighbors):
    """Yield (ids int32[n, K], similarity float32[n, K]) of the rows in turn."""
    import jax
    import jax.numpy as jnp

    num_documents, dim = vectors.shape
    num_rows = min(block[0], _up(max(len(rows), 1), 8))
    num_columns = min(_up(block[1], _GROUP), _up(max(num_documents, 1), _GROUP))
    scale = np.where(allowed, inverse, np.nan).astype(np.float32)  # NaN: nobody's

    def columns(first: int) -> tuple[Any, Any]:
        part = _padded(vectors[first : first + num_columns], num_columns, 0)
        return part, _padded(scale[first : first + num_columns], num_columns, np.nan)

    starts = range(0, num_documents, num_columns)
    held = None
    if num_documents * dim * vectors.dtype.itemsize <= _DEVICE_BYTES:
        held = [jax.device_put(columns(first)) for first in starts]
    step = _step(num_neighbors, index == "approximate")
    for first in range(0, len(rows), num_rows):
        row = rows[first : first + num_rows]
        queries = jnp.asarray(_padded(np.asarray(vectors[row]), num_rows, 0))
        lengths = jnp.asarray(_padded(inverse[row], num_rows, 0.0))
        itself = jnp.asarray(_padded(row.astype(np.int32), num_rows, -1))
        best = (
            jnp.full((num_rows, num_neighbors), -1, jnp.int32),
            jnp.full((num_rows, num_neighbors), -jnp.inf, jnp.float32),
        )
        for number, start in enumerate(starts):
            base = held[number] if held is not None else columns(start)
            best = step(best, queries, lengths, itself, *base, np.int32(start))
        yield np.asarray(best[0])[: len(row)], np.asarray(best[1])[: len(row)]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(array: np.ndarray, size: int, value: Any) -> np.ndarray:
    """Every block has one shape, so there is one compilation."""
    if len(array) == size:
        return np.ascontiguousarray(array)
    out = np.full((size, *array.shape[1:]), value, array.dtype)
    out[: len(array)] = array
    return out


@functools.cache
def _step(num_neighbors: int, approximate: bool):
    """The compiled function: (best so far, queries, a block of documents) -> best."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    def largest(value):
        """(value, column) of the K largest of each row; equal ones as they stand."""
        width = value.shape[1]
        if approximate and width > num_neighbors:
            return lax.approx_max_k(value, num_neighbors, recall_target=0.95)
        if width <= num_neighbors * _GROUP * 2 or width % _GROUP:
            return lax.top_k(value, min(num_neighbors, width))
        # The K best are in the K groups with the best maxima: whatever is in another group has K
        # values that are better than it, or as good and earlier.
        grouped = value.reshape(value.shape[0], -1, _GROUP)
        _, group = lax.top_k(grouped.max(axis=2), num_neighbors)
        group = jnp.sort(group, axis=1)
        within = jnp.take_along_axis(grouped, group[:, :, None], axis=1)
        top, place = lax.top_k(within.reshape(value.shape[0], -1), num_neighbors)
        chosen = jnp.take_along_axis(group, place // _GROUP, axis=1)
        return top, chosen * _GROUP + place % _GROUP

    @jax.jit
    def step(best, queries, lengths, itself, base, scale, start):
        exact = queries.dtype == jnp.int8
        product = lax.dot_general(
            queries.astype(jnp.float32),
            base.astype(jnp.float32),
            (((1,), (1,)), ((), ())),
            # Small whole numbers are exact even as bfloat16; sums are in float32 either way.
            precision=lax.Precision.DEFAULT if exact else lax.Precision.HIGHEST,
        )
        # The product of the two scales first: what i is to j, j is to i, to the last bit.
        value = product * (lengths[:, None] * scale[None, :])
        place = jnp.arange(base.shape[0], dtype=jnp.int32)
        hidden = jnp.isnan(scale)[None, :] | (place[None, :] + start == itself[:, None])
        top, column = largest(jnp.where(hidden, -jnp.inf, value))
        # Those found before have lower numbers and stand first: ties keep them.
        value = jnp.concatenate([best[1], top], axis=1)
        ids = jnp.concatenate([best[0], jnp.where(top > -jnp.inf, column + start, -1)], axis=1)
        top, place = lax.top_k(value, num_neighbors)
        return jnp.take_along_axis(ids, place, axis=1), top

    return step


def _faiss_search(vectors, inverse, rows, allowed, num_neighbors):
    """As `_jax_search`, by an inverted file: clusters, of which the nearest 8 are searched.

    One thread trains and searches, and ties go to the lowest number, so the result is a function of
    the vectors (and of the library's version).
    """
    import faiss

    documents = np.flatnonzero(allowed)
    dim = vectors.shape[1]
    num_lists = max(1, min(int(4 * np.sqrt(len(documents))), len(documents) // 39))
    quantizer = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFFlat(quantizer, dim, num_lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = 0
    index.nprobe = min(8, num_lists)

    def unit(which: np.ndarray) -> np.ndarray:
        return np.asarray(vectors[which], np.float32) * inverse[which, None]

    step = max(1, len(documents) // (40 * num_lists))
    index.train(unit(documents[::step]))
    for first in range(0, len(documents), 65536):
        index.add(unit(documents[first : first + 65536]))
    for first in range(0, len(rows), 16_384):
        row = rows[first : first + 16_384]
        # One more than asked for: the document itself is among them.
        value, place = index.search(unit(row), num_neighbors + 1)
        found = np.where(place >= 0, documents[place], -1)
        found = np.where(found == row[:, None], -1, found)
        value = np.where(found >= 0, value, -np.inf)
        order = np.lexsort((found, -value), axis=1)[:, :num_neighbors]
        found, value = (np.take_along_axis(a, order, axis=1) for a in (found, value))
        yield found, value


def adjacent_similarity(vectors_ND: np.ndarray, order_N: np.ndarray) -> np.ndarray:
    """Return the cosine of each document of an order to the one before it, float32[M - 1].

    Args:
        vectors_ND: [N, D], any length and kind.
        order_N: int[M].

    Example:
        >>> adjacent_similarity(np.eye(2), [0, 1, 1]).tolist()
        [0.0, 1.0]
    """
    order = np.asarray(order_N, np.int64)
    vectors = np.asarray(vectors_ND)
    inverse = _inverse_lengths(vectors)
    out = np.zeros(max(len(order) - 1, 0), np.float32)
    for first in range(0, len(out), 65536):
        part = order[first : first + 65537]
        unit = np.asarray(vectors[part], np.float32) * inverse[part, None]
        out[first : first + len(part) - 1] = np.einsum("nd,nd->n", unit[:-1], unit[1:])
    return out


def near_duplicates(neighbors: Neighbors, threshold: float) -> np.ndarray:
    """Tell which documents say again what an earlier one says.

    Documents are gone through by number. One is a near-duplicate if a document before it that is
    none itself is at least `threshold` similar, by either's list.

        similarity  0 -.99- 1 -.99- 2     0 stays, 1 repeats 0, 2 is near 1 only and stays

    Args:
        neighbors: lists of all N documents.
        threshold: cosine, e.g. 0.95; above 1 nothing is a duplicate.

    Returns:
        duplicate_of, int64[N]: the lowest such document, or -1 for one that stays.

    Example:
        >>> near_duplicates(
        ...     Neighbors(np.array([[1], [0]]), np.array([[0.99], [0.99]])), 0.9
        ... ).tolist()
        [-1, 0]
    """
    ids, similarity = neighbors
    source, column = np.nonzero((ids >= 0) & (similarity >= threshold))
    target = ids[source, column].astype(np.int64)
    ends = np.column_stack([np.maximum(source, target), np.minimum(source, target)])
    duplicate_of = [-1] * len(ids)
    for later, earlier in np.unique(ends, axis=0).tolist():
        if duplicate_of[later] < 0 and duplicate_of[earlier] < 0 and later != earlier:
            duplicate_of[later] = earlier
    return np.array(duplicate_of, np.int64)
