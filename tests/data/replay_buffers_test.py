"""lcl.data.replay_buffers: what a buffer keeps, in what order it gives it, and that it is exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl.data.ordering import named_key
from lcl.data.packing import Layout
from lcl.data.plans import Plan, rows_at
from lcl.data.replay import Replay, Used, shown
from lcl.data.replay_buffers import (
    BalancedByStage,
    Contiguous,
    Everything,
    Reservoir,
    reservoir,
)

NUM_DOMAINS = 3


def make_plan(num_rows, domain=0):
    """A plan whose rows hold one document each, of 1 .. 8 transitions."""
    index = np.arange(num_rows)
    length = (1 + index * 5 % 8).astype(np.int32)
    layout = Layout(8, np.arange(num_rows + 1), index, np.zeros_like(index), length)
    return Plan(("p", domain, num_rows), domain, None, layout)


class Run:
    """Stages that read rows of several plans in turns, and what a planner knows about them."""

    def __init__(self, sizes, stages, seed=0):
        """Args: sizes: rows of each plan; stages: for each, the plan of each row it reads."""
        self.plans = [make_plan(size, d) for d, size in enumerate(sizes)]
        self.history, self.reading, self.reads, self.seed = [], {}, [], seed
        used = [0] * len(sizes)
        for stage, plan in enumerate(stages):
            plan = np.array(plan, np.int64)
            use = np.empty_like(plan)
            for p in range(len(sizes)):
                here = plan == p
                use[here] = used[p] + np.arange(np.count_nonzero(here))
                if here.any():
                    self.history.append(Used(stage, p, used[p], int(np.count_nonzero(here))))
                used[p] += int(np.count_nonzero(here))
            self.reading[stage] = lambda k, plan=plan, use=use: (plan[k], use[k])
            self.reads += list(zip([stage] * len(plan), plan.tolist(), use.tolist(), strict=True))

    def pool(self, buffer, key=1, **kwargs):
        arguments = {"buffer_key": self.seed, "reading": self.reading} | kwargs
        return Replay(0.5, buffer=buffer).pool(
            self.plans, self.history, NUM_DOMAINS, key, **arguments
        )

    def row(self, plan, use):
        return int(rows_at(self.plans, np.array([plan]), np.array([use]))[1][0])


STAGE = st.lists(st.integers(0, 2), min_size=1, max_size=25)
RUNS = st.builds(
    Run,
    st.lists(st.integers(1, 12), min_size=3, max_size=3),
    st.lists(STAGE, min_size=1, max_size=4),
    st.integers(0, 99),
)
BUFFERS = st.one_of(
    st.just(Everything()),
    st.builds(Reservoir, st.integers(1, 30)),
    st.builds(BalancedByStage, st.none() | st.integers(4, 30)),
    st.builds(Contiguous, st.integers(1, 9), st.integers(1, 4)),
)


def located(pool, j):
    return list(zip(*(a.tolist() for a in pool.locate(np.asarray(j))), strict=True))


# ---- of every buffer -----------------------------------------------------------------------------


@settings(deadline=None)
@given(RUNS, BUFFERS, st.integers(0, 150))
def test_tokens_are_exact_and_replay_is_of_seen_rows_only(run, buffer, j):
    pool = run.pool(buffer)
    got = located(pool, np.arange(j))
    seen = {(plan, run.row(plan, use)) for _, plan, use in run.reads}
    want = np.zeros(NUM_DOMAINS, int)
    for _, plan, use in got:
        row = run.row(plan, use)
        assert (plan, row) in seen
        want[run.plans[plan].domain] += run.plans[plan].layout.tokens_in([row])[0]
    assert pool.tokens_in_first(j).tolist() == want.tolist()
    assert pool.num_rows <= len(run.reads)


@settings(deadline=None)
@given(RUNS, BUFFERS, st.lists(st.integers(0, 500), min_size=1, max_size=9))
def test_any_row_alone_after_a_restart_is_the_same(run, buffer, asked):
    whole = located(run.pool(buffer), np.arange(501))
    assert located(run.pool(buffer), asked) == [whole[j] for j in asked]
    far = 10**12
    assert located(run.pool(buffer), [far]) == located(run.pool(buffer), [far, 0])[:1]


@given(RUNS)
def test_buffers_differ_in_their_settings_and_everything_stays_as_it_was(run):
    buffers = [
        Everything(),
        Reservoir(3),
        Reservoir(4),
        BalancedByStage(),
        BalancedByStage(8),
        Contiguous(),
        Contiguous(8),
        Contiguous(8, 2),
    ]
    settings_of = [repr(Replay(0.5, buffer=buffer).settings()) for buffer in buffers]
    assert len(set(settings_of)) == len(buffers)
    assert settings_of[0] == "[0.5, 'add']"


# ---- everything ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(RUNS)
def test_everything_is_every_row_once_a_pass_however_often_it_was_read(run):
    pool = run.pool(Everything())
    rows = [(plan, run.row(plan, use)) for _, plan, use in located(pool, np.arange(pool.num_rows))]
    assert sorted(rows) == sorted({(plan, run.row(plan, use)) for _, plan, use in run.reads})


# ---- reservoir -----------------------------------------------------------------------------------


def textbook_reservoir(num_items, capacity, words):
    """Algorithm R as one writes it: item after item."""
    kept = []
    for i in range(num_items):
        if i < capacity:
            kept.append(i)
        else:
            j = int(words[i]) % (i + 1)
            if j < capacity:
                kept[j] = i
    return kept


@given(st.integers(0, 400), st.integers(1, 50), st.integers(0, 2**128 - 1))
def test_reservoir_is_the_textbooks(num_items, capacity, key):
    words = np.random.Philox(key=key).random_raw(num_items) if num_items else []
    want = textbook_reservoir(num_items, capacity, words)
    assert reservoir(num_items, capacity, key).tolist() == want


def test_reservoir_is_the_textbooks_across_chunks():
    num_items, key = 200_000, 7
    words = np.random.Philox(key=key).random_raw(num_items)
    want = textbook_reservoir(num_items, 1000, words)
    assert reservoir(num_items, 1000, key).tolist() == want


def survivors(num_items, capacity, num_seeds, sample_fn):
    times = np.zeros(num_items)
    for seed in range(num_seeds):
        times[sample_fn(num_items, capacity, named_key("test", seed, bits=128))] += 1
    return times


def chi2_of_survival(times, num_items, capacity, num_seeds):
    """Over n items, each kept with p = M / n: sum (O - E)^2 / (E (1 - p)), about n - 1 if so."""
    p = capacity / num_items
    return float(((times - num_seeds * p) ** 2 / (num_seeds * p * (1 - p))).sum())


@pytest.mark.parametrize(("num_items", "capacity"), [(100, 20), (60, 1), (60, 59), (300, 30)])
def test_every_read_survives_with_capacity_over_reads(num_items, capacity):
    num_seeds = 4000
    times = survivors(num_items, capacity, num_seeds, reservoir)
    assert times.sum() == num_seeds * capacity
    # n - 1 degrees of freedom, deviation about sqrt(2 n): six of them is chance below 1e-6.
    bound = num_items + 6 * np.sqrt(2 * num_items)
    assert chi2_of_survival(times, num_items, capacity, num_seeds) < bound


def test_pairs_survive_as_in_a_sample_without_replacement():
    """Not only one by one: P(both kept) = M (M - 1) / (n (n - 1))."""
    num_items, capacity, num_seeds = 12, 4, 6000
    both = np.zeros((num_items, num_items))
    for seed in range(num_seeds):
        kept = reservoir(num_items, capacity, named_key("pair", seed, bits=128))
        both[np.ix_(kept, kept)] += 1
    p = capacity * (capacity - 1) / (num_items * (num_items - 1))
    pairs = both[np.triu_indices(num_items, 1)]
    z = (pairs - num_seeds * p) / np.sqrt(num_seeds * p * (1 - p))
    assert np.abs(z).max() < 5  # 66 pairs: chance below 1e-4


def always_overwrites(num_items, capacity, key):
    """The released MER code's "reservoir": j ~ U(0, capacity), so every new item gets in."""
    kept = np.arange(capacity)
    words = np.random.Philox(key=key).random_raw(num_items)
    for i in range(capacity, num_items):
        kept[int(words[i]) % capacity] = i
    return kept


