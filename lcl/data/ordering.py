"""Orders: which document comes after which, as keyed pure functions of integers.

Nothing here holds a random state. A decision is named by a readable tuple, the tuple is hashed to a
key (`named_key`), and the key picks a permutation. The same name gives the same permutation in any
process, on any machine, under any NumPy: only integer arithmetic and Philox's raw words are used,
never `Generator.permutation`, whose stream NumPy may change between releases (NEP 19).

Two kinds of permutation, for two uses:

    shuffle(n, ...)       the whole permutation as a table   (once a plan: an order of documents)
    permute(i, n, key)    one entry of it, no table at all   (every step: rows of an epoch, replay)

And one order that looks at the documents: `traverse`, the path of in-context pretraining, along
which every document comes after one that resembles it.
"""

from __future__ import annotations

import array
import heapq
from typing import Any, Literal, NamedTuple

import numpy as np

from lcl.data.document_graph import Graph, check_neighbors, union_graph
from lcl.data.fingerprints import fingerprint

DEGREES = ("residual", "static")

_NUM_ROUNDS = 8
_SMALL = 1024  # on a grid this small 8 rounds are not yet uniform over permutations; 24 are
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's multipliers
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT = np.uint64(31)


def named_key(*parts: Any, bits: int = 64) -> int:
    """Hash a readable tuple to an integer key: `named_key("order", seed, domain)`.

    Keys are named, never drawn or split, so adding a decision cannot shift another one's numbers.

    Args:
        *parts: strings, integers, floats and (nested) tuples of them.
        bits: width of the key, a multiple of 4, at most 128.

    Returns:
        An int in [0, 2**bits).

    Example:
        >>> named_key("order", 0, "python") == named_key("order", 0, "python")
        True
        >>> named_key("order", 0, "python") == named_key("order", 1, "python")
        False
    """
    return int(fingerprint(*parts)[: bits // 4], 16)


def shuffle_with_key(size: int, key: int) -> np.ndarray:
    """Return the permutation of `range(size)` that a 128-bit key names, int64[size].

    Sorting Philox's raw 64-bit words: the raw words of a bit generator are frozen by NumPy.
    """
    words = np.random.Philox(key=key).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def shuffle(num_documents: int, *, seed: int, domain: str) -> np.ndarray:
    """Return the seeded order of a domain's documents.

    Args:
        num_documents: N >= 0.
        seed: the run's seed.
        domain: the domain's name; two domains of one size get unrelated orders.

    Returns:
        order_N, int64[N]: order_N[i] is the document that comes i-th. A permutation.

    Example:
        >>> sorted(shuffle(5, seed=0, domain="python").tolist())
        [0, 1, 2, 3, 4]
    """
    if num_documents < 0:
        raise ValueError(f"num_documents is {num_documents}; give a count of 0 or more")
    return shuffle_with_key(num_documents, named_key("order", seed, domain, bits=128))


def mix(words: np.ndarray) -> np.ndarray:
    """Apply splitmix64's finaliser, a bijection of 64-bit words that scatters their bits.

    Args:
        words: uint64 array, not a scalar: it wraps without a warning.

    Returns:
        uint64 array of the same shape.

    Example:
        >>> len(set(mix(np.arange(1000, dtype=np.uint64)).tolist()))
        1000
    """
    words = (words ^ (words >> np.uint64(30))) * _MIX_1
    words = (words ^ (words >> np.uint64(27))) * _MIX_2
    return words ^ (words >> _SHIFT)


def _feistel(
    index: np.ndarray,
    num_left: np.ndarray,
    num_right: np.ndarray,
    key: np.ndarray,
    num_rounds: int = _NUM_ROUNDS,
) -> np.ndarray:
    """Apply Feistel rounds on the grid Z_left x Z_right; all arrays uint64[n]."""
    left, right = np.divmod(index, num_right)
    for i in range(num_rounds):
        key = key + GOLDEN
        word = ((right if i % 2 == 0 else left) ^ key) * _MIX_1
        word ^= word >> _SHIFT
        word *= _MIX_2
        word ^= word >> _SHIFT
        # Reduce before adding: left + word could wrap at 2**64 and the round not be a bijection.
        if i % 2 == 0:
            left = (left + word % num_left) % num_left
        else:
            right = (right + word % num_right) % num_right
    return left * num_right + right


def _on_grid(
    index: np.ndarray, num_left: np.ndarray, num_right: np.ndarray, key: np.ndarray
) -> np.ndarray:
    """Permute the grid's points; an entry's result depends on its own arguments only."""
    out = _feistel(index, num_left, num_right, key)
    small = np.flatnonzero(num_left * num_right <= _SMALL)
    if small.size:
        out[small] = _feistel(
            out[small], num_left[small], num_right[small], ~key[small], 2 * _NUM_ROUNDS
        )
    return out


def permute(index: Any, size: Any, key: Any) -> np.ndarray:
    """Look up entries of keyed permutations of `range(size)` without building them.

    A Feistel network on the grid a x b, a = ceil(sqrt(size)), b = ceil(size / a). Each round adds
    a keyed hash of one coordinate to the other, which is a bijection of the grid; the few grid
    points past `size` (fewer than sqrt(size)) are walked on until they fall inside, so the result
    is a permutation of exactly `range(size)` (Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains", the generalised Feistel and cycle-walking constructions). O(1) memory; constant
    time.

        index 0 1 2 3 4 | 5 (outside size=5)        grid 3 x 2
                |                                   0 1
        rounds  4 0 5 1 3 | 2                       2 3
                    |                               4 5   <- 5 is outside: apply the rounds again
        walked  4 0 2 1 3

    Args:
        index: int array in [0, size), any shape.
        size: int or array broadcastable with index, >= 1: each entry's permutation may have its
          own.
        key: int in [0, 2**64) or uint64 array broadcastable with index.

    Returns:
        int64 array of the broadcast shape.

    Example:
        >>> sorted(permute(np.arange(5), 5, key=7).tolist())
        [0, 1, 2, 3, 4]
    """
    index, size, key = np.broadcast_arrays(
        np.asarray(index, np.uint64), np.asarray(size, np.uint64), np.asarray(key, np.uint64)
    )
    shape = index.shape
    # 1-d arrays wrap silently on overflow, as a hash wants; NumPy scalars would warn.
    index, size, key = index.ravel(), size.ravel(), key.ravel()
    num_left = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    num_right = (size + num_left - np.uint64(1)) // num_left
    out = _on_grid(index, num_left, num_right, key)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _on_grid(out[outside], num_left[outside], num_right[outside], key[outside])
        outside = outside[out[outside] >= size[outside]]
    return out.astype(np.int64).reshape(shape)


class Path(NamedTuple):
    """A walk through all documents.

    order: int64[N], a permutation. starts: bool[N], True where the walk began anew: at place 0, and
    at every jump, where no neighbour of the document before it was left.
    """

    order: np.ndarray
    starts: np.ndarray

    @property
    def num_jumps(self) -> int:
        """Hops that are no edge of the graph."""
        return max(int(self.starts.sum()) - 1, 0)


def traverse(
    neighbors_NK: Any,
    similarity_NK: Any,
    *,
    degree: Literal["residual", "static"] = "residual",
) -> np.ndarray:
    """Return the order of in-context pretraining: a greedy walk over the documents' graph.

    Algorithm 1 of "In-Context Pretraining" (Shi et al. 2023, arXiv 2310.10638). The graph joins two
    documents if either is among the other's nearest neighbours (`union_graph`). Start at the
    remaining document of least degree; go on, again and again, along the heaviest edge to a
    remaining document; when there is none, start anew. Ties go to the lowest number, so the order
    is a function of the arguments.

            .9       .7       .8
        0 ------ 1 ------ 2 ------ 3        4 ------ 5        order  0 1 2 3 | 4 5
                                               .6                            jump

    "Degree" is the paper's word for one of two things: `static` is that of the whole graph,
    `residual` counts remaining neighbours only, so that documents about to be cut off go first.

    Args:
        neighbors_NK: int[N, K], the nearest neighbours of each document; -1 is none. They need not
            be sorted, and a document itself among them is passed over.
        similarity_NK: float[N, K], their similarities, the larger the nearer.
        degree: "residual" or "static".

    Returns:
        order_N, int64[N]: a permutation; order_N[i] is the document that comes i-th. Time is
        N K log N at most and linear in practice, memory some 40 numbers a document at K = 10.

    Raises:
        ValueError: lists that do not fit together, or an unknown `degree`.

    Example:
        >>> traverse([[1], [0], [3], [2]], [[0.9], [0.9], [0.8], [0.8]]).tolist()
        [0, 1, 2, 3]
    """
    return traverse_with_jumps(neighbors_NK, similarity_NK, degree=degree).order


def traverse_with_jumps(
    neighbors_NK: Any,
    similarity_NK: Any,
    *,
    degree: Literal["residual", "static"] = "residual",
) -> Path:
    """Return what `traverse` returns, and where it jumped.

    Example:
        >>> traverse_with_jumps([[1], [0], [3], [2]], [[0.9], [0.9], [0.8], [0.8]]).starts.tolist()
        [True, False, True, False]
    """
    if degree not in DEGREES:
        raise ValueError(f"degree {degree!r} is unknown; use {' or '.join(DEGREES)}")
    graph = union_graph(neighbors_NK, similarity_NK)
    return _walk_residual(graph) if degree == "residual" else _walk_static(graph)


def jumps(order_N: Any, neighbors_NK: Any) -> np.ndarray:
    """Mark the documents of any order that are no neighbours of the one before them.

    Args:
        order_N: int[M], document numbers.
        neighbors_NK: int[N, K], the lists that made the graph.

    Returns:
        bool[M]; the first is True.

    Example:
        >>> jumps([2, 0, 1], [[1], [0], [0]]).tolist()
        [True, False, False]
    """
    neighbors, _ = check_neighbors(neighbors_NK)
    order = np.asarray(order_N, np.int64)
    before, after = order[:-1], order[1:]
    edge = (neighbors[before] == after[:, None]).any(axis=1)
    edge |= (neighbors[after] == before[:, None]).any(axis=1)
    return np.concatenate([np.ones(min(len(order), 1), bool), ~edge])


def _walk_static(graph: Graph) -> Path:
    """The walk in which the next start is the first unvisited of a list made beforehand."""
    remains = bytearray(b"\1") * graph.num_documents
    starts = iter(np.argsort(graph.degrees, kind="stable").tolist())
    path = _NewPath(graph)
    begin, document = path.begin, -1
    for _ in range(graph.num_documents):
        if document < 0:
            document = next(start for start in starts if remains[start])
            path.jump()
        path.order.append(document)
        remains[document] = 0
        document, others = -1, path.neighbors[begin[document] : begin[document + 1]]
        for other in others:
            if remains[other]:  # heaviest first
                document = other
                break
    return path.finish()


def _walk_residual(graph: Graph) -> Path:
    """The walk in which the next start is the one with fewest remaining neighbours."""
    remains = bytearray(b"\1") * graph.num_documents
    degree = graph.degrees.tolist()
    queue = _DegreeQueue(degree, remains)
    path = _NewPath(graph)
    order, begin, neighbors, touched = path.order, path.begin, path.neighbors, queue.touched
    document = -1
    for _ in range(graph.num_documents):
        if document < 0:
            document = queue.pop()
            path.jump()
        order.append(document)
        remains[document] = 0
        span = neighbors[begin[document] : begin[document + 1]]
        others = [other for other in span if remains[other]]
        for other in others:
            degree[other] -= 1
        touched += others
        if len(touched) > _FLUSH:
            queue.flush()
        document = others[0] if others else -1  # heaviest first
    return path.finish()


class _NewPath:
    """A path under way, in plain lists and an `array`: a loop reads them faster than NumPy's."""

    def __init__(self, graph: Graph):
        self.order: list[int] = []
        self.begin: list[int] = graph.offsets.tolist()
        self.neighbors = array.array(graph.neighbors.dtype.char, graph.neighbors.tobytes())
        self._num_documents = graph.num_documents
        self._starts: list[int] = []

    def jump(self) -> None:
        """Note that the next document begins the walk anew."""
        self._starts.append(len(self.order))

    def finish(self) -> Path:
        starts = np.zeros(self._num_documents, bool)
        starts[self._starts] = True
        return Path(np.array(self.order, np.int64), starts)


_FLUSH = 4096  # touched documents that are sorted into the queue at once


class _DegreeQueue:
    """The remaining document of least residual degree, lowest number first.

    One heap of numbers for each degree. A document whose degree fell is put into its new heap as
    well; what it left behind in the old one is recognised when it surfaces. Only the walk's jumps
    ask, so documents are noted in `touched` and put in order when one does: by then many are gone.
    """

    def __init__(self, degree: list[int], remains: bytearray):
        self.touched: list[int] = []
        self._degree, self._remains = degree, remains
        self._heaps: list[list[int]] = [[] for _ in range(max(degree, default=0) + 1)]
        self._lowest = 0
        self._rebuild()

    def _rebuild(self) -> None:
        """Keep one entry for each remaining document: memory stays linear in their number."""
        for heap in self._heaps:
            heap.clear()
        self._size = 0
        for document, degree in enumerate(self._degree):
            if self._remains[document]:
                self._heaps[degree].append(document)  # ascending, which is a heap
                self._size += 1
        self._limit = 2 * self._size + _FLUSH

    def flush(self) -> None:
        """Put the touched documents that remain into the heaps of their degrees."""
        degree, remains, heaps = self._degree, self._remains, self._heaps
        for document in set(self.touched):
            if remains[document]:
                now = degree[document]
                heapq.heappush(heaps[now], document)
                self._size += 1
                if now < self._lowest:
                    self._lowest = now
        self.touched.clear()
        if self._size > self._limit:
            self._rebuild()

    def pop(self) -> int:
        """Take out the remaining document of least degree; there must be one."""
        self.flush()
        while True:
            heap = self._heaps[self._lowest]
            while heap:
                document = heapq.heappop(heap)
                self._size -= 1
                if self._remains[document] and self._degree[document] == self._lowest:
                    return document
            self._lowest += 1
