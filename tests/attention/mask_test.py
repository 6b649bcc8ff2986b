"""The structured mask: its picture, its ranges, its errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl.attention import Mask

MASKS = st.builds(
    Mask,
    causal=st.booleans(),
    window=st.none() | st.integers(1, 12),
    prefix_length=st.none() | st.integers(0, 25),
)


def test_picture_of_documents_and_padding():
    assert Mask().picture(5, [1, 1, 2, 2, 0]).split("\n") == [
        "x . . . .",
        "x x . . .",
        ". . x . .",
        ". . x x .",
        ". . . . .",
    ]


def test_str_names_the_rules_and_draws_them():
    text = str(Mask(window=2))
    assert text.startswith("Mask(causal=True, window=2)\n")
    assert text.split("\n")[3] == ". x x . . . . ."


def test_prefix_is_seen_both_ways():
    assert Mask(prefix_length=2).picture(3) == "x x .\nx x .\nx x x"


def test_the_row_index_decides_and_not_the_place():
    row_index = np.array([3, 0, 2, 1])
    dense = Mask().dense(row_index)
    assert np.array_equal(dense, row_index[None, :] <= row_index[:, None])


def test_explicit_is_indexed_by_row_and_hashable():
    table = np.eye(3, dtype=bool)
    mask = Mask(causal=False, explicit=table)
    assert hash(mask) == hash(Mask(causal=False, explicit=table.tolist()))
    assert np.array_equal(mask.dense(np.array([2, 0, 1])), np.eye(3, dtype=bool))


@settings(max_examples=200, deadline=None)
@given(mask=MASKS, num_rows=st.integers(1, 24), data=st.data())
def test_ranges_hold_every_visible_pair(mask, num_rows, data):
    first = data.draw(st.integers(0, num_rows - 1))
    last = data.draw(st.integers(first, num_rows - 1))
    dense = mask.dense(np.arange(num_rows))
    for of, seen in (
        (mask.key_range, dense[first : last + 1].any(0)),
        (mask.query_range, dense[:, first : last + 1].any(1)),
    ):
        start, stop = of(first, last, num_rows)
        outside = np.ones(num_rows, bool)
        outside[start:stop] = False
        assert not (seen & outside).any()


def test_ranges_of_a_causal_window_are_tight():
    dense = Mask(window=5).dense(np.arange(40))
    start, stop = Mask(window=5).key_range(16, 23, 40)
    assert np.flatnonzero(dense[16:24].any(0)).tolist() == list(range(start, stop))


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"window": 0}, "window=0"),
        ({"prefix_length": -1}, "prefix_length=-1"),
        ({"explicit": np.ones((2, 3))}, "square"),
    ],
)
def test_bad_values_are_one_line_errors(kwargs, words):
    with pytest.raises(ValueError, match=words) as error:
        Mask(**kwargs)
    assert "\n" not in str(error.value)
