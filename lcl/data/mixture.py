"""Mixtures: which domain each row comes from, exact in every block of rows.

Weights are turned into whole numbers of rows a block (largest remainder), and a keyed permutation
orders each block. So the shares are exact, not in expectation: no run of bad luck, and the k-th
row's domain is a pure function of k, whatever was read before and on however many hosts.

    weights a: 0.5, b: 0.3, c: 0.2      block 10

    k            0 1 2 3 4 5 6 7 8 9 | 10 11 12 ...
    domain       a c b a a b a b c a |  b  a  a ...     5 a, 3 b, 2 c in each block, exactly
    occurrence   0 0 0 1 2 1 3 2 1 4 |  3  5  6 ...     the how-maniest row of its domain it is

Every mixture is used in the same way. `bind` is told how long the stage is; what it returns says of
any row which domain it comes from, and how many of each came before it:

    Mixture         constant weights                                      here
    StagedMixture   weights that change at given points of the stage      mixture_curricula.py
    LinearMixture   weights that move along lines over the stage
    TokenBudgets    so many tokens of each domain, to the row
    Subset          any of these, with a domain cut down to a part        mixture_subset.py
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import types
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from lcl.data.ordering import named_key, shuffle_with_key

_NO_SUBSETS: Mapping[str, Any] = types.MappingProxyType({})


class BoundMixture(Protocol):
    """A mixture over a stage of known length: what the planner and the stream ask.

    `domains` is sorted; `locate` and `counts_before` are those of `Mixture`.
    """

    @property
    def domains(self) -> tuple[str, ...]: ...

    def locate(self, k: Any, *, key: int = 0) -> tuple[np.ndarray, np.ndarray]: ...

    def counts_before(self, k: int, *, key: int = 0) -> np.ndarray: ...


class AnyMixture(abc.ABC):
    """What a stage's `mixture` may be.

    Attributes:
        needs_length: whether the batches depend on the stage's length; then a run of another
            length is another run.
        subsets: domain -> `Subset`, for the domains of which only a part is read.
    """

    needs_length: bool = False

    @property
    def subsets(self) -> Mapping[str, Any]:
        return _NO_SUBSETS

    @property
    @abc.abstractmethod
    def domains(self) -> tuple[str, ...]:
        """The domains in sorted order: `locate` answers with indices into them."""

    @abc.abstractmethod
    def bind(self, num_rows: int, row_length: int | None = None) -> BoundMixture:
        """Say which rows a stage reads.

        Args:
            num_rows: new rows of the whole stage.
            row_length: T, tokens of a row; only `TokenBudgets` asks.

        Raises:
            ValueError: the stage is too short for the mixture, or does not fit it.
        """

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return everything that decides the rows (but the stage's length), as plain values."""


def check_weights(weights: Any, what: str, *, zero: bool = False) -> None:
    """Refuse what are not weights of domains.

    Args:
        weights: domain -> weight, at least one.
        what: what they are, for the message.
        zero: whether a weight may be 0 (one of them must be more).
    """
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"{what}s are {weights!r}; give at least one, as in {{'python': 1.0}}")
    for domain, weight in weights.items():
        number = isinstance(weight, (int, float, np.number)) and weight < math.inf
        if not (number and (weight > 0 or (zero and weight == 0))):
            raise ValueError(
                f"{what} of {domain!r} is {weight!r}; give a positive number or remove the domain"
            )
    if not any(weights.values()):
        raise ValueError(
            f"{what} is 0 for every domain; give one of {', '.join(sorted(weights))} a weight"
        )


