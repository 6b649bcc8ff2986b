"""Every mixture with every replay buffer, in a real stream: what reaches the batches is exact."""

from __future__ import annotations

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from lcl.data.decomposition import Decomposition
from lcl.data.mixture import Mixture
from lcl.data.mixture_curricula import LinearMixture, StagedMixture, TokenBudgets
from lcl.data.mixture_subset import Subset
from lcl.data.replay import Replay
from lcl.data.replay_buffers import BalancedByStage, Contiguous, Everything, Reservoir
from lcl.data.stage_data import StageData
from lcl.data.stream import build_stream
from lcl.data.testing import make_stores

T, BATCH, STEPS = 32, 6, 8
ROWS = BATCH * STEPS
FIRST = Mixture({"a": 2, "b": 1}, block=6)
MIXTURES = {
    "constant": Mixture({"b": 1, "c": 1}, block=6),
    "staged": StagedMixture(({"a": 1}, {"b": 1, "c": 2}), (0.0, 0.25), block=8),
    "linear": LinearMixture(({"a": 1, "b": 1}, {"c": 1}), block=8),
    "budgets": TokenBudgets({"a": 10 * T + 5, "c": 20 * T, "b": None}, block=8),
    "subset": Subset(Mixture({"b": 1, "c": 1}, block=6), "c", epochs=4),
    "subset by tokens": Subset(LinearMixture(({"b": 1}, {"c": 1}), block=8), "b", tokens=6 * T),
}
BUFFERS = {
    "everything": Everything(),
    "reservoir": Reservoir(20),
    "balanced": BalancedByStage(),
    "balanced, bounded": BalancedByStage(10),
    "contiguous": Contiguous(5, lanes=2),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    return make_stores(root, {"a": 40, "b": 40, "c": 40}, seed=0)


def stages_of(mixture, buffer):
    replay = Replay(0.25, buffer=buffer) if buffer is not None else None

    def stage(mix):
        return StageData(mix, T, BATCH, replay=replay)

    return [("x", stage(FIRST), 7), ("y", stage(mixture), STEPS), ("z", stage(mixture), STEPS)]


def origins_of(stream):
    return [stream.rows(t) for t in range(stream.num_steps)]


@pytest.mark.parametrize(
    ("mixture", "buffer"), [*itertools.product(MIXTURES, BUFFERS)], ids=lambda x: x
)
def test_rows_ledger_and_restart_of_every_combination(data, mixture, buffer):
    stages = stages_of(MIXTURES[mixture], BUFFERS[buffer])
    # 6 new rows and 2 replayed ones a step.
    stream = build_stream(data, stages, seed=3)
    origins = origins_of(stream)
    seen = set()  # of the stages before
    new_tokens, replayed_tokens = collections.Counter(), collections.Counter()
    for stage, (begin, end) in enumerate([(0, 7), (7, 15), (15, 23)]):
        fresh = [row for t in range(begin, end) for row in origins[t] if not row.replay]
        again = [row for t in range(begin, end) for row in origins[t] if row.replay]
        assert len(fresh) == (end - begin) * BATCH
        assert len(again) == (0 if stage == 0 else (end - begin) * 2)
        assert {(row.domain, row.slices) for row in again} <= seen
        seen |= {(row.domain, row.slices) for row in fresh}
        bound = stages[stage][1].mixture.bind(len(fresh), T)
        counts = collections.Counter(row.domain for row in fresh)
        want = bound.counts_before(len(fresh), key=0)
        for d, domain in enumerate(bound.domains):
            assert counts[domain] == want[d]
        for kind, tokens in ((fresh, new_tokens), (again, replayed_tokens)):
            for row in kind:
                tokens[row.domain] += sum(length for _, _, length in row.slices)
        ledger = stream.ledger(end)
        for domain in stream.domains:
            assert ledger[domain]["new_tokens"] == new_tokens[domain]
            assert ledger[domain]["replayed_tokens"] == replayed_tokens[domain]
    resumed = build_stream(data, stages, seed=3)
    assert resumed.fingerprint == stream.fingerprint
    for t in (22, 7, 15, 9, 0, 21):  # in any order, in a new process
        assert resumed.rows(t) == origins[t]
        for one, other in zip(resumed.batch(t), stream.batch(t), strict=True):
            assert (one is None and other is None) or (one == other).all()
    # Replayed tokens are marked: domain d's as D + d.
    replayed = stream.batch(20).source_ids.max(axis=1) >= len(stream.domains)
    assert replayed.tolist() == [row.replay for row in origins[20]]


def test_an_exact_number_of_epochs_over_the_subset(data):
    stream = build_stream(data, stages_of(MIXTURES["subset"], None)[1:2], seed=0)
    rows = [row for origins in origins_of(stream) for row in origins if row.domain == "c"]
    times = collections.Counter(row.row for row in rows)
    assert len(rows) == ROWS // 2 and set(times.values()) == {4} and len(times) == ROWS // 8


def test_a_subset_goes_on_in_the_next_stage_and_is_replayed_as_it_was(data):
    part = Subset(Mixture({"c": 1}), "c", tokens=20 * T)
    replay = Replay(0.25, buffer=Contiguous(4, lanes=2))
    stages = [
        ("x", StageData(part, T, BATCH), 2),
        ("y", StageData(part, T, BATCH), 2),
        ("z", StageData(Mixture({"c": 1}), T, BATCH, replay=replay), 4),
    ]
    stream = build_stream(data, stages, seed=0)
    rows = [row for t in range(4) for row in stream.rows(t)]
    first = [row.row for row in rows[: len(rows)] if row.epoch == 0]
    assert len(set(first)) == len(first)  # no row again before all have come
    read = [row.slices for row in rows]
    lanes = [[r.slices for r in stream.rows(t) if r.replay] for t in range(4, 8)]
    for lane in zip(*lanes, strict=True):
        start = [i for i, row in enumerate(read) if row == lane[0]]
        assert any(read[i : i + 4] == list(lane) for i in start)


def test_everything_shows_each_transition_once_a_pass_though_parts_overlap(data):
    """A stage on part of a domain, a stage on all of it: together each transition is there once."""
    whole = Mixture({"c": 1})
    stages = [
        ("x", StageData(Subset(whole, "c", tokens=20 * T), T, BATCH), 6),
        ("y", StageData(whole, T, BATCH), 9),
        ("z", StageData(Mixture({"a": 1}), T, BATCH, replay=Replay(0.5)), 30),
    ]
    stream = build_stream(data, stages, seed=0)
    seen = {s for t in range(15) for row in stream.rows(t) for s in cells(row)}
    one_pass = [
        row for t in range(15, 45) for row in stream.rows(t) if row.replay and row.epoch == 0
    ]
    got = [cell for row in one_pass for cell in cells(row)]
    assert len(got) == len(set(got)) and set(got) <= seen


def cells(row):
    return [(d, i) for d, start, length in row.slices for i in range(start, start + length)]


def test_only_mixtures_that_look_at_the_length_tie_the_fingerprint_to_it(data):
    def name(mixture, steps):
        return build_stream(data, [("x", StageData(mixture, T, BATCH), steps)], seed=0).fingerprint

    for mixture in MIXTURES.values():
        assert (name(mixture, 8) != name(mixture, 9)) == mixture.needs_length
    names = [name(mixture, 8) for mixture in MIXTURES.values()]
    assert len(set(names)) == len(names)


def test_buffers_are_in_the_fingerprint(data):
    names = [
        build_stream(data, stages_of(FIRST, buffer), seed=0).fingerprint
        for buffer in (None, *BUFFERS.values())
    ]
    assert len(set(names)) == len(names)


def test_what_cannot_be_planned_is_refused_in_a_line(data):
    short = StageData(FIRST, 16, BATCH, replay=Replay(0.25))
    contiguous = StageData(FIRST, T, BATCH, replay=Replay(0.25, buffer=Contiguous()))
    with pytest.raises(ValueError, match="contiguous replay needs the rows of stage 0"):
        build_stream(data, [("x", short, 3), ("y", contiguous, 3)], seed=0)
    with pytest.raises(ValueError, match="token budgets are 30 rows of 32, but the stage has 12"):
        budgets = TokenBudgets({"a": 10 * T, "c": 20 * T})
        build_stream(data, [("x", StageData(budgets, T, BATCH), 2)], seed=0)


@pytest.mark.parametrize("buffer", ["everything", "reservoir", "balanced"])
def test_other_rows_are_laid_out_again_and_only_what_was_seen(data, buffer):
    stages = [
        ("x", StageData(FIRST, 16, BATCH), 7),
        ("y", StageData(MIXTURES["linear"], T, BATCH), STEPS),
        ("z", StageData(FIRST, 64, BATCH, replay=Replay(0.25, buffer=BUFFERS[buffer])), 9),
    ]
    stream = build_stream(data, stages, seed=0)
    seen = {(row.domain, c) for t in range(15) for row in stream.rows(t) for c in cells(row)}
    replayed = [row for t in range(15, 24) for row in stream.rows(t) if row.replay]
    assert replayed and {(row.domain, c) for row in replayed for c in cells(row)} <= seen
    assert np.sum([stream.ledger(24)[d]["replayed_tokens"] for d in stream.domains]) == sum(
        len(cells(row)) for row in replayed
    )


@pytest.mark.parametrize(
    ("mixture", "buffer"),
    [
        ("constant", "contiguous"),
        ("linear", "everything"),
        ("staged", "balanced"),
        ("subset by tokens", "reservoir"),
    ],
)
def test_with_decomposition_too(data, mixture, buffer):
    """Each bucket has the mixture in its own rows, and a buffer of its own."""
    decomposition = Decomposition(min_log2=4, max_log2=5, cycles=2)
    stages = [
        (name, dataclasses.replace(stage, decomposition=decomposition), steps)
        for name, stage, steps in stages_of(MIXTURES[mixture], BUFFERS[buffer])
    ]
    stream = build_stream(data, stages, seed=1)
    seen, new, replayed = set(), collections.Counter(), collections.Counter()
    for begin, end in ((0, 7), (7, 15), (15, 23)):
        rows = [row for t in range(begin, end) for row in stream.rows(t)]
        for row in rows:
            (replayed if row.replay else new)[row.domain] += len(cells(row))
        assert {(r.domain, c) for r in rows if r.replay for c in cells(r)} <= seen
        seen |= {(r.domain, c) for r in rows if not r.replay for c in cells(r)}
    for domain, line in stream.ledger(23).items():
        assert line["new_tokens"] == new[domain] and line["replayed_tokens"] == replayed[domain]
    resumed = build_stream(data, stages, seed=1)
    assert all(resumed.rows(t) == stream.rows(t) for t in (22, 8, 15, 3))


def test_epochs_do_not_size_a_decomposed_subset():
    with pytest.raises(ValueError, match="sized by epochs=4, .* give its size in tokens"):
        StageData(MIXTURES["subset"], T, BATCH, decomposition=Decomposition(4, 5))
