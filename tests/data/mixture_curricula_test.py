"""lcl.data.mixture_curricula: weights that move, and budgets, exact in every block."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lcl.data.mixture import Mixture
from lcl.data.mixture_curricula import (
    LinearMixture,
    StagedMixture,
    TokenBudgets,
    _round_lines,
)

DOMAINS = "abcd"
WEIGHTS = st.dictionaries(
    st.sampled_from(DOMAINS), st.floats(0, 10) | st.integers(0, 3), min_size=1
).filter(lambda weights: sum(weights.values()) > 0.01)
KEY = st.integers(0, 2**64 - 1)


@st.composite
def points(draw, last):
    count = draw(st.integers(2 if last else 1, 4))
    inner = draw(st.lists(st.floats(0.01, 0.99), min_size=count - 1, max_size=count - 1))
    at = [0.0, *sorted(inner)]
    if last:
        at[-1] = 1.0
    assume(all(a < b for a, b in itertools.pairwise(at)))
    return draw(st.lists(WEIGHTS, min_size=count, max_size=count)), at


@st.composite
def mixtures(draw):
    """(mixture, bound) of every kind."""
    num_rows, block = draw(st.integers(1, 300)), draw(st.integers(1, 70))
    kind = draw(st.sampled_from(["staged", "linear", "budgets"]))
    if kind == "staged":
        weights, starts = draw(points(last=False))
        mixture = StagedMixture(weights, starts, block)
    elif kind == "linear":
        weights, at = draw(points(last=True))
        mixture = LinearMixture(weights, at, block)
    else:
        rows = draw(st.dictionaries(st.sampled_from(DOMAINS), st.integers(1, 80), min_size=1))
        num_rows = sum(rows.values())
        mixture = TokenBudgets({d: 7 * n + 3 for d, n in rows.items()}, block)
    try:
        return mixture, mixture.bind(num_rows, 7)
    except ValueError as error:  # too short a stage
        assert "less than a row of the" in str(error) or "has no row in a stage" in str(error)
        assume(False)


def line(mixture, k, num_rows):
    """Rows of each domain after k rows, by slow exact integration of the shares row by row."""
    total = [Fraction(0)] * len(mixture.domains)
    if isinstance(mixture, TokenBudgets):
        return [Fraction(mixture.tokens[d] // 7 * k, num_rows) for d in mixture.domains]
    linear = isinstance(mixture, LinearMixture)
    at = mixture._points if linear else [*mixture.starts, 1.0]
    knots = [int(Fraction(float(a)) * num_rows + Fraction(1, 2)) for a in at]

    def share(weights, d):
        return Fraction(float(weights.get(d, 0))) / sum(
            Fraction(float(w)) for w in weights.values()
        )

    for i, (start, end) in enumerate(itertools.pairwise(knots)):
        here = max(0, min(k, end) - start)
        for j, d in enumerate(mixture.domains):
            first = share(mixture.weights[i], d)
            last = share(mixture.weights[i + 1], d) if linear else first
            for x in range(here):  # the mean share of row x
                total[j] += first + (last - first) * Fraction(2 * x + 1, 2 * (end - start))
    return total


@settings(deadline=None)
@given(mixtures(), KEY)
def test_each_block_has_exactly_its_counts_and_the_line_is_never_a_row_away(made, key):
    mixture, bound = made
    domain, _ = bound.locate(np.arange(bound.num_rows), key=key)
    assert bound.borders[0] == 0 and bound.borders[-1] == bound.num_rows
    assert 0 < np.diff(bound.borders).min() and np.diff(bound.borders).max() <= mixture.block
    for b, (start, end) in enumerate(itertools.pairwise(bound.borders.tolist())):
        counts = np.bincount(domain[start:end], minlength=len(mixture.domains))
        assert counts.tolist() == (bound.cumulative[b + 1] - bound.cumulative[b]).tolist()
    for border, rows in list(zip(bound.borders.tolist(), bound.cumulative, strict=True))[-5:]:
        for exact, realised in zip(line(mixture, border, bound.num_rows), rows, strict=True):
            assert abs(realised - exact) < 1
            assert realised == exact or exact.denominator > 1


@settings(deadline=None)
@given(mixtures(), KEY)
def test_occurrences_count_up_and_counts_before_is_a_count(made, key):
    mixture, bound = made
    domain, occurrence = bound.locate(np.arange(bound.num_rows), key=key)
    for d in range(len(mixture.domains)):
        assert occurrence[domain == d].tolist() == list(range(np.count_nonzero(domain == d)))
    for k in range(0, bound.num_rows + 1, 7):
        want = np.bincount(domain[:k], minlength=len(mixture.domains))
        assert bound.counts_before(k, key=key).tolist() == want.tolist()
    assert bound.counts_before(bound.num_rows, key=key).tolist() == bound.cumulative[-1].tolist()


@settings(deadline=None)
@given(mixtures(), KEY, st.data())
def test_any_row_alone_in_a_new_process_is_the_same(made, key, data):
    mixture, bound = made
    whole = bound.locate(np.arange(bound.num_rows), key=key)
    asked = np.array(data.draw(st.lists(st.integers(0, bound.num_rows - 1), max_size=9)), np.int64)
    again = mixture.bind(bound.num_rows, 7).locate(asked, key=key)
    for one, other in zip(whole, again, strict=True):
        assert one[asked].tolist() == other.tolist()


def test_the_files_picture():
    bound = LinearMixture(({"a": 1}, {"b": 1}), block=4).bind(20)
    assert bound.cumulative[:, 1].tolist() == [0, 0, 1, 3, 6, 10]
    rows = TokenBudgets({"a": 2_000_000, "b": None}).bind(6000, 1000)
    assert rows.cumulative[-1].tolist() == [2000, 4000]
    assert set(np.diff(rows.cumulative[:, 0])[:-1].tolist()) == {341, 342}


def test_a_line_is_followed_where_rounding_each_block_alone_would_drift():
    """Six domains of 2/3 row a block: rounding each block by itself starves two of them."""
    bound = LinearMixture([dict.fromkeys("abcdef", 1.0)] * 2, block=4).bind(4 * 300)
    assert bound.cumulative[-1].tolist() == [200] * 6
    exact = np.arange(301)[:, None] * (2 / 3)
    assert np.abs(bound.cumulative - exact).max() < 1


def test_parts_of_a_staged_mixture_are_exact_alone():
    mixture = StagedMixture(({"a": 1}, {"a": 1, "b": 3}, {"b": 1}), (0.0, 0.25, 0.75), block=16)
    bound = mixture.bind(80)
    domain = bound.locate(np.arange(80))[0]
    assert domain[:20].tolist() == [0] * 20 and domain[60:].tolist() == [1] * 20
    assert np.bincount(domain[20:60]).tolist() == [10, 30]
    assert bound.borders.tolist() == [0, 16, 20, 36, 52, 60, 76, 80]


def test_constant_weights_agree_with_mixture_block_by_block():
    """Where blocks come out even, the three kinds are the constant mixture with other orders."""
    weights = {"a": 5, "b": 2, "c": 1}
    want = [Mixture(weights, block=16).counts_before(16 * b).tolist() for b in range(9)]
    assert LinearMixture((weights, weights), block=16).bind(128).cumulative.tolist() == want
    assert StagedMixture((weights,), (0.0,), block=16).bind(128).cumulative.tolist() == want
    budgets = TokenBudgets({"a": 80, "b": 32, "c": None}, block=16).bind(128, 1)
    assert budgets.cumulative.tolist() == want


@given(
    st.lists(st.lists(st.integers(0, 30), min_size=5, max_size=5).filter(any), min_size=1),
    st.integers(1, 9),
)
def test_rounding_any_lines_at_all_keeps_within_a_row(raw, block):
    """Not only straight lines: any shares, block after block (the theorem has no other demand)."""
    at, lines, borders = [Fraction(0)] * 5, [[Fraction(0)] * 5], [0]
    for weights in raw:
        at = [a + Fraction(w * block, sum(weights)) for a, w in zip(at, weights, strict=True)]
        lines.append(at)
        borders.append(borders[-1] + block)
    low = [[v.__floor__() for v in one] for one in lines]
    high = [[v.__ceil__() for v in one] for one in lines]
    table = _round_lines(borders, low, high)
    assert (table.sum(axis=1) == borders).all()
    assert (np.diff(table, axis=0) >= 0).all()
    assert (np.array(low) <= table).all() and (table <= np.array(high)).all()


def test_rows_go_to_those_that_will_need_one_soonest():
    """Five domains at 0.6, three rows to give: d and e must have two, since they are due next."""
    low = [[0] * 5, [0] * 5, [0, 0, 0, 2, 2]]
    high = [[0] * 5, [1] * 5, [1, 1, 1, 3, 3]]  # the lines end at 0.6 and 2.1
    table = _round_lines([0, 3, 6], low, high)
    assert table[1].tolist() == [1, 0, 0, 1, 1]
    assert table[2].sum() == 6 and table[2, 3:].tolist() in ([2, 2], [2, 3], [3, 2])


def test_a_long_stage_is_a_small_table():
    mixture = LinearMixture(({"a": 0.37, "b": 0.6, "c": 0.03}, {"b": 0.3, "c": 0.333, "d": 1.7}))
    bound = mixture.bind(10**7)
    assert bound.cumulative.nbytes < 400_000
    k = np.arange(9_999_000, 9_999_064)
    before = bound.counts_before(9_999_000, key=3)
    domain, occurrence = bound.locate(k, key=3)
    for d in range(4):
        mine = occurrence[domain == d]
        assert mine.tolist() == list(range(before[d], before[d] + len(mine)))


def test_settings_tell_apart_what_differs():
    ab, ba = {"a": 1, "b": 0}, {"b": 2}
    kinds = [
        LinearMixture((ab, ba)),
        LinearMixture((ba, ab)),
        LinearMixture((ab, ba), block=8),
        LinearMixture((ab, ba, ba)),
        LinearMixture((ab, ba, ba), (0.0, 0.3, 1.0)),
        StagedMixture((ab, ba), (0.0, 0.5)),
        StagedMixture((ab, ba), (0.0, 0.4)),
        TokenBudgets({"a": 5, "b": None}),
        TokenBudgets({"a": 5, "b": 5}),
        Mixture(ba),
    ]
    texts = [repr(sorted(kind.settings().items())) for kind in kinds]
    assert len(set(texts)) == len(texts)
    assert [kind.needs_length for kind in kinds] == [True] * 9 + [False]
    assert kinds[0].settings() == LinearMixture(({"a": 1.0}, ba), (0, 1)).settings()


def test_scaled_weights_leave_out_what_has_no_factor():
    mixture = LinearMixture(({"a": 1, "b": 1, "c": 2}, {"b": 1}))
    scaled = mixture.scaled({"a": 0.5, "b": 2.0})
    assert scaled.weights == ({"a": 0.5, "b": 2.0}, {"b": 2.0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StagedMixture((), ()), "0 weights and 0 starts; give as many"),
        (lambda: StagedMixture(({"a": 1},), (0.0, 0.5)), "1 weights and 2 starts"),
        (lambda: StagedMixture(({"a": 1},) * 2, (0.1, 0.5)), r"starts are \[0.1, 0.5\]; give 0"),
        (lambda: StagedMixture(({"a": 1},) * 2, (0.0, 1.0)), "shares of the stage below 1"),
        (lambda: StagedMixture(({"a": -1},), (0.0,)), "weight in part 0 of 'a' is -1; give a pos"),
        (lambda: StagedMixture(({"a": 0},), (0.0,)), "in part 0 is 0 for every domain; give one"),
        (lambda: StagedMixture(({"a": 1},), (0.0,), block=0), "mixture block is 0; give at least"),
        (lambda: StagedMixture(({"a": 1},) * 2, (0.0, 0.9)).bind(3), "part 1 .* no row in a stage"),
        (lambda: LinearMixture(({"a": 1},)), "at 1 points; give two or more, or use Mixture"),
        (lambda: LinearMixture(({"a": 1},) * 3, (0, 1)), "3 weights at 2 points"),
        (lambda: LinearMixture(({"a": 1},) * 2, (0, 0.9)), "then rising shares of the stage, then"),
        (
            lambda: LinearMixture(({"a": 1, "b": 1e-6}, {"a": 1})).bind(100),
            "gives 'b' less than a row of the stage's 100; make the stage longer",
        ),
        (lambda: LinearMixture(({"a": 1},) * 2, block=1).bind(1 << 21), "set block to 2 or more"),
        (lambda: TokenBudgets({}), "token budgets are {}; give at least one"),
        (lambda: TokenBudgets({"a": 0}), "token budget of 'a' is 0; give a positive whole number"),
        (lambda: TokenBudgets({"a": 1.5}), "is 1.5; give a positive whole number, or None"),
        (lambda: TokenBudgets({"a": None, "b": None}), "'a', 'b' are None; only one domain"),
        (lambda: TokenBudgets({"a": 5}).bind(10, 8), "'a' is 5, less than a row of 8; give 8 or"),
        (
            lambda: TokenBudgets({"a": 50}).bind(10, 8),
            "are 6 rows of 8, but the stage has 10; make them equal, or give one domain None",
        ),
        (
            lambda: TokenBudgets({"a": 80, "b": None}).bind(10, 8),
            "are 10 rows of 8, which leaves none of the stage's 10 to 'b'; lengthen",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
