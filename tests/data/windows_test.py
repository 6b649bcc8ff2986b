"""lcl.data.windows: fragments are the paper's inequality, windows are the released schedules."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.attention import Mask, attend
from lcl.data.batch import Batch, gather_rows, layout_group
from lcl.data.packing import pack
from lcl.data.windows import SCHEDULES, SkyLadder, window_segments
from tests.attention.helpers import inputs
from tests.data.batch_test import fake_store

CALL = dict(num_steps=10, key=0, places_B=np.arange(2))


def batch_of(segment_ids) -> Batch:
    segment_ids = np.asarray(segment_ids, np.int32)
    positions = np.broadcast_to(np.arange(segment_ids.shape[1]), segment_ids.shape)
    return Batch(
        segment_ids + 7,
        segment_ids + 8,
        segment_ids,
        positions.astype(np.int32),
        (segment_ids > 0).astype(np.float32),
        segment_ids * 0,
    )


def inequality(segment_ids, window):
    """The definition: floor(i / w) * w <= j <= i, both in one document; [B, T, T]."""
    i, j = np.ogrid[: segment_ids.shape[1], : segment_ids.shape[1]]
    seen = (i // window * window <= j) & (j <= i)
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    return seen & (query == key) & (query != 0)


ROWS = st.lists(st.lists(st.integers(1, 9), min_size=0, max_size=5), min_size=1, max_size=3)


def rows_of(documents, length=24) -> np.ndarray:
    """Rows of documents of the given lengths, cut or padded to `length`."""
    rows = np.zeros((len(documents), length), np.int32)
    for row, lengths in zip(rows, documents, strict=True):
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:length]
        row[: len(ids)] = ids
    return rows


@given(documents=ROWS, window=st.integers(1, 30))
def test_the_mask_is_the_inequality(documents, window):
    segment_ids = rows_of(documents)
    cut = window_segments(segment_ids, window)
    seen = Mask().dense(np.arange(segment_ids.shape[1]), cut)
    np.testing.assert_array_equal(seen, inequality(segment_ids, window))
    # The numbers are as in any batch: 1, 2, ... along the row, 0 at padding.
    for row, ids in zip(cut, segment_ids, strict=True):
        assert (row[ids == 0] == 0).all()
        numbers = row[row > 0]
        assert (np.diff(numbers, prepend=0) <= 1).all() and (np.diff(numbers) >= 0).all()


def test_the_mask_is_the_inequality_for_every_window_without_documents():
    one = np.ones((1, 50), np.int32)
    for window in range(1, 60):
        seen = Mask().dense(np.arange(50), window_segments(one, window))
        np.testing.assert_array_equal(seen, inequality(one, window))
    assert window_segments(one, 50).max() == 1


def test_the_pictures():
    def drawn(segment_ids, window):
        cut = window_segments(np.array([segment_ids]), window)[0]
        return "".join(map(str, cut)), Mask().picture(8, cut).replace(" ", "").split()

    assert drawn([1] * 8, 4) == (
        "11112222",
        "x....... xx...... xxx..... xxxx.... ....x... ....xx.. ....xxx. ....xxxx".split(),
    )
    assert drawn([1] * 6 + [2] * 2, 4) == (
        "11112233",
        "x....... xx...... xxx..... xxxx.... ....x... ....xx.. ......x. ......xx".split(),
    )


@pytest.mark.parametrize("window", [1, 5, 32, 100, 300])
@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_attention_sees_what_the_inequality_says(impl, window):
    """Several blocks of the kernel, against softmax over the dense inequality in float64."""
    length = 300
    q, k, v, _ = inputs(2, length, 2, 2, head_dim=8)
    segment_ids = rows_of([[300], [77, 1, 130, 60]], length)  # one document; several and padding
    seen = inequality(segment_ids, window)
    scores = np.einsum("btnh,bsnh->bnts", np.float64(q), np.float64(k)) / math.sqrt(8)
    weights = np.where(seen[:, None], np.exp(scores), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    want = np.einsum("bnts,bsnh->btnh", weights, np.float64(v))
    cut = jnp.asarray(window_segments(segment_ids, window))
    got = attend(q, k, v, segment_ids_BT=cut, impl=impl)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_a_growing_window_compiles_once():
    ladder = SkyLadder(start=2, end=32, schedule="linear", steps=9)
    q, k, v, _ = inputs(2, 32, 2, 2, head_dim=8)
    attention = jax.jit(partial(attend, impl="blockwise"))
    batch, seen = batch_of(np.ones((2, 32))), set()
    for step in range(10):
        cut = ladder(batch, step=step, **CALL).segment_ids
        assert (cut.dtype, cut.shape) == (np.int32, (2, 32))
        attention(q, k, v, segment_ids_BT=jnp.asarray(cut))
        seen.add(int(cut.max()))
    assert attention._cache_size() == 1
    assert len(seen) > 5  # and the window did grow


def test_only_the_segments_change():
    """Positions stay the paper's, with document masks and without."""
    store = fake_store([30, 7, 11, 40])
    layout = pack(store.lengths - 1, 32)
    group = layout_group(store, layout, np.arange(layout.num_rows), np.arange(layout.num_rows), 0)
    for mask in (True, False):
        batch = gather_rows([group], layout.num_rows, 32, document_mask=mask)
        kept = jax.tree.map(np.copy, batch)
        cut = SkyLadder(start=4, steps=8)(batch, step=1, **CALL)
        for name in Batch._fields:
            if name != "segment_ids":
                np.testing.assert_array_equal(getattr(cut, name), getattr(kept, name))
        assert cut.segment_ids.max() > batch.segment_ids.max()
        np.testing.assert_array_equal(batch.segment_ids, kept.segment_ids)  # the input is untouched
        last = SkyLadder(start=4, steps=8)(batch, step=8, **CALL)
        np.testing.assert_array_equal(last.segment_ids, kept.segment_ids)


