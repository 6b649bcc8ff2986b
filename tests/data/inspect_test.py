"""The tables of the data report: against counts by hand, and sums that must match."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lcl.data.inspect
from lcl.data import Mixture, Replay, StageData, build_stream, pack
from lcl.data.decomposition import Decomposition, decompose
from lcl.data.inspect import (
    bucket_table,
    layout_line,
    length_table,
    sample_rows,
    stage_layouts,
    tokens_by_step,
)
from lcl.data.positions import EndPrompt
from lcl.data.testing import make_stores

LENGTHS = st.lists(st.integers(0, 300), max_size=40).map(np.array)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_stores(tmp_path_factory.mktemp("stores"), {"a": 60, "b": 40}, seed=5)


@pytest.fixture(scope="module")
def stages():
    """Best fit; a mixture with replay; buckets."""
    long = Mixture({"a": 0.75, "b": 0.25}, block=8)
    buckets = Decomposition(4, 6, cycles=1)
    return [
        ("one", StageData(Mixture({"a": 1.0}), 64, 6), 11),
        ("two", StageData(long, 64, 6, packing="concat", replay=Replay(0.25)), 9),
        ("three", StageData(Mixture({"b": 1.0}), 64, 2, decomposition=buckets), 20),
    ]


@given(LENGTHS)
def test_a_histogram_counts_every_document_once(lengths):
    table = length_table(lengths)
    kept = lengths[lengths > 0] if len(lengths) else np.zeros(0, int)
    assert table.num_documents == len(kept) and table.num_tokens == kept.sum()
    for low, high, documents, tokens in zip(
        table.edges[:-1], table.edges[1:], table.documents, table.tokens, strict=True
    ):
        inside = kept[(kept >= low) & (kept < high)]
        assert (documents, tokens) == (len(inside), inside.sum())
    if len(kept):
        assert table.documents[0] and table.documents[-1]  # no empty bin at the ends
        assert table.quantiles[[0, -1]].tolist() == [kept.min(), kept.max()]


def slow_line(layouts, lengths):
    """`layout_line` a transition at a time."""
    longest = max(layout.row_length for layout in layouts)
    pieces = [0] * len(lengths)
    after, context, laid = 0, 0, 0
    for layout in layouts:
        for d, start, length in zip(layout.document, layout.start, layout.length, strict=True):
            pieces[d] += 1
            laid += length
            after += length if start else 0
            context += sum(range(1, length + 1))
    cut = [n for n, p in zip(lengths, pieces, strict=True) if p > 1]
    needless = sum(n <= longest for n in cut)
    dropped = sum(lengths) - laid
    return len(cut), needless, after, dropped, context / max(1, laid)


@given(LENGTHS, st.sampled_from(["best_fit", "concat", "drop", "pad"]))
def test_a_layouts_line_is_what_one_counts(lengths, kind):
    lengths = np.asarray(lengths, np.int64)
    if kind in ("drop", "pad"):
        made = decompose(lengths, min_log2=3, max_log2=6, seed=1, tails=kind)
        layouts = list(made.layouts)
        assert layout_line(layouts, lengths).dropped_tokens == made.dropped_tokens
    else:
        layouts = [pack(lengths, 64, method=kind)]
    line = layout_line(layouts, lengths)
    got = (line.cut_documents, line.needless_cuts, line.cut_tokens, line.dropped_tokens)
    *counts, context = slow_line(layouts, lengths)
    assert list(got) == counts
    assert line.mean_context == pytest.approx(context)
    assert line.tokens + line.dropped_tokens == lengths.sum()
    assert line.tokens + line.padding == line.cells
    lines = bucket_table(layouts)
    assert sum(b.tokens for b in lines) == line.tokens and sum(b.rows for b in lines) == line.rows
    assert [b.row_length for b in lines] == sorted({x.row_length for x in layouts}, reverse=True)


def test_best_fit_cuts_nothing_needlessly_and_concat_does():
    lengths = np.full(50, 40)
    assert layout_line([pack(lengths, 64)], lengths).needless_cuts == 0
    assert layout_line([pack(lengths, 64, method="concat")], lengths).needless_cuts > 0


def test_a_document_that_comes_twice_is_not_cut():
    lengths = np.array([10, 20, 5])
    layout = pack(lengths, 64, method="concat", order_N=np.array([0, 1, 0]))
    line = layout_line([layout], lengths)
    assert line.cut_documents == 0 and line.dropped_tokens == 5


def test_tokens_by_step_sum_to_the_ledger(data, stages):
    stream = build_stream(data, stages, seed=0)
    for points in (1, 7, 1000):
        flow = tokens_by_step(stream, points)
        assert set(stream.stage_starts) <= set(flow.edges.tolist())
        ledger = stream.ledger(stream.num_steps)
        for d, domain in enumerate(stream.domains):
            assert flow.new[:, d].sum() == ledger[domain]["new_tokens"]
            assert flow.replayed[:, d].sum() == ledger[domain]["replayed_tokens"]
    assert flow.replayed.any()
    # With a stretch a step, each is what the batch of that step holds.
    for t in (0, 12, 25):
        batch = stream.batch(t)
        for d in range(2):
            weights = np.where(batch.source_ids == d, batch.loss_weights, 0)
            assert flow.new[t, d] == weights.sum()


def test_a_stages_layouts_and_rows(data, stages):
    stream = build_stream(data, stages, seed=0)
    one, two, three = (stage_layouts(stream, i) for i in range(3))
    assert [(x.domain, len(x.layouts), x.num_rows) for x in one] == [("a", 1, 66)]
    assert [x.domain for x in two] == ["a", "b"] and sum(x.num_rows for x in two) == 54
    assert [layout.row_length for layout in three[0].layouts] == [16, 32, 64]
    rows = sum(stream.batch_shape(t)[0] for t in range(20, 40))
    assert three[0].num_rows == rows


def test_sample_rows_decode_to_the_documents_themselves(data, stages):
    stream = build_stream(data, stages, seed=0)
    tokenizer = data.tokenizer()
    for step in (3, 15, 30):
        places = list(range(stream.batch_shape(step)[0]))
        rows = sample_rows(stream, data, step, places)
        assert [row.place for row in rows] == places
        for row, cells in zip(rows, stream.batch(step).segment_ids, strict=True):
            assert row.padding == np.count_nonzero(cells == 0)
            store = data.open(row.domain)
            for piece in row.pieces:
                (index,) = np.flatnonzero(store.document_ids == piece.document_id)
                document = store.document(int(index))
                assert piece.whole == len(document) - 1
                own = document[piece.start : piece.start + piece.length]
                assert piece.text == tokenizer.decode(own)
    assert any(row.replay for row in sample_rows(stream, data, 15, [0, 7]))


def test_what_a_transform_adds_is_a_piece_of_its_own(data):
    prompt = EndPrompt(target_length=256, prompt=(65, 66, 67))
    stage = StageData(Mixture({"a": 1.0}), 64, 2, transforms=(prompt,))
    stream = build_stream(data, [("one", stage, 4)], seed=0)
    *_, added = sample_rows(stream, data, 0, [0])[0].pieces
    assert added.document_id is None and added.text == "ABC" and added.length == 3


def test_docstring_examples_are_true():
    assert doctest.testmod(lcl.data.inspect).failed == 0
