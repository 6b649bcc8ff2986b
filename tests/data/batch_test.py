"""lcl.data.batch: rows of tokens, and the fixed batches of an evaluation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl.data.batch import Batch, eval_batches, gather_rows, layout_group, segment_runs
from lcl.data.packing import pack

BOS, EOS = 256, 257


@dataclasses.dataclass
class FakeStore:
    """The attributes of a store that the batches use, in memory."""

    domain: str
    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self):
        return np.diff(self.offsets)


def fake_store(lengths, domain="x", seed=0):
    """Documents [bos] + random bytes + [eos] with the given numbers of transitions."""
    rng = np.random.default_rng(seed)
    documents = []
    for n in lengths:
        document = rng.integers(0, 256, n + 1)
        document[0], document[-1] = BOS, EOS
        documents.append(document)
    offsets = np.cumsum([0] + [len(d) for d in documents])
    return FakeStore(domain, np.concatenate(documents).astype(np.uint16), offsets)


def naive_rows(store, layout, rows, num_rows, source, document_mask):
    """The batch token by token, as the docstring's picture says."""
    out = Batch(
        *[np.zeros((num_rows, layout.row_length), np.int32) for _ in range(4)],
        np.zeros((num_rows, layout.row_length), np.float32),
        np.zeros((num_rows, layout.row_length), np.int32),
    )
    for place, row in enumerate(rows):
        column, begin, end = 0, layout.row_offsets[row], layout.row_offsets[row + 1]
        for segment, s in enumerate(range(begin, end), start=1):
            document = store.tokens[store.offsets[layout.document[s]] :].astype(int)
            for i in range(layout.length[s]):
                out.tokens[place, column] = document[layout.start[s] + i]
                out.targets[place, column] = document[layout.start[s] + i + 1]
                out.segment_ids[place, column] = segment if document_mask else 1
                out.positions[place, column] = i if document_mask else column
                out.loss_weights[place, column] = 1
                out.source_ids[place, column] = source
                column += 1
    return out


def assert_batches_equal(a, b):
    for name, x, y in zip(Batch._fields, a, b, strict=True):
        if x is None or y is None:
            assert x is y
            continue
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    row_length=st.integers(2, 16),
    method=st.sampled_from(["best_fit", "concat"]),
    document_mask=st.booleans(),
    data=st.data(),
)
def test_gathered_rows_equal_the_naive_loop(lengths, row_length, method, document_mask, data):
    store = fake_store(lengths)
    layout = pack(np.array(lengths), row_length, method=method)
    rows = data.draw(st.lists(st.integers(0, layout.num_rows - 1), min_size=1, max_size=6))
    group = layout_group(store, layout, rows, range(len(rows)), source_id=3)
    batch = gather_rows([group], len(rows) + 1, row_length, document_mask=document_mask)
    want = naive_rows(store, layout, rows, len(rows) + 1, 3, document_mask)
    assert_batches_equal(batch, want)


def test_rows_of_several_stores_go_to_their_places():
    a, b = fake_store([5, 9, 3], seed=1), fake_store([20, 4], seed=2)
    layouts = [pack(s.lengths - 1, 8) for s in (a, b)]
    groups = [
        layout_group(a, layouts[0], [1, 0], [3, 0], source_id=0),
        layout_group(b, layouts[1], [0], [2], source_id=5),
        layout_group(b, layouts[1], [], [], source_id=1),
    ]
    batch = gather_rows(groups, 4, 8)
    want_a = naive_rows(a, layouts[0], [1, 0], 2, 0, True)
    want_b = naive_rows(b, layouts[1], [0], 1, 5, True)
    for field in Batch._fields[:-1]:
        got = getattr(batch, field)
        np.testing.assert_array_equal(got[[3, 0]], getattr(want_a, field))
        np.testing.assert_array_equal(got[[2]], getattr(want_b, field))
        assert not got[1].any()


