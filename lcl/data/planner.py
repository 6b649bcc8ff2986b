"""The planner: what a stage reads, and all its row numbers, worked out before the first step.

It goes through the stages in order and keeps, for every plan (a domain's rows of one length), how
many of its rows have been used: where the next stage goes on, and what it may replay.

    stage 0   {a: 1}            6 rows    a: 0..5                         used a 6
    stage 1   {a: 1, b: 1}      8 rows    a: 6..9      b: 0..3            used a 10, b 4
    stage 2   {b: 1}, replay    4 rows    b: 4..7      pool: a 0..9, b 0..3
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lcl.data.curricula import Schedule, largest_remainders
from lcl.data.decomposition import DecompositionLayout, decompose
from lcl.data.mixture import AnyMixture
from lcl.data.ordering import named_key, shuffle
from lcl.data.packing import Layout, Slices, pack
from lcl.data.planned import Bucket, PlannedStage
from lcl.data.plans import Plan, cached_layout
from lcl.data.replay import Pool, Used, repack, shown, union, whole_epoch
from lcl.data.replay_buffers import ReadFn
from lcl.data.stage_data import StageData, mean_shares, named_settings, scaled_mixture

__all__ = ["Bucket", "PlannedStage", "Planner", "StageData"]


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
            plan_fn = functools.partial(self._plan, data)
            buckets = {0: self._bucket(data, data.mixture, plan_fn, num_steps, None)}
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
        plan_fn: Callable[[str, int], int],
        num_steps: int,
        bucket: int | None,
    ) -> Bucket:
        """Plan the rows of one length; `bucket` is the number of a decomposition's.

        plan_fn(domain, rows that the stage takes of it) makes the domain's plan.
        """
        where: tuple[Any, ...] = (self._seed, self._num_stages)
        row_length, factor = data.sequence_length, 1
        if bucket is not None and data.decomposition is not None:
            row_length = data.decomposition.row_lengths[bucket]
            factor, where = data.sequence_length // row_length, (*where, row_length)
        new_rows, replay_rows, pool = data.batch_size, 0, None
        pool_plans = np.zeros(0, np.int64)
        replays = data.replay is not None and bool(self._used)  # the first stage has nothing to
        if data.replay is not None and replays:
            new_rows, replay_rows = data.replay.rows_per_step(data.batch_size)
        num_rows = max(1, num_steps * new_rows * factor)
        mixture_key = named_key("mixture", *where)
        bound = mixture.bind(num_rows, row_length)
        counts = bound.counts_before(num_rows, key=mixture_key).tolist()
        plans = [plan_fn(domain, n) for domain, n in zip(bound.domains, counts, strict=True)]
        indices = np.array(plans, np.int64)
        if replays:
            pool_plans, pool = self._pool(data, bucket, named_key("pool", *where))
        return Bucket(
            row_length=row_length,
            new_rows=new_rows * factor,
            replay_rows=replay_rows * factor,
            num_steps=num_steps,
            mixture=bound,
            mixture_key=mixture_key,
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
        if 0 in sums:
            raise ValueError(
                f"{data.mixture.domains[sums.index(0)]!r} has no document of "
                f"{2**decomposition.min_log2} transitions, and tails='drop' drops the rest; lower "
                "min_log2 or use tails='pad'"
            )
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
            plan_fn = functools.partial(self._bucket_plan, data, decomposed, b)
            try:
                mixture = scaled_mixture(data.mixture, factors)
                buckets[b] = self._bucket(data, mixture, plan_fn, int(counts[b]), b)
            except ValueError as error:  # a mixture that the bucket is too small for
                where = f"bucket of {decomposition.row_lengths[b]} with {counts[b]:,} steps"
                raise ValueError(f"{where}: {error}") from error
        return buckets, schedule

    # ---- plans -------------------------------------------------------------------------------

    def _register(self, name: tuple[Any, ...], domain: str, layout_fn: Callable[[], Layout]) -> int:
        """Return the index of the plan called `name`, made if it is new."""
        if name not in self._index:
            layout = layout_fn()
            if not layout.num_rows:
                raise ValueError(
                    f"{domain!r} has no row to train on: its subset or its order leaves all "
                    "documents out; enlarge the subset or use another order"
                )
            self._index[name] = len(self.plans)
            self.plans.append(Plan(name, self._domains.index(domain), self._stores[domain], layout))
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

    def _plan(self, data: StageData, domain: str, count: int) -> int:
        """The plan of a domain's store, or of a part of it, of which a stage takes `count` rows."""
        name, part = self._plan_name(domain, data), data.mixture.subsets.get(domain)
        if part is not None:
            name += (*part.name(count), *part.ranked_by(self._stores[domain]))

        def build() -> Layout:
            order, length = self._order(domain, data), data.content_length
            lengths = self._lengths(domain)
            if part is not None:
                lengths = self._part_lengths(part, domain, lengths, length, count)
            layout = pack(lengths, length, method=data.packing, order_N=order)
            return layout if part is None else part.cut(layout, count)

        return self._register(name, domain, lambda: self._cached(name, domain, build))

    def _part_lengths(
        self, part: Any, domain: str, lengths: np.ndarray, row_length: int, count: int
    ) -> np.ndarray:
        store = self._stores[domain]
        return part.lengths(store, lengths, seed=self._seed, row_length=row_length, count=count)

    def _order(self, domain: str, data: StageData) -> np.ndarray | None:
        """The order of a domain's documents; None: as they are stored."""
        store = self._stores[domain]
        if data.order == "shuffle":
            return shuffle(len(store.lengths), seed=self._seed, domain=domain)
        if data.order == "stored":
            return None
        return data.order.order(store, seed=self._seed, domain=domain, cache_dir=self._plan_dir)

    # ---- decomposition -----------------------------------------------------------------------

    def _bucket_kind(self, domain: str, data: StageData, log2: int) -> tuple[Any, ...]:
        d = data.decomposition
        assert d is not None
        return ("bucket", self._seed, domain, d.min_log2, d.max_log2, d.tails, log2)

    def _bucket_name(self, domain: str, data: StageData, log2: int) -> tuple[Any, ...]:
        name = self._bucket_kind(domain, data, log2)
        part = data.mixture.subsets.get(domain)
        if part is None:
            return name
        return (*name, *part.name(0), *part.ranked_by(self._stores[domain]))

    def _decomposed(self, domain: str, data: StageData) -> DecompositionLayout:
        """A domain's whole store in buckets."""
        lengths = self._lengths(domain)
        part = data.mixture.subsets.get(domain)
        if part is not None:
            lengths = self._part_lengths(part, domain, lengths, data.sequence_length, 0)
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
            self._cached(name_fn(log2), domain, functools.partial(build, log2 - d.min_log2))
            for log2 in range(d.min_log2, d.max_log2 + 1)
        ]
        return DecompositionLayout(tuple(layouts), int(lengths.sum()))

    def _bucket_plan(
        self,
        data: StageData,
        decomposed: Mapping[str, DecompositionLayout],
        bucket: int,
        domain: str,
        count: int,
    ) -> int:
        assert data.decomposition is not None
        name = self._bucket_name(domain, data, data.decomposition.min_log2 + bucket)
        return self._register(name, domain, lambda: decomposed[domain].layouts[bucket])

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
            used_plans = {used.plan for used in read}
            # Two parts of a domain may overlap: each row is one row of what was seen together.
            apart = data.replay.buffer.by_stage or len({same.get(p) for p in used_plans}) == len(
                used_plans
            )
            if used_plans <= set(same) and apart:
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
            counts = bucket.counts_before(bucket.num_steps).tolist()
            plans = bucket.plans.tolist()
            if all(p in place for p, count in zip(plans, counts, strict=True) if count):
                reading[stage] = bucket.reads([place.get(p, 0) for p in plans])
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
        kinds: dict[tuple[Any, ...], int | None] = {self._plan_name(domain, data): None}
        if data.decomposition is not None:
            first, last = data.decomposition.min_log2, data.decomposition.max_log2
            kinds = {
                self._bucket_kind(domain, data, log2): log2 - first
                for log2 in range(first, last + 1)
            }
        # A part of the domain has the kind's name and its own behind it.
        return {
            index: b
            for name, index in self._index.items()
            for kind, b in kinds.items()
            if name[: len(kind)] == kind
        }

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
        again = [self._decomposed_again(domain, group, data, bucket) for group in groups]
        return [used for used in again if used is not None]

    def _decomposed_again(
        self, domain: str, read: Sequence[Used], data: StageData, bucket: int
    ) -> Used | None:
        """What a domain has shown, cut into buckets: the rows of one; None: there are none."""
        d = data.decomposition
        assert d is not None
        about = ("repacked", self._sources(read), d.min_log2, d.max_log2, d.tails)
        pieces = union(self._slices(read))
        decomposed = self._in_buckets(
            pieces.length,
            domain,
            data,
            lambda log2: (*about, log2),
            lambda layout: _on_pieces(layout, pieces),
        )
        layout = decomposed.layouts[bucket]
        if not layout.num_rows:
            return None
        plan = self._register((*about, d.min_log2 + bucket), domain, lambda: layout)
        return self._whole(read, plan)

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