def test_the_survival_test_can_fail():
    """A buffer that favours recent rows, as the released one does, is told apart at once."""
    times = survivors(100, 20, 400, always_overwrites)
    assert chi2_of_survival(times, 100, 20, 400) > 100 + 100 * np.sqrt(200)


@settings(deadline=None)
@given(RUNS, st.integers(1, 30))
def test_the_pool_is_the_reservoir_of_the_reads_in_their_order(run, capacity):
    pool = run.pool(Reservoir(capacity))
    key = named_key("reservoir", run.seed, bits=128)
    words = np.random.Philox(key=key).random_raw(len(run.reads))
    kept = textbook_reservoir(len(run.reads), capacity, words)
    want = [run.reads[i][1:] for i in kept]
    one_pass = located(pool, np.arange(pool.num_rows))
    assert sorted((plan, use) for _, plan, use in one_pass) == sorted(want)
    assert {p for p, _, _ in located(pool, pool.num_rows + np.arange(pool.num_rows))} == {1}


def test_the_reservoir_carries_on_from_stage_to_stage():
    """Rows that were thrown out do not come back: a real buffer of that size would do."""
    rng = np.random.default_rng(0)
    stages = [rng.integers(0, 3, 200) for _ in range(4)]
    size = [600, 600, 600]
    kept = []
    for n in range(1, 5):
        run = Run(size, stages[:n])
        pool = run.pool(Reservoir(40), key=n)
        assert pool.num_rows == 40
        kept.append({(plan, use) for _, plan, use in located(pool, np.arange(40))})
    for (earlier, later), n in zip(itertools.pairwise(kept), range(1, 4), strict=True):
        new = {read[1:] for read in Run(size, stages[: n + 1]).reads[200 * n :]}
        assert later <= earlier | new
        assert later & earlier and later & new


