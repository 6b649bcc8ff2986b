"""lcl.data.stream: the run's batches as a pure function of the step.

The numbers "peers N" are the complaints about other codebases that each test answers: resume
that repeats or skips (1), another device count (2), changing stages (4), and (5) a replay that is
neither uniform nor reproducible.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl.data.batch import Batch
from lcl.data.mixture import Mixture
from lcl.data.packing import Layout
from lcl.data.planner import StageData
from lcl.data.replay import Replay
from lcl.data.stream import build_stream

BOS, EOS = 256, 257
LENGTHS = {"a": (40, 0), "b": (25, 1), "c": (30, 2)}  # documents, seed


@dataclasses.dataclass
class FakeStore:
    """A store in memory; tokens are unique over all documents, so each transition can be told."""

    domain: str
    tokens: np.ndarray
    offsets: np.ndarray
    fingerprint: str

    @property
    def lengths(self):
        return np.diff(self.offsets)

    @property
    def document_ids(self):
        return 1000 + np.arange(len(self.lengths))


class FakeData:
    """What build_stream needs of lcl.data.Data."""

    def __init__(self, **stores):
        self.stores = stores
        self.opened = []

    def open(self, domain, split="train"):
        assert split == "train"
        self.opened.append(domain)
        if domain not in self.stores:
            raise ValueError(f"unknown domain {domain!r}")
        return self.stores[domain]


def make_store(domain, num_documents, seed, longest=60):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest, num_documents)
    lengths[: num_documents // 10] = 2
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1], dtype=np.uint32) + 1 + 1_000_000 * seed
    return FakeStore(domain, tokens, offsets, f"store-{domain}-{seed}-{num_documents}")


DATA = FakeData(**{d: make_store(d, n, seed) for d, (n, seed) in LENGTHS.items()})


def stage(weights, *, length=16, batch=6, block=8, **kwargs):
    return StageData(Mixture(weights, block=block), length, batch, **kwargs)


def stream_of(kind, **kwargs):
    """The kinds of streams; each crosses epochs and stage borders."""
    add, substitute = Replay(0.25), Replay(1 / 3, "substitute")
    stages = {
        "one stage": [("x", stage({"a": 1}), 28)],
        "concat": [("x", stage({"a": 1, "b": 1}, packing="concat"), 28)],
        "no mask, stored": [("x", stage({"b": 1}, document_mask=False, order="stored"), 20)],
        "mixture": [("x", stage({"a": 5, "b": 2, "c": 1}), 30)],
        "replay add": [
            ("x", stage({"a": 1}, replay=add), 4),
            ("y", stage({"b": 3, "c": 1}, replay=add), 9),
            ("z", stage({"a": 1, "c": 1}, replay=add), 12),
        ],
        "replay substitute": [
            ("x", stage({"a": 1}, replay=substitute), 3),
            ("y", stage({"b": 1}, replay=substitute), 15),
            ("z", stage({"c": 1}, replay=substitute), 8),
        ],
        "lengths": [
            ("x", stage({"a": 1, "b": 1}, length=8), 12),
            ("y", stage({"c": 1, "a": 1}, length=32, batch=3, replay=add), 9),
            ("z", stage({"b": 1}, length=16, packing="concat", replay=Replay(0.5)), 9),
        ],
    }[kind]
    return build_stream(DATA, stages, seed=kwargs.pop("seed", 0), **kwargs)


KINDS = [
    "one stage",
    "concat",
    "no mask, stored",
    "mixture",
    "replay add",
    "replay substitute",
    "lengths",
]
STREAMS = {kind: stream_of(kind) for kind in KINDS}
kinds = pytest.mark.parametrize("kind", KINDS)


def assert_batches_equal(a, b):
    for name, x, y in zip(Batch._fields[:-1], a, b, strict=False):
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)
    assert a.row_index is None and b.row_index is None


def domain_of(token):
    return {seed: d for d, (_, seed) in LENGTHS.items()}[(token - 1) // 1_000_000]


def first_tokens(batch):
    """What identifies the batch's rows: their tokens, as tuples."""
    return [tuple(row) for row in batch.tokens.tolist()]


