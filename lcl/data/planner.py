"""The planner: what a stage reads, and all its row numbers, worked out before the first step.

It goes through the stages in order and keeps, for every plan (a domain's rows of one length), how
many of its rows have been used: where the next stage goes on, and what it may replay.

    stage 0   {a: 1}            6 rows    a: 0..5                         used a 6
    stage 1   {a: 1, b: 1}      8 rows    a: 6..9      b: 0..3            used a 10, b 4
    stage 2   {b: 1}, replay    4 rows    b: 4..7      pool: a 0..9, b 0..3
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lcl.data.mixture import Mixture
from lcl.data.ordering import named_key, shuffle
from lcl.data.packing import METHODS, Layout, pack
from lcl.data.plans import Plan, cached_layout
from lcl.data.replay import Pool, Replay, repack

ORDERS = ("shuffle", "stored")


@dataclasses.dataclass(frozen=True)
class StageData:
    """What one stage of a run reads.

    Attributes:
        mixture: domain weights.
        sequence_length: T, transitions of a row, >= 2.
        batch_size: new rows a step (all rows a step with `Replay(mode="substitute")`), in the whole
            run, not for each host or device.
        packing: "best_fit" or "concat" (see `lcl.data.packing.pack`).
        document_mask: a document attends to itself only, and its positions start at 0; False makes
            the row one segment.
        replay: None, or how much comes from the earlier stages.
        order: "shuffle", or "stored" to keep documents as the store has them: which documents are
            neighbours in a row. The rows are shuffled either way.
    """

    mixture: Mixture
    sequence_length: int
    batch_size: int
    packing: str = "best_fit"
    document_mask: bool = True
    replay: Replay | None = None
    order: str = "shuffle"

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length is {self.sequence_length}; give at least 2")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; give at least 1")
        if self.packing not in METHODS:
            raise ValueError(f"packing {self.packing!r} is unknown; use {' or '.join(METHODS)}")
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r} is unknown; use {' or '.join(ORDERS)}")
        if self.replay is not None:
            self.replay.rows_per_step(self.batch_size)  # refuses a fraction that is not whole rows

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the batches, as plain values to be hashed."""
        replay = self.replay
        return {
            "weights": {d: float(w) for d, w in sorted(self.mixture.weights.items())},
            "block": self.mixture.block,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "packing": self.packing,
            "document_mask": self.document_mask,
            "replay": None if replay is None else [replay.fraction, replay.mode],
            "order": self.order,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedStage:
    """A stage with everything about it that does not depend on the step."""

    name: str
    data: StageData
    start: int
    num_steps: int
    new_rows: int
    replay_rows: int
    plans: np.ndarray  # int64[D of the mixture]: index into the stream's plans
    used: np.ndarray  # int64[D of the mixture]: rows of those plans used by the stages before
    mixture_key: int
    pool: Pool | None
    pool_plans: np.ndarray  # int64: the pool's plans as indices into the stream's

    @property
    def batch_rows(self) -> int:
        return self.new_rows + self.replay_rows

    def counts_before(self, num_steps: int) -> np.ndarray:
        """New rows of each of the mixture's domains in the first steps of the stage."""
        return self.data.mixture.counts_before(num_steps * self.new_rows, key=self.mixture_key)


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
        self._start = 0
        self._num_stages = 0

    def add_stage(self, name: str, data: StageData, num_steps: int) -> PlannedStage:
        """Plan the next stage."""
        plans = np.array([self._plan(domain, data) for domain in data.mixture.domains])
        used = np.array([self._used.get(p, 0) for p in plans.tolist()])
        new_rows, replay_rows, pool = data.batch_size, 0, None
        pool_plans = np.zeros(0, np.int64)
        if data.replay is not None and self._used:  # the first stage has nothing to replay
            new_rows, replay_rows = data.replay.rows_per_step(data.batch_size)
            pool_plans, pool = self._pool(data)
        stage = PlannedStage(
            name=name,
            data=data,
            start=self._start,
            num_steps=num_steps,
            new_rows=new_rows,
            replay_rows=replay_rows,
            plans=plans,
            used=used,
            mixture_key=named_key("mixture", self._seed, self._num_stages),
            pool=pool,
            pool_plans=pool_plans,
        )
        for p, count in zip(plans.tolist(), stage.counts_before(num_steps).tolist(), strict=True):
            self._used[p] = self._used.get(p, 0) + count
        self._start += num_steps
        self._num_stages += 1
        return stage

    def _register(self, name: tuple[Any, ...], domain: str, build_fn: Callable[[], Layout]) -> int:
        """Return the index of the plan called `name`, built if it is new."""
        if name not in self._index:
            store = self._stores[domain]
            # The plan's name need not hold the store's fingerprint, but the file's must.
            layout = cached_layout(self._plan_dir, (*name, store.fingerprint), build_fn)
            self._index[name] = len(self.plans)
            self.plans.append(Plan(name, self._domains.index(domain), store, layout))
        return self._index[name]

    def _plan_name(self, domain: str, data: StageData) -> tuple[Any, ...]:
        return ("plan", self._seed, domain, data.sequence_length, data.packing, data.order)

    def _plan(self, domain: str, data: StageData) -> int:
        """The plan of a domain's whole store under a stage's settings."""
        lengths = np.maximum(np.asarray(self._stores[domain].lengths, np.int64) - 1, 0)

        def build() -> Layout:
            order = None
            if data.order == "shuffle":
                order = shuffle(len(lengths), seed=self._seed, domain=domain)
            return pack(lengths, data.sequence_length, method=data.packing, order_N=order)

        return self._register(self._plan_name(domain, data), domain, build)

    def _pool(self, data: StageData) -> tuple[np.ndarray, Pool]:
        """What the stages so far have shown, as rows of this stage's length."""
        plans, counts = [], []
        for domain in sorted({self.plans[p].domain for p in self._used}):
            name = self._domains[domain]
            seen = {p: n for p, n in self._used.items() if n and self.plans[p].domain == domain}
            same = self._index.get(self._plan_name(name, data))
            if same is not None and list(seen) == [same]:
                # The very rows that were used: the first ones in the plan's own order of use.
                plans.append(same)
                counts.append(min(seen[same], self.plans[same].num_rows))
            elif seen:
                plans.append(self._repacked(name, seen, data))
                counts.append(self.plans[plans[-1]].num_rows)
        key = named_key("pool", self._seed, self._num_stages)
        pool = Pool([self.plans[p] for p in plans], counts, len(self._domains), key)
        return np.array(plans, np.int64), pool

    def _repacked(self, domain: str, seen: Mapping[int, int], data: StageData) -> int:
        """A plan of what several layouts, or one of another length, have shown of a domain."""
        sources = tuple(
            (*self.plans[p].name, min(n, self.plans[p].num_rows)) for p, n in sorted(seen.items())
        )
        name = ("repacked", sources, data.sequence_length, data.packing, data.order)

        def build() -> Layout:
            key = None
            if data.order == "shuffle":
                key = named_key("repacked order", self._seed, domain, bits=128)
            slices = [self.plans[p].seen(n) for p, n in sorted(seen.items())]
            return repack(slices, data.sequence_length, method=data.packing, key=key)

        return self._register(name, domain, build)
