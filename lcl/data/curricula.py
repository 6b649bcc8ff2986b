"""Length curricula: which bucket each step reads, as a table made before the run.

A stage has so many steps of each bucket as the bucket has tokens. A curriculum says in what order:
the steps are dealt out to `cycles` cycles evenly, and within a cycle of n buckets to n sub-cycles
by the odds of a table (a row a bucket, a column a sub-cycle); each sub-cycle is then shuffled.

    GrowP2, 4 buckets      sub-cycle  0  1  2  3        a cycle with 15 steps of each bucket
                  bucket 0 (shortest) 8  4  2  1        0000 0000 1111 22 3 | 0000 1111 1111 22 3 |
                  bucket 1            4  8  2  1         (in a shuffled order)
                  bucket 2            2  4  8  1        00 11 2222 2222 3333 ... | 0 1 2 3333 3333
                  bucket 3 (longest)  1  2  4  8        lengths grow, and start anew each cycle

The design and the tables are OLMo-core's (`VSLGrowthCurriculum`). `style="exhaustion"` is what the
paper released (Dataset Decomposition, arXiv:2405.13226, get_dd_params.py): every step draws a
bucket with weight tokens x odds among those that the cycle has not used up, so the short ones run
out first.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from lcl.data.ordering import named_key, shuffle_with_key

STYLES = ("table", "exhaustion")


class Schedule(NamedTuple):
    """Which rows each step of a stage reads.

    bucket: uint8[steps], index of the step's bucket (0 the shortest); nth: int64[steps], how many
    steps before it had the same bucket, so that its rows are nth * B ... nth * B + B - 1 of that
    bucket's; counts: int64[n], steps of each bucket.
    """

    bucket: np.ndarray
    nth: np.ndarray
    counts: np.ndarray

    def counts_before(self, step: int) -> np.ndarray:
        """Steps of each bucket among the first `step` ones, int64[n]."""
        return np.bincount(self.bucket[:step], minlength=len(self.counts)).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """How the buckets' steps are ordered; use one of the named ones below.

    Attributes:
        style: "table" (OLMo-core's sub-cycles) or "exhaustion" (the paper's released sampler).
    """

    style: str = "table"

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"curriculum style {self.style!r} is unknown; use {_either(STYLES)}")

    def odds(self, num_buckets: int) -> list[int]:
        """Odds of the buckets from the shortest to the longest at the start of a cycle."""
        raise NotImplementedError

    def table(self, num_buckets: int) -> np.ndarray:
        """Odds of each bucket (rows) in each sub-cycle (columns), Python integers [n, n].

        Bucket b's odds climb to their peak in sub-cycle b, where it is the bucket of the hour, and
        then follow those of the buckets before it:

            table[b, j] = odds[b - j] for j <= b, odds[j] after
        """
        odds = self.odds(num_buckets)
        rows = [
            [odds[b - j] if j <= b else odds[j] for j in range(num_buckets)]
            for b in range(num_buckets)
        ]
        return np.array(rows, object)  # 100 ** 12 needs more than 64 bits

    def schedule(
        self, counts: np.ndarray, *, cycles: int, key: int, longest_first: bool = True
    ) -> Schedule:
        """Order the steps of a stage.

        Args:
            counts: int64[n], steps of each bucket, shortest first.
            cycles: how often the lengths run through, >= 1.
            key: names the shuffles.
            longest_first: the first step is exchanged with the first one of the longest bucket, so
                that running out of memory shows at once.

        Returns:
            The Schedule of counts.sum() steps.

        Example:
            >>> GrowP100().schedule(np.array([4, 2]), cycles=1, key=0).bucket.tolist()
            [1, 0, 0, 0, 0, 1]
        """
        counts = np.asarray(counts, np.int64)
        order_fn = self._by_table if self.style == "table" else self._by_exhaustion
        parts = [
            order_fn(np.array([_share(int(n), cycle, cycles) for n in counts]), key, cycle)
            for cycle in range(cycles)
        ]
        bucket = np.concatenate(parts).astype(np.uint8)
        if longest_first and len(bucket):
            first = int(np.argmax(bucket == bucket.max()))
            bucket[0], bucket[first] = bucket[first], bucket[0]
        nth = np.empty(len(bucket), np.int64)
        for b, count in enumerate(counts.tolist()):
            nth[bucket == b] = np.arange(count)
        return Schedule(bucket, nth, counts)

    def _by_table(self, counts: np.ndarray, key: int, cycle: int) -> np.ndarray:
        table = self.table(len(counts))
        shares = np.array(
            [largest_remainders(odds, int(n)) for odds, n in zip(table, counts, strict=True)]
        )
        out = []
        for j in range(len(counts)):
            steps = np.repeat(np.arange(len(counts)), shares[:, j])
            shuffled = shuffle_with_key(len(steps), named_key("sub-cycle", key, cycle, j, bits=128))
            out.append(steps[shuffled])
        return np.concatenate(out)

    def _by_exhaustion(self, counts: np.ndarray, key: int, cycle: int) -> np.ndarray:
        odds = self.odds(len(counts))
        left = counts.tolist()
        weights = [n * o for n, o in zip(left, odds, strict=True)]
        total = int(counts.sum())
        words = np.random.Philox(key=named_key("exhaustion", key, cycle, bits=128))
        out = []
        for word in words.random_raw(total).tolist() if total else ():
            place = word * sum(weights) >> 64  # integers: the same draw on every machine
            b = 0
            while place >= weights[b]:
                place -= weights[b]
                b += 1
            out.append(b)
            left[b] -= 1
            if not left[b]:
                weights[b] = 0
        return np.array(out, np.int64)


@dataclasses.dataclass(frozen=True)
class Uniform(Curriculum):
    """No curriculum: the buckets come as they are, mixed.

    Example:
        >>> Uniform().table(2).tolist()
        [[1, 1], [1, 1]]
    """

    def odds(self, num_buckets: int) -> list[int]:
        return [1] * num_buckets


@dataclasses.dataclass(frozen=True)
class GrowLinear(Curriculum):
    """Lengths grow a little within each cycle: odds n, n - 1, ..., 1.

    Example:
        >>> GrowLinear().table(3).tolist()
        [[3, 2, 1], [2, 3, 1], [1, 2, 3]]
    """

    def odds(self, num_buckets: int) -> list[int]:
        return list(range(num_buckets, 0, -1))


@dataclasses.dataclass(frozen=True)
class GrowP2(Curriculum):
    """Lengths grow within each cycle: odds 2^(n - 1), ..., 2, 1. The paper's default.

    Example:
        >>> GrowP2().table(3).tolist()
        [[4, 2, 1], [2, 4, 1], [1, 2, 4]]
    """

    def odds(self, num_buckets: int) -> list[int]:
        return [2**b for b in reversed(range(num_buckets))]


@dataclasses.dataclass(frozen=True)
class GrowP100(Curriculum):
    """Practically all of a bucket before the next longer one: odds 100^(n - 1), ..., 100, 1."""

    def odds(self, num_buckets: int) -> list[int]:
        return [100**b for b in reversed(range(num_buckets))]


@dataclasses.dataclass(frozen=True)
class ShrinkP100(Curriculum):
    """Practically all of a bucket before the next shorter one: `GrowP100` backwards.

    Example:
        >>> ShrinkP100().table(2).tolist()
        [[1, 100], [100, 1]]
    """

    def odds(self, num_buckets: int) -> list[int]:
        return [100**b for b in range(num_buckets)]

    def table(self, num_buckets: int) -> np.ndarray:
        return GrowP100().table(num_buckets)[:, ::-1]


def largest_remainders(weights: object, total: int) -> list[int]:
    """Deal `total` things out in proportion to integer weights, as whole numbers that sum to it.

    Ties of remainders go to the larger weight, then to the first.

    Example:
        >>> largest_remainders([4, 2, 1], 8)
        [5, 2, 1]
    """
    whole = [int(w) for w in weights]  # type: ignore[attr-defined]
    size = sum(whole)
    shares = [w * total // size for w in whole]
    by_need = sorted(
        range(len(whole)), key=lambda i: (shares[i] * size - whole[i] * total, -whole[i], i)
    )
    for i in by_need[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _share(count: int, part: int, num_parts: int) -> int:
    """How many of `count` things the part-th of equal parts gets."""
    return count * (part + 1) // num_parts - count * part // num_parts


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))
