"""The stability gap against a run worked by hand, and properties of it."""

from __future__ import annotations

import doctest
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lcl.evals.stability_gap
from lcl.evals.stability_gap import Gap, StabilityGap, recovery_text

# Three stages of 40 steps, evaluated every 10; the losses are made up so that all can be counted.
STEPS = list(range(0, 121, 10))
#       0    10   20   30   40 | 50   60   70   80 | 90   100  110  120
EN = [5.0, 4.0, 3.0, 2.5, 2.0, 3.5, 3.0, 2.0, 2.25, 2.5, 2.0, 2.0, 1.5]
CODE = [6.0, 5.5, 5.0, 5.0, 5.0, 3.0, 2.0, 1.5, 1.00, 0.9, 0.8, 0.7, 0.6]
FR = [7.0, 6.5, 6.0, 6.0, 6.0, 6.5, 6.5, 6.5, 6.50, 5.0, 4.5, 4.0, 4.0]
DOMAINS = ["en", "code", "fr"]
STAGES = ["first", "second", "third"]
TRAINED = [{"en": 1.0}, {"code": 1.0}, {"fr": 1.0}]


def hand(**changes) -> StabilityGap:
    return StabilityGap(
        **{
            "steps": STEPS,
            "values": np.array([EN, CODE, FR]).T,
            "ends": [40, 80, 120],
            "domains": DOMAINS,
            "stages": STAGES,
            "trained": TRAINED,
            **changes,
        }
    )