# --- purity, and resume ---------------------------------------------------------------------------


@kinds
def test_batches_are_a_pure_function_of_the_step(kind):
    """Peers 1: whatever was asked before, in whatever order, by another object: the same batch."""
    stream, again = STREAMS[kind], stream_of(kind)
    wanted = [stream.batch(t) for t in range(stream.num_steps)]
    for t in np.random.default_rng(0).permutation(stream.num_steps).tolist():
        assert_batches_equal(again.batch(t), wanted[t])


@kinds
def test_restore_at_every_step_with_grain(kind):
    """Peers 1 (axolotl 2229, datasets 5454, torchtitan 3008): every step, epoch and stage edge."""
    import grain

    dataset = STREAMS[kind].dataset()
    threads = int(kind == "replay add")  # the other way of reading, once
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    grain.experimental.assert_equal_output_after_checkpoint(dataset.to_iter_dataset(options))


@kinds
def test_a_second_resume_does_not_drift(kind):
    """Peers 1 (KempnerForge 57): the *second* resume is where others drift."""
    import grain

    stream = STREAMS[kind]
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    state, t = None, 0
    for length in (2, 1, 3, 5, 1, 7):
        iterator = iter(stream_of(kind).dataset().to_iter_dataset(options))
        if state is not None:
            iterator.set_state(state)
        for _ in range(length):
            if t < stream.num_steps:
                assert_batches_equal(next(iterator), stream.batch(t))
                t += 1
        state = iterator.get_state()


@kinds
def test_the_dataset_starts_and_stops_where_asked(kind):
    import grain

    stream = STREAMS[kind]
    start, stop = stream.num_steps // 3, stream.num_steps - 1
    dataset = stream.dataset(start, stop, rows=slice(1, 3))
    assert len(dataset) == stop - start
    read = list(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
    assert len(read) == stop - start
    for k, batch in enumerate(read):
        assert_batches_equal(batch, stream.batch(start + k, slice(1, 3)))
    assert len(stream.dataset(stream.num_steps)) == 0


def test_the_dataset_refuses_steps_outside():
    with pytest.raises(ValueError, match="steps 3 to 99 are not within the stream's 0 to 28"):
        STREAMS["one stage"].dataset(3, 99)


def test_threads_do_not_change_batches():
    """Peers 5: a background thread decides the order of the reference implementation."""
    stream, wrong = stream_of("replay add"), []
    wanted = [STREAMS["replay add"].batch(t) for t in range(stream.num_steps)]

    def read(seed):
        for t in np.random.default_rng(seed).permutation(stream.num_steps).tolist():
            got = stream.batch(t)
            stream.ledger(t)
            if not np.array_equal(got.tokens, wanted[t].tokens):
                wrong.append(t)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_another_process_and_hash_seed_give_the_same_batches():
    """Peers 5: not reproducible. No global generator, no hash order, no clock."""
    code = """
import sys, zlib
sys.path.insert(0, sys.argv[1])
from stream_test import KINDS, STREAMS
for kind in KINDS:
    stream = STREAMS[kind]
    batches = [stream.batch(t) for t in range(stream.num_steps)]
    print(stream.fingerprint, *[zlib.crc32(batch.tokens) for batch in batches])
"""
    here = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(os.path.dirname(here))
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, here],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and runs[0].count("\n") == len(KINDS)


