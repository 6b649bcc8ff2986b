"""Planned stages: all numbers about a stage that do not depend on the step, and their look-ups.

A stage has one bucket of rows, or, with dataset decomposition, one for each power of two, and a
schedule that says which of them a step reads:

    step            0     1     2     3     4          bucket 512: B = 2     bucket 256: B = 4
    bucket          512   256   256   512   256
    rows            0 1   0..3  4..7  2 3   8..11      of that bucket
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lcl.data.curricula import Schedule
from lcl.data.decomposition import DecompositionLayout
from lcl.data.mixture import BoundMixture
from lcl.data.replay import Pool
from lcl.data.replay_buffers import ReadFn
from lcl.data.stage_data import StageData


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
        for b, bucket in reversed(list(self.buckets.items())):
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
