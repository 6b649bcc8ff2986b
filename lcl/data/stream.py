"""The stream: step -> Batch, a pure function of (stores, settings, seed, step).

    stores -> order -> layout -> plan      which row of a domain is its k-th        plans.py
              stages -> mixture            which domain the stage's k-th row is of  mixture.py
                        replay             which earlier row the j-th replay is     replay.py
    step t -> stage, row numbers -> (domain, row) -> slices -> tokens               batch.py

There is no iterator state: `stream.batch(t)` answers for any t, in any order, in any process. So
the checkpoint of the data is the integer t, a resume cannot repeat or skip, and the global batch
does not depend on how many hosts or devices share it (each asks for its rows of the one global
order).

The rows of a step, in a stage of batch_size 4 with replay (add, fraction 1/3):

    row          0    1    2    3   |  4    5         new rows first, then replayed ones
    domain       fr   fr   en   fr  |  en   en
    source_ids   1    1    0    1   |  D+0  D+0

With dataset decomposition the shape (B, T) of a step depends on the step: `shapes` lists them.

A domain goes on where the stage before left it: while the row length, packing and order stay the
same, a row comes again only when all the domain's rows have been used (the next epoch). A stage
with other rows (another sequence_length, say) starts the domain anew.
"""

from __future__ import annotations

import bisect
import difflib
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from lcl.data.batch import Batch, gather_rows, layout_group
from lcl.data.fingerprints import fingerprint
from lcl.data.ordering import named_key
from lcl.data.planned import Bucket, PlannedStage
from lcl.data.planner import Planner
from lcl.data.plans import Plan, rows_at
from lcl.data.stage_data import StageData

if TYPE_CHECKING:
    import grain

# Which rows of a global batch: all, some, or a function of how many there are (a host's share).
Rows: TypeAlias = "slice | np.ndarray | None | Callable[[int], slice | np.ndarray | None]"

_VERSION = 1  # raise it when the same settings give other batches


class RowOrigin(NamedTuple):
    """Where a row of a batch comes from, for error messages and inspection.

    domain: name; epoch: the how-maniest use of the domain (of the pool, when replayed); row: of the
    plan's layout; replay: whether it is replayed; slices: ((document id, start, length), ...), in
    transitions.
    """

    domain: str
    epoch: int
    row: int
    replay: bool
    slices: tuple[tuple[int, int, int], ...]


class _Located(NamedTuple):
    """Rows of a batch as (plan, epoch or pass, row of the plan's layout, replayed?), int64[n]."""

    plan: np.ndarray
    epoch: np.ndarray
    row: np.ndarray
    replay: np.ndarray