# ---- balanced ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=25), min_size=1, max_size=4),
    st.none() | st.integers(4, 30),
    st.integers(0, 40),
)
def test_each_stage_has_exactly_its_share_of_every_block(stages, capacity, blocks):
    run = Run([200, 200, 200], stages)  # no row is read twice, so a row tells its stage
    stage_of = {(plan, use): stage for stage, plan, use in run.reads}
    pool = run.pool(BalancedByStage(capacity))
    got = [stage_of[plan, use] for _, plan, use in located(pool, np.arange(blocks * len(stages)))]
    for b in range(blocks):
        block = got[b * len(stages) : (b + 1) * len(stages)]
        assert sorted(block) == list(range(len(stages)))


def test_balanced_gives_each_row_of_a_stage_once_in_its_pass():
    run = Run([200, 200, 200], [[0] * 30, [1] * 5, [2, 0] * 4])
    pool = run.pool(BalancedByStage())
    assert pool.num_rows == 43
    by_stage = {0: [], 1: [], 2: []}
    stage_of = {(plan, use): stage for stage, plan, use in run.reads}
    for one_pass, plan, use in located(pool, np.arange(3 * 40)):
        by_stage[stage_of[plan, use]].append((one_pass, plan, use))
    for rows, size in zip(by_stage.values(), (30, 5, 8), strict=True):
        assert [p for p, _, _ in rows] == [i // size for i in range(40)]
        for i in range(0, 40 - size + 1, size):
            assert len({row[1:] for row in rows[i : i + size]}) == size


def test_a_plan_read_whole_gives_each_row_once_a_pass():
    run = Run([7, 1, 1], [[0] * 17])
    pool = run.pool(BalancedByStage())
    assert pool.num_rows == 7  # not 17
    rows = [run.row(plan, use) for _, plan, use in located(pool, np.arange(7))]
    assert sorted(rows) == list(range(7))


def test_what_a_balanced_buffer_keeps_only_shrinks():
    stages = [[0] * 50, [1] * 50, [2] * 50, [0] * 50]
    kept = []
    for n in range(1, 5):
        pool = Run([200] * 3, stages[:n]).pool(BalancedByStage(22), key=n)
        got = located(pool, np.arange(22 * 4 * n))
        kept.append({(plan, use) for _, plan, use in got if plan == 0 and use < 50})
        assert len({(plan, use) for _, plan, use in got}) == 22 == pool.num_rows
    assert [len(k) for k in kept] == [22, 11, 8, 6]
    assert kept[0] > kept[1] > kept[2] > kept[3]


# ---- contiguous ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(RUNS, st.integers(1, 9), st.integers(1, 4))
def test_lanes_go_on_along_the_stream_in_its_order(run, segment, lanes):
    pool = run.pool(Contiguous(segment, lanes))
    reads = {read[1:]: i for i, read in enumerate(run.reads)}  # a use tells its read
    segment = min(segment, len(run.reads))
    got = located(pool, np.arange(lanes * segment * 5))
    at = np.array([reads[plan, use] for _, plan, use in got]).reshape(5, segment, lanes)
    assert (np.diff(at, axis=1) == 1).all()


@settings(deadline=None)
@given(RUNS, st.integers(1, 9))
def test_a_pass_has_no_read_twice_and_leaves_out_less_than_a_piece(run, segment):
    pool = run.pool(Contiguous(segment))
    segment = min(segment, len(run.reads))
    size = len(run.reads) // segment * segment
    got = located(pool, np.arange(3 * size))
    assert [p for p, _, _ in got] == [i // size for i in range(3 * size)]
    for p in range(3):
        one = [row[1:] for row in got[p * size : (p + 1) * size]]
        assert len(set(one)) == size > len(run.reads) - segment


def test_no_read_is_always_left_out():
    run = Run([50, 1, 1], [[0] * 19])
    pool = run.pool(Contiguous(8))
    missing = [
        set(range(19)) - {use for _, _, use in located(pool, p * 16 + np.arange(16))}
        for p in range(40)
    ]
    assert not set.intersection(*missing)


def test_contiguous_refuses_rows_without_an_order_of_reading():
    run = Run([9, 9, 9], [[0, 1], [2, 0]])
    with pytest.raises(ValueError, match="needs the rows of stage 1 .* as they were read") as error:
        run.pool(Contiguous(), reading={0: run.reading[0]})
    assert "\n" not in str(error.value)


def test_reservoir_takes_rows_laid_out_again_one_after_the_other():
    run = Run([9, 9, 9], [[0, 1, 0], [2, 0]])
    pool = run.pool(Reservoir(50), reading={})
    got = {(plan, use) for _, plan, use in located(pool, np.arange(pool.num_rows))}
    assert got == {read[1:] for read in run.reads}


# ---- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reservoir(0), "reservoir capacity is 0; give at least 1 row"),
        (lambda: BalancedByStage(0), "balanced capacity is 0; give at least 1 row, or None"),
        (lambda: Contiguous(0), "contiguous segment is 0; give at least 1"),
        (lambda: Contiguous(lanes=0), "contiguous lanes is 0; give at least 1"),
        (
            lambda: Run([5, 5, 5], [[0], [1], [2]]).pool(BalancedByStage(2)),
            "balanced capacity is 2 for 3 earlier stages; give at least 3 rows",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 30))
def test_shown_is_what_the_uses_showed(num_rows, first, count):
    plan = make_plan(num_rows)
    use = first + np.arange(count)
    _, row = rows_at([plan], np.zeros(count, int), use)
    got = shown(plan, first, count)
    assert sorted(got.document.tolist()) == sorted(set(row.tolist()))


def test_memory_does_not_grow_with_what_was_seen():
    """A hundred million reads: the pool is a rule, and locating costs what it costs for ten."""
    plan = make_plan(1000)
    seen = [Used(0, 0, 0, 10**8)]
    read = {0: lambda k: (np.zeros_like(k), k)}
    for buffer in (Everything(), BalancedByStage(64), Contiguous(64, 4)):
        pool = Replay(0.5, buffer=buffer).pool([plan], seen, 1, 5, 6, read)
        got = located(pool, np.arange(10**10, 10**10 + 4))
        assert all(0 <= use < 10**8 for _, _, use in got)
