"""Mixtures whose weights change over the stage, and mixtures made of token budgets.

What each domain should have had after k rows is a line (exact rational numbers). At every block's
end each domain has had that many rows, rounded up or down: it never is a row behind or ahead, so
shares do not drift, whatever the curriculum; and what is a whole number is met exactly.

    LinearMixture a: 1 -> 0, b: 0 -> 1       block 4, 20 rows

    block               0       1       2       3       4
    b after the block   0.4     1.6     3.6     6.4     10       the line
    b, rows             0       1       3       6       10       within a row of it, always
    b in the block      0       1       2       3       4        a table, known before the run
    domains             aaaa    aaab    aabb    abbb    bbbb     in a keyed order within the block

The table has one line a block: some kilobytes for a stage of a million rows.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from lcl.data.mixture import AnyMixture, block_tables, by_block, check_weights

_MAX_BLOCKS = 1 << 20


class _Piece(NamedTuple):
    """Rows start .. end - 1, over which the shares move along lines from `first` to `last`."""

    start: int
    end: int
    first: list[Fraction]
    last: list[Fraction]


class BlockMixture:
    """A mixture over a stage of known length: a table of how many rows each block has of each.

    Attributes:
        domains: sorted.
        num_rows: of the stage.
        borders: int64[b + 1], first row of each block, and the end.
        cumulative: int64[b + 1, D], rows of each domain before each block.
    """

    def __init__(self, domains: Sequence[str], pieces: Sequence[_Piece], block: int):
        """Args: pieces: one after the other, from row 0 on; block: rows of a block, at most."""
        self.domains = tuple(domains)
        self.num_rows = pieces[-1].end
        self.borders = np.array(
            [0, *(b for piece in pieces for b in _borders(piece, block))], np.int64
        )
        low, high = _bounds(pieces, block)
        self.cumulative = _round_lines(self.borders.tolist(), low, high)
        starved = np.flatnonzero(self.cumulative[-1] == 0)
        if starved.size:
            raise ValueError(
                f"mixture gives {self.domains[starved[0]]!r} less than a row of the stage's "
                f"{self.num_rows:,}; make the stage longer or remove the domain"
            )

    def _block_of(self, k: Any) -> Any:
        return np.minimum(np.searchsorted(self.borders, k, side="right") - 1, len(self.borders) - 2)

    def _counts(self, block: int) -> tuple[int, ...]:
        return tuple((self.cumulative[block + 1] - self.cumulative[block]).tolist())

    def locate(self, k: Any, *, key: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Say which domain row k comes from, and which of that domain's rows it is.

        Args:
            k: int array [n], row numbers in [0, num_rows).
            key: names the order within the blocks.

        Returns:
            (domain index into `domains`, occurrence), both int64[n]. Over k = 0, 1, 2, ... each
            domain's occurrences are 0, 1, 2, ... in this order, without a gap.
        """
        k = np.asarray(k, np.int64)
        assert not k.size or (k.min() >= 0 and k.max() < self.num_rows), "a row past the stage"
        block = self._block_of(k)
        place = k - self.borders[block]
        domain, occurrence = np.empty_like(k), np.empty_like(k)
        for b, here in by_block(block):
            table, rank = block_tables(self._counts(b), key, b)
            domain[here] = table[place[here]]
            occurrence[here] = rank[place[here]] + self.cumulative[b][domain[here]]
        return domain, occurrence

    def counts_before(self, k: int, *, key: int = 0) -> np.ndarray:
        """Count the rows of each domain among rows 0 .. k - 1, int64[D]; a look-up."""
        assert 0 <= k <= self.num_rows, "a row past the stage"
        b = int(self._block_of(k))
        table, _ = block_tables(self._counts(b), key, b)
        inside = np.bincount(table[: k - int(self.borders[b])], minlength=len(self.domains))
        return self.cumulative[b] + inside


def _borders(piece: _Piece, block: int) -> list[int]:
    """Ends of a piece's blocks: the last one is short rather than go over into the next piece."""
    return [*range(piece.start + block, piece.end, block), piece.end]