# --- hosts and devices ----------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("num_hosts", [1, 2, 3, 4, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_hosts(kind, num_hosts):
    """Peers 2: refused, dropped or irreproducible elsewhere. Each host asks for its rows."""
    stream = STREAMS[kind]
    for t in range(0, stream.num_steps, 5):
        whole = stream.batch(t)
        edges = np.linspace(0, len(whole.tokens), num_hosts + 1).astype(int)
        parts = [stream.batch(t, slice(a, b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        for name in Batch._fields[:-1]:
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name))


@given(data=st.data(), kind=st.sampled_from(KINDS))
@settings(max_examples=30)
def test_any_choice_of_rows(data, kind):
    stream = STREAMS[kind]
    t = data.draw(st.integers(0, stream.num_steps - 1))
    num_rows, _ = stream.batch_shape(t)
    chosen = np.array(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=8)), int)
    whole, part = stream.batch(t), stream.batch(t, chosen)
    np.testing.assert_array_equal(part.tokens, whole.tokens[chosen])
    np.testing.assert_array_equal(part.segment_ids, whole.segment_ids[chosen])
    assert stream.rows(t, chosen) == [stream.rows(t)[i] for i in chosen]


# --- what is in the batches -----------------------------------------------------------------------


@kinds
def test_each_epoch_has_every_transition_exactly_once(kind):
    """Peers 1, 5: nothing repeated, skipped, drawn and thrown away."""
    stream = STREAMS[kind]
    seen = collections.defaultdict(collections.Counter)
    for t in range(stream.num_steps):
        batch, length = stream.batch(t), stream.batch_shape(t)[1]
        origins = stream.rows(t)
        for r, origin in enumerate(origins):
            if origin.replay:
                continue
            real = batch.loss_weights[r] > 0
            # A stage with other rows starts the domain anew: an epoch of its own.
            packing = "concat" if (kind, stream.stage_at(t)) == ("lengths", 2) else "best_fit"
            key = (origin.domain, length, packing, origin.epoch)
            seen[key].update(batch.tokens[r][real].tolist())
    for (domain, length, packing, epoch), counts in seen.items():
        assert set(counts.values()) == {1}, "a transition came twice in one epoch"
        if (domain, length, packing, epoch + 1) in seen:  # then this epoch is complete
            store = DATA.stores[domain]
            last = np.cumsum(store.lengths) - 1
            assert set(counts) == set(np.delete(store.tokens, last).tolist())


@kinds
def test_batches_are_well_formed(kind):
    stream = STREAMS[kind]
    num_domains = len(stream.domains)
    for t in range(stream.num_steps):
        batch = stream.batch(t)
        assert batch.tokens.shape == stream.batch_shape(t)
        real = batch.loss_weights > 0
        assert real.any(axis=1).all(), "peers 5: a row of zeros is trained on"
        assert (batch.targets[real] == batch.tokens[real] + 1).all()  # as the fake tokens are made
        assert (batch.segment_ids[real] >= 1).all()
        for name in ("tokens", "targets", "segment_ids", "positions", "source_ids"):
            assert getattr(batch, name).dtype == np.int32
            assert not getattr(batch, name)[~real].any(), name
        assert batch.loss_weights.dtype == np.float32 and batch.row_index is None
        assert set(np.unique(batch.loss_weights)) <= {0.0, 1.0}
        for r, origin in enumerate(stream.rows(t)):
            d = stream.domains.index(origin.domain) + num_domains * origin.replay
            assert set(batch.source_ids[r][real[r]].tolist()) == {d}
            assert domain_of(batch.tokens[r, 0]) == origin.domain


@kinds
def test_provenance_names_the_tokens(kind):
    """A NaN guard that names a step's rows must name the right ones."""
    stream = STREAMS[kind]
    for t in range(0, stream.num_steps, 3):
        batch = stream.batch(t)
        for r, origin in enumerate(stream.rows(t)):
            store = DATA.stores[origin.domain]
            tokens = [
                store.tokens[store.offsets[document - 1000] + start + i]
                for document, start, length in origin.slices
                for i in range(length)
            ]
            assert batch.tokens[r][batch.loss_weights[r] > 0].tolist() == tokens


def test_mixture_shares_are_exact_over_whole_blocks():
    stream = STREAMS["mixture"]
    rows = [o.domain for t in range(24) for o in stream.rows(t)]  # 144 rows = 18 blocks of 8
    assert collections.Counter(rows) == {"a": 90, "b": 36, "c": 18}