class Stream:
    """All batches of a run, by step. Make one with `build_stream`.

    Attributes:
        num_steps: of all stages together.
        domains: names of the domains, sorted; the index is the source id (+ D when replayed).
        stage_names: names of the stages.
        stage_starts: first step of each stage.
        fingerprint: hash of the stores, the settings and the seed. Equal fingerprints mean equal
            batches at every step that both streams have: the length of the last stage is left out,
            so that a run may be prolonged (but not where something follows the stage's length: a
            curriculum, a growing window).
        scores: {"medicine scores:reference": fingerprint} of what its subsets rank by.
    """

    def __init__(
        self,
        domains: Sequence[str],
        plans: Sequence[Plan],
        stages: Sequence[PlannedStage],
        name: str,
        scores: Mapping[str, str] = types.MappingProxyType({}),
    ):
        """Use `build_stream`."""
        self.domains = tuple(domains)
        self.fingerprint = name
        self.scores = dict(scores)
        self.stage_names = tuple(stage.name for stage in stages)
        self.stage_starts = tuple(stage.start for stage in stages)
        self.num_steps = stages[-1].start + stages[-1].num_steps
        self._plans = tuple(plans)
        self._stages = tuple(stages)

    def __len__(self) -> int:
        return self.num_steps

    def stage_at(self, t: int) -> int:
        """Return the index of the stage that step t belongs to."""
        if not 0 <= t < self.num_steps:
            raise IndexError(f"step {t} is outside the stream's steps 0 to {self.num_steps - 1}")
        return bisect.bisect_right(self.stage_starts, t) - 1

    def batch_shape(self, t: int) -> tuple[int, int]:
        """Return (B, T) of step t's global batch, replayed rows included."""
        stage = self._stages[self.stage_at(t)]
        bucket, _ = stage.bucket_at(t - stage.start)
        return bucket.batch_rows, bucket.row_length

    def shapes(self, stage_index: int) -> tuple[tuple[int, int], ...]:
        """Return all shapes (B, T) of a stage's batches, those of the longest rows first."""
        return tuple(self._stages[stage_index].first_steps())

    def first_steps(self, stage_index: int) -> dict[tuple[int, int], int]:
        """Return the first step of the stage that has each of its shapes."""
        stage = self._stages[stage_index]
        return {shape: stage.start + step for shape, step in stage.first_steps().items()}

    def buckets(self, stage_index: int) -> list[dict[str, Any]]:
        """Say of a decomposed stage, for each row length, how many steps read it.

        Returns:
            [{"row_length", "batch_rows", "num_steps", "fill": share of the cells that hold a
            token}], shortest rows first; [] without decomposition.
        """
        stage = self._stages[stage_index]
        if stage.schedule is None:
            return []
        table = []
        for bucket in stage.buckets.values():
            layouts = [self._plans[p].layout for p in bucket.plans.tolist()]
            cells = sum(layout.num_rows * layout.row_length for layout in layouts)
            table.append(
                {
                    "row_length": bucket.row_length,
                    "batch_rows": bucket.batch_rows,
                    "num_steps": bucket.num_steps,
                    "fill": round(sum(layout.num_tokens for layout in layouts) / cells, 6),
                }
            )
        return table

    def shares(self, stage_index: int) -> dict[str, float]:
        """Return each domain's share of the new rows' cells of a stage, exact, by name."""
        cells = self._stages[stage_index].cells_of_domains()
        return {domain: count / sum(cells.values()) for domain, count in cells.items()}

    def _locate(self, t: int, places: np.ndarray) -> _Located:
        """Find the rows at some places of step t's global batch."""
        stage = self._stages[self.stage_at(t)]
        bucket, nth = stage.bucket_at(t - stage.start)
        replay = places >= bucket.new_rows
        plan, use = np.empty_like(places), np.empty_like(places)
        k = nth * bucket.new_rows + places[~replay]
        domain, use[~replay] = bucket.locate(k)
        plan[~replay] = bucket.plans[domain]
        passes = None
        if bucket.pool is not None and replay.any():
            j = nth * bucket.replay_rows + places[replay] - bucket.new_rows
            passes, pool_plan, use[replay] = bucket.pool.locate(j)
            plan[replay] = bucket.pool_plans[pool_plan]
        epoch, row = rows_at(self._plans, plan, use)
        if passes is not None:
            epoch[replay] = passes
        return _Located(plan, epoch, row, replay)

    def _places(self, t: int, rows: Rows) -> np.ndarray:
        num_rows, _ = self.batch_shape(t)
        if callable(rows):
            rows = rows(num_rows)
        places = np.arange(num_rows)
        return places if rows is None else places[rows]

    def batch(self, t: int, rows: Rows = None) -> Batch:
        """Return step t's batch, or some of its rows.

        Args:
            t: step, 0 <= t < num_steps.
            rows: which rows of the global batch (a slice, int[n] or bool[B], or a function of B
                that returns such); None: all. The rows are the same whoever asks for them, alone or
                together.

        Returns:
            A Batch of [n, T].
        """
        stage = self._stages[self.stage_at(t)]
        bucket, _ = stage.bucket_at(t - stage.start)
        places = self._places(t, rows)
        located = self._locate(t, places)
        kind = 2 * located.plan + located.replay
        groups = []
        for one in np.unique(kind).tolist():
            here = np.flatnonzero(kind == one)
            plan = self._plans[one // 2]
            source_id = plan.domain + (len(self.domains) if one % 2 else 0)
            groups.append(layout_group(plan.store, plan.layout, located.row[here], here, source_id))
        # A decomposition's rows hold one document each, but for replayed ones that were packed.
        document_mask = stage.data.document_mask or stage.data.decomposition is not None
        batch = gather_rows(groups, len(kind), bucket.row_length, document_mask=document_mask)
        return self._transformed(batch, stage, t - stage.start, places)

    def _transformed(
        self, batch: Batch, stage: PlannedStage, step: int, places: np.ndarray
    ) -> Batch:
        """Apply the stage's transforms to the rows at some places of its step's batch."""
        num_rows, _ = self.batch_shape(stage.start + step)
        for i, transform in enumerate(stage.data.transforms):
            batch = transform(
                batch,
                step=step,
                num_steps=stage.num_steps,
                key=named_key(i, stage.transform_key),
                places_B=step * num_rows + places,
            )
        return batch

    def rows(self, t: int, rows: Rows = None) -> list[RowOrigin]:
        """Say where each row of step t's batch comes from (arguments as in `batch`)."""
        located = self._locate(t, self._places(t, rows))
        origins = []
        for p, epoch, row, replay in zip(*(a.tolist() for a in located), strict=True):
            plan = self._plans[p]
            slices = plan.layout.rows([row])
            ids = np.asarray(plan.store.document_ids)[slices.document]
            parts = zip(ids.tolist(), slices.start.tolist(), slices.length.tolist(), strict=True)
            origins.append(RowOrigin(self.domains[plan.domain], epoch, row, replay, tuple(parts)))
        return origins

    def dataset(
        self, start: int = 0, stop: int | None = None, rows: Rows = None
    ) -> grain.MapDataset:
        """Return a grain MapDataset whose element k is `batch(start + k, rows)`.

        The element is a whole batch, so grain's own state is one integer too. Read it with
        `.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))`: one thread
        that works ahead is enough for memory-mapped tokens, more only contend.

        Args:
            start: first step.
            stop: one past the last; None: the end of the stream.
            rows: rows of each batch, as in `batch` (this host's; a function where the batches have
                several shapes).
        """
        import grain  # imports jax, which nothing else here needs

        stop = self.num_steps if stop is None else stop
        if not 0 <= start <= stop <= self.num_steps:
            raise ValueError(
                f"steps {start} to {stop} are not within the stream's 0 to {self.num_steps}; "
                "give 0 <= start <= stop <= num_steps"
            )
        return grain.MapDataset.source(_Steps(self, start, stop, rows))

    def ledger(self, t: int) -> dict[str, dict[str, float]]:
        """Count the tokens (loss-bearing transitions) of steps 0 .. t - 1, exactly.

        Closed forms and prefix sums: the cost does not grow with t (apart from the first call after
        a resume, which goes once over the current epoch's row lengths).

        Args:
            t: number of steps, 0 <= t <= num_steps.

        Returns:
            domain -> {"new_tokens": int, "replayed_tokens": int, "epochs": float}, for every
            domain; epochs is new tokens / tokens of the domain's train store (0.0 for one not
            trained on).
        """
        if not 0 <= t <= self.num_steps:
            raise IndexError(f"{t} steps are not within the stream's 0 to {self.num_steps}")
        used = np.zeros(len(self._plans), np.int64)
        replayed = np.zeros(len(self.domains), np.int64)
        for stage in self._stages:
            steps = min(t - stage.start, stage.num_steps)
            if steps <= 0:
                break
            for bucket, count in stage.steps_before(steps):
                np.add.at(used, bucket.plans, bucket.counts_before(count))
                if bucket.pool is not None:
                    replayed += bucket.pool.tokens_in_first(count * bucket.replay_rows)
        new, size = np.zeros_like(replayed), np.zeros_like(replayed)
        for plan, count in zip(self._plans, used.tolist(), strict=True):
            new[plan.domain] += plan.tokens_in_first(count)
            size[plan.domain] = _num_transitions(plan.store)
        return {
            domain: {
                "new_tokens": int(new[d]),
                "replayed_tokens": int(replayed[d]),
                "epochs": float(new[d] / size[d]) if size[d] else 0.0,
            }
            for d, domain in enumerate(self.domains)
        }

    def __str__(self) -> str:
        """Describe the stages and their plans in a table."""
        lines = [f"stream of {self.num_steps:,} steps, fingerprint {self.fingerprint}"]
        for stage in self._stages:
            steps = f"steps {stage.start:,} to {stage.start + stage.num_steps:,}"
            if stage.schedule is None:
                (bucket,) = stage.buckets.values()
                lines.append(f"  {stage.name}: {steps}, {self._describe(bucket)}")
                lines += self._describe_plans(bucket)
                continue
            lines.append(f"  {stage.name}: {steps}, {len(stage.buckets)} buckets")
            for domain, decomposed in stage.decomposed.items():
                lines.append(
                    f"    {domain}: {decomposed.dropped_tokens:,} tokens dropped, "
                    f"{decomposed.num_padded_rows:,} rows padded with "
                    f"{decomposed.padded_cells:,} cells"
                )
            for bucket in stage.buckets.values():
                lines.append(f"   {bucket.num_steps:,} steps of {self._describe(bucket)}")
                lines += self._describe_plans(bucket)
        return "\n".join(lines)

    def _describe(self, bucket: Bucket) -> str:
        return f"{bucket.new_rows} new + {bucket.replay_rows} replayed rows x {bucket.row_length:,}"

    def _describe_plans(self, bucket: Bucket) -> list[str]:
        lines = []
        rows = bucket.counts_before(bucket.num_steps)
        for p, count in zip(bucket.plans.tolist(), rows.tolist(), strict=True):
            plan = self._plans[p]
            lines.append(
                f"    {self.domains[plan.domain]}: {count / rows.sum():.4g} of the new rows, "
                f"{count:,} of {plan.num_rows:,} rows ({count / plan.num_rows:.3g} epochs), fill "
                f"{plan.layout.fill:.4f}, {plan.layout.num_cut_documents:,} documents cut"
            )
        if bucket.pool is not None:
            lines.append(f"    replay: from {bucket.pool.num_rows:,} rows")
        return lines


class _Steps:
    """The random-access source behind `Stream.dataset`."""

    def __init__(self, stream: Stream, start: int, stop: int, rows: Rows):
        self._stream, self._start, self._stop, self._rows = stream, start, stop, rows

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, k: Any) -> Batch:
        return self._stream.batch(self._start + int(k), self._rows)

    def __repr__(self) -> str:
        return f"lcl.Stream({self._stream.fingerprint}, {self._start}, {self._stop}, {self._rows})"


