"""lcl.data.decomposition: documents into power-of-two rows, and back."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl.data.curricula import GrowP2, Uniform
from lcl.data.decomposition import Decomposition, decompose


def pieces_of(decomposed):
    """{document: [(start, length, row length), ...]} in order."""
    pieces = collections.defaultdict(list)
    for layout in decomposed.layouts:
        slices = zip(
            layout.document.tolist(), layout.start.tolist(), layout.length.tolist(), strict=True
        )
        for document, start, length in slices:
            pieces[document].append((start, length, layout.row_length))
    return {document: sorted(found) for document, found in pieces.items()}


lengths = st.lists(st.integers(0, 900), max_size=12)
buckets = st.tuples(st.integers(1, 4), st.integers(0, 4)).map(lambda p: (p[0], p[0] + p[1]))


@given(lengths, buckets, st.integers(0, 3), st.sampled_from(["pad", "drop"]))
@settings(max_examples=200, deadline=None)
def test_the_pieces_rebuild_each_document(lengths_N, min_max, seed, tails):
    """Every transition once, in one piece after the other; a dropped tail is what is missing."""
    low, high = min_max
    decomposed = decompose(lengths_N, min_log2=low, max_log2=high, seed=seed, tails=tails)
    pieces = pieces_of(decomposed)
    dropped = 0
    for document, whole in enumerate(lengths_N):
        at = 0
        for start, length, row_length in pieces.get(document, []):
            assert start == at
            at += length
            assert length == row_length or (tails == "pad" and at == whole and row_length == 2**low)
        missing = whole - at
        assert 0 <= missing < 2**low and (missing == 0 or tails == "drop")
        dropped += missing
    assert decomposed.dropped_tokens == dropped
    assert decomposed.num_transitions == sum(lengths_N)
    assert int(decomposed.tokens.sum()) + dropped == sum(lengths_N)


@given(lengths, buckets)
@settings(max_examples=100, deadline=None)
def test_a_row_has_its_buckets_length_and_one_document(lengths_N, min_max):
    low, high = min_max
    decomposed = decompose(lengths_N, min_log2=low, max_log2=high, seed=0)
    assert decomposed.row_lengths == tuple(2**i for i in range(low, high + 1))
    for b, layout in enumerate(decomposed.layouts):
        assert (np.diff(layout.row_offsets) == 1).all()  # one slice: one document
        full = layout.length == layout.row_length
        assert full.all() if b else (layout.length <= layout.row_length).all()
    padded = decomposed.layouts[0].length < 2**low
    assert decomposed.num_padded_rows == padded.sum()
    assert decomposed.padded_cells == (2**low - decomposed.layouts[0].length[padded]).sum()


@given(st.integers(0, 2**12 - 1))
@settings(max_examples=60, deadline=None)
def test_a_document_that_fits_is_its_binary_expansion_longest_first(length):
    decomposed = decompose([length], min_log2=1, max_log2=11, seed=0)
    found = [n for _, n, _ in pieces_of(decomposed).get(0, [])]
    assert found == [2**i for i in reversed(range(12)) if length >> i & 1]


def reference(lengths_N, low, high, log2_of):
    """The released get_binary, in transitions, one document after the other."""
    found = {}
    for document, left in enumerate(lengths_N):
        start, pieces, draw = 0, [], 0
        while left >= 2**low:
            log2 = left.bit_length() - 1
            if log2 > high:
                log2, draw = log2_of(document, draw), draw + 1
            pieces.append((start, 2**log2, 2**log2))
            start, left = start + 2**log2, left - 2**log2
        if left:
            pieces.append((start, left, 2**low))
        found[document] = pieces
    return {document: pieces for document, pieces in found.items() if pieces}


@given(st.lists(st.integers(0, 3000), max_size=6), st.integers(0, 5), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_it_is_the_released_loop_with_named_draws(lengths_N, seed, at_once):
    from lcl.data import decomposition
    from lcl.data.ordering import named_key

    low, high = 2, 5
    key = named_key("decompose", seed, "d")

    def log2_of(document, draw):
        return int(decomposition._draw(key, np.array([document]), np.array([draw]), low, high)[0])

    old = decomposition._DRAWS_AT_ONCE
    decomposition._DRAWS_AT_ONCE = at_once  # the blocks must not show
    try:
        got = decompose(lengths_N, min_log2=low, max_log2=high, seed=seed, domain="d")
    finally:
        decomposition._DRAWS_AT_ONCE = old
    assert pieces_of(got) == reference(lengths_N, low, high, log2_of)


def test_a_long_document_gives_each_bucket_as_many_tokens():
    """p(k) proportional to 2^-k: equal expected tokens, D8 .508, D9 .254, ... D13 .0159."""
    decomposed = decompose([40_000_000], min_log2=8, max_log2=13, seed=1)
    rows = np.array([layout.num_rows for layout in decomposed.layouts])
    want = np.array([0.508, 0.254, 0.127, 0.0635, 0.0317, 0.0159])
    np.testing.assert_allclose(rows / rows.sum(), want, rtol=0.06)
    np.testing.assert_allclose(decomposed.tokens / decomposed.tokens.mean(), 1.0, atol=0.06)


def test_cuts_do_not_depend_on_the_other_documents():
    """Seeded per document: a corpus that grows keeps its old documents' pieces."""
    few = pieces_of(decompose([5000, 70, 9000], min_log2=3, max_log2=6, seed=0))
    more = pieces_of(decompose([5000, 70, 9000, 20_000, 3], min_log2=3, max_log2=6, seed=0))
    assert few == {document: more[document] for document in few}
    other = pieces_of(decompose([5000, 70, 9000], min_log2=3, max_log2=6, seed=1))
    domain = pieces_of(decompose([5000, 70, 9000], min_log2=3, max_log2=6, seed=0, domain="x"))
    assert other[0] != few[0] != domain[0] and other[1] == few[1] == domain[1]
    same = decompose([6000, 6000], min_log2=3, max_log2=6, seed=0)
    assert pieces_of(same)[0] != pieces_of(same)[1]