def _bounds(pieces: Sequence[_Piece], block: int) -> tuple[list[list[int]], list[list[int]]]:
    """The lines at each border, rounded down and up: [b + 1][D] each, exactly."""
    # All in multiples of 1 / unit, so that the loop is over integers.
    unit = math.lcm(
        *(
            2 * (piece.end - piece.start) * share.denominator
            for piece in pieces
            for share in (*piece.first, *piece.last)
        )
    )
    num_domains = len(pieces[0].first)
    at = [0] * num_domains
    lines = [list(at)]
    for piece in pieces:
        length = piece.end - piece.start
        # Rows after x rows of the piece: the integral of first + (last - first) * x / length.
        slope = [int(f * unit) for f in piece.first]
        bend = [
            int((y - f) * unit / (2 * length)) for f, y in zip(piece.first, piece.last, strict=True)
        ]
        for border in _borders(piece, block):
            x = border - piece.start
            lines.append([a + s * x + c * x * x for a, s, c in zip(at, slope, bend, strict=True)])
        at = lines[-1]
    return (
        [[v // unit for v in line] for line in lines],
        [[-(-v // unit) for v in line] for line in lines],
    )


def _round_lines(
    borders: Sequence[int], low: Sequence[Sequence[int]], high: Sequence[Sequence[int]]
) -> np.ndarray:
    """Round lines to whole rows at each border, so that no domain ever loses a row again.

    Rows that are left when every domain has its line rounded down go to those which will need one
    soonest. With the earliest deadline first it always works out (R. Tijdeman 1980, "The chairman
    assignment problem"; S. Baruah et al. 1996, "Proportionate progress"): any rows that are due
    between two borders are no more than there are rows between them.

    Args:
        borders: [b + 1] rows; the lines' sum at each.
        low, high: [b + 1][D] lines rounded down and up.

    Returns:
        int64[b + 1, D]: low <= it <= high, never falling, and each line's sum is its border.
    """
    num_domains = len(low[0])
    due = [[line[d] for line in low] for d in range(num_domains)]
    rows = [0] * num_domains
    table = np.zeros((len(borders), num_domains), np.int64)
    for b in range(1, len(borders)):
        rows = [max(had, least) for had, least in zip(rows, low[b], strict=True)]
        left = borders[b] - sum(rows)
        if left:
            may = [d for d in range(num_domains) if rows[d] < high[b][d]]
            may.sort(key=lambda d: (bisect.bisect_left(due[d], rows[d] + 1, b), d))
            for d in may[:left]:
                rows[d] += 1
        assert sum(rows) == borders[b]
        table[b] = rows
    return table


def _shares(weights: Mapping[str, float], domains: Sequence[str]) -> list[Fraction]:
    """Each domain's share, exactly: a tie must fall alike on every machine."""
    values = [Fraction(float(weights.get(domain, 0.0))) for domain in domains]
    total = sum(values)
    return [value / total for value in values]


def _check_block(block: int) -> None:
    if block < 1:
        raise ValueError(f"mixture block is {block}; give at least 1 row")


def _check_num_blocks(num_rows: int, block: int) -> None:
    if num_rows // block > _MAX_BLOCKS:
        raise ValueError(
            f"mixture block is {block}, which makes more than {_MAX_BLOCKS:,} blocks of the "
            f"stage's {num_rows:,} rows; set block to {-(-num_rows // _MAX_BLOCKS)} or more"
        )


def _knots(at: Sequence[float], num_rows: int) -> list[int]:
    """Points of the stage, in [0, 1], as rows (the nearest; halves go up)."""
    return [math.floor(Fraction(float(a)) * num_rows + Fraction(1, 2)) for a in at]


def _all_domains(weights: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    return tuple(sorted({d for one in weights for d, weight in one.items() if weight}))


def _scaled(
    weights: Sequence[Mapping[str, float]], factors: Mapping[str, float]
) -> tuple[dict[str, float], ...]:
    return tuple({d: w * factors[d] for d, w in one.items() if d in factors} for one in weights)


@dataclasses.dataclass(frozen=True)
class StagedMixture(AnyMixture):
    """Weights that change at given points of the stage.

        weights a | a b | b     starts 0, 0.25, 0.75
        rows    aaaaaabbaababbabbbbbb

    Unlike several stages it is one: one learning-rate schedule, one optimizer state, one evaluation
    at its end. A domain that a part does not name has no rows there.

    Attributes:
        weights: for each part, domain -> weight >= 0; they need not sum to 1.
        starts: where each part begins, as a share of the stage: 0, then rising, all below 1.
        block: rows in which the shares are exact (see the file's picture), at most.

    Example:
        >>> mixture = StagedMixture(({"a": 1}, {"a": 1, "b": 3}), (0.0, 0.5)).bind(16)
        >>> mixture.counts_before(8).tolist(), mixture.counts_before(16).tolist()
        ([8, 0], [10, 6])
    """

    weights: Sequence[Mapping[str, float]]
    starts: Sequence[float]
    block: int = 1024
    needs_length = True

    def __post_init__(self) -> None:
        _check_block(self.block)
        if not self.weights or len(self.starts) != len(self.weights):
            raise ValueError(
                f"staged mixture has {len(self.weights)} weights and {len(self.starts)} starts; "
                "give as many of both, at least one"
            )
        for part, weights in enumerate(self.weights):
            check_weights(weights, f"weight in part {part}", zero=True)
        rising = all(a < b for a, b in itertools.pairwise([*self.starts, 1.0]))
        if self.starts[0] != 0 or not rising:
            raise ValueError(
                f"staged mixture's starts are {list(self.starts)}; give 0, then rising shares of "
                "the stage below 1"
            )

    @functools.cached_property
    def domains(self) -> tuple[str, ...]:  # type: ignore[override]
        return _all_domains(self.weights)

    def bind(self, num_rows: int, row_length: int | None = None) -> BlockMixture:
        _check_num_blocks(num_rows, self.block)
        knots = [*_knots(self.starts, num_rows), num_rows]
        pieces = []
        for part, (start, end) in enumerate(itertools.pairwise(knots)):
            if start == end:
                raise ValueError(
                    f"part {part} of the staged mixture has no row in a stage of {num_rows} rows; "
                    "make the stage longer or leave the part out"
                )
            shares = _shares(self.weights[part], self.domains)
            pieces.append(_Piece(start, end, shares, shares))
        return BlockMixture(self.domains, pieces, self.block)

    def scaled(self, factors: Mapping[str, float]) -> StagedMixture:
        """Multiply each domain's weights, and leave out those that have no factor."""
        return dataclasses.replace(self, weights=_scaled(self.weights, factors))

    def settings(self) -> dict[str, Any]:
        return {
            "mixture": "staged",
            "weights": [_plain(weights) for weights in self.weights],
            "starts": [float(start) for start in self.starts],
            "block": self.block,
        }


@dataclasses.dataclass(frozen=True)
class LinearMixture(AnyMixture):
    """Weights that move along straight lines over the stage.

        weights {a: 1}, {a: 1, b: 1}

        1    aaaa____                         share of a: from all to a half
        1/2          aaaa____aaaa
        1/2      ____bbbb----bbbb             share of b: from nothing to a half
        0    bbbb

    The shares (weights over their sum) move, so what stands at a point is what holds there. With
    more than two points there are several lines, one after the other; two equal ones hold.

    Attributes:
        weights: at each point, domain -> weight >= 0; a domain that is not named has 0.
        at: where the points are, as shares of the stage: 0, then rising, 1; None: evenly.
        block: rows in which the shares are exact (see the file's picture), at most.

    Example:
        >>> mixture = LinearMixture(({"a": 1}, {"b": 1}), block=4).bind(20)
        >>> mixture.cumulative[:, 1].tolist()
        [0, 0, 1, 3, 6, 10]
    """

    weights: Sequence[Mapping[str, float]]
    at: Sequence[float] | None = None
    block: int = 1024
    needs_length = True

    def __post_init__(self) -> None:
        _check_block(self.block)
        if len(self.weights) < 2:
            raise ValueError(
                f"linear mixture has weights at {len(self.weights)} points; give two or more, or "
                "use Mixture"
            )
        for point, weights in enumerate(self.weights):
            check_weights(weights, f"weight at point {point}", zero=True)
        at = self._points
        if len(at) != len(self.weights):
            raise ValueError(
                f"linear mixture has {len(self.weights)} weights at {len(at)} points; give as "
                "many of both"
            )
        rising = all(a < b for a, b in itertools.pairwise(at))
        if at[0] != 0 or at[-1] != 1 or not rising:
            raise ValueError(
                f"linear mixture's points are {list(at)}; give 0, then rising shares of the "
                "stage, then 1"
            )

    @property
    def _points(self) -> Sequence[float]:
        if self.at is not None:
            return self.at
        return [i / (len(self.weights) - 1) for i in range(len(self.weights))]

    @functools.cached_property
    def domains(self) -> tuple[str, ...]:  # type: ignore[override]
        return _all_domains(self.weights)

    def bind(self, num_rows: int, row_length: int | None = None) -> BlockMixture:
        _check_num_blocks(num_rows, self.block)
        shares = [_shares(weights, self.domains) for weights in self.weights]
        pieces = [
            _Piece(start, end, shares[i], shares[i + 1])
            for i, (start, end) in enumerate(itertools.pairwise(_knots(self._points, num_rows)))
            if start < end
        ]
        return BlockMixture(self.domains, pieces, self.block)

    def scaled(self, factors: Mapping[str, float]) -> LinearMixture:
        """Multiply each domain's weights, and leave out those that have no factor."""
        return dataclasses.replace(self, weights=_scaled(self.weights, factors))

    def settings(self) -> dict[str, Any]:
        return {
            "mixture": "linear",
            "weights": [_plain(weights) for weights in self.weights],
            "at": [float(a) for a in self._points],
            "block": self.block,
        }


@dataclasses.dataclass(frozen=True)
class TokenBudgets(AnyMixture):
    """So many tokens of each domain, spread evenly over the stage, to the row.

        tokens a: 2,000,000   b: rest       row_length 1,000, stage of 6,000 rows
        rows   a: 2,000       b: 4,000      exactly, and 341 of a's in each block of 1,024 (or 342)

    A budget is whole rows, at most the tokens given (a row's padding counts as tokens; the ledger
    has what was trained on). The budgets must fill the stage; the domain with None takes the rest.

    Attributes:
        tokens: domain -> tokens, or None for one domain that takes what is left.
        block: rows in which the shares are exact (see the file's picture), at most.

    Example:
        >>> bound = TokenBudgets({"a": 25, "b": None}).bind(num_rows=16, row_length=4)
        >>> bound.counts_before(16).tolist()
        [6, 10]
    """

    tokens: Mapping[str, int | None]
    block: int = 1024
    needs_length = True

    def __post_init__(self) -> None:
        _check_block(self.block)
        if not isinstance(self.tokens, Mapping) or not self.tokens:
            raise ValueError(
                f"token budgets are {self.tokens!r}; give at least one, as in {{'python': 1000000}}"
            )
        for domain, budget in self.tokens.items():
            whole = isinstance(budget, int | np.integer) and not isinstance(budget, bool)
            if budget is not None and not (whole and budget > 0):
                raise ValueError(
                    f"token budget of {domain!r} is {budget!r}; give a positive whole number, or "
                    "None for what is left"
                )
        rest = sorted(domain for domain, budget in self.tokens.items() if budget is None)
        if len(rest) > 1:
            raise ValueError(
                f"token budgets of {', '.join(map(repr, rest))} are None; only one domain can "
                "take what is left"
            )

    @functools.cached_property
    def domains(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(sorted(self.tokens))

    def bind(self, num_rows: int, row_length: int | None = None) -> BlockMixture:
        assert row_length is not None, "budgets are in tokens; say how many a row has"
        _check_num_blocks(num_rows, self.block)
        rows: dict[str, int] = {}
        for domain, budget in self.tokens.items():
            if budget is not None:
                rows[domain] = budget // row_length
                if not rows[domain]:
                    raise ValueError(
                        f"token budget of {domain!r} is {budget}, less than a row of "
                        f"{row_length}; give {row_length} or more"
                    )
        given = sum(rows.values())
        left = num_rows - given
        rest = [domain for domain in self.domains if domain not in rows]
        if rest and left < 1:
            raise ValueError(
                f"token budgets are {given:,} rows of {row_length}, which leaves none of the "
                f"stage's {num_rows:,} to {rest[0]!r}; lengthen the stage or lower the budgets"
            )
        if left and not rest:
            raise ValueError(
                f"token budgets are {given:,} rows of {row_length}, but the stage has "
                f"{num_rows:,}; make them equal, or give one domain None: it takes what is left"
            )
        rows.update(dict.fromkeys(rest, left))
        shares = [Fraction(rows[domain], num_rows) for domain in self.domains]
        return BlockMixture(self.domains, [_Piece(0, num_rows, shares, shares)], self.block)

    def settings(self) -> dict[str, Any]:
        return {
            "mixture": "token budgets",
            "tokens": {d: None if n is None else int(n) for d, n in sorted(self.tokens.items())},
            "block": self.block,
        }


def _plain(weights: Mapping[str, float]) -> dict[str, float]:
    return {domain: float(weight) for domain, weight in sorted(weights.items()) if weight}
