"""Gathers what a report on data shows: from a root of stores, or from the stages of a run.

`lcl.data.inspect` does the counting; here it is decided what is counted, in the order it is shown.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcl.data import Mixture, StageData, Stream, build_stream, pack
from lcl.data import inspect as tables
from lcl.data.decomposition import decompose
from lcl.data.neighbors import adjacent_similarity
from lcl.data.ordering import shuffle
from lcl.data.packing import METHODS, Layout

MAX_SAMPLES = 8
_SAMPLE_ROWS = 4  # of a stage (or of a domain, when there are no stages)
_NUM_BUCKETS = 6


@dataclasses.dataclass(frozen=True)
class DomainLine:
    """One domain's training store; `lengths` in transitions, `share` of the root's transitions."""

    domain: str
    num_bytes: int
    lengths: tables.Lengths
    share: float
    fingerprint: str
    ledger: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class PlanLine:
    """How a domain lies in rows: in a stage of a run, or as it would under some setting.

    Attributes:
        stage: name of the stage; "" when there are no stages.
        domain: of the documents.
        layout: "best_fit", "concat", "buckets 256-8192", ...
        line: fill, padding, cuts.
        buckets: a line a row length; only a decomposition has several.
        num_rows: rows the stage reads; None when there are no stages.
    """

    stage: str
    domain: str
    layout: str
    line: tables.LayoutLine
    buckets: tuple[tables.BucketLine, ...]
    num_rows: int | None = None

    @property
    def epochs(self) -> float | None:
        """Passes over the domain's rows within the stage."""
        return None if self.num_rows is None else self.num_rows / max(1, self.line.rows)


@dataclasses.dataclass(frozen=True)
class PathLine:
    """Cosines of neighbours along an order of documents; `shuffled`: along a random order."""

    stage: str
    domain: str
    order: str
    similarity: np.ndarray
    shuffled: np.ndarray
    jumps: int = 0
    near_duplicates: int = 0


@dataclasses.dataclass(frozen=True)
class DataReport:
    """Everything that text and page show; parts that do not apply are empty or None."""

    title: str
    root: str
    tokenizer: str
    domains: tuple[DomainLine, ...]
    plans: tuple[PlanLine, ...]
    stream: Stream | None
    flow: tables.TokensByStep | None
    paths: tuple[PathLine, ...]
    samples: tuple[tables.SampleRow, ...]