def released(schedule, t, start, end, horizon):
    """sail-sg/SkyLadder, lit_gpt/packed_dataset.py, with its integers as they are."""
    if t >= horizon:
        return end
    u = t / horizon
    value = {
        "linear": start + int((end - start) * u),
        "sin": start + int((end - start) * np.sin(np.pi / 2 * u)),
        "cos": start + int((end - start) * (1 - np.cos(np.pi * u))),
        "exp": int(start * (end / start) ** u),
        "log": int(start * (end / start) ** (np.log(1 + t) / np.log(1 + horizon))),
        "inverse": end + start - (start + int((end - start) * u)),
        "step": start,
    }[schedule]
    return min(value, end)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_windows_follow_the_released_schedules(schedule):
    ladder = SkyLadder(start=32, end=8192, schedule=schedule, steps=997)
    got = [ladder.window(t, row_length=8192, num_steps=2000) for t in range(1100)]
    want = [released(schedule, t, 32, 8192, 997) for t in range(1100)]
    assert got == want
    assert set(got[997:]) == {8192}
    if schedule != "inverse":
        assert got[0] == 32 and (np.diff(got) >= 0).all()


def test_a_rate_is_the_papers_formula():
    """w(t) = min(w_e, w_s + floor(alpha * t)), alpha = 1/8."""
    ladder = SkyLadder(rate=1 / 8)
    for t in (0, 7, 8, 9, 1000, 65_279, 65_280, 10**6):
        want = min(8192, 32 + t // 8)
        assert ladder.window(t, row_length=8192, num_steps=1) == want
    third = SkyLadder(start=1, end=100, rate=1 / 3)
    assert [third.window(t, row_length=100, num_steps=1) for t in range(7)] == [1, 1, 1, 2, 2, 2, 3]


def test_a_percentage_is_of_the_stage():
    """The released "sin70p": the window is whole from 70% of the steps on."""
    ladder = SkyLadder(start=8, schedule="sin", percent=70)
    assert ladder.horizon(64, 50) == 35
    assert ladder.window(34, row_length=64, num_steps=50) < 64
    assert ladder.window(35, row_length=64, num_steps=50) == 64
    assert SkyLadder(percent=29).horizon(64, 100) == 29  # not 28.999999999999996


def test_round_to_makes_a_ladder():
    """The released "exp8inc1024": rounded down, and `start` below the first rung."""
    ladder = SkyLadder(start=32, schedule="exp", steps=1000, round_to=1024)
    windows = [ladder.window(t, row_length=8192, num_steps=1) for t in range(1001)]
    assert sorted(set(windows)) == [32, *range(1024, 8193, 1024)]
    assert (np.diff(windows) >= 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "SkyLadder has no horizon; give exactly one of rate"),
        (dict(rate=1, steps=2), "SkyLadder has rate and steps; give exactly one"),
        (dict(start=0, steps=1), "start is 0"),
        (dict(start=8, end=4, steps=1), "end is 4, below start 8"),
        (dict(schedule="sine", steps=1), "schedule 'sine' is unknown; use one of linear, sin"),
        (dict(rate=0.0), "rate is 0.0"),
        (dict(rate=float("nan")), "rate is nan"),
        (dict(steps=0), "steps is 0"),
        (dict(percent=101), "percent is 101"),
        (dict(steps=1, round_to=0), "round_to is 0"),
    ],
)
def test_bad_ladders(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        SkyLadder(**arguments)
    assert "\n" not in str(error.value)


def test_rows_that_the_windows_do_not_fit_are_refused_at_once():
    assert SkyLadder(steps=1).content_length(64) == 64
    with pytest.raises(ValueError, match="windows from 32 to 16 do not fit rows of 16"):
        SkyLadder(steps=1).content_length(16)
    with pytest.raises(ValueError, match="windows from 32 to 128 do not fit rows of 64"):
        SkyLadder(end=128, steps=1).content_length(64)
    with pytest.raises(ValueError, match="window is 0"):
        window_segments(np.ones((1, 4), np.int32), 0)


def test_settings_name_everything():
    assert SkyLadder(steps=3).settings() != SkyLadder(steps=4).settings()
    assert set(SkyLadder(steps=3).settings()) == {f.name for f in dataclasses.fields(SkyLadder)}
