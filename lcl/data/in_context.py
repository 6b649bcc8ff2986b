"""Orders of documents by likeness: in-context pretraining and what it is compared with.

    store -> vectors -> neighbours -> near-duplicates out -> order

    InContext        the paper's path: every document after one that resembles it
    ChainOrder       short chains along a tree: rows keep to their topic, and it is faster
    KNNOrder         every document followed by its neighbours, so with repeats
    ReleasedOrder    the clusters of the paper's released code, which is another algorithm

All need rows in which attention crosses documents (`document_mask=False`), cut from the order as
it stands (`packing="concat"`); then the rows, not the documents, are shuffled.

A near-duplicate beside its original teaches copying. So the graph is built without it, and it comes
after the path, among the other duplicates in a keyed random order: every document is still in the
order, every token still read. `duplicates="drop"` leaves them out instead, as the paper does; how
many documents and tokens that are is logged and in the plan.

    documents 0 1 2 3 4 5, where 4 repeats 1        path over 0 1 2 3 5, then the rest
    order     0 2 1 | 3 5 | 4                       | is a jump
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lcl.data.block_cache import Fields, cached_rows
from lcl.data.chain_order import CHAIN_LENGTH, chained, check_chain_length
from lcl.data.embeddings import (
    Embedder,
    FromFunction,
    HashedTfidf,
    Precomputed,
    SentenceEncoder,
    quantise,
)
from lcl.data.neighbors import (
    Neighbors,
    adjacent_similarity,
    check_index,
    near_duplicates,
    nearest,
    nearest_in_blocks,
)
from lcl.data.order_baselines import CLUSTER_SIZE, NUM_RELEASED_NEIGHBORS, released, with_neighbors
from lcl.data.ordering import (
    DEGREES,
    Path,
    named_key,
    shuffle,
    shuffle_with_key,
    traverse_with_jumps,
)
from lcl.data.ordering import jumps as mark_jumps

_LOG = logging.getLogger(__name__)
_SPARE = 10  # neighbours found beyond those asked for, to stand in for near-duplicates
DUPLICATES = ("last", "drop")


class OrderPlan(NamedTuple):
    """An order with what one wants to know about it.

    Attributes:
        order: int64[M].
        starts: bool[M], True where a document is no neighbour of the one before it.
        similarity: float32[M], cosine to the document before it; 0 for the first.
        duplicate_of: int64[N], the document that a near-duplicate repeats; -1 for the others.
        dropped_tokens: stored tokens of documents that the order leaves out.
    """

    order: np.ndarray
    starts: np.ndarray
    similarity: np.ndarray
    duplicate_of: np.ndarray
    dropped_tokens: int

    def report(self) -> dict[str, float]:
        """Return the figures: documents, jumps, mean_similarity, near_duplicates, dropped."""
        num_documents = len(self.duplicate_of)
        return {
            "documents": num_documents,
            "places": len(self.order),
            "jumps": max(int(self.starts.sum()) - 1, 0),
            "mean_similarity": float(self.similarity[1:].mean()) if len(self.order) > 1 else 0.0,
            "near_duplicates": int((self.duplicate_of >= 0).sum()),
            "dropped_documents": num_documents - len(np.unique(self.order)),
            "dropped_tokens": self.dropped_tokens,
        }


class Found(NamedTuple):
    """Neighbours among the documents that stay.

    vectors: int8[N, D]; duplicate_of: as in the plan.
    """

    neighbors: Neighbors
    vectors: np.ndarray
    duplicate_of: np.ndarray


@dataclasses.dataclass(frozen=True)
class _ByLikeness:
    """What orders by likeness share: how vectors and neighbours are found.

    Attributes:
        embedder: what makes the vectors.
        num_neighbors: K of the lists; the paper's graph has 10.
        index: "exact", "approximate" or "faiss" (see `lcl.data.neighbors.nearest_in_blocks`).
        duplicate_threshold: cosine from which a document is a near-duplicate of an earlier one;
            None keeps them all. A property of the embedder: look at pairs before you trust it.
        duplicates: "last": after the path, shuffled; "drop": not in the order.
    """

    embedder: HashedTfidf | Precomputed | FromFunction | SentenceEncoder = HashedTfidf()
    num_neighbors: int = 10
    index: str = "exact"
    duplicate_threshold: float | None = 0.95
    duplicates: str = "last"

    def __post_init__(self) -> None:
        if self.num_neighbors < 1:
            raise ValueError(f"num_neighbors is {self.num_neighbors}; give 1 or more")
        check_index(self.index)
        threshold = self.duplicate_threshold
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(
                f"duplicate_threshold is {threshold}; give a cosine in (0, 1], or None to keep all"
            )
        if self.duplicates not in DUPLICATES:
            raise ValueError(
                f"duplicates {self.duplicates!r} is unknown; use {' or '.join(DUPLICATES)}"
            )

    @property
    def needs_open_rows(self) -> bool:
        """True: without attention across documents, which one precedes makes no difference."""
        return True

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the order, as plain values to be hashed."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"order": type(self).__name__, **values, "embedder": self.embedder.settings()}

    def order(
        self,
        store: Any,
        *,
        seed: int,
        domain: str,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> np.ndarray:
        """Return the order of a store's documents.

        Args:
            store: the domain's store.
            seed: the run's; decides where near-duplicates (and a baseline's starts) come.
            domain: the domain's name.
            cache_dir: keeps vectors and neighbours, by fingerprint; None computes them anew.

        Returns:
            int64[M], document numbers: a permutation unless duplicates are dropped or the order
            repeats documents.
        """
        return self.plan(store, seed=seed, domain=domain, cache_dir=cache_dir).order

    def plan(
        self,
        store: Any,
        *,
        seed: int,
        domain: str,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> OrderPlan:
        """Return the order with its jumps, similarities and near-duplicates; logs their counts."""
        found = self.find(store, cache_dir=cache_dir, title=domain)
        kept = np.flatnonzero(found.duplicate_of < 0)
        order, starts = self._order_of_kept(found, kept, seed, domain)
        if self.duplicates == "last":
            again = np.flatnonzero(found.duplicate_of >= 0)
            key = named_key("near-duplicates", seed, domain, bits=128)
            order = np.concatenate([order, again[shuffle_with_key(len(again), key)]])
            starts = np.concatenate([starts, np.ones(len(again), bool)])
        left_out = np.ones(store.num_documents, bool)
        left_out[order] = False
        similarity = np.zeros(len(order), np.float32)
        similarity[1:] = adjacent_similarity(found.vectors, order)
        tokens = int(np.asarray(store.lengths)[left_out].sum())
        plan = OrderPlan(order, starts, similarity, found.duplicate_of, tokens)
        figures = plan.report()
        _LOG.info(
            "%s of %r: %d documents, %d jumps, mean similarity of neighbours %.3f; %d "
            "near-duplicates %s; %d documents with %d tokens left out",
            type(self).__name__,
            domain,
            figures["documents"],
            figures["jumps"],
            figures["mean_similarity"],
            figures["near_duplicates"],
            "put last" if self.duplicates == "last" else "dropped",
            figures["dropped_documents"],
            tokens,
        )
        return plan

    def find(
        self, store: Any, *, cache_dir: str | os.PathLike[str] | None = None, title: str = ""
    ) -> Found:
        """Return the neighbours of a store's documents, near-duplicates apart."""
        num_documents = store.num_documents
        vectors = self._vectors(store, cache_dir, title)
        prune = self.duplicate_threshold is not None
        wanted = self.num_neighbors + (_SPARE if prune else 0)

        def search(start: int) -> Iterator[Neighbors]:
            rows = np.arange(start, num_documents)
            return nearest_in_blocks(vectors, wanted, index=self.index, rows=rows)

        name = ["neighbors", *self._vectors_name(store), wanted, self.index]
        fields: Fields = {"ids": ((wanted,), np.int32), "similarity": ((wanted,), np.float32)}
        arrays = cached_rows(
            cache_dir, name, num_documents, lambda: fields, search, title=f"{title} neighbours"
        )
        lists = Neighbors(arrays["ids"], arrays["similarity"])
        duplicate_of = np.full(num_documents, -1, np.int64)
        if self.duplicate_threshold is not None:
            duplicate_of = near_duplicates(lists, self.duplicate_threshold)
        lists = without(lists, duplicate_of >= 0, self.num_neighbors)
        lists = self._refill(lists, vectors, duplicate_of)
        # Where nothing is alike there is no edge: a document without any text, say.
        alike = lists.similarity > 0
        lists = Neighbors(np.where(alike, lists.ids, -1), np.where(alike, lists.similarity, 0))
        return Found(lists, vectors, duplicate_of)

    def _refill(self, lists: Neighbors, vectors: np.ndarray, duplicate_of: np.ndarray) -> Neighbors:
        """Search again, among what stays, for documents whose lists were mostly duplicates."""
        stays = duplicate_of < 0
        possible = min(self.num_neighbors, int(stays.sum()) - 1)
        short = np.flatnonzero(stays & ((lists.ids >= 0).sum(axis=1) < possible))
        if short.size and not stays.all():
            more = nearest(vectors, self.num_neighbors, index=self.index, rows=short, among=stays)
            lists.ids[short], lists.similarity[short] = more.ids, more.similarity
        return lists

    def _vectors_name(self, store: Any) -> list[Any]:
        return [store.fingerprint, self.embedder.settings()]

    def _vectors(
        self, store: Any, cache_dir: str | os.PathLike[str] | None, title: str
    ) -> np.ndarray:
        """The store's vectors, int8[N, D]."""
        embedder: Embedder = self.embedder
        if store.num_documents == 0:
            return np.zeros((0, 1), np.int8)
        begun: list[Iterator[np.ndarray]] = []  # blocks whose width had to be looked at

        def fields() -> Fields:
            blocks = iter(embedder.embed(store))
            first = next(blocks)
            begun.append(itertools.chain([first], blocks))
            return {"vectors": ((first.shape[1],), np.int8)}

        def make(start: int) -> Iterator[list[np.ndarray]]:
            blocks = begun[0] if start == 0 else embedder.embed(store, start=start)
            return ([quantise(block)] for block in blocks)

        name = ["vectors", *self._vectors_name(store)]
        arrays = cached_rows(
            cache_dir, name, store.num_documents, fields, make, title=f"{title} vectors"
        )
        return arrays["vectors"]

    def _order_of_kept(self, found: Found, kept: np.ndarray, seed: int, domain: str) -> Path:
        raise NotImplementedError