# --- stages and replay ----------------------------------------------------------------------------


def seen_before(stream, stage_index):
    """Tokens that were trained on as new ones in the stages before."""
    seen = set()
    for t in range(stream.stage_starts[stage_index]):
        batch = stream.batch(t)
        new = (batch.loss_weights > 0) & (batch.source_ids < len(stream.domains))
        seen.update(batch.tokens[new].tolist())
    return seen


@pytest.mark.parametrize("kind", ["replay add", "replay substitute", "lengths"])
def test_only_what_earlier_stages_used_is_replayed_and_all_of_it_evenly(kind):
    """Peers 5: never unseen data, never the current stage's; no recency bias, no lost part."""
    stream = STREAMS[kind]
    assert not any(o.replay for t in range(stream.stage_starts[1]) for o in stream.rows(t))
    for s in (1, 2):
        begin = stream.stage_starts[s]
        end = stream.num_steps if s == 2 else stream.stage_starts[s + 1]
        seen, replayed = seen_before(stream, s), collections.Counter()
        for t in range(begin, end):
            batch = stream.batch(t)
            marked = batch.source_ids >= len(stream.domains)
            assert marked[:, 0].tolist() == [o.replay for o in stream.rows(t)]
            replayed.update(batch.tokens[marked].tolist())
        assert set(replayed) <= seen
        assert max(replayed.values()) - min(replayed.values()) <= 1
        if min(replayed.values()) < max(replayed.values()) or max(replayed.values()) > 1:
            assert set(replayed) == seen


def test_the_pool_is_covered_and_an_unfinished_epoch_stays_unfinished():
    """A stage that used part of an epoch: the rest of the domain is unseen and is not replayed."""
    stages = [
        ("x", stage({"a": 1}, batch=4), 3),
        ("y", stage({"b": 1}, batch=4, replay=Replay(0.5)), 9),
    ]
    stream = build_stream(DATA, stages, seed=3)
    new = {(o.domain, o.row) for t in range(3) for o in stream.rows(t)}
    replayed = [(o.domain, o.row) for t in range(3, 12) for o in stream.rows(t) if o.replay]
    assert len(new) == 12
    assert collections.Counter(replayed) == {row: 3 for row in new}
    assert [o.epoch for o in stream.rows(11) if o.replay] == [2] * 4


def test_a_row_seen_in_three_epochs_is_one_row_of_the_pool():
    small = FakeData(a=make_store("a", 6, 0), b=DATA.stores["b"])
    stages = [
        ("x", stage({"a": 1}, batch=4), 20),
        ("y", stage({"b": 1}, batch=4, replay=Replay(0.5)), 20),
    ]
    stream = build_stream(small, stages, seed=0)
    num_rows = len({o.row for t in range(20) for o in stream.rows(t)})
    assert max(o.epoch for o in stream.rows(19)) >= 3
    once = [o.row for t in range(20, 40) for o in stream.rows(t) if o.replay][:num_rows]
    assert sorted(once) == list(range(num_rows))


def test_a_domain_goes_on_where_the_stage_before_left_it():
    """Peers 4: splitting a stage in two must not repeat rows while others were never seen."""
    one = build_stream(DATA, [("x", stage({"a": 1}), 12)], seed=0)
    two = build_stream(DATA, [("x", stage({"a": 1}), 5), ("y", stage({"a": 1}), 7)], seed=0)
    for t in range(12):
        assert sorted(first_tokens(one.batch(t))) == sorted(first_tokens(two.batch(t)))


def test_replay_add_leaves_the_new_rows_as_they_are():
    """Peers 5 (compute not equal): with `add` the new rows are those of the run without replay."""
    plain = [("x", stage({"a": 1}), 4), ("y", stage({"b": 1}), 6)]
    replay = [(n, dataclasses.replace(d, replay=Replay(0.25)), k) for n, d, k in plain]
    a, b = (build_stream(DATA, stages, seed=0) for stages in (plain, replay))
    for t in range(10):
        assert_batches_equal(a.batch(t), b.batch(t, slice(0, 6)))
    assert [b.batch_shape(t)[0] for t in (3, 4)] == [6, 8]
    assert [sum(o.replay for o in b.rows(t)) for t in (3, 4, 9)] == [0, 2, 2]


