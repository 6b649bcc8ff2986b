"""The planner: what a stage reads, and all its row numbers, worked out before the first step.

It goes through the stages in order and keeps, for every plan (a domain's rows of one length), how
many of its rows have been used: where the next stage goes on, and what it may replay.

    stage 0   {a: 1}            6 rows    a: 0..5                         used a 6
    stage 1   {a: 1, b: 1}      8 rows    a: 6..9      b: 0..3            used a 10, b 4
    stage 2   {b: 1}, replay    4 rows    b: 4..7      pool: a 0..9, b 0..3

A stage has one bucket of rows, or, with dataset decomposition, one for each power of two, and a
schedule that says which of them a step reads:

    step            0     1     2     3     4          bucket 512: B = 2     bucket 256: B = 4
    bucket          512   256   256   512   256
    rows            0 1   0..3  4..7  2 3   8..11      of that bucket
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lcl.data.curricula import Schedule, largest_remainders
from lcl.data.decomposition import DecompositionLayout, decompose
from lcl.data.mixture import AnyMixture, BoundMixture
from lcl.data.ordering import named_key, shuffle
from lcl.data.packing import Layout, Slices, pack
from lcl.data.plans import Plan, cached_layout
from lcl.data.replay import Pool, Used, repack, shown, union, whole_epoch
from lcl.data.replay_buffers import ReadFn
from lcl.data.stage_data import StageData, mean_shares, named_settings, scaled_mixture

__all__ = ["Bucket", "PlannedStage", "Planner", "StageData"]


@dataclasses.dataclass(frozen=True, eq=False)
class Bucket:
    """The rows of one length that a stage reads.

    Attributes:
        row_length: T, cells of a row in the batch.
        new_rows, replay_rows: of each of its steps.
        num_steps: how many steps of the stage read it.
        mixture: bound to the bucket's rows: locate and counts_before.
        plans: int64[D of the mixture]: index into the stream's plans.
        used: int64[D of the mixture]: rows of those plans used by the stages before.
        pool, pool_plans: what may be replayed, its plans as indices into the stream's.
    """

    row_length: int
    new_rows: int
    replay_rows: int
    num_steps: int
    mixture: BoundMixture
    mixture_key: int
    plans: np.ndarray
    used: np.ndarray
    pool: Pool | None
    pool_plans: np.ndarray

    @property
    def batch_rows(self) -> int:
        return self.new_rows + self.replay_rows

    def counts_before(self, num_steps: int) -> np.ndarray:
        """New rows of each of the mixture's domains in the bucket's first steps."""
        return self.mixture.counts_before(num_steps * self.new_rows, key=self.mixture_key)

    def locate(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Say which domain of the mixture the bucket's k-th new row is of, and which use of it."""
        domain, occurrence = self.mixture.locate(k, key=self.mixture_key)
        return domain, self.used[domain] + occurrence

    def reads(self, plans: Sequence[int]) -> ReadFn:
        """`locate`, with other numbers for the plans of the mixture's domains."""
        numbers = np.array(plans, np.int64)

        def read(k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            domain, use = self.locate(k)
            return numbers[domain], use

        return read


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedStage:
    """A stage with everything about it that does not depend on the step.

    Attributes:
        buckets: by number, shortest rows first, those that have a step; one without decomposition.
        schedule: which bucket each step reads; None: the only one.
        decomposed: domain -> its decomposition, for the reports.
        transform_key: names the draws of the stage's transforms.
    """

    name: str
    data: StageData
    start: int
    num_steps: int
    buckets: Mapping[int, Bucket]
    schedule: Schedule | None
    decomposed: Mapping[str, DecompositionLayout]
    transform_key: int

    def bucket_at(self, step: int) -> tuple[Bucket, int]:
        """Return the bucket of a step of the stage, and how many steps read it before."""
        if self.schedule is None:
            return self.buckets[0], step
        return self.buckets[int(self.schedule.bucket[step])], int(self.schedule.nth[step])

    def steps_before(self, step: int) -> list[tuple[Bucket, int]]:
        """Return the buckets, each with how many of the first `step` steps read it."""
        counts = [step] if self.schedule is None else self.schedule.counts_before(step).tolist()
        return [(bucket, counts[b]) for b, bucket in self.buckets.items()]

    def first_steps(self) -> dict[tuple[int, int], int]:
        """Return the shapes (B, T) of the stage, longest rows first, each with its first step."""
        first = {}
        for b, bucket in reversed(self.buckets.items()):
            step = 0 if self.schedule is None else int(np.argmax(self.schedule.bucket == b))
            first[bucket.batch_rows, bucket.row_length] = step
        return first

    def cells_of_domains(self) -> dict[str, int]:
        """Return how many cells of new rows each domain of the mixture gives, by name."""
        cells: dict[str, int] = dict.fromkeys(self.data.mixture.domains, 0)
        for bucket in self.buckets.values():
            counts = bucket.counts_before(bucket.num_steps).tolist()
            for domain, count in zip(bucket.mixture.domains, counts, strict=True):
                cells[domain] += count * bucket.row_length
        return cells


class Planner:
    """Builds stage after stage, and knows how far each plan has been used so far.

    Attributes:
        plans: all plans so far; stages and pools refer to them by index.
    """

    def __init__(
        self,
        domains: Sequence[str],
        stores: Mapping[str, Any],
        seed: int,
        plan_dir: str | os.PathLike[str] | None,
    ):
        self.plans: list[Plan] = []
        self._domains, self._stores = domains, stores
        self._seed, self._plan_dir = seed, plan_dir
        self._index: dict[tuple[Any, ...], int] = {}  # name of a plan -> its index
        self._used: dict[int, int] = {}  # index of a plan -> rows used by the stages so far
        self._history: list[Used] = []  # what the stages read, in their order
        self._read: list[tuple[int, Bucket]] = []  # and how: (stage, bucket)
        self._start = 0
        self._num_stages = 0

    def add_stage(self, name: str, data: StageData, num_steps: int) -> PlannedStage:
        """Plan the next stage."""
        decomposed: dict[str, DecompositionLayout] = {}
        schedule = None
        if data.decomposition is None:
            plans = {d: self._plan(d, data) for d in data.mixture.domains}
            buckets = {0: self._bucket(data, data.mixture, plans, num_steps, None)}
        else:
            decomposed = {d: self._decomposed(d, data) for d in data.mixture.domains}
            buckets, schedule = self._buckets(data, decomposed, num_steps)
        stage = PlannedStage(
            name=name,
            data=data,
            start=self._start,
            num_steps=num_steps,
            buckets=buckets,
            schedule=schedule,
            decomposed=decomposed,
            transform_key=named_key("transforms", self._seed, self._num_stages),
        )
        for bucket in buckets.values():
            counts = bucket.counts_before(bucket.num_steps).tolist()
            for p, count in zip(bucket.plans.tolist(), counts, strict=True):
                first = self._used.get(p, 0)
                self._used[p] = first + count
                if count:
                    self._history.append(Used(self._num_stages, p, first, count))
            self._read.append((self._num_stages, bucket))
        self._start += num_steps
        self._num_stages += 1
        return stage

    # ---- buckets -----------------------------------------------------------------------------

    def _bucket(
        self,
        data: StageData,
        mixture: AnyMixture,
        plans: Mapping[str, int],
        num_steps: int,
        bucket: int | None,
    ) -> Bucket:
        """Plan the rows of one length; `bucket` is the number of a decomposition's."""
        where: tuple[Any, ...] = (self._seed, self._num_stages)
        row_length, factor = data.sequence_length, 1
        if bucket is not None and data.decomposition is not None:
            row_length = data.decomposition.row_lengths[bucket]
            factor, where = data.sequence_length // row_length, (*where, row_length)
        new_rows, replay_rows, pool = data.batch_size, 0, None
        pool_plans = np.zeros(0, np.int64)
        if data.replay is not None and self._used:  # the first stage has nothing to replay
            new_rows, replay_rows = data.replay.rows_per_step(data.batch_size)
            pool_plans, pool = self._pool(data, bucket, named_key("pool", *where))
        indices = np.array([plans[domain] for domain in mixture.domains], np.int64)
        num_rows = max(1, num_steps * new_rows * factor)
        return Bucket(
            row_length=row_length,
            new_rows=new_rows * factor,
            replay_rows=replay_rows * factor,
            num_steps=num_steps,
            mixture=mixture.bind(num_rows, row_length),
            mixture_key=named_key("mixture", *where),
            plans=indices,
            used=np.array([self._used.get(p, 0) for p in indices.tolist()], np.int64),
            pool=pool,
            pool_plans=pool_plans,
        )

    def _buckets(
        self, data: StageData, decomposed: Mapping[str, DecompositionLayout], num_steps: int
    ) -> tuple[dict[int, Bucket], Schedule]:
        """Plan the buckets of a decomposed stage, and which step reads which.

        A bucket's share of the steps is its share of the cells, each domain's cells counted by the
        mixture; and a domain's share of a bucket's rows is in proportion to the cells that it has
        there. So the domains' shares of the stage are the mixture's, and all buckets of a
        domain are used up at the same pace.
        """
        decomposition = data.decomposition
        assert decomposition is not None
        # cells[b, d] of domain d are in bucket b.
        cells = np.array([decomposed[d].cells for d in data.mixture.domains]).T
        sums = cells.sum(axis=0).tolist()
        weights = mean_shares(data.mixture, num_steps * data.batch_size, data.sequence_length)
        # In integers, so that a tie falls alike on every machine.
        whole = [round(w * 2**40) for w in weights.tolist()]
        shares = [
            sum(w * n // total for w, n, total in zip(whole, row, sums, strict=True))
            for row in cells.tolist()
        ]
        counts = np.array(largest_remainders(shares, num_steps), np.int64)
        schedule = decomposition.curriculum.schedule(
            counts,
            cycles=decomposition.cycles,
            key=named_key("curriculum", self._seed, self._num_stages),
            longest_first=decomposition.longest_first,
        )
        buckets = {}
        for b in np.flatnonzero(counts).tolist():
            factors = {
                domain: n / total
                for domain, n, total in zip(
                    data.mixture.domains, cells[b].tolist(), sums, strict=True
                )
                if n
            }
            mixture = scaled_mixture(data.mixture, factors)
            plans = {d: self._bucket_plan(d, data, decomposed[d], b) for d in mixture.domains}
            buckets[b] = self._bucket(data, mixture, plans, int(counts[b]), b)
        return buckets, schedule

    # ---- plans -------------------------------------------------------------------------------

    def _register(self, name: tuple[Any, ...], domain: str, layout_fn: Callable[[], Layout]) -> int:
        """Return the index of the plan called `name`, made if it is new."""
        if name not in self._index:
            self._index[name] = len(self.plans)
            store = self._stores[domain]
            self.plans.append(Plan(name, self._domains.index(domain), store, layout_fn()))
        return self._index[name]

    def _cached(self, name: tuple[Any, ...], domain: str, build_fn: Callable[[], Layout]) -> Layout:
        # The plan's name need not hold the store's fingerprint, but the file's must.
        name = (*name, self._stores[domain].fingerprint)
        return cached_layout(self._plan_dir, name, build_fn)

    def _plan_name(self, domain: str, data: StageData) -> tuple[Any, ...]:
        order = _order_name(data)
        return ("plan", self._seed, domain, data.content_length, data.packing, order)

    def _lengths(self, domain: str) -> np.ndarray:
        """Transitions of the domain's documents."""
        return np.maximum(np.asarray(self._stores[domain].lengths, np.int64) - 1, 0)

    def _plan(self, domain: str, data: StageData) -> int:
        """The plan of a domain's whole store under a stage's settings."""
        name = self._plan_name(domain, data)

        def build() -> Layout:
            order = self._order(domain, data)
            lengths = self._lengths(domain)
            return pack(lengths, data.content_length, method=data.packing, order_N=order)

        return self._register(name, domain, lambda: self._cached(name, domain, build))

    def _order(self, domain: str, data: StageData) -> np.ndarray | None:
        """The order of a domain's documents; None: as they are stored."""
        store = self._stores[domain]
        if data.order == "shuffle":
            return shuffle(len(store.lengths), seed=self._seed, domain=domain)
        if data.order == "stored":
            return None
        return data.order.order(store, seed=self._seed, domain=domain, cache_dir=self._plan_dir)

    # ---- decomposition -----------------------------------------------------------------------

    def _bucket_name(self, domain: str, data: StageData, log2: int) -> tuple[Any, ...]:
        d = data.decomposition
        assert d is not None
        return ("bucket", self._seed, domain, d.min_log2, d.max_log2, d.tails, log2)

    def _decomposed(self, domain: str, data: StageData) -> DecompositionLayout:
        """A domain's whole store in buckets."""
        lengths = self._lengths(domain)
        return self._in_buckets(
            lengths, domain, data, lambda log2: self._bucket_name(domain, data, log2)
        )

    def _in_buckets(
        self,
        lengths: np.ndarray,
        domain: str,
        data: StageData,
        name_fn: Callable[[int], tuple[Any, ...]],
        map_fn: Callable[[Layout], Layout] = lambda layout: layout,
    ) -> DecompositionLayout:
        """Decompose documents (or pieces) of some lengths; a file for each bucket."""
        d = data.decomposition
        assert d is not None
        built: list[DecompositionLayout] = []  # at most one: all buckets come of one pass

        def build(b: int) -> Layout:
            if not built:
                built.append(
                    decompose(
                        lengths,
                        min_log2=d.min_log2,
                        max_log2=d.max_log2,
                        seed=self._seed,
                        domain=domain,
                        tails=d.tails,
                    )
                )
            return map_fn(built[0].layouts[b])

        layouts = [
            self._cached(name_fn(log2), domain, lambda b=log2 - d.min_log2: build(b))
            for log2 in range(d.min_log2, d.max_log2 + 1)
        ]
        return DecompositionLayout(tuple(layouts), int(lengths.sum()))

    def _bucket_plan(
        self, domain: str, data: StageData, decomposed: DecompositionLayout, bucket: int
    ) -> int:
        assert data.decomposition is not None
        name = self._bucket_name(domain, data, data.decomposition.min_log2 + bucket)
        return self._register(name, domain, lambda: decomposed.layouts[bucket])

    # ---- replay ------------------------------------------------------------------------------

    def _pool(self, data: StageData, bucket: int | None, key: int) -> tuple[np.ndarray, Pool]:
        """What the stages so far have shown, as rows of this stage's (or bucket's) length."""
        assert data.replay is not None
        by_domain: dict[int, list[Used]] = {}
        for used in self._history:
            by_domain.setdefault(self.plans[used.plan].domain, []).append(used)
        rows: list[Used] = []  # `plan` is an index into self.plans
        for d, read in sorted(by_domain.items()):
            same = self._same_rows(self._domains[d], data)
            if {used.plan for used in read} <= set(same):
                # The very rows that were used: the first ones in the plan's own order of use.
                rows += [used for used in read if same[used.plan] == bucket]
            else:
                rows += self._again(self._domains[d], self._groups(read, data), data, bucket)
        if not rows:
            # Nothing as long as this bucket's rows was seen: the documents share rows, masked.
            for d, read in sorted(by_domain.items()):
                groups = self._groups(read, data)
                rows += [self._packed(self._domains[d], group, data, bucket) for group in groups]
        plans = list(dict.fromkeys(used.plan for used in rows))
        place = {p: i for i, p in enumerate(plans)}
        pool = data.replay.pool(
            [self.plans[p] for p in plans],
            [used._replace(plan=place[used.plan]) for used in rows],
            len(self._domains),
            key,
            named_key("buffer", self._seed, -1 if bucket is None else bucket),
            self._reading(place),
        )
        return np.array(plans, np.int64), pool

    def _reading(self, place: Mapping[int, int]) -> dict[int, ReadFn]:
        """How the stages read their rows, where all of them are among the plans of `place`."""
        reading: dict[int, ReadFn] = {}
        for stage, bucket in self._read:
            plans = bucket.plans.tolist()
            if all(p in place for p in plans):
                reading[stage] = bucket.reads([place[p] for p in plans])
        return reading

    @staticmethod
    def _groups(read: Sequence[Used], data: StageData) -> list[list[Used]]:
        """What is laid out again together: each stage's reads, or all of them."""
        assert data.replay is not None
        if not data.replay.buffer.by_stage:
            return [list(read)]
        stages = sorted({used.stage for used in read})
        return [[used for used in read if used.stage == stage] for stage in stages]

    def _same_rows(self, domain: str, data: StageData) -> dict[int, int | None]:
        """The plans of this stage's own kind of rows that were made before, and their buckets."""
        names: dict[tuple[Any, ...], int | None] = {self._plan_name(domain, data): None}
        if data.decomposition is not None:
            first, last = data.decomposition.min_log2, data.decomposition.max_log2
            names = {
                self._bucket_name(domain, data, log2): log2 - first
                for log2 in range(first, last + 1)
            }
        return {self._index[name]: b for name, b in names.items() if name in self._index}

    def _slices(self, read: Sequence[Used]) -> list[Slices]:
        return [shown(self.plans[plan], first, count) for _, plan, first, count in _merged(read)]

    def _sources(self, read: Sequence[Used]) -> tuple[Any, ...]:
        """What decides `_slices`, for the name of a plan."""
        sources = []
        for _, p, first, count in _merged(read):
            rows = self.plans[p].num_rows
            first, count = whole_epoch(first, count, rows)
            whole = not first or (first % rows == 0 and count == rows)
            span = (count,) if whole else (first, count)
            sources.append((*self.plans[p].name, *span))
        return tuple(sources)

    def _whole(self, read: Sequence[Used], plan: int) -> Used:
        """All rows of a plan that was laid out again, as read by the last stage of `read`."""
        return Used(max(used.stage for used in read), plan, 0, self.plans[plan].num_rows)

    def _again(
        self, domain: str, groups: Sequence[Sequence[Used]], data: StageData, bucket: int | None
    ) -> list[Used]:
        """What a domain has shown in other rows, in rows of this stage's; none may be so long."""
        if bucket is None:
            return [self._packed(domain, group, data, None) for group in groups]
        d = data.decomposition
        assert d is not None
        again = []
        for group in groups:
            about = ("repacked", self._sources(group), d.min_log2, d.max_log2, d.tails)
            pieces = union(self._slices(group))
            decomposed = self._in_buckets(
                pieces.length,
                domain,
                data,
                lambda log2, about=about: (*about, log2),
                lambda layout, pieces=pieces: _on_pieces(layout, pieces),
            )
            layout = decomposed.layouts[bucket]
            if layout.num_rows:
                name = (*about, d.min_log2 + bucket)
                plan = self._register(name, domain, lambda layout=layout: layout)
                again.append(self._whole(group, plan))
        return again

    def _packed(
        self, domain: str, read: Sequence[Used], data: StageData, bucket: int | None
    ) -> Used:
        """What a domain has shown, packed in rows of this stage's length."""
        row_length = data.content_length
        if bucket is not None and data.decomposition is not None:
            row_length = data.decomposition.row_lengths[bucket]
        name = ("repacked", self._sources(read), row_length, data.packing, _order_name(data))

        def build() -> Layout:
            if isinstance(data.order, str):
                key = None
                if data.order == "shuffle":
                    key = named_key("repacked order", self._seed, domain, bits=128)
                return repack(self._slices(read), row_length, method=data.packing, key=key)
            pieces = union(self._slices(read))
            order = self._order(domain, data)
            assert order is not None
            rank = np.full(len(self._stores[domain].lengths), len(order))
            rank[order[::-1]] = np.arange(len(order))[::-1]  # the first of several places
            order = np.lexsort((pieces.start, rank[pieces.document]))
            layout = pack(pieces.length, row_length, method=data.packing, order_N=order)
            return _on_pieces(layout, pieces)

        plan = self._register(name, domain, lambda: self._cached(name, domain, build))
        return self._whole(read, plan)


def _merged(read: Sequence[Used]) -> list[Used]:
    """Reads of one plan that follow on each other as one, by plan."""
    merged: list[Used] = []
    for used in sorted(read, key=lambda used: (used.plan, used.first)):
        if merged and merged[-1].plan == used.plan:
            last = merged[-1]
            if last.first + last.count == used.first:
                merged[-1] = last._replace(count=last.count + used.count)
                continue
        merged.append(used)
    return merged


def _order_name(data: StageData) -> str:
    """The order in a plan's name: a word, or the object's settings."""
    if isinstance(data.order, str):
        return data.order
    return json.dumps(named_settings(data.order), sort_keys=True)


def _on_pieces(layout: Layout, pieces: Slices) -> Layout:
    """A layout of pieces (numbered as documents) as one of the documents they are of."""
    return dataclasses.replace(
        layout,
        document=pieces.document[layout.document],
        start=layout.start + pieces.start[layout.document],
    )