def without(lists: Neighbors, hidden: np.ndarray, num_neighbors: int) -> Neighbors:
    """Take documents out of lists, close the gaps and cut them at `num_neighbors`.

    Args:
        lists: nearest first.
        hidden: bool[N], what goes: from the lists of others, and its own list becomes empty.
        num_neighbors: length of the lists that come back.

    Example:
        >>> lists = Neighbors(np.array([[1, 2], [0, 2], [1, 0]]), np.ones((3, 2), np.float32))
        >>> without(lists, np.array([False, True, False]), 1).ids.tolist()
        [[2], [-1], [0]]
    """
    gone = (lists.ids < 0) | hidden[lists.ids] | hidden[:, None]
    place = np.argsort(gone, axis=1, kind="stable")[:, :num_neighbors]
    gone = np.take_along_axis(gone, place, axis=1)
    ids = np.where(gone, -1, np.take_along_axis(lists.ids, place, axis=1))
    return Neighbors(ids, np.where(gone, 0, np.take_along_axis(lists.similarity, place, axis=1)))


def among_kept(lists: Neighbors, kept: np.ndarray) -> Neighbors:
    """Lists of the documents `kept`, renumbered 0, 1, ... in that order."""
    number = np.full(len(lists.ids) + 1, -1, np.int32)  # the last entry is for -1
    number[kept] = np.arange(len(kept))
    return Neighbors(number[lists.ids[kept]], lists.similarity[kept])


