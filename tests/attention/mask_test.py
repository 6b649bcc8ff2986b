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


@settings(max_examples=200)
@given(mask=MASKS, num_rows=st.integers(1, 24), data=st.data())
def test_ranges_of_queries_and_keys_tell_whether_any_and_whether_all_pairs_are_seen(
    mask, num_rows, data
):
    def draw_range():
        first = data.draw(st.integers(0, num_rows - 1))
        return first, data.draw(st.integers(first, num_rows - 1))

    (q0, q1), (k0, k1) = draw_range(), draw_range()
    seen = mask.dense(np.arange(num_rows))[q0 : q1 + 1, k0 : k1 + 1]
    assert mask.some_visible(q0, q1, k0, k1) or not seen.any()
    assert seen.all() or not mask.all_visible(q0, q1, k0, k1)
    if not mask.prefix_length:  # a single rule's closed form is exact
        assert mask.all_visible(q0, q1, k0, k1) == seen.all()
    if not mask.prefix_length and (mask.window is None or not mask.causal):
        assert mask.some_visible(q0, q1, k0, k1) == seen.any()


def test_an_explicit_table_promises_nothing_about_blocks():
    mask = Mask(causal=False, explicit=np.zeros((4, 4)))
    assert mask.some_visible(0, 3, 0, 3) and not mask.all_visible(0, 3, 0, 3)


def test_queries_and_keys_may_be_different_tokens():
    dense = Mask().dense(
        np.array([5]), np.array([2]), np.array([3, 4, 5, 6]), np.array([1, 2, 2, 2])
    )
    assert dense.tolist() == [[False, True, True, False]]


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