def lines(keep=lambda step: True, unit: str = "nats_per_token") -> list[dict]:
    """The run's evals.jsonl: one line an evaluation, the border's of kind stage_end."""
    found = []
    for row, step in enumerate(STEPS):
        if not keep(step):
            continue
        index = max(0, -(-step // 40) - 1)
        kind = "start" if step == 0 else "stage_end" if step % 40 == 0 else "interval"
        scores = {d: {unit: v[row]} for d, v in zip(DOMAINS, (EN, CODE, FR), strict=True)}
        where = {"step": step, "stage_index": index, "stage": STAGES[index]}
        found.append({**where, "kind": kind, "domains": scores})
    return found


def test_gaps_by_hand():
    g = hand()
    by_place = {(one.stage, one.domain): one for one in g.gaps}
    assert list(by_place) == [("second", "en"), ("third", "en"), ("third", "code")]
    en = by_place["second", "en"]
    assert en == Gap(1, "second", "en", 2.0, 3.5, 10, 2.25, 30, 4)  # back at 70, 30 after 40
    assert (en.gap, en.lasting, en.regained) == (1.5, 0.25, 1.25)
    en = by_place["third", "en"]
    assert en == Gap(2, "third", "en", 2.25, 2.5, 10, 1.5, 20, 4)
    code = by_place["third", "code"]  # which only went on falling: a negative gap, nothing to mend
    assert (code.gap, code.recovery_steps, code.worst_step) == (0.9 - 1.0, 0, 10)
    assert g.worst_gap == by_place["second", "en"]
    assert g.mean_gap == pytest.approx((1.5 + 0.25 - 0.1) / 3)


def test_a_loss_that_does_not_come_back_has_no_recovery_steps():
    values = np.array([[2.0, 3.0, 2.5, 2.5, 2.1]]).T
    g = StabilityGap([0, 5, 10, 15, 20], values, [5, 20], ["en"], ["a", "b"], [["en"], []])
    assert [one.recovery_steps for one in g.gaps] == [0]  # 3.0 at the border, lower ever after
    g = StabilityGap([0, 5, 10, 15, 20], values[::-1], [5, 20], ["en"], ["a", "b"], [["en"], []])
    assert g.gaps[0].worst == 3.0 and g.gaps[0].recovery_steps == 15
    late = np.array([[2.0, 2.0, 1.0, 3.0, 2.5]]).T  # below the border before the worst, not after
    g = StabilityGap([0, 5, 10, 15, 20], late, [5, 20], ["en"], ["a", "b"], [["en"], []])
    assert g.gaps[0].recovery_steps is None and recovery_text(g.gaps[0]) == "never"


def test_mirrors_of_min_acc_and_wc_acc_by_hand():
    g = hand()
    # After stage 2: en since step 40. After stage 3: en since 40 still, code since 80.
    assert g.max_loss == {"first": None, "second": 3.5, "third": (3.5 + 0.9) / 2}
    assert g.wc_loss["first"] is None
    assert g.wc_loss["second"] == 1.0 / 2 + (1 - 1 / 2) * 3.5
    assert g.wc_loss["third"] == pytest.approx(4.0 / 3 + (1 - 1 / 3) * g.max_loss["third"])


def test_averages_by_hand():
    g = hand()
    assert g.average["first"] == 2.0
    assert g.average["second"] == (2.25 + 1.0) / 2
    assert g.average["third"] == pytest.approx((1.5 + 0.6 + 4.0) / 3)
    first = [4.0, 3.0, 2.5, 2.0]
    second = [(a + b) / 2 for a, b in zip(EN[5:9], CODE[5:9], strict=True)]
    third = [sum(x) / 3 for x in zip(EN[9:], CODE[9:], FR[9:], strict=True)]
    assert g.anytime == pytest.approx(np.mean([*first, *second, *third]))


def test_windows_by_hand():
    g = hand()
    assert g.windowed_forgetting(10) == {"en": 1.5, "code": 0.0, "fr": 0.5}
    assert g.windowed_plasticity(10) == {"en": 1.0, "code": 2.0, "fr": 1.5}
    assert g.windowed_plasticity(40)["en"] == 3.0  # 5.0 to 2.0 in 40 steps
    assert g.windowed_plasticity(120)["code"] == pytest.approx(5.4)
    with pytest.raises(ValueError, match="window is 0 steps; give at least one"):
        g.windowed_forgetting(0)


def test_the_interval_is_part_of_the_number():
    fine = StabilityGap.from_evals(lines(), STAGES, TRAINED)
    coarse = StabilityGap.from_evals(lines(lambda step: step % 20 == 0), STAGES, TRAINED)
    only_ends = StabilityGap.from_evals(lines(lambda step: step % 40 == 0), STAGES, TRAINED)
    assert [g.interval for g in (fine, coarse, only_ends)] == [(10, 10), (20, 20), (40, 40)]
    # The peak at 50 falls between two evaluations of the coarse run, and the finest sees the most.
    assert [g.worst_gap.gap for g in (fine, coarse, only_ends)] == [1.5, 1.0, 0.25]
    assert "every 20 steps" in coarse.table() and coarse.to_dict()["interval_steps"] == [20, 20]
    ends = only_ends.gaps[0]
    assert ends.num_evaluations == 1 and ends.gap == ends.lasting == 0.25


def test_from_evals_reads_the_trunk_only():
    branch = {
        "step": 60,
        "stage_index": 1,
        "stage": "second",
        "kind": "branch",
        "branch_from": 50,
        "domains": {d: {"nats_per_token": 99.0} for d in DOMAINS},
    }
    g = StabilityGap.from_evals([branch, *reversed(lines())], STAGES, TRAINED)
    assert g.gaps == hand().gaps and g.max_loss == hand().max_loss
    assert g.domains == ("en", "code", "fr")
    bits = StabilityGap.from_evals(
        lines(unit="bits_per_byte"), STAGES, TRAINED, unit="bits_per_byte"
    )
    assert bits.unit == "bits/byte" and bits.gaps == hand().gaps
    with pytest.raises(ValueError, match="unit 'bits' is not one of"):
        StabilityGap.from_evals(lines(), STAGES, TRAINED, unit="bits")


def test_a_running_job_is_read_as_far_as_it_has_come():
    g = StabilityGap.from_evals(lines(lambda step: step <= 60), STAGES, TRAINED)
    (one,) = g.gaps
    assert (one.stage, one.worst, one.end, one.recovery_steps) == ("second", 3.5, 3.0, None)
    assert list(g.max_loss) == ["first"]  # which are of whole stages only
    nothing = StabilityGap.from_evals([], STAGES, TRAINED)
    assert (nothing.gaps, nothing.anytime, nothing.interval) == ((), None, None)
    assert "evaluated once so far" in nothing.table()


def test_mixtures_and_domains_that_come_again():
    trained = [{"en": 1.0}, {"code": 0.5, "en": 0.5}, {"fr": 1.0}]
    g = hand(trained=trained)
    assert [(one.stage, one.domain) for one in g.gaps] == [
        ("second", "en"),
        ("third", "en"),
        ("third", "code"),
    ]
    # en's largest share is still stage 1's, so all since step 40 counts.
    assert g.max_loss["third"] == (3.5 + 0.9) / 2
    again = hand(trained=[{"en": 1.0}, {"code": 1.0}, {"en": 1.0}])
    assert again.wc_loss["third"] == again.max_loss["third"]  # nothing new in stage 3
    assert again.average["third"] == (1.5 + 0.6) / 2  # fr is never trained: in no average


def test_one_stage_has_no_gap():
    g = hand(ends=[120], stages=["all"], trained=[dict.fromkeys(DOMAINS, 1.0)])
    assert g.gaps == () and g.worst_gap is None and g.mean_gap is None
    assert g.max_loss == {"all": None} == g.wc_loss
    assert g.average["all"] == pytest.approx((1.5 + 0.6 + 4.0) / 3)
    assert "no domain of an earlier stage" in g.table()


def test_unmeasured_cells_are_passed_over():
    values = np.array([EN, CODE, FR]).T
    values[5, 0] = np.nan  # en's peak was not measured
    values[4, 1] = np.nan
    g = hand(values=values)
    assert g.gaps[0].worst == 3.0 and g.gaps[0].num_evaluations == 3
    values[:, 0] = np.nan
    assert [one.domain for one in hand(values=values).gaps] == ["code"]
    json.dumps(g.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": [0, 0, *STEPS[2:]]}, "must rise; give each once"),
        ({"ends": [45]}, r"stage ends \[45\] must rise, be evaluated"),
        ({"ends": [80, 40]}, "must rise, be evaluated"),
        ({"trained": [{"en": 1}, {"de": 1}, {"fr": 1}]}, "trained domain 'de', which is not"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        hand(**changes)
    assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=13, max_size=13),
    st.floats(-3, 3),
    st.sampled_from([1, 2, 4]),
)
def test_properties(losses, shift, every):
    values = np.array([losses, losses[::-1], losses]).T / 8.0
    g = hand(values=values)
    for one in g.gaps:
        assert one.gap >= one.lasting and one.regained >= 0
        assert (one.recovery_steps == 0) == (one.gap <= 0)
        if one.recovery_steps:
            assert one.worst_step < one.recovery_steps <= 40
    # A constant on all losses moves no difference, and rises with every average.
    moved = hand(values=values + shift)
    assert [one.gap for one in moved.gaps] == pytest.approx([one.gap for one in g.gaps])
    assert moved.anytime == pytest.approx(g.anytime + shift)
    # Looking less often finds no deeper gap.
    seen = slice(None, None, every)
    coarse = hand(steps=STEPS[seen], values=values[seen])
    for fine, rough in zip(g.gaps, coarse.gaps, strict=True):
        assert rough.gap <= fine.gap
    assert values[0, 0] == losses[0] / 8.0  # the input is as it was


def test_docstring_examples_are_true():
    assert doctest.testmod(lcl.evals.stability_gap).failed == 0