@dataclasses.dataclass(frozen=True)
class InContext(_ByLikeness):
    """The order of in-context pretraining (Shi et al. 2023): see `lcl.data.ordering.traverse`.

    Attributes:
        degree: "residual" or "static": which start comes next.
        embedder, num_neighbors, index, duplicate_threshold, duplicates: as for all orders by
            likeness.

    Example:
        >>> InContext(num_neighbors=10, duplicate_threshold=None).needs_open_rows
        True
    """

    degree: str = "residual"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.degree not in DEGREES:
            raise ValueError(f"degree {self.degree!r} is unknown; use {' or '.join(DEGREES)}")

    def _order_of_kept(self, found: Found, kept: np.ndarray, seed: int, domain: str) -> Path:
        del seed, domain  # nothing is left to chance
        path = traverse_with_jumps(*among_kept(found.neighbors, kept), degree=self.degree)  # type: ignore[arg-type]
        return Path(kept[path.order], path.starts)


@dataclasses.dataclass(frozen=True)
class ChainOrder(_ByLikeness):
    """Short chains of near documents along a tree: see `lcl.data.chain_order.chained`.

    Attributes:
        chain_length: most documents in a chain.
        embedder, num_neighbors, index, duplicate_threshold, duplicates: as for all orders by
            likeness.
    """

    chain_length: int = CHAIN_LENGTH

    def __post_init__(self) -> None:
        super().__post_init__()
        check_chain_length(self.chain_length)

    def _order_of_kept(self, found: Found, kept: np.ndarray, seed: int, domain: str) -> Path:
        del seed, domain  # nothing is left to chance
        lists = among_kept(found.neighbors, kept)
        order = chained(*lists, chain_length=self.chain_length)
        return Path(kept[order], mark_jumps(order, lists.ids))


@dataclasses.dataclass(frozen=True)
class KNNOrder(_ByLikeness):
    """The kNN baseline: every document, in a seeded order, followed by its neighbours.

    An epoch is up to K + 1 times as long as the store, and popular documents come often.
    """

    def _order_of_kept(self, found: Found, kept: np.ndarray, seed: int, domain: str) -> Path:
        begin = kept[shuffle(len(kept), seed=seed, domain=domain)]
        order = with_neighbors(begin, found.neighbors.ids)
        return Path(order, mark_jumps(order, found.neighbors.ids))


@dataclasses.dataclass(frozen=True)
class ReleasedOrder(_ByLikeness):
    """The heuristic of the released code: see `lcl.data.order_baselines.released`.

    Attributes:
        cluster_size: documents after which a cluster is closed; 21 there.
        embedder, num_neighbors, index, duplicate_threshold, duplicates: as for all orders by
            likeness; it uses the nearest 9.
    """

    cluster_size: int = CLUSTER_SIZE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cluster_size < 1:
            raise ValueError(f"cluster_size is {self.cluster_size}; give 1 or more")

    def _order_of_kept(self, found: Found, kept: np.ndarray, seed: int, domain: str) -> Path:
        del seed, domain
        lists = among_kept(found.neighbors, kept).ids
        order = released(lists, cluster_size=self.cluster_size)
        return Path(kept[order], mark_jumps(order, lists[:, :NUM_RELEASED_NEIGHBORS]))
