"""Every order x layout x mixture x replay: a restore at every step is the uninterrupted tail."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import grain
import numpy as np
import pytest

from lcl.data import (
    BalancedByStage,
    Contiguous,
    Decomposition,
    GrowP2,
    LinearMixture,
    Mixture,
    Replay,
    Reservoir,
    SkyLadder,
    StageData,
    StagedMixture,
    Subset,
    TokenBudgets,
    Uniform,
    build_stream,
)
from lcl.data.testing import make_stores

T, BATCH, STEPS = 32, 6, 4
READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclasses.dataclass(frozen=True)
class ByLength:
    """An order that is no shuffle, as an object; it leaves the shortest document out."""

    needs_open_rows: bool = True

    def order(self, store, *, seed, domain, cache_dir):
        return np.argsort(np.asarray(store.lengths), kind="stable")[1:]

    def settings(self):
        return {"needs_open_rows": self.needs_open_rows}


def decomposed(**settings):
    return {"decomposition": Decomposition(3, 5, cycles=2, **settings)}


LAYOUTS = {
    ("shuffle", "best_fit"): {},
    ("shuffle", "first_fit"): {"packing": "first_fit"},
    ("shuffle", "concat"): {"packing": "concat"},
    ("shuffle", "buckets"): decomposed(curriculum=GrowP2()),
    ("shuffle", "buckets, tails dropped"): decomposed(
        curriculum=Uniform(style="exhaustion"), tails="drop"
    ),
    ("stored", "best_fit"): {"order": "stored"},
    ("stored", "concat"): {"order": "stored", "packing": "concat", "document_mask": False},
    ("stored", "buckets"): {"order": "stored", **decomposed(longest_first=False)},
    ("object", "concat"): {"order": ByLength(), "packing": "concat", "document_mask": False},
    ("shuffle", "best_fit, windows"): {"transforms": (SkyLadder(start=4, percent=70),)},
}
MIXTURES = {
    "constant": Mixture({"b": 1, "c": 1}, block=6),
    "staged": StagedMixture(({"a": 1, "b": 1, "c": 1}, {"b": 1, "c": 2}), (0.0, 0.5), block=8),
    "linear": LinearMixture(({"b": 3, "c": 1}, {"b": 1, "c": 2}), block=8),
    "budgets": TokenBudgets({"c": 6 * T, "b": None}, block=8),
    "subset": Subset(Mixture({"b": 1, "c": 1}, block=6), "c", tokens=40 * T),
}
REPLAYS = {
    "no replay": None,
    "add": Replay(0.25),
    "substitute, reservoir": Replay(1 / 3, "substitute", Reservoir(5)),
    "add, balanced": Replay(0.25, buffer=BalancedByStage()),
    "add, contiguous": Replay(0.25, buffer=Contiguous(3, lanes=2)),
}


def possible(layout, mixture):
    """Budgets are in tokens of rows of one length: refused with buckets (a test of its own)."""
    return not (mixture == "budgets" and "buckets" in layout[1])


COMBINATIONS = [
    (layout, mixture, replay)
    for layout, mixture, replay in itertools.product(LAYOUTS, MIXTURES, REPLAYS)
    if possible(layout, mixture)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_stores(tmp_path_factory.mktemp("stores"), {"a": 30, "b": 30, "c": 30}, seed=0)


def stages_of(layout, mixture, replay):
    """Two stages (the border is inside), the second on some domains that the first has read."""
    settings = {**LAYOUTS[layout], "replay": REPLAYS[replay]}
    first = StageData(Mixture({"a": 2, "b": 1}, block=6), T, BATCH, **settings)
    return [("x", first, STEPS), ("y", StageData(MIXTURES[mixture], T, BATCH, **settings), STEPS)]


def assert_equal(one, other):
    for name, a, b in zip(one._fields, one, other, strict=True):
        assert (a is None and b is None) or np.array_equal(a, b), name


@pytest.mark.parametrize(("layout", "replay"), list(itertools.product(LAYOUTS, REPLAYS)), ids=str)
def test_restore_at_every_step_and_on_any_number_of_hosts(data, layout, replay):
    """Peers 1 and 2: repeats, skips or another order after a resume or on another host count."""
    for mixture in MIXTURES:
        if not possible(layout, mixture):
            continue
        stages = stages_of(layout, mixture, replay)
        whole = build_stream(data, stages, seed=3)
        batches = [whole.batch(t) for t in range(whole.num_steps)]
        assert {b.tokens.shape for b in batches} == {*whole.shapes(0), *whole.shapes(1)}
        again = build_stream(data, stages, seed=3)  # another process, say
        assert again.fingerprint == whole.fingerprint
        dataset = again.dataset()
        for t in range(whole.num_steps + 1):  # also at the border and at the end
            iterator = iter(dataset.to_iter_dataset(READ))
            iterator.set_state({"next_index": t})
            assert_all_equal(iterator, batches[t:])
            assert iterator.get_state() == {"next_index": whole.num_steps}
        for num_hosts in (2, 4, 8):
            parts = [
                list(
                    again.dataset(rows=functools.partial(share, host, num_hosts)).to_iter_dataset(
                        READ
                    )
                )
                for host in range(num_hosts)
            ]
            for t, batch in enumerate(batches):
                for name in batch._fields[:-1]:
                    joined = np.concatenate([getattr(part[t], name) for part in parts])
                    assert np.array_equal(joined, getattr(batch, name)), (mixture, t, name)


def share(host, num_hosts, num_rows):
    """One host's rows of a batch of any size."""
    return slice(host * num_rows // num_hosts, (host + 1) * num_rows // num_hosts)


def assert_all_equal(iterator, batches):
    read = list(iterator)
    assert len(read) == len(batches)
    for one, other in zip(read, batches, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_grains_own_check_and_a_second_resume(data, layout):
    stages = stages_of(layout, "linear", "substitute, reservoir")
    whole = build_stream(data, stages, seed=0)
    grain.experimental.assert_equal_output_after_checkpoint(whole.dataset().to_iter_dataset(READ))
    state, t = {"next_index": 0}, 0
    for length in (2, 1, 3, 2):  # a resume of a resume of a resume
        iterator = iter(build_stream(data, stages, seed=0).dataset().to_iter_dataset(READ))
        iterator.set_state(state)
        for _ in range(length):
            assert_equal(next(iterator), whole.batch(t))
            t += 1
        state = iterator.get_state()
    assert state == {"next_index": whole.num_steps}


@pytest.mark.parametrize(("layout", "replay"), list(itertools.product(LAYOUTS, REPLAYS)), ids=str)
def test_the_ledger_counts_what_the_batches_hold(data, layout, replay):
    for mixture in MIXTURES:
        if not possible(layout, mixture):
            continue
        stream = build_stream(data, stages_of(layout, mixture, replay), seed=1)
        num_domains = len(stream.domains)
        counts = np.zeros(2 * num_domains, int)
        for t in range(stream.num_steps + 1):
            ledger = stream.ledger(t)
            for d, domain in enumerate(stream.domains):
                assert ledger[domain]["new_tokens"] == counts[d]
                assert ledger[domain]["replayed_tokens"] == counts[num_domains + d]
            if t < stream.num_steps:
                batch = stream.batch(t)
                real = batch.loss_weights > 0
                counts += np.bincount(batch.source_ids[real], minlength=2 * num_domains)


# --- an epoch of a decomposed domain --------------------------------------------------------------


@pytest.mark.parametrize("tails", ["pad", "drop"])
def test_every_token_once_an_epoch_or_in_the_ledger(data, tails):
    """Natural shares: every bucket of a domain is read at the same pace, so an epoch is whole."""
    from lcl.data.decomposition import decompose

    store = data.open("a")
    lengths = np.asarray(store.lengths) - 1
    layout = decompose(lengths, min_log2=3, max_log2=5, seed=0, domain="a", tails=tails)
    steps = [bucket.num_rows // (2 * 2 ** (2 - b)) for b, bucket in enumerate(layout.layouts)]
    decomposition = Decomposition(3, 5, tails=tails, cycles=2)
    stage = StageData(Mixture({"a": 1.0}), T, 2, decomposition=decomposition)
    stream = build_stream(data, [("x", stage, sum(steps))], seed=0)
    seen = set()
    for t in range(stream.num_steps):
        batch = stream.batch(t)
        assert (batch.segment_ids <= 1).all(), "a row of two documents"
        for origin in stream.rows(t):
            assert len(origin.slices) == 1
            if origin.epoch == 0:
                assert origin.slices[0] not in seen
                seen.add(origin.slices[0])
    # What an epoch has not shown is less than a step a bucket.
    shown = sum(length for _, _, length in seen)
    assert layout.tokens.sum() - shown <= 3 * 2 * T
    assert layout.dropped_tokens == lengths.sum() - layout.tokens.sum()
    assert (layout.dropped_tokens > 0) == (tails == "drop")
    assert f"a: {layout.dropped_tokens:,} tokens dropped" in str(stream)
    assert sum(bucket["num_steps"] for bucket in stream.buckets(0)) == stream.num_steps


def test_the_epoch_border_of_a_bucket_is_a_restart_like_any_other(data):
    stage = StageData(Mixture({"a": 1.0}), T, BATCH, **LAYOUTS["shuffle", "buckets"])
    stream = build_stream(data, [("x", stage, 150)], seed=0)
    epochs = [max(origin.epoch for origin in stream.rows(t)) for t in range(150)]
    border = epochs.index(1)  # the first step with a row that comes again
    assert min(origin.epoch for origin in stream.rows(border)) == 0, "the border is in a batch"
    tail = list(stream.dataset(border, border + 9).to_iter_dataset(READ))
    for k, batch in enumerate(tail):
        assert_equal(batch, stream.batch(border + k))


def test_domain_shares_hold_over_the_stage_and_buckets_are_used_at_one_pace(data):
    """A domain of other lengths is in other buckets, at its own natural shares."""
    decomposition = Decomposition(3, 5, cycles=2)
    stage = StageData(Mixture({"a": 3, "b": 1}, block=8), T, 16, decomposition=decomposition)
    stream = build_stream(data, [("x", stage, 400)], seed=0)
    assert stream.shares(0)["a"] == pytest.approx(0.75, abs=0.02)
    uses = {}
    for t in range(400):
        for origin in stream.rows(t):
            key = origin.domain, stream.batch_shape(t)[1]
            uses[key] = uses.get(key, 0) + 1
    rows = {}
    for t in range(400):
        for origin in stream.rows(t):
            key = origin.domain, stream.batch_shape(t)[1]
            rows[key] = max(rows.get(key, 0), origin.row + 1)
    for domain in "ab":
        epochs = [uses[domain, n] / rows[domain, n] for n in (8, 16, 32)]
        assert max(epochs) / min(epochs) < 1.15


def test_replay_into_buckets_that_nothing_seen_fills_packs_the_documents(data, tmp_path):
    """Short documents replayed in long rows share them, each masked."""
    from lcl.data.testing import make_stores

    short = make_stores(tmp_path, {"s": 60, "t": 60}, seed=0, mean_words=3)
    longest = int(np.asarray(short.open("s").lengths).max())
    log2 = int(np.ceil(np.log2(longest))) + 1
    decomposition = Decomposition(3, log2, cycles=1)
    long = make_stores(tmp_path / "long", {"s": 2, "t": 60}, seed=0, mean_words=2**log2 // 3)

    class Both:
        def open(self, domain, split="train"):
            return (short if domain == "s" else long).open(domain, split)

    length = 2**log2
    stages = [
        ("x", StageData(Mixture({"s": 1.0}), 16, 4), 6),
        (
            "y",
            StageData(
                Mixture({"t": 1.0}), length, 3, replay=Replay(0.25), decomposition=decomposition
            ),
            8,
        ),
    ]
    stream = build_stream(Both(), stages, seed=0)
    packed = 0
    for t in range(6, 14):
        batch, (rows, row_length) = stream.batch(t), stream.batch_shape(t)
        assert rows * row_length == 4 * length
        replayed = [i for i, origin in enumerate(stream.rows(t)) if origin.replay]
        assert len(replayed) == rows // 4
        if row_length == length:
            packed += 1
            assert batch.segment_ids[replayed].max() > 1
            assert (np.delete(batch.segment_ids, replayed, axis=0) <= 1).all()
    assert packed


# --- what is refused ------------------------------------------------------------------------------

ONE = Mixture({"a": 1.0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: StageData(ONE, T, 2, order=ByLength(), packing="concat"),
            "order ByLength puts related documents into one row, but document_mask=True cuts",
        ),
        (
            lambda: StageData(ONE, T, 2, order=ByLength(), document_mask=False),
            "packing 'best_fit' takes it apart; use packing='concat'",
        ),
        (
            lambda: StageData(ONE, T, 2, order=ByLength(), decomposition=Decomposition(3, 5)),
            "order ByLength has no effect with decomposition",
        ),
        (lambda: StageData(ONE, T, 2, order=3), "order is 3; use shuffle or stored, or an object"),
        (
            lambda: StageData(ONE, T, 2, decomposition=Decomposition(3, 6)),
            r"sequence_length is 32, but the decomposition's longest rows have 64; make",
        ),
        (
            lambda: StageData(ONE, T, 2, packing="concat", decomposition=Decomposition(3, 5)),
            "packing 'concat' has no effect with decomposition",
        ),
        (
            lambda: StageData(MIXTURES["budgets"], T, 2, decomposition=Decomposition(3, 5)),
            "a mixture whose weights can be scaled bucket by bucket, not TokenBudgets",
        ),
        (
            lambda: StageData(ONE, T, 2, transforms=("windows",)),
            "transform 'windows' is none; give objects",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_an_order_that_leaves_all_documents_out_is_refused(data, monkeypatch):
    monkeypatch.setattr(ByLength, "order", lambda *_, **__: np.zeros(0, np.int64))
    stage = StageData(ONE, T, 2, order=ByLength(needs_open_rows=False))
    with pytest.raises(ValueError, match="'a' has no row to train on: .*order leaves all"):
        build_stream(data, [("x", stage, 3)], seed=0)


def test_a_decomposition_that_drops_all_is_refused(data):
    length = 2**16
    decomposition = Decomposition(16, 16, tails="drop")
    stage = StageData(ONE, length, 1, decomposition=decomposition)
    with pytest.raises(ValueError, match="'a' has no document of 65536 transitions, and tails"):
        build_stream(data, [("x", stage, 3)], seed=0)


def test_a_mixture_that_a_bucket_is_too_small_for_is_refused_with_the_bucket(data):
    mixture = LinearMixture(({"a": 2, "b": 1}, {"a": 2, "b": 1}), block=8)
    stage = StageData(mixture, T, 1, decomposition=Decomposition(3, 5))
    with pytest.raises(ValueError, match=r"bucket of \d+ with \d steps: mixture gives '.' less"):
        build_stream(data, [("x", stage, 3)], seed=0)


def test_an_order_that_allows_masks_may_have_them(data):
    stage = StageData(ONE, T, 2, order=ByLength(needs_open_rows=False))
    assert build_stream(data, [("x", stage, 3)], seed=0).num_steps == 3


def test_the_length_of_a_last_stage_counts_where_it_decides_batches(data):
    def name(steps, **settings):
        stage = StageData(ONE, T, 2, **settings)
        return build_stream(data, [("x", stage, steps)], seed=0).fingerprint

    assert name(4) == name(5)
    assert name(4, decomposition=Decomposition(3, 5)) != name(5, decomposition=Decomposition(3, 5))
    ladder = (SkyLadder(start=4, percent=70),)
    assert name(4, transforms=ladder) != name(5, transforms=ladder)
    names = {
        name(4),
        name(4, transforms=ladder),
        name(4, decomposition=Decomposition(3, 5)),
        name(4, decomposition=Decomposition(2, 5)),
        name(4, decomposition=Decomposition(3, 5, cycles=1)),
        name(4, order=ByLength(needs_open_rows=False)),
        name(4, packing="first_fit"),
    }
    assert len(names) == 7


def test_buckets_are_kept_on_disk_and_used_again(data, tmp_path, monkeypatch):
    stages = stages_of(("shuffle", "buckets"), "constant", "add")
    stream = build_stream(data, stages, seed=0, plan_dir=tmp_path)
    monkeypatch.setattr("lcl.data.planner.decompose", None)  # building anything would fail
    again = build_stream(data, stages, seed=0, plan_dir=tmp_path)
    for t in range(stream.num_steps):
        assert_equal(stream.batch(t), again.batch(t))