def test_replay_substitute_keeps_the_batch():
    stream = STREAMS["replay substitute"]
    assert {stream.batch_shape(t) for t in range(stream.num_steps)} == {(6, 16)}
    assert [sum(o.replay for o in stream.rows(t)) for t in (2, 3, 25)] == [0, 2, 2]


def test_replay_in_the_only_stage_adds_nothing():
    for mode in ("add", "substitute"):
        data = stage({"a": 1}, batch=4, replay=Replay(0.5, mode))
        stream = build_stream(DATA, [("x", data, 5)], seed=0)
        assert stream.batch_shape(0) == (4, 16)
        assert stream.ledger(5)["a"]["replayed_tokens"] == 0


def test_another_length_replays_in_rows_of_this_length():
    """Peers 4: changing the context length is hand work elsewhere."""
    stream = STREAMS["lengths"]
    for s in (1, 2):
        replayed = [
            o
            for t in range(stream.stage_starts[s], stream.num_steps)
            if stream.stage_at(t) == s
            for o in stream.rows(t)
            if o.replay
        ]
        length = stream.batch_shape(stream.stage_starts[s])[1]
        assert max(sum(n for *_, n in o.slices) for o in replayed) == length
    longest = max(n for t in range(12, 21) for o in stream.rows(t) for *_, n in o.slices)
    assert longest > 8  # pieces of a document seen in rows of 8 are joined again


def test_seeds_differ():
    a, b = stream_of("mixture"), stream_of("mixture", seed=1)
    assert first_tokens(a.batch(0)) != first_tokens(b.batch(0))
    assert a.fingerprint != b.fingerprint


def test_epochs_are_shuffled_anew():
    stream = STREAMS["one stage"]
    rows = [o for t in range(stream.num_steps) for o in stream.rows(t)]
    per_epoch = collections.defaultdict(list)
    for o in rows:
        per_epoch[o.epoch].append(o.row)
    assert sorted(per_epoch[0]) == sorted(per_epoch[1])
    assert per_epoch[0] != per_epoch[1] and per_epoch[0] != sorted(per_epoch[0])


# --- the ledger -----------------------------------------------------------------------------------


@kinds
def test_the_ledger_equals_counting(kind):
    stream, fresh = STREAMS[kind], stream_of(kind)
    num_domains = len(stream.domains)
    counts = np.zeros(2 * num_domains, int)
    for t in range(stream.num_steps + 1):
        for ledger in (stream.ledger(t), fresh.ledger(t) if t % 7 == 0 else None):
            if ledger is None:
                continue
            assert tuple(ledger) == stream.domains
            for d, domain in enumerate(stream.domains):
                store = DATA.stores[domain]
                size = (store.lengths - 1).sum()
                assert ledger[domain] == {
                    "new_tokens": counts[d],
                    "replayed_tokens": counts[num_domains + d],
                    "epochs": counts[d] / size,
                }
        if t < stream.num_steps:
            batch = stream.batch(t)
            real = batch.loss_weights > 0
            counts += np.bincount(batch.source_ids[real], minlength=2 * num_domains)


def test_the_ledger_lists_domains_that_are_not_trained_on():
    stream = build_stream(DATA, [("x", stage({"b": 1}), 3)], seed=0, domains=["b", "z", "a"])
    assert stream.domains == ("a", "b", "z")
    assert set(stream.batch(0).source_ids[stream.batch(0).loss_weights > 0]) == {1}
    assert stream.ledger(3)["z"] == {"new_tokens": 0, "replayed_tokens": 0, "epochs": 0.0}


def test_the_ledger_refuses_steps_outside():
    with pytest.raises(IndexError, match="29 steps are not within"):
        STREAMS["one stage"].ledger(29)


# --- fingerprints, plans on disk, errors ----------------------------------------------------------