def test_mean_context_is_half_of_what_a_token_sees():
    assert decompose([8], min_log2=1, max_log2=3, seed=0).mean_context == 4.5
    assert decompose([4, 4], min_log2=1, max_log2=3, seed=0).mean_context == 2.5


def test_nothing_at_all():
    for lengths_N in ([], [0, 0]):
        decomposed = decompose(lengths_N, min_log2=2, max_log2=4, seed=0)
        assert decomposed.num_rows == decomposed.dropped_tokens == 0
        assert "0 rows" in str(decomposed)


def test_the_table_counts_what_is_dropped():
    text = str(decompose([13, 3], min_log2=2, max_log2=3, seed=0, tails="drop"))
    assert "16 transitions: 2 rows, 4 dropped (25%), 0 padded" in text


def test_rows_per_step_keep_the_tokens_constant():
    decomposition = Decomposition(6, 9)
    assert decomposition.rows_per_step(3) == (24, 12, 6, 3)
    assert {n * t for n, t in zip((24, 12, 6, 3), decomposition.row_lengths, strict=True)} == {1536}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Decomposition(0, 4), "min_log2 is 0 and max_log2 4; give 1 <= min_log2"),
        (lambda: Decomposition(5, 4), "min_log2 is 5 and max_log2 4; give 1 <= min_log2"),
        (lambda: Decomposition(5, 31), "max_log2 31; give 1 <= min_log2 <= max_log2 <= 30"),
        (lambda: Decomposition(tails="keep"), "tails is 'keep'; use 'pad' or 'drop'"),
        (lambda: Decomposition(cycles=0), "cycles is 0; give at least 1"),
        (lambda: Decomposition(curriculum="GrowP2"), r"curriculum is 'GrowP2'; give one of"),
        (lambda: decompose([-1], min_log2=1, max_log2=2, seed=0), "length -1; lengths count"),
        (lambda: GrowP2(style="greedy"), "style 'greedy' is unknown; use 'table' or"),
    ],
)
def test_bad_settings_are_one_line_with_the_mend(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_settings_say_all_that_decides_the_batches():
    base = Decomposition()
    others = [
        Decomposition(min_log2=7),
        Decomposition(max_log2=12),
        Decomposition(curriculum=Uniform()),
        Decomposition(curriculum=GrowP2(style="exhaustion")),
        Decomposition(cycles=4),
        Decomposition(tails="drop"),
        Decomposition(longest_first=False),
    ]
    texts = {repr(one.settings()) for one in [base, *others]}
    assert len(texts) == 1 + len(others)
