"""An order by likeness whose rows keep to their topic: short chains, laid along a tree.

A greedy walk (`lcl.data.ordering.traverse`) follows heavy edges for as long as it can. It leaves a
topic before all of it is read, and what it leaves behind turns up much later, among strangers.
Here no such choice is final: near documents are bound first, wherever they are, and what is bound
together stays together.

    1. chains   Edges from the heaviest to the lightest: one that joins the ends of two chains is
                taken, unless the chain would be longer than `chain_length`.

                0 --.9-- 1 --.8-- 2      3 --.7-- 4      5         chains 012, 34, 5

    2. tree     Edges from the heaviest again: one that joins two parts not yet joined is taken,
                wherever in its chains it ends: the maximum spanning forest of the chains.

                0 ------ 1 ------ 2
                         |.3      |.4                              chain 012 is joined to
                         5        3 ------ 4                       34 at 2-3, to 5 at 1-5

    3. order    Depth first from a chain of fewest tree edges; what hangs on a chain follows it, the
                part with fewest documents first. A chain begins at its end nearer to the edge it is
                reached by.                              order  3 4 | 2 1 0 | 5   (| a jump)

Steps 1 and 2 are the greedy edge heuristic of the travelling salesman problem (Bentley 1992, "Fast
algorithms for geometric traveling salesman problems") stopped early, and Kruskal's tree on top.
Both ask only which of two edges is heavier; ties go by the number of the document that lists the
other, then by that of the other: the order is a function of the arguments. Everything but a loop
over the chains is NumPy: an edge that is the heaviest left at both its sides is taken in either
algorithm, whatever becomes of the others, so all such edges are taken at once.

Shapes: N documents, K neighbours, E edges (a pair that lists one another counts twice), M chains.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lcl.data.document_graph import check_neighbors, heaviest_first

CHAIN_LENGTH = 8
_FEW = 256  # so many edges are cheaper one by one than in rounds
_SLOW = 64  # nor do rounds pay that take fewer than one edge in so many


def chained(
    neighbors_NK: Any, similarity_NK: Any, *, chain_length: int = CHAIN_LENGTH
) -> np.ndarray:
    """Return an order by likeness of short chains along a tree: see the module's picture.

    On the graph of `traverse`: two documents are joined if either is among the other's neighbours.

    Args:
        neighbors_NK: int[N, K], the nearest neighbours of each document; -1 is none. They need not
            be sorted, and a document itself among them is passed over.
        similarity_NK: float[N, K], their similarities, the larger the nearer.
        chain_length: most documents in a chain. Longer chains have nearer neighbours and fewer
            jumps, shorter ones leave purer rows. 1: the tree alone.

    Returns:
        order_N, int64[N]: a permutation; order_N[i] is the document that comes i-th. Hops that are
        no edge of the graph are what `lcl.data.ordering.jumps` marks. Time is E log E at most and
        linear in practice, memory some 60 bytes an edge.

    Raises:
        ValueError: lists that do not fit together, or a `chain_length` below 1.

    Example:
        >>> chained([[1], [0], [3], [2]], [[0.9], [0.9], [0.8], [0.8]]).tolist()
        [0, 1, 2, 3]
    """
    check_chain_length(chain_length)
    neighbors, similarity = check_neighbors(neighbors_NK, similarity_NK)
    first_E, second_E = heaviest_first(neighbors, similarity)
    num_documents = len(neighbors)
    chains = _number(*_chain(num_documents, first_E, second_E, chain_length))
    tree = _tree(len(chains.length), chains.chain[first_E], chains.chain[second_E], num_documents)
    return _lay(chains, first_E[tree], second_E[tree])


def check_chain_length(chain_length: int) -> None:
    """Refuse a length below 1."""
    if chain_length < 1:
        raise ValueError(f"chain_length is {chain_length}; give 1 or more documents")


def _chain(
    num_documents: int, first: np.ndarray, second: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Step 1: the one and the other neighbour of every document in its chain; -1 for none.

    Of a chain only its ends matter, so they alone know its length and its other end.
    """
    one = np.full(num_documents, -1, first.dtype)
    two = np.full(num_documents, -1, first.dtype)
    far = np.arange(num_documents, dtype=first.dtype)  # of an end: the other end
    size = np.ones(num_documents, first.dtype)  # of an end: its chain's
    best = np.empty(num_documents, first.dtype)

    def join(x: Any, y: Any) -> None:
        for a, b in ((x, y), (y, x)):
            taken = one[a] >= 0
            two[a[taken]] = b[taken]
            one[a[~taken]] = b[~taken]
        far_x, far_y, both = far[x], far[y], size[x] + size[y]
        far[far_x], far[far_y] = far_y, far_x
        size[far_x], size[far_y] = both, both

    def possible(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        free = np.flatnonzero((two[x] < 0) & (two[y] < 0))
        a, b = x[free], y[free]
        return free[(far[a] != b) & (size[a] + size[b] <= limit)]

    # In portions: the heaviest edges make most of the others impossible, which is cheap to see.
    for begin in range(0, len(first), max(num_documents, 1)):
        x = first[begin : begin + num_documents]
        y = second[begin : begin + num_documents]
        taken = len(x)
        while True:
            left = possible(x, y)
            x, y = x[left], y[left]
            if len(x) < _FEW or taken * _SLOW < len(x):
                break
            chain_x, chain_y = np.minimum(x, far[x]), np.minimum(y, far[y])
            ahead = _heaviest_at_both(best, chain_x, chain_y)
            taken = len(ahead)
            join(x[ahead], y[ahead])
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            if two[a] < 0 and two[b] < 0 and far[a] != b and size[a] + size[b] <= limit:
                join(np.array([a]), np.array([b]))
    return one, two


def _heaviest_at_both(best: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which edges, listed heaviest first, are the first of both the parts that they join.

    best: of every part, overwritten.
    """
    place = np.arange(len(x), dtype=best.dtype)
    _first_at(best, x, y, place)
    return np.flatnonzero((best[x] == place) & (best[y] == place))


def _first_at(best: np.ndarray, x: np.ndarray, y: np.ndarray, place: np.ndarray) -> None:
    """Set best[part] to the lowest place at which x or y is that part."""
    best[x] = len(x)
    best[y[::-1]] = place[::-1]  # the last to be written stays
    in_y = best[x]
    best[x[::-1]] = np.minimum(place, in_y)[::-1]


class _Chains(NamedTuple):
    """chain: int[N], the number of a document's chain; by their lower ends. place: int[N], in it,
    from the lower end. length: int64[M].
    """

    chain: np.ndarray
    place: np.ndarray
    length: np.ndarray


def _number(one: np.ndarray, two: np.ndarray) -> _Chains:
    """Number the chains and the places in them."""
    chain = np.full(len(one), -1, one.dtype)
    place = np.zeros(len(one), one.dtype)
    # From both ends at once: an end meets another one, or itself, and the lower is the first.
    ends = np.flatnonzero(two < 0)
    current, before, origin = ends, np.full(len(ends), -1), ends
    last = np.empty(len(one), np.int64)
    steps = []
    while len(current):
        steps.append((origin, current))
        after = np.where(one[current] != before, one[current], two[current])
        done = after < 0
        last[origin[done]] = current[done]
        before, current, origin = current[~done], after[~done], origin[~done]
    starts = ends[ends <= last[ends]]
    number = np.full(len(one), -1, one.dtype)
    number[starts] = np.arange(len(starts))
    for step, (origin, current) in enumerate(steps):
        ours = number[origin] >= 0
        chain[current[ours]] = number[origin[ours]]
        place[current[ours]] = step
    return _Chains(chain, place, np.bincount(chain, minlength=len(starts)))


def _tree(num_chains: int, x: np.ndarray, y: np.ndarray, chunk: int) -> np.ndarray:
    """Step 2: places of the spanning forest's edges among those given, heaviest first.

    Boruvka's algorithm: every part's heaviest edge to another part is in the forest.
    """
    part = np.arange(num_chains)
    best = np.empty(num_chains, np.int64)
    taken = [np.zeros(0, np.int64)]
    for begin in range(0, len(x), max(chunk, 1)):
        number = np.arange(begin, min(begin + chunk, len(x)))
        while True:
            a, b = part[x[number]], part[y[number]]
            apart = a != b
            a, b, number = a[apart], b[apart], number[apart]
            if not len(a):
                break
            place = np.arange(len(a))
            _first_at(best, a, b, place)
            parts = np.flatnonzero(
                np.bincount(a, minlength=num_chains) + np.bincount(b, minlength=num_chains)
            )
            edge = best[parts]
            other = a[edge] + b[edge] - parts
            # Of two parts that chose one another the lower is the root of what is joined.
            into = np.arange(num_chains)
            into[parts] = other
            into = np.where(
                (into[into] == np.arange(num_chains)) & (np.arange(num_chains) < into),
                np.arange(num_chains),
                into,
            )
            while True:
                further = into[into]
                if np.array_equal(further, into):
                    break
                into = further
            taken.append(number[np.unique(edge)])
            part = into[part]
    return np.sort(np.concatenate(taken))


def _lay(chains: _Chains, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Step 3. first, second: the tree's edges between documents, heaviest first."""
    num_chains = len(chains.length)
    ends = np.concatenate([chains.chain[first], chains.chain[second]])
    others = np.concatenate([chains.chain[second], chains.chain[first]])
    by_end = np.argsort(ends, kind="stable")
    degree = np.bincount(ends, minlength=num_chains)
    begin = np.concatenate([[0], np.cumsum(degree)]).tolist()
    reached: list[int] = others[by_end].tolist()
    # For a chain that is reached: the edge, and the document of the chain at which it ends.
    edge_of: list[int] = (by_end % max(len(first), 1)).tolist()

    parent, by_edge = [-1] * num_chains, [-1] * num_chains
    seen, visited, roots = bytearray(num_chains), [], []
    for root in np.argsort(degree, kind="stable").tolist():
        if seen[root]:
            continue
        seen[root] = 1
        roots.append(root)
        stack = [root]
        while stack:
            chain = stack.pop()
            visited.append(chain)
            for slot in range(begin[chain], begin[chain + 1]):
                other = reached[slot]
                if not seen[other]:
                    seen[other] = 1
                    parent[other], by_edge[other] = chain, edge_of[slot]
                    stack.append(other)
    weight = chains.length.tolist()  # documents in the chain and all that hangs on it
    for chain in reversed(visited):
        if parent[chain] >= 0:
            weight[parent[chain]] += weight[chain]

    # Where a part begins: after its parent's chain and the parent's smaller parts.
    weights, above, via = (np.array(each, np.int64) for each in (weight, parent, by_edge))
    children = np.flatnonzero(above >= 0)
    children = children[np.lexsort((via[children], weights[children], above[children]))]
    total = np.cumsum(weights[children]) - weights[children]
    family = above[children]
    fresh = np.ones(len(children), bool)
    fresh[1:] = family[1:] != family[:-1]
    total -= np.maximum.accumulate(np.where(fresh, total, 0))
    offset = np.zeros(num_chains, np.int64)
    offset[children] = total + chains.length[family]
    trees = np.array(roots, np.int64)
    offset[trees] = np.cumsum(weights[trees]) - weights[trees]
    at = offset.tolist()
    for chain in visited:
        if parent[chain] >= 0:
            at[chain] += at[parent[chain]]

    backwards = np.zeros(num_chains, bool)
    edge = via[children]
    entry = np.where(chains.chain[first[edge]] == children, first[edge], second[edge])
    place, length = chains.place[entry], chains.length[children]
    backwards[children] = length - 1 - place < place
    ours = chains.chain
    place = np.where(backwards[ours], chains.length[ours] - 1 - chains.place, chains.place)
    order = np.empty(len(ours), np.int64)
    order[np.array(at, np.int64)[ours] + place] = np.arange(len(ours))
    return order
