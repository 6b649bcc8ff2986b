"""Buffers: which of the rows that earlier stages read a stage may replay, and in what order.

A buffer holds no tokens. It is a rule over the *reads* of a run, row after row in the order of
reading, so it costs O(1) memory whatever was seen (the reservoir: its capacity in integers), it is
the same after any restart, and row j of the replay can be asked for on its own.

    stage 0 read   a3 a0 a4 a1     stage 1 read   b1 b0

    Everything         a3 a0 a4 a1 b1 b0      every row once in each pass, in a keyed order
    Reservoir(3)       a3 b1 a4               Vitter's algorithm R: any read is kept with 3/6
    BalancedByStage    a a b b -> a b b a ..  one row of each stage in every 2 replayed rows
    Contiguous(2)      a4 a1 | b1 b0 | a3 a0  pieces of the stream, in its own order
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lcl.data.ordering import named_key, permute
from lcl.data.plans import Plan, PrefixSums, rows_at

# The k-th new rows that a stage read, k int64[n] -> (index into the plans, which use), int64[n].
ReadFn = Callable[[np.ndarray], "tuple[np.ndarray, np.ndarray]"]
_CHUNK = 1 << 16


class Used(NamedTuple):
    """What one stage read of one plan: the uses first .. first + count - 1 of it."""

    stage: int
    plan: int  # index into the plans that come with it
    first: int
    count: int  # type: ignore[assignment]


class History(NamedTuple):
    """What the stages so far have read.

    plans: what `Used.plan` refers to; used: stage after stage; num_domains: D; reading: the order
    of reading of the stages whose very rows are in `used` (not of those laid out again).
    """

    plans: Sequence[Plan]
    used: Sequence[Used]
    num_domains: int
    reading: Mapping[int, ReadFn]

    def stages(self) -> dict[int, list[Used]]:
        """The stages that read anything, in order, with what they read."""
        stages: dict[int, list[Used]] = {}
        for one in self.used:
            if one.count:
                stages.setdefault(one.stage, []).append(one)
        return dict(sorted(stages.items()))

    def tokens_of(self, plan: np.ndarray, use: np.ndarray) -> np.ndarray:
        """Transitions of some rows, each in its domain's column: int64[n, D]."""
        _, row = rows_at(self.plans, plan, use)
        out = np.zeros((len(plan), self.num_domains), np.int64)
        for p in np.unique(plan).tolist():
            here = plan == p
            out[here, self.plans[p].domain] = self.plans[p].layout.tokens_in(row[here])
        return out