def build_stream(
    data: Any,
    stages: Sequence[tuple[str, StageData, int]],
    *,
    seed: int,
    domains: Sequence[str] | None = None,
    plan_dir: str | os.PathLike[str] | None = None,
) -> Stream:
    """Open the train stores and plan every row of a run.

    Args:
        data: where the stores are (`lcl.data.Data`).
        stages: (name, StageData, number of steps) in order.
        seed: of the orders, mixtures and replay.
        domains: all domains of the run, trained on or not: the numbering of source ids. None: those
            of the mixtures.
        plan_dir: where layouts are kept between runs; None: in memory only.

    Returns:
        The Stream.

    Raises:
        ValueError: no stage, no steps, an unknown domain, an empty store.
    """
    if not stages:
        raise ValueError("there is no stage; give at least one (name, StageData, number of steps)")
    trained = {d for _, stage_data, _ in stages for d in stage_data.mixture.domains}
    names = tuple(sorted(trained if domains is None else set(domains)))
    for name, stage_data, num_steps in stages:
        if num_steps < 1:
            raise ValueError(f"stage {name!r} has {num_steps} steps; give at least 1 or remove it")
        for domain in stage_data.mixture.domains:
            if domain not in names:
                near = difflib.get_close_matches(domain, names, n=1)
                raise ValueError(
                    f"stage {name!r} trains on {domain!r}, which is not among the run's domains "
                    f"{', '.join(names)}; " + (f"did you mean {near[0]!r}?" if near else "add it")
                )
    stores = {domain: data.open(domain, "train") for domain in sorted(trained)}
    for domain, store in stores.items():
        if not _num_transitions(store):
            raise ValueError(
                f"store of {domain!r} has no tokens to train on; prepare more documents of it or "
                "take it out of the mixtures"
            )
    planner = Planner(names, stores, seed, plan_dir)
    built = [planner.add_stage(name, stage_data, steps) for name, stage_data, steps in stages]
    settings = [[data.settings(), steps] for _, data, steps in stages]
    if not stages[-1][1].depends_on_length:
        settings[-1][1] = 0  # the last stage's length decides no batch
    scores = _scores_fingerprints(stores, [data for _, data, _ in stages])
    prints = {domain: store.fingerprint for domain, store in stores.items()}
    stream_name = fingerprint(
        "stream",
        _VERSION,
        seed,
        list(names),
        prints | scores,
        settings,
    )
    return Stream(names, planner.plans, built, stream_name, scores)


def _scores_fingerprints(stores: Mapping[str, Any], stages: Sequence[StageData]) -> dict[str, str]:
    """What decides the batches beside stores and settings: the scores that subsets rank by.

    Args:
        stores: domain -> its train store.
        stages: what the stages read.

    Returns:
        {"medicine scores:reference": fingerprint of the scores}; empty where no stage ranks by any.
    """
    found = {}
    for stage in stages:
        for domain, part in stage.mixture.subsets.items():
            for scores in part.ranked_by(stores[domain]):
                found[f"{domain} {part.by}"] = scores
    return found


def _num_transitions(store: Any) -> int:
    return int(store.offsets[-1] - np.count_nonzero(np.diff(store.offsets)))