def test_the_fingerprint_names_what_decides_the_batches():
    """Style 9, peers 1: other data or settings under an old checkpoint must be recognised."""
    base = [("x", stage({"a": 1, "b": 1}), 5), ("y", stage({"b": 1}, replay=Replay(0.25)), 5)]

    def name(stages=base, data=DATA, seed=0, **kwargs):
        return build_stream(data, stages, seed=seed, **kwargs).fingerprint

    def changed(i, **kwargs):
        out = list(base)
        out[i] = (out[i][0], dataclasses.replace(out[i][1], **kwargs), out[i][2])
        return out

    other = FakeData(**{**DATA.stores, "b": make_store("b", 25, 4)})
    names = [
        name(),
        name(seed=1),
        name(data=other),
        name(domains=["a", "b", "c"]),
        name(stages=base[:1]),
        name(stages=[("x", base[0][1], 6), base[1]]),
        name(stages=changed(0, sequence_length=32)),
        name(stages=changed(0, batch_size=7)),
        name(stages=changed(0, packing="concat")),
        name(stages=changed(0, document_mask=False)),
        name(stages=changed(0, order="stored")),
        name(stages=changed(0, mixture=Mixture({"a": 1, "b": 3}, block=8))),
        name(stages=changed(0, mixture=Mixture({"a": 1, "b": 1}, block=16))),
        name(stages=changed(1, replay=None)),
        name(stages=changed(1, replay=Replay(0.25, "substitute"), batch_size=8)),
    ]
    assert len(set(names)) == len(names)
    assert name() == names[0]


def test_a_run_may_be_prolonged_and_its_stages_renamed():
    """The last stage's length decides no batch: the fingerprint and all batches stay."""
    short = build_stream(DATA, [("x", stage({"a": 1}), 5), ("y", stage({"b": 1}), 4)], seed=0)
    long = build_stream(DATA, [("p", stage({"a": 1}), 5), ("q", stage({"b": 1}), 9)], seed=0)
    assert short.fingerprint == long.fingerprint
    for t in range(short.num_steps):
        assert_batches_equal(short.batch(t), long.batch(t))


def test_plans_are_kept_on_disk_and_used_again(tmp_path, monkeypatch):
    stream = stream_of("lengths", plan_dir=tmp_path)
    saved = sorted(os.listdir(tmp_path))
    assert len(saved) >= 5
    monkeypatch.setattr("lcl.data.planner.pack", None)  # building anything would fail
    monkeypatch.setattr("lcl.data.planner.repack", None)
    again = stream_of("lengths", plan_dir=tmp_path)
    assert sorted(os.listdir(tmp_path)) == saved
    for t in range(stream.num_steps):
        assert_batches_equal(stream.batch(t), again.batch(t))
        assert_batches_equal(stream.batch(t), STREAMS["lengths"].batch(t))


def test_a_torn_plan_is_built_again_and_said(tmp_path, caplog):
    stream_of("one stage", plan_dir=tmp_path)
    (entry,) = os.listdir(tmp_path)
    (tmp_path / entry / "start.npy").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        stream = stream_of("one stage", plan_dir=tmp_path)
    assert "is torn" in caplog.text and "building it again" in caplog.text
    assert os.listdir(tmp_path) == [entry]
    Layout.load(tmp_path / entry)
    assert_batches_equal(stream.batch(3), STREAMS["one stage"].batch(3))


def test_another_store_gets_another_plan(tmp_path):
    """Peers 1: a plan of yesterday's corpus must not be used for today's."""
    for seed in (0, 5):
        data = FakeData(a=make_store("a", 40, seed))
        stream = build_stream(data, [("x", stage({"a": 1}), 3)], seed=0, plan_dir=tmp_path)
        real = stream.batch(0).loss_weights > 0
        assert np.isin(stream.batch(0).tokens[real], data.stores["a"].tokens).all()
    assert len(os.listdir(tmp_path)) == 2