@dataclasses.dataclass(frozen=True)
class Mixture(AnyMixture):
    """Domain weights, in rows, constant over a stage.

    Rows of one length hold (nearly) equal numbers of tokens, so shares of rows are shares of tokens
    up to the padding; the ledger counts the tokens exactly.

    Attributes:
        weights: domain -> weight > 0; they need not sum to 1.
        block: rows in which the shares are exact. A weight that is less than about half a row of a
            block cannot be kept and is refused.

    Example:
        >>> Mixture({"python": 3, "french": 1}, block=8).counts.tolist()  # french, python
        [2, 6]
    """

    weights: Mapping[str, float]
    block: int = 1024

    def __post_init__(self) -> None:
        check_weights(self.weights, "mixture weight")
        if self.block < 1:
            raise ValueError(f"mixture block is {self.block}; give at least 1 row")
        starved = [d for d, count in zip(self.domains, self.counts, strict=True) if not count]
        if starved:
            share = self._shares[self.domains.index(starved[0])]
            raise ValueError(
                f"mixture weight of {starved[0]!r} is {float(share):.3g} of the whole, less than "
                f"a row in a block of {self.block}; set block to {math.ceil(1 / share)} or more"
            )

    @functools.cached_property
    def domains(self) -> tuple[str, ...]:  # type: ignore[override]
        """The domains in sorted order: `locate` answers with indices into them."""
        return tuple(sorted(self.weights))

    def bind(self, num_rows: int, row_length: int | None = None) -> Mixture:
        """Return itself: constant weights do not depend on the stage's length."""
        return self

    def settings(self) -> dict[str, Any]:
        """Return the weights and the block, as plain values."""
        return {
            "weights": {d: float(w) for d, w in sorted(self.weights.items())},
            "block": self.block,
        }

    @functools.cached_property
    def _shares(self) -> list[Fraction]:
        # Fractions neither round nor overflow: a tie must fall alike on every machine.
        weights = [Fraction(float(self.weights[d])) for d in self.domains]
        return [weight / sum(weights) for weight in weights]

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Rows of each domain in every block, int64[D], by the method of largest remainders."""
        exact = [share * self.block for share in self._shares]
        counts = [math.floor(e) for e in exact]
        by_remainder = sorted(range(len(exact)), key=lambda d: counts[d] - exact[d])
        for d in by_remainder[: self.block - sum(counts)]:
            counts[d] += 1
        return np.array(counts, np.int64)

    def locate(self, k: Any, *, key: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Say which domain row k comes from, and which of that domain's rows it is.

        Args:
            k: int array [n], row numbers >= 0.
            key: names the order within the blocks (see `lcl.data.ordering.named_key`).

        Returns:
            (domain index into `domains`, occurrence), both int64[n]. Over k = 0, 1, 2, ... each
            domain's occurrences are 0, 1, 2, ... in this order, without a gap.

        Example:
            >>> domain, occurrence = Mixture({"a": 1, "b": 1}, block=2).locate(np.arange(6))
            >>> occurrence.tolist()
            [0, 0, 1, 1, 2, 2]
        """
        block, place = np.divmod(np.asarray(k, np.int64), self.block)
        domain = np.empty(place.shape, np.int64)
        occurrence = np.empty(place.shape, np.int64)
        for b, here in by_block(block):
            table, rank = block_tables(tuple(self.counts.tolist()), key, b)
            domain[here] = table[place[here]]
            occurrence[here] = rank[place[here]] + b * self.counts[domain[here]]
        return domain, occurrence

    def counts_before(self, k: int, *, key: int = 0) -> np.ndarray:
        """Count the rows of each domain among rows 0 .. k - 1, int64[D], in constant time."""
        block, place = divmod(int(k), self.block)
        table, _ = block_tables(tuple(self.counts.tolist()), key, block)
        return block * self.counts + np.bincount(table[:place], minlength=len(self.counts))


def by_block(block: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Go through the blocks that rows are in, each with the places of its rows in `block`.

    A batch is in one or two; a reservoir's reads are in as many as a stage has.
    """
    order = np.argsort(block, kind="stable")
    blocks, first = np.unique(block[order], return_index=True)
    yield from zip(blocks.tolist(), np.split(order, first)[1:], strict=True)


@functools.lru_cache(maxsize=128)
def block_tables(counts: tuple[int, ...], key: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Order one block: (domain of each place, rank of the place among its domain's), int64[block].

    The cache only saves time: a block serves many steps, and the tables are a function of the
    arguments.
    """
    domains = np.repeat(np.arange(len(counts)), counts)
    table = domains[shuffle_with_key(len(domains), named_key("block", key, block, bits=128))]
    by_domain = np.argsort(table, kind="stable")
    rank = np.empty_like(table)
    rank[by_domain] = np.arange(len(table)) - np.repeat(np.cumsum(counts) - counts, counts)
    for array in (table, rank):
        array.flags.writeable = False
    return table, rank
