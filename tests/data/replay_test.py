"""lcl.data.replay: what a stage may replay, and how evenly it does."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl.data.packing import METHODS, Layout, Slices
from lcl.data.plans import Plan, rows_at
from lcl.data.replay import Replay, Used, repack, union


def slices(*parts):
    document, start, length = (np.array(x, np.int64) for x in zip(*parts, strict=True))
    return Slices(np.zeros(len(parts), np.int64), document, start, length)


def make_plan(num_rows, domain=0, name="x"):
    """A plan whose rows hold one document each, of 1 .. 8 transitions."""
    index = np.arange(num_rows)
    length = (1 + index * 5 % 8).astype(np.int32)
    layout = Layout(8, np.arange(num_rows + 1), index, np.zeros_like(index), length)
    return Plan((name, domain), domain, None, layout)


def pool_of(plans, counts, num_domains, key, buffer=None):
    """The pool after one stage that used so many rows of each plan."""
    replay = Replay(0.5) if buffer is None else Replay(0.5, buffer=buffer)
    history = [Used(0, p, 0, count) for p, count in enumerate(counts)]
    return replay.pool(plans, history, num_domains, key)


@given(batch_size=st.integers(1, 300), replayed=st.integers(1, 100))
def test_whole_fractions_are_accepted_as_floats(batch_size, replayed):
    fraction = replayed / (batch_size + replayed)
    assert Replay(fraction).rows_per_step(batch_size) == (batch_size, replayed)
    if replayed < batch_size:
        want = (batch_size - replayed, replayed)
        assert Replay(replayed / batch_size, "substitute").rows_per_step(batch_size) == want


@given(batch_size=st.integers(2, 64), fraction=st.floats(0.01, 0.9))
def test_accepted_fractions_are_kept_and_the_mend_of_a_refused_one_works(batch_size, fraction):
    for mode in ("add", "substitute"):
        try:
            new, replayed = Replay(fraction, mode).rows_per_step(batch_size)
        except ValueError as error:
            assert "\n" not in str(error)
            mends = str(error).split("; use ")[1].split(" (")[0].split(" or ")
            mend = mends[0]
            if mend.startswith("another"):
                continue
            new, replayed = Replay(float(mend), mode).rows_per_step(batch_size)
            fraction_kept = float(mend)
        else:
            fraction_kept = fraction
        assert abs(replayed / (new + replayed) - fraction_kept) <= 1.01e-4
        assert new >= 1 and replayed >= 1
        assert (new if mode == "add" else new + replayed) == batch_size


@pytest.mark.parametrize(
    ("fraction", "mode", "message"),
    [
        (
            0.3,
            "add",
            r"is 3.429 rows; use 0.2727 \(3 rows\) or 0.3333 \(4 rows\), or another batch",
        ),
        (0.3, "substitute", r"is 2.4 rows; use 0.2500 \(2 rows\) or 0.3750 \(3 rows\)"),
        (0.01, "add", r"is 0.08081 rows; use 0.1111 \(1 rows\), or another"),
        (0.99, "substitute", r"is 7.92 rows; use 0.8750 \(7 rows\), or another"),
    ],
)
def test_a_fraction_that_is_not_whole_rows_names_the_nearest(fraction, mode, message):
    with pytest.raises(ValueError, match=message):
        Replay(fraction, mode).rows_per_step(8)


def test_one_row_cannot_be_substituted():
    with pytest.raises(ValueError, match="use another batch_size"):
        Replay(0.5, "substitute").rows_per_step(1)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fractions_outside_0_to_1_are_refused(fraction):
    with pytest.raises(ValueError, match="replay fraction is .*between 0 and 1"):
        Replay(fraction)


def test_unknown_mode():
    with pytest.raises(ValueError, match="replay mode 'mix' is unknown; use add or substitute"):
        Replay(0.5, "mix")


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=4), passes=st.integers(1, 3))
def test_each_pass_replays_every_row_once(counts, passes):
    """Peers 5: not a reservoir, biased to recent rows, survival (1 - 1/M)^n. Here: exactly even."""
    plans = [make_plan(40, d, "p") for d in range(len(counts))]
    pool = pool_of(plans, counts, len(counts), key=1)
    total = sum(counts)
    one_pass, plan, use = pool.locate(np.arange(passes * total))
    assert one_pass.tolist() == np.repeat(np.arange(passes), total).tolist()
    _, row = rows_at(plans, plan, use)
    times = collections.Counter(zip(plan.tolist(), row.tolist(), strict=True))
    assert set(times.values()) == {passes}
    assert len(times) == total
    for p, count in enumerate(counts):
        _, first = rows_at(plans, np.full(count, p), np.arange(count))
        assert {r for q, r in times if q == p} == set(first.tolist())


def test_no_place_in_a_pass_prefers_a_row():
    """Recency bias, measured: over many keys each row is equally likely to be replayed first."""
    plans = [make_plan(10, 0), make_plan(10, 1)]
    first = np.zeros(20)
    for key in range(4000):
        _, plan, use = pool_of(plans, [10, 10], 2, key).locate(np.arange(3))
        for p, u in zip(plan, use, strict=True):
            first[p * 10 + u] += 1
    chi2 = ((first - 600) ** 2 / 600).sum()
    assert chi2 < 60  # 19 degrees of freedom: chance below 1e-5


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=3), j=st.integers(0, 200))
def test_tokens_of_the_pool_are_exact(counts, j):
    plans = [make_plan(40, d, "p") for d in range(len(counts))]
    pool = pool_of(plans, counts, 3, key=5)
    _, plan, use = pool.locate(np.arange(j))
    _, row = rows_at(plans, plan, use)
    want = np.zeros(3, int)
    for p, r in zip(plan.tolist(), row.tolist(), strict=True):
        want[p] += plans[p].layout.tokens_in([r])[0]
    assert pool.tokens_in_first(j).tolist() == want.tolist()


def test_tokens_beyond_the_stride_of_the_prefix_sums():
    plan = make_plan(3000)
    pool = pool_of([plan], [2500], 1, key=0)
    for j in (4999, 1024, 2500, 2501, 1023, 5001, 0):
        _, which, use = pool.locate(np.arange(j))
        _, row = rows_at([plan], which, use)
        assert pool.tokens_in_first(j)[0] == plan.layout.tokens_in(row).sum()
        _, row = rows_at([plan], np.zeros(j, int), np.arange(j))
        assert plan.tokens_in_first(j) == plan.layout.tokens_in(row).sum()


PARTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=12
)


def transitions(s):
    parts = zip(s.document.tolist(), s.start.tolist(), s.length.tolist(), strict=True)
    return [(d, i) for d, start, length in parts for i in range(start, start + length)]


@given(a=PARTS, b=PARTS)
def test_union_holds_what_was_seen_once(a, b):
    merged = union([slices(*a), slices(*b)])
    got = transitions(merged)
    assert sorted(got) == sorted(set(got))
    assert set(got) == {*transitions(slices(*a)), *transitions(slices(*b))}
    ends = merged.start + merged.length
    apart = (np.diff(merged.document) > 0) | (merged.start[1:] > ends[:-1])
    assert apart.all()  # touching slices are joined, documents are not


def test_union_of_nothing():
    empty = Slices(*[np.zeros(0, np.int64)] * 4)
    assert union([empty]).length.shape == (0,)


@given(parts=PARTS, row_length=st.integers(2, 12), method=st.sampled_from(METHODS))
def test_repacked_rows_hold_exactly_what_was_seen(parts, row_length, method):
    layout = repack([slices(*parts)], row_length, method=method, key=7)
    got = transitions(layout.rows(np.arange(layout.num_rows)))
    assert sorted(got) == sorted(set(transitions(slices(*parts))))
    assert (layout.tokens_in(np.arange(layout.num_rows)) <= row_length).all()


def test_repacking_longer_joins_a_documents_pieces():
    layout = repack([slices((4, 0, 8), (4, 8, 8), (2, 0, 3))], 16, method="best_fit", key=None)
    assert layout.num_rows == 2
    assert (4, 0, 16) in list(
        zip(layout.document.tolist(), layout.start.tolist(), layout.length.tolist(), strict=True)
    )
