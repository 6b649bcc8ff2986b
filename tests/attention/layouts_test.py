"""Layouts are permutations, balance what they promise to, and refuse rows that do not split."""

from __future__ import annotations

import numpy as np
import pytest

from lcl.attention import layouts
from lcl.attention.rows import Relation
from lcl.parallel.mesh import CONTEXT_LAYOUTS


def test_the_mesh_knows_the_same_layouts():
    assert set(CONTEXT_LAYOUTS) == set(layouts.LAYOUTS)  # neither room may import the other


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("length, context", [(8, 1), (8, 2), (24, 4), (48, 8), (6, 3)])
def test_layouts_are_permutations_and_invert(layout, length, context):
    order = layouts.permutation(layout, length, context)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(length))
    row = np.random.default_rng(0).normal(size=length)
    assert (row[order][layouts.inverse(layout, length, context)] == row).all()
    index = layouts.row_index(layout, 3, length, context)
    places = np.arange(length // context)
    devices = np.arange(context)[:, None]
    closed = layouts.device_rows(layout, places, len(places), context, devices)
    assert (closed.reshape(-1) == order).all()
    assert index.dtype == np.int32 and (index == order).all() and index.shape == (3, length)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_one_device_keeps_the_order(layout):
    assert (layouts.permutation(layout, 10, 1) == np.arange(10)).all()


def test_balanced_layouts_share_out_causal_work():
    """Keys seen per device: zigzag exactly equal, striped within a row's length, contiguous not."""
    length, context = 64, 4
    work = {
        layout: (layouts.permutation(layout, length, context) + 1).reshape(context, -1).sum(1)
        for layout in layouts.LAYOUTS
    }
    assert np.ptp(work["zigzag"]) == 0
    assert np.ptp(work["striped"]) < length
    assert work["contiguous"][-1] > 5 * work["contiguous"][0]


@pytest.mark.parametrize(
    "layout, length, context, words",
    [
        ("zig", 8, 2, "'zig'"),
        ("contiguous", 10, 4, "context=4 does not divide a row of 10"),
        ("striped", 10, 4, "context=4 does not divide"),
        ("zigzag", 12, 4, "2 x context = 8 equal chunks"),
        ("zigzag", 8, 0, "context=0"),
    ],
)
def test_rows_that_do_not_split_are_one_line_errors(layout, length, context, words):
    with pytest.raises(ValueError, match=words) as error:
        layouts.permutation(layout, length, context)
    assert "\n" not in str(error.value)


def test_relation_compares_places_with_an_offset():
    place = np.arange(4)
    seen = Relation(offset=-1).visible(place[:, None], place[None, :])
    assert (seen == np.tri(4, k=-1, dtype=bool)).all()
    seen = Relation(causal=False, window=2, offset=4).visible(place[:, None], place[None, :])
    assert [tuple(x) for x in np.argwhere(seen)] == [(0, 3)]
    assert Relation(causal=False).full and not Relation().full
    with pytest.raises(ValueError, match="window=0"):
        Relation(window=0)
