"""lcl.data.mixture_subset: which documents a part has, and that it is read so many times."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl.data.mixture import Mixture
from lcl.data.mixture_curricula import LinearMixture
from lcl.data.mixture_subset import Subset
from lcl.data.packing import METHODS, pack
from lcl.data.plans import Plan, rows_at

MIXTURE = Mixture({"med": 1, "web": 3}, block=8)


@dataclasses.dataclass
class Scored:
    """A store that has a score for each document."""

    score: np.ndarray

    def extra(self, name):
        assert name == "score"
        return self.score


def subset(**kwargs):
    return Subset(MIXTURE, "med", **kwargs)


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=40).map(np.array)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 30), st.integers(1, 5), st.integers(4, 16), st.sampled_from(METHODS))
def test_each_row_of_the_part_is_read_epochs_times(lengths, count, epochs, row_length, method):
    part = subset(epochs=epochs)
    rows = -(-count // epochs)
    if lengths.sum() < rows * row_length:
        with pytest.raises(ValueError, match="needs .* tokens, but the domain has"):
            part.lengths(None, lengths, seed=0, row_length=row_length, count=count)
        return
    inside = part.lengths(None, lengths, seed=0, row_length=row_length, count=count)
    layout = part.cut(pack(inside, row_length, method=method), count)
    assert layout.num_rows == rows
    _, row = rows_at([Plan(("x",), 0, None, layout)], np.zeros(count, int), np.arange(count))
    times = np.bincount(row, minlength=rows)
    assert times.sum() == count and times.max() <= epochs
    assert times.min() >= count // rows
    if count % epochs == 0:
        assert set(times.tolist()) == {epochs}


@given(LENGTHS.filter(lambda lengths: lengths.sum() > 0), st.data())
def test_the_part_is_the_head_of_the_ranking(lengths, data):
    tokens = data.draw(st.integers(1, int(lengths.sum())))
    score = data.draw(
        st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)).map(np.array)
    )
    for best, sign in (("high", -1), ("low", 1)):
        part = subset(tokens=tokens, by="score", best=best)
        inside = part.lengths(Scored(score), lengths, seed=0, row_length=8, count=5)
        rank = sorted(range(len(lengths)), key=lambda i: (sign * score[i], i))
        want, total = np.zeros_like(lengths), 0
        for i in rank:  # the textbook way: take the best until there is enough
            if total >= tokens:
                break
            want[i] = lengths[i]
            total += lengths[i]
        assert inside.tolist() == want.tolist()


def test_a_share_of_the_documents_and_a_cap_of_tokens():
    score, lengths = np.array([5.0, 1.0, 4.0, 2.0, 3.0]), np.array([10, 20, 30, 40, 50])

    def chosen(**kwargs):
        part = subset(by="score", best="low", **kwargs)
        inside = part.lengths(Scored(score), lengths, seed=0, row_length=8, count=5)
        assert (inside[inside > 0] == lengths[inside > 0]).all()
        return np.flatnonzero(inside).tolist()

    assert chosen(share=0.4) == [1, 3]  # two of five documents: scores 1 and 2
    assert chosen(share=0.5) == [1, 3, 4]  # two and a half, and half a document is one
    assert chosen(share=1.0) == [0, 1, 2, 3, 4]
    assert chosen(share=0.6, tokens=60) == [1, 3]  # the cap comes first
    assert chosen(share=0.4, tokens=100) == [1, 3]  # the share does
    assert chosen(share=0.4, epochs=1) == [1, 3]  # 5 rows of 8: 20 + 40 tokens do


def test_cut_leaves_the_fullest_rows_and_no_other():
    layout = pack(np.array([5, 16, 6, 8]), 8)  # the rows that are not full come first
    part = subset(epochs=2)
    cut = part.cut(layout, 6)
    assert layout.num_rows == 5 and cut.num_rows == 3
    assert cut.tokens_in(np.arange(3)).tolist() == [8, 8, 8]
    assert sorted(cut.document.tolist()) == [1, 1, 3]
    assert part.cut(layout, 10) is layout
    with pytest.raises(ValueError, match="needs 6 rows, but its documents make 5"):
        part.cut(layout, 12)


def test_seeded_parts_differ_by_seed_and_grow_into_each_other():
    lengths = np.full(200, 10)

    def chosen(seed, **kwargs):
        part = subset(**kwargs)
        inside = part.lengths(None, lengths, seed=seed, row_length=8, count=5)
        return set(np.flatnonzero(inside).tolist())

    small, large = chosen(0, tokens=300), chosen(0, tokens=900)
    assert len(small) == 30 and len(large) == 90 and small < large
    assert chosen(1, tokens=300) != small
    assert not small & chosen(0, tokens=300, best="low")


def test_shares_are_those_of_the_mixture_inside():
    part = subset(tokens=5)
    k = np.arange(50)
    bound = part.bind(50)
    for one, other in zip(bound.locate(k, key=2), MIXTURE.locate(k, key=2), strict=True):
        assert one.tolist() == other.tolist()
    assert part.domains == ("med", "web") and not part.needs_length
    assert subset(epochs=2).needs_length
    line = LinearMixture(({"med": 1}, {"web": 1}))
    assert Subset(line, "med", tokens=5).needs_length


def test_subsets_of_several_domains():
    both = Subset(subset(epochs=2), "web", tokens=80)
    assert {d: part.domain for d, part in both.subsets.items()} == {"med": "med", "web": "web"}
    assert not MIXTURE.subsets
    with pytest.raises(ValueError, match="two subsets of 'med'"):
        Subset(both, "med", epochs=3)


def test_names_and_settings_tell_apart_what_differs():
    parts = [
        subset(epochs=2),
        subset(epochs=3),
        subset(tokens=2),
        subset(tokens=2, by="score"),
        subset(tokens=2, by="score", best="low"),
        subset(tokens=2, by="score", best="low", share=0.5),
        subset(by="score", best="low", share=0.5),
    ]
    for tell in (lambda part: repr(part.settings()), lambda part: repr(part.name(12))):
        assert len({tell(part) for part in parts}) == len(parts)
    assert subset(epochs=2).name(12) == subset(epochs=3).name(18)  # the same part


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Subset(MIXTURE, "fr", epochs=2), "subset of 'fr', .* use one of med, web"),
        (lambda: subset(), "epochs=None and tokens=None; give one of the two"),
        (lambda: subset(epochs=1, tokens=1), "epochs=1 and tokens=1; give one"),
        (lambda: subset(epochs=0), "subset epochs is 0; give at least 1"),
        (lambda: subset(share=0.0), "subset share is 0.0; give more than 0 and at most 1"),
        (lambda: subset(epochs=1, tokens=1, share=0.5), "epochs=1 and tokens=1; give one"),
        (
            lambda: subset(epochs=1, share=0.5).lengths(
                None, np.array([9, 9]), seed=0, row_length=8, count=2
            ),
            "needs 16 tokens, but the best 0.5 of it has 9; give epochs=2, or a larger share",
        ),
        (lambda: subset(tokens=5, best="good"), "best is 'good'; use 'high' or 'low'"),
        (
            lambda: subset(tokens=50).lengths(
                None, np.array([9, 9]), seed=0, row_length=8, count=1
            ),
            "needs 50 tokens, but the domain has 18; give tokens=18 or less, or prepare",
        ),
        (
            lambda: subset(epochs=2).lengths(None, np.array([9, 9]), seed=0, row_length=8, count=9),
            "needs 40 tokens, but the domain has 18; give epochs=5, or prepare",
        ),
        (
            lambda: subset(tokens=5, by="score").lengths(
                Scored(np.array([1, np.nan])), np.array([9, 9]), seed=0, row_length=8, count=1
            ),
            "'score' of 'med' is not a finite number for every document",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_mend_for_too_few_tokens_works():
    part = subset(epochs=5)
    inside = part.lengths(None, np.array([9, 9]), seed=0, row_length=8, count=9)
    assert inside.sum() >= 16