def test_a_plan_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot keep plans under .*plan_dir") as error:
        stream_of("one stage", plan_dir=tmp_path / "file")
    assert "\n" not in str(error.value)


EMPTY = FakeStore("void", np.zeros(0, np.uint16), np.zeros(1, np.int64), "empty")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_stream(DATA, [], seed=0), "there is no stage; give at least one"),
        (
            lambda: build_stream(DATA, [("x", stage({"a": 1}), 0)], seed=0),
            "stage 'x' has 0 steps; give at least 1",
        ),
        (lambda: build_stream(DATA, [("x", stage({"q": 1}), 1)], seed=0), "unknown domain 'q'"),
        (
            lambda: build_stream(DATA, [("x", stage({"aa": 1}), 1)], seed=0, domains=["a", "b"]),
            "trains on 'aa', which is not among the run's domains a, b; did you mean 'a'",
        ),
        (
            lambda: build_stream(FakeData(void=EMPTY), [("x", stage({"void": 1}), 1)], seed=0),
            "store of 'void' has no tokens to train on; prepare more",
        ),
        (lambda: stage({"a": 0}), "mixture weight of 'a' is 0; give a positive number"),
        (lambda: stage({"a": 1}, length=1), "sequence_length is 1; give at least 2"),
        (lambda: stage({"a": 1}, batch=0), "batch_size is 0; give at least 1"),
        (lambda: stage({"a": 1}, packing="first"), "packing 'first' is unknown; use best_fit or"),
        (lambda: stage({"a": 1}, order="random"), "order 'random' is unknown; use shuffle or"),
        (lambda: stage({"a": 1}, batch=8, replay=Replay(0.3)), r"is 3.429 rows; use 0.2727"),
    ],
)
def test_bad_settings_are_one_line_with_the_mend(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_steps_outside_are_refused():
    for t in (-1, 28):
        with pytest.raises(IndexError, match=f"step {t} is outside the stream's steps 0 to 27"):
            STREAMS["one stage"].batch(t)


def test_it_describes_itself():
    text = str(STREAMS["replay add"])
    assert "y: steps 4 to 13, 6 new + 2 replayed rows x 16" in text
    assert "replay: from 24 rows" in text


# --- a real store ---------------------------------------------------------------------------------


def test_with_real_stores(tmp_path):
    """From text to batches: bytes of the stores' documents, bos first, eos last."""
    from lcl.data.testing import make_stores

    data = make_stores(tmp_path / "stores", {"en": 30, "fr": 12}, seed=0)
    stages = [
        ("english", stage({"en": 1}, length=64, batch=4), 6),
        ("french", stage({"fr": 1}, length=64, batch=3, replay=Replay(0.25)), 8),
    ]
    stream = build_stream(data, stages, seed=0, plan_dir=tmp_path / "plans")
    tokenizer = data.tokenizer()
    ends = set()
    for t in range(stream.num_steps):
        batch = stream.batch(t)
        for r, origin in enumerate(stream.rows(t)):
            store = data.open(origin.domain)
            text = tokenizer.decode(batch.tokens[r][batch.loss_weights[r] > 0])
            document, start, length = origin.slices[0]
            index = int(np.flatnonzero(store.document_ids == document)[0])
            want = store.document(index)
            assert batch.tokens[r, :length].tolist() == want[start : start + length].tolist()
            want = want[start + 1 : start + length + 1]
            assert batch.targets[r, :length].tolist() == want.tolist()
            assert isinstance(text, str) and text
        ends |= {*batch.tokens[:, 0].tolist(), *batch.targets.ravel().tolist()}
    assert {BOS, EOS} <= ends
    with pytest.raises(ValueError) as error:
        build_stream(data, [("x", stage({"frr": 1}), 1)], seed=0)
    assert "\n" not in str(error.value) and "fr" in str(error.value)


def test_building_and_reading_needs_no_jax_grain_or_tensorflow():
    code = """
import sys
import lcl.data
from lcl.data.stream import build_stream
assert not {"jax", "grain", "tensorflow"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