def read_root(
    data: Any,
    *,
    domains: Sequence[str] | None = None,
    sequence_length: int = 1024,
    samples: bool = True,
) -> DataReport:
    """What lies in a root, and how it would lie in rows under each layout there is.

    Args:
        data: an `lcl.data.Data`.
        domains: which; None = all of them.
        sequence_length: of the rows, in transitions.
        samples: decode rows too.

    Raises:
        ValueError: an unknown domain, a sequence length below 2, an empty root.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}; give at least 2")
    names = list(domains) if domains else data.domains()
    if not names:
        raise ValueError(f"no stores in {data.root!r}; make some with `lcl prepare`")
    stores = {name: data.open(name, "train") for name in names}
    plans = []
    for name, store in stores.items():
        lengths = _lengths(store)
        for method in METHODS:
            layouts: list[Layout] = [pack(lengths, sequence_length, method=method)]
            plans.append(_plan("", name, method, layouts, lengths))
        high = sequence_length.bit_length() - 1
        low = max(1, high - _NUM_BUCKETS + 1)
        buckets = list(decompose(lengths, min_log2=low, max_log2=high, seed=0).layouts)
        plans.append(_plan("", name, _bucket_name(buckets), buckets, lengths))
    rows: list[tables.SampleRow] = []
    for name in names if samples else ():
        stage = StageData(Mixture({name: 1.0}), sequence_length, batch_size=_SAMPLE_ROWS)
        stream = build_stream(data, [("sample", stage, 1)], seed=0)
        count = max(1, min(_SAMPLE_ROWS, MAX_SAMPLES // len(names)))
        rows += tables.sample_rows(stream, data, 0, range(count))
    return DataReport(
        title=os.path.basename(os.path.abspath(data.root)),
        root=data.root,
        tokenizer=_tokenizer(data),
        domains=_domains(stores),
        plans=tuple(plans),
        stream=None,
        flow=None,
        paths=(),
        samples=tuple(rows[:MAX_SAMPLES]),
    )


def read_stages(
    data: Any,
    stages: Sequence[tuple[str, StageData, int]],
    *,
    seed: int,
    domains: Sequence[str] | None = None,
    plan_dir: str | os.PathLike[str] | None = None,
    title: str = "data",
    samples: bool = True,
) -> DataReport:
    """What the stages of a run read.

    Args:
        data, stages, seed, domains, plan_dir: as `lcl.data.build_stream` takes them.
        title: of the page.
        samples: decode rows too.

    Raises:
        ValueError: whatever `build_stream` refuses.
    """
    stream = build_stream(data, stages, seed=seed, domains=domains, plan_dir=plan_dir)
    trained = sorted({d for _, stage, _ in stages for d in stage.mixture.domains})
    stores = {name: data.open(name, "train") for name in trained}
    plans, paths, rows = [], [], []
    each = max(1, min(_SAMPLE_ROWS, MAX_SAMPLES // len(stages)))
    for index, (name, stage, num_steps) in enumerate(stages):
        for planned in tables.stage_layouts(stream, index):
            lengths = _lengths(stores[planned.domain])
            layouts = list(planned.layouts)
            label = stage.packing if len(layouts) == 1 else _bucket_name(layouts)
            plans.append(_plan(name, planned.domain, label, layouts, lengths, planned.num_rows))
        paths += _paths(name, stage, stores, seed, plan_dir)
        if samples:
            # The stage's middle: where a changing mixture, a window or replay can be seen.
            step = stream.stage_starts[index] + num_steps // 2
            rows += tables.sample_rows(stream, data, step, _places(stream, step, each))
    return DataReport(
        title=title,
        root=data.root,
        tokenizer=_tokenizer(data),
        domains=_domains(stores),
        plans=tuple(plans),
        stream=stream,
        flow=tables.tokens_by_step(stream),
        paths=tuple(paths),
        samples=tuple(rows[:MAX_SAMPLES]),
    )


def _places(stream: Stream, step: int, count: int) -> list[int]:
    """Rows of a step to look at: the one with most pieces, the last (replayed, if any), others."""
    pieces = [len(origin.slices) for origin in stream.rows(step)]
    last = len(pieces) - 1
    wanted = [int(np.argmax(pieces)), last, *np.linspace(0, last, count).astype(int).tolist()]
    return sorted(list(dict.fromkeys(wanted))[:count])


def _paths(
    name: str, stage: StageData, stores: Mapping[str, Any], seed: int, cache_dir: Any
) -> list[PathLine]:
    """Similarity along the order of a stage that has one by likeness; else nothing."""
    order = stage.order
    if isinstance(order, str) or not hasattr(order, "plan"):
        return []
    paths = []
    for domain in stage.mixture.domains:
        store = stores[domain]
        plan = order.plan(store, seed=seed, domain=domain, cache_dir=cache_dir)
        vectors = order.find(store, cache_dir=cache_dir).vectors
        others = shuffle(len(vectors), seed=seed, domain=domain)
        paths.append(
            PathLine(
                name,
                domain,
                type(order).__name__,
                np.asarray(plan.similarity[1:]),
                adjacent_similarity(vectors, others),
                jumps=max(0, int(plan.starts.sum()) - 1),
                near_duplicates=int((plan.duplicate_of >= 0).sum()),
            )
        )
    return paths


def _lengths(store: Any) -> np.ndarray:
    return np.maximum(np.asarray(store.lengths, np.int64) - 1, 0)


def _bucket_name(layouts: Sequence[Layout]) -> str:
    sizes = sorted(layout.row_length for layout in layouts)
    return f"buckets {sizes[0]}-{sizes[-1]}"


def _plan(
    stage: str,
    domain: str,
    label: str,
    layouts: Sequence[Layout],
    lengths: np.ndarray,
    num_rows: int | None = None,
) -> PlanLine:
    line = tables.layout_line(layouts, lengths)
    return PlanLine(stage, domain, label, line, tuple(tables.bucket_table(layouts)), num_rows)


def _domains(stores: Mapping[str, Any]) -> tuple[DomainLine, ...]:
    lengths = {name: tables.length_table(_lengths(store)) for name, store in stores.items()}
    total = sum(table.num_tokens for table in lengths.values())
    return tuple(
        DomainLine(
            name,
            store.num_bytes,
            lengths[name],
            lengths[name].num_tokens / max(1, total),
            store.fingerprint,
            store.meta.get("ledger") or {},
        )
        for name, store in stores.items()
    )


def _tokenizer(data: Any) -> str:
    tokenizer = data.tokenizer()
    return f"{tokenizer.spec.partition(':')[0]}, {tokenizer.vocab_size:,} ids"