def whole_epoch(first: int, count: int, num_rows: int) -> tuple[int, int]:
    """Cut a span of uses down to an epoch of its plan, if it holds one: each row once.

    Example:
        >>> whole_epoch(2, 9, num_rows=4), whole_epoch(2, 5, num_rows=4)
        ((4, 4), (2, 5))
    """
    begin = -(-first // num_rows) * num_rows
    return (begin, num_rows) if begin + num_rows <= first + count else (first, count)


# ---- rows by number: what a pool is over ---------------------------------------------------------


class Rows(Protocol):
    """A numbered list of rows that is computed, not stored."""

    @property
    def num_rows(self) -> int: ...

    def at(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows `index` int64[n] as (index into the plans, which use), int64[n] each."""

    def tokens(self) -> np.ndarray:
        """Transitions of all rows together by domain, int64[D]."""


class Spans:
    """Runs of uses, one after the other."""

    def __init__(self, history: History, used: Sequence[Used]):
        self._history, self._used = history, list(used)
        self._ends = np.cumsum([u.count for u in used])
        self._plan = np.array([u.plan for u in used], np.int64)
        self._offset = np.array([u.first + u.count for u in used], np.int64) - self._ends

    @property
    def num_rows(self) -> int:
        return int(self._ends[-1])

    def at(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        span = np.searchsorted(self._ends, index, side="right")
        return self._plan[span], index + self._offset[span]

    def tokens(self) -> np.ndarray:
        total = np.zeros(self._history.num_domains, np.int64)
        for _, p, first, count in self._used:
            plan = self._history.plans[p]
            total[plan.domain] += plan.tokens_in_first(first + count) - plan.tokens_in_first(first)
        return total


class Reads:
    """All reads of the run so far, in the order of reading."""

    def __init__(self, history: History):
        stages = history.stages()
        self._ends = np.cumsum([sum(u.count for u in used) for used in stages.values()])
        # A stage laid out again has no order of reading but its rows' own.
        self._read_fns = [
            history.reading.get(stage) or Spans(history, used).at for stage, used in stages.items()
        ]

    @property
    def num_rows(self) -> int:
        return int(self._ends[-1])

    def at(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stage = np.searchsorted(self._ends, index, side="right")
        plan, use = np.empty_like(index), np.empty_like(index)
        for s in np.unique(stage).tolist():
            here = stage == s
            begin = int(self._ends[s - 1]) if s else 0
            plan[here], use[here] = self._read_fns[s](index[here] - begin)
        return plan, use


class _Chosen:
    """Some of other rows, by their numbers there: a table, or a function of the number."""

    def __init__(
        self,
        history: History,
        num_rows: int,
        at_fn: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    ):
        self.num_rows, self.at, self._history = num_rows, at_fn, history

    def tokens(self) -> np.ndarray:
        total = np.zeros(self._history.num_domains, np.int64)
        for begin in range(0, self.num_rows, _CHUNK):
            index = np.arange(begin, min(begin + _CHUNK, self.num_rows))
            total += self._history.tokens_of(*self.at(index)).sum(axis=0)
        return total


# ---- pools: rows in the order of replay ----------------------------------------------------------


class Pool(abc.ABC):
    """The rows a stage may replay, and the order in which it does.

    Attributes:
        plans: what `locate` refers to.
        num_rows: P, how many there are.
    """

    plans: tuple[Plan, ...]
    num_rows: int

    @abc.abstractmethod
    def locate(self, j: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Say what the j-th replayed row is.

        Args:
            j: int64[n], >= 0.

        Returns:
            (pass over the pool, index into `plans`, which use of that plan), int64[n] each; the use
            is an argument of `lcl.data.plans.rows_at`.
        """

    @abc.abstractmethod
    def tokens_in_first(self, j: int) -> np.ndarray:
        """Count the transitions of each domain in the first j replayed rows, int64[D]; exact."""


class ShuffledPool(Pool):
    """Every row once in each pass; each pass has a keyed order of its own."""

    def __init__(self, history: History, rows: Rows, key: int):
        self.plans, self.num_rows = tuple(history.plans), rows.num_rows
        self._rows, self._history = rows, history
        self._total = functools.cache(rows.tokens)
        self._pass_key = functools.lru_cache(maxsize=64)(lambda p: named_key("replay", key, p))
        self._pass_sums = functools.lru_cache(maxsize=4)(
            lambda p: PrefixSums(history.num_domains, functools.partial(self._tokens_of_pass, p))
        )

    def locate(self, j: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        passes, place = np.divmod(j, self.num_rows)
        keys = np.array([self._pass_key(p) for p in passes.tolist()], np.uint64)
        return passes, *self._rows.at(permute(place, self.num_rows, keys))

    def _tokens_of_pass(self, one_pass: int, place: np.ndarray) -> np.ndarray:
        return self._history.tokens_of(*self.locate(one_pass * self.num_rows + place)[1:])

    def tokens_in_first(self, j: int) -> np.ndarray:
        passes, rest = divmod(int(j), self.num_rows)
        tokens = passes * self._total() if passes else np.zeros(self._history.num_domains, np.int64)
        return tokens + self._pass_sums(passes)(rest) if rest else tokens


class BalancedPool(Pool):
    """One row of each of S pools in every block of S rows, in a keyed order."""

    def __init__(self, pools: Sequence[Pool], key: int):
        self.plans, self.num_rows = pools[0].plans, sum(pool.num_rows for pool in pools)
        self._pools = tuple(pools)
        self._block_key = functools.lru_cache(maxsize=1024)(lambda b: named_key("balance", key, b))

    def _which(self, block: np.ndarray, place: np.ndarray) -> np.ndarray:
        keys = np.array([self._block_key(b) for b in block.tolist()], np.uint64)
        return permute(place, len(self._pools), keys)

    def locate(self, j: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        block, place = np.divmod(j, len(self._pools))
        which = self._which(block, place)
        out = tuple(np.empty_like(block) for _ in range(3))
        for s in np.unique(which).tolist():
            here = which == s
            for array, values in zip(out, self._pools[s].locate(block[here]), strict=True):
                array[here] = values
        return out[0], out[1], out[2]

    def tokens_in_first(self, j: int) -> np.ndarray:
        block, rest = divmod(int(j), len(self._pools))
        more = set(self._which(np.full(rest, block), np.arange(rest)).tolist())
        tokens = [pool.tokens_in_first(block + (s in more)) for s, pool in enumerate(self._pools)]
        return np.sum(tokens, axis=0)


class ContiguousPool(Pool):
    """Pieces of the stream in its own order, side by side in lanes.

    reads 0 .. 9, segment 3, lanes 2      a pass: 3 pieces from a keyed begin in {0, 1}

    lane 0    4 5 6 | 1 2 3 | 6 7 8 |     each lane goes on along its piece, then restarts;
    lane 1    7 8 9 | 3 4 5 | 0 1 2 |     j counts down the columns: 4 7 5 8 6 9 1 3 ...
    """

    def __init__(self, history: History, rows: Reads, segment: int, lanes: int, key: int):
        self.plans, self.num_rows = tuple(history.plans), rows.num_rows
        self._rows, self._lanes = rows, lanes
        self._segment = min(segment, self.num_rows)
        self._num_segments, self._slack = divmod(self.num_rows, self._segment)
        self._pass_key = functools.lru_cache(maxsize=64)(lambda p: named_key("contiguous", key, p))
        self._begin = functools.lru_cache(maxsize=64)(
            lambda p: named_key("begin", key, p) % (self._slack + 1)
        )
        self._sums = PrefixSums(
            history.num_domains, lambda j: history.tokens_of(*self.locate(j)[1:])
        )

    def locate(self, j: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        position, lane = np.divmod(j, self._lanes)
        turn, offset = np.divmod(position, self._segment)
        passes, place = np.divmod(turn * self._lanes + lane, self._num_segments)
        keys = np.array([self._pass_key(p) for p in passes.tolist()], np.uint64)
        begin = np.array([self._begin(p) for p in passes.tolist()], np.int64)
        piece = permute(place, self._num_segments, keys)
        return passes, *self._rows.at(begin + piece * self._segment + offset)

    def tokens_in_first(self, j: int) -> np.ndarray:
        # Where a piece is cut differs from pass to pass, so there is no closed form: the first call
        # after a resume goes once over the rows replayed so far.
        return self._sums(j)


# ---- buffers: what one writes in a configuration -------------------------------------------------


class Buffer(abc.ABC):
    """What `Replay.buffer` may be.

    Attributes:
        by_stage: whether it asks which stage read a row, and in what order; else the history may be
            given merged.
    """

    by_stage: bool = True

    @abc.abstractmethod
    def pool(self, history: History, key: int, buffer_key: int) -> Pool:
        """Build the pool of a stage that comes after `history`, which is not empty.

        Args:
            history: what the stages before it have read.
            key: names the order of replay in this stage.
            buffer_key: names what the buffer draws for the whole run.
        """

    def settings(self) -> dict[str, Any]:
        """Return what decides the rows, as plain values."""
        name = type(self).__name__
        return {"buffer": name, **dataclasses.asdict(self)}  # type: ignore[call-overload]


@dataclasses.dataclass(frozen=True)
class Everything(Buffer):
    """Every row that was read; each once a pass, however often it was read."""

    by_stage = False

    def pool(self, history: History, key: int, buffer_key: int) -> Pool:
        seen: dict[int, int] = {}
        for _, plan, first, count in history.used:
            if count:
                seen[plan] = max(seen.get(plan, 0), first + count)
        rows = [Used(-1, p, 0, min(n, history.plans[p].num_rows)) for p, n in seen.items()]
        return ShuffledPool(history, Spans(history, rows), key)


@dataclasses.dataclass(frozen=True)
class Reservoir(Buffer):
    """A buffer of fixed size: Vitter's algorithm R (1985) over the reads of the run.

    After n reads each of them is in the buffer with probability capacity / n: no favour for recent
    rows. A row that was read in two epochs is two reads. The buffer carries on from stage to stage
    (what was thrown out does not come back) as long as the rows stay the same: a stage with another
    sequence_length, packing or order lays the reads out again and draws its buffer from those rows.

    Attributes:
        capacity: M, rows.
    """

    capacity: int

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"reservoir capacity is {self.capacity}; give at least 1 row")

    def pool(self, history: History, key: int, buffer_key: int) -> Pool:
        reads = Reads(history)
        kept = reservoir(
            reads.num_rows, self.capacity, named_key("reservoir", buffer_key, bits=128)
        )
        plan, use = reads.at(kept)
        rows = _Chosen(history, len(kept), lambda index: (plan[index], use[index]))
        return ShuffledPool(history, rows, key)


@dataclasses.dataclass(frozen=True)
class BalancedByStage(Buffer):
    """Each earlier stage has an equal share of the replayed rows, whatever its length.

    The shares are exact in every block of as many rows as there are earlier stages. Within a stage
    every read comes once a pass; of a plan which it has read in a whole epoch or more, every row.

    Attributes:
        capacity: rows that all stages together may keep, shared equally; None: all they have read.
            What a stage keeps is drawn once, and shrinks as stages come: it never changes
            otherwise.
    """

    capacity: int | None = None

    def __post_init__(self) -> None:
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"balanced capacity is {self.capacity}; give at least 1 row, or None")

    def pool(self, history: History, key: int, buffer_key: int) -> Pool:
        stages = history.stages()
        num_stages = len(stages)
        if self.capacity is not None and self.capacity < num_stages:
            raise ValueError(
                f"balanced capacity is {self.capacity} for {num_stages} earlier stages; give at "
                f"least {num_stages} rows"
            )
        pools = []
        for s, (stage, used) in enumerate(stages.items()):
            spans = [whole_epoch(u.first, u.count, history.plans[u.plan].num_rows) for u in used]
            rows: Rows = Spans(
                history, [Used(stage, u.plan, *span) for u, span in zip(used, spans, strict=True)]
            )
            if self.capacity is not None:
                share = -(-(self.capacity - s) // num_stages)  # never grows with num_stages
                rows = _sample(history, rows, share, named_key("keep", buffer_key, stage))
            pools.append(ShuffledPool(history, rows, named_key("stage", key, stage)))
        return BalancedPool(pools, key)


@dataclasses.dataclass(frozen=True)
class Contiguous(Buffer):
    """Pieces of the stream as it was read, row after row: for online learning.

    After "Transformers for supervised online continual learning" (arXiv:2403.01554): replay streams
    that restart at random earlier points and go on in the original order. In each pass the reads
    are cut into pieces at a keyed offset and every piece comes once, in a keyed order; fewer than
    `segment` reads are left out of a pass, others in each.

    Attributes:
        segment: rows of a piece.
        lanes: streams side by side: with as many as a step has replayed rows, the row in one place
            of the batch goes on, step after step, where the step before left it. 1: the replayed
            rows of a step follow on each other.
    """

    segment: int = 64
    lanes: int = 1

    def __post_init__(self) -> None:
        for name in ("segment", "lanes"):
            if getattr(self, name) < 1:
                raise ValueError(f"contiguous {name} is {getattr(self, name)}; give at least 1")

    def pool(self, history: History, key: int, buffer_key: int) -> Pool:
        for stage in history.stages():
            if stage not in history.reading:
                raise ValueError(
                    f"contiguous replay needs the rows of stage {stage} (counted from 0) as they "
                    "were read, but this stage has others; give both the same sequence_length, "
                    "packing and order, or take another buffer"
                )
        return ContiguousPool(history, Reads(history), self.segment, self.lanes, key)


def _sample(history: History, rows: Rows, size: int, key: int) -> Rows:
    """A keyed sample without replacement; a smaller one is part of a larger one."""
    num_rows = rows.num_rows
    return _Chosen(
        history, min(size, num_rows), lambda index: rows.at(permute(index, num_rows, key))
    )


def reservoir(num_items: int, capacity: int, key: int) -> np.ndarray:
    """Run Vitter's algorithm R over the items 0, 1, ..., num_items - 1.

    Item i < capacity fills slot i. A later item draws j = word[i] mod (i + 1) and, if j < capacity,
    takes slot j (J. S. Vitter, "Random sampling with a reservoir", ACM TOMS 11, 1985). word[i] is
    the i-th of Philox's words under `key`, so a longer run of items carries a shorter one on. The
    remainder favours some j by less than num_items / 2**64.

        capacity 3    item   0 1 2 | 3      4      5
                      j            | 1      4      0
                      slots  0 1 2 | 0 3 2  0 3 2  5 3 2

    Args:
        num_items: n >= 0.
        capacity: M >= 1.
        key: 128 bits.

    Returns:
        int64[min(M, n)], the item in each slot. O(n) time once, O(M) memory.

    Example:
        >>> reservoir(2, 3, key=0).tolist()
        [0, 1]
    """
    slots = np.arange(min(capacity, num_items))
    words = np.random.Philox(key=key)
    for begin in range(0, num_items, _CHUNK):
        item = np.arange(begin, min(begin + _CHUNK, num_items))
        j = (words.random_raw(len(item)) % (item + 1).astype(np.uint64)).astype(np.int64)
        taken = (item >= capacity) & (j < capacity)
        np.maximum.at(slots, j[taken], item[taken])  # items come in order: the last one stays
    return slots