def test_the_docstrings_picture():
    store = FakeStore(
        "d", np.array([256, 72, 105, 257, 256, 79, 107, 33, 257], np.uint16), np.array([0, 4, 9])
    )
    layout = pack(np.array([3, 4]), 8)
    batch = gather_rows([layout_group(store, layout, [0], [0], 2)], 1, 8)
    assert batch.tokens.tolist() == [[256, 72, 105, 256, 79, 107, 33, 0]]
    assert batch.targets.tolist() == [[72, 105, 257, 79, 107, 33, 257, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 2, 2, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    assert batch.loss_weights.tolist() == [[1, 1, 1, 1, 1, 1, 1, 0]]
    assert batch.source_ids.tolist() == [[2, 2, 2, 2, 2, 2, 2, 0]]


def test_without_document_mask_the_row_is_one_segment():
    """nanoVLM PR 204: positions and segments are two arrays, set together."""
    store = fake_store([3, 4])
    layout = pack(np.array([3, 4]), 8)
    batch = gather_rows([layout_group(store, layout, [0], [0], 0)], 1, 8, document_mask=False)
    assert batch.segment_ids.tolist() == [[1] * 7 + [0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0]]


def test_no_transition_crosses_documents():
    store = fake_store([3, 1, 9, 30, 2, 7])
    layout = pack(store.lengths - 1, 8, method="concat")
    batch = gather_rows(
        [layout_group(store, layout, range(layout.num_rows), range(layout.num_rows), 0)],
        layout.num_rows,
        8,
    )
    real = batch.loss_weights > 0
    assert not (batch.tokens[real] == EOS).any()
    assert not (batch.targets[real] == BOS).any()
    assert real.sum() == (store.lengths - 1).sum()


def test_wide_tokens_keep_their_value():
    store = fake_store([4])
    store.tokens = store.tokens.astype(np.uint32) + 100_000
    layout = pack(np.array([4]), 4)
    batch = gather_rows([layout_group(store, layout, [0], [0], 0)], 1, 4)
    assert batch.tokens[0, 0] == 100_000 + BOS and batch.tokens.dtype == np.int32


def test_eval_batches_are_fixed_full_and_padded_at_the_end():
    store = fake_store(np.random.default_rng(0).integers(1, 60, 200))
    make = lambda: eval_batches(  # noqa: E731
        store, sequence_length=32, batch_size=4, num_rows=10, source_id=1
    )
    batches = make()
    assert [b.tokens.shape for b in batches] == [(4, 32)] * 3
    for once, again in zip(batches, make(), strict=True):
        assert_batches_equal(once, again)
    weights = np.concatenate([b.loss_weights for b in batches])
    assert (weights[:10].sum(axis=1) > 0).all()
    assert not weights[10:].any()
    assert weights[:10].mean() > 0.9


def test_eval_batches_of_a_small_store_hold_every_transition_once():
    store = fake_store([5, 100, 7, 3])
    batches = eval_batches(store, sequence_length=16, batch_size=2, num_rows=1000)
    assert sum(b.loss_weights.sum() for b in batches) == 115
    pairs = np.concatenate(
        [np.stack([b.tokens, b.targets], -1)[b.loss_weights > 0] for b in batches]
    )
    want = [
        p
        for i in range(4)
        for p in zip(
            store.tokens[store.offsets[i] : store.offsets[i + 1] - 1].tolist(),
            store.tokens[store.offsets[i] + 1 : store.offsets[i + 1]].tolist(),
            strict=True,
        )
    ]
    assert sorted(map(tuple, pairs.tolist())) == sorted(want)


def test_eval_batches_are_not_one_long_document():
    store = fake_store([20_000] + [50] * 400)
    batches = eval_batches(store, sequence_length=64, batch_size=8, num_rows=32)
    starts = sum(int((b.positions[b.loss_weights > 0] == 0).sum()) for b in batches)
    assert starts > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 1}, "sequence_length is 1; give at least 2"),
        ({"batch_size": 0}, "batch_size is 0; give at least 1"),
        ({"num_rows": 0}, "num_rows is 0; give at least 1"),
    ],
)
def test_eval_batches_refuse_bad_numbers(change, message):
    arguments = {"sequence_length": 8, "batch_size": 2, "num_rows": 2} | change
    with pytest.raises(ValueError, match=message):
        eval_batches(fake_store([5]), **arguments)


def test_eval_batches_refuse_an_empty_store():
    empty = FakeStore("void", np.zeros(0, np.uint16), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="'void' has no tokens.*\n?") as error:
        eval_batches(empty, sequence_length=8, batch_size=2, num_rows=2)
    assert "\n" not in str(error.value)


@given(
    rows=st.integers(1, 12).flatmap(
        lambda t: st.lists(st.lists(st.integers(0, 3), min_size=t, max_size=t), max_size=4)
    )
)
def test_segment_runs_are_the_runs_of_equal_numbers(rows):
    got = segment_runs(np.array(rows, np.int32).reshape(len(rows), -1 if rows else 5))
    want = []
    for row, ids in enumerate(rows):
        for start, number in enumerate(ids):
            if number and (not start or ids[start - 1] != number):
                length = next((k for k, n in enumerate(ids[start:]) if n != number), None)
                want.append((row, start, length or len(ids) - start, number))
    assert [tuple(map(int, one)) for one in zip(*got, strict=True)] == want
