"""The loss matrix against matrices worked by hand."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lcl.evals.loss_matrix
from lcl.evals.loss_matrix import SIGNS, LossMatrix, format_loss

#        en   code  fr
HAND = [
    [5.0, 6.0, 7.0],  # start
    [2.0, 5.0, 6.0],  # after en
    [3.0, 1.0, 6.5],  # after code
    [2.5, 1.75, 4.0],  # after fr
]
DOMAINS = ["en", "code", "fr"]
ONE_EACH = [{"en": 1.0}, {"code": 1.0}, {"fr": 1.0}]


def hand(**changes) -> LossMatrix:
    return LossMatrix(
        **{"values": HAND, "domains": DOMAINS, "stages": DOMAINS, "trained": ONE_EACH, **changes}
    )


def test_hand_made_3x3():
    m = hand()
    assert m.learned == {"en": -3.0, "code": -5.0, "fr": -3.0}
    assert m.forgetting == {"en": 0.5, "code": 0.75, "fr": None}
    assert m.retained == {"en": 2.5, "code": 1.75, "fr": 4.0}
    assert m.backward == {"en": 0.5, "code": 0.75, "fr": None}
    assert m.forward == {"en": None, "code": -1.0, "fr": -0.5}
    assert m.bwt == pytest.approx((0.5 + 0.75) / 2)
    assert m.fwt == pytest.approx((-1.0 - 0.5) / 2)
    assert m.mean_forgetting == pytest.approx(0.625)
    assert m.mean_learned == pytest.approx(-11 / 3)
    assert m.mean_retained == pytest.approx(8.25 / 3)
    assert m.home_stage == {"en": 1, "code": 2, "fr": 3}


def test_the_minimum_leaves_out_the_last_stage_so_an_improvement_shows():
    values = [[5, 5, 5], [2, 5, 5], [3, 2, 5], [1, 2, 2]]
    m = hand(values=values)
    # en got BETTER in the last stage, 2 -> 1; a minimum over i <= T would say 0.
    assert m.forgetting["en"] == -1.0
    assert m.forgetting["code"] == 0.0


def test_forgetting_compares_with_the_best_earlier_value_not_the_diagonal():
    values = [[5, 5, 5], [3, 5, 5], [2, 2, 5], [4, 2, 2]]
    m = hand(values=values)
    assert m.forgetting["en"] == 2.0  # best was after stage 2
    assert m.backward["en"] == 1.0  # against the diagonal


def test_one_stage_has_no_forgetting_and_no_transfer():
    m = LossMatrix([[5.0, 6.0], [2.0, 3.0]], ["en", "fr"], ["joint"], [{"en": 0.5, "fr": 0.5}])
    assert m.forgetting == {"en": None, "fr": None}
    assert (m.bwt, m.fwt, m.mean_forgetting) == (None, None, None)
    assert m.learned == {"en": -3.0, "fr": -3.0}
    assert m.mean_retained == 2.5


def test_before_any_stage_has_ended():
    m = LossMatrix([[5.0, 6.0]], ["en", "fr"], [], [])
    assert m.learned == {"en": None, "fr": None}
    assert m.retained == {"en": 5.0, "fr": 6.0}
    assert m.forgetting == {"en": None, "fr": None}
    assert "start" in m.table()


def test_mixtures_read_the_diagonal_where_a_domain_had_its_largest_share():
    m = hand(
        stages=["warm", "mid", "final"],
        trained=[{"en": 1.0}, {"code": 0.8, "en": 0.2}, {"fr": 0.8, "en": 0.1, "code": 0.1}],
    )
    assert m.home_stage == {"en": 1, "code": 2, "fr": 3}
    assert m.bwt == hand().bwt and m.learned == hand().learned
    # Only fr and code had a stage before their first training.
    assert m.forward == {"en": None, "code": -1.0, "fr": -0.5}
    table = m.table()
    assert "*2.000" in table and "+3.000" in table and "+ = also trained it" in table


def test_a_domain_trained_in_two_stages_takes_the_later_of_equal_shares():
    m = LossMatrix(
        [[5, 5], [2, 4], [3, 1], [1.5, 2]], ["en", "fr"], ["a", "b", "c"], [["en"], ["fr"], ["en"]]
    )
    assert m.home_stage == {"en": 3, "fr": 2}
    assert m.learned == {"en": -3.5, "fr": -4.0}
    assert m.backward == {"en": None, "fr": 1.0}
    assert m.forgetting == {"en": -0.5, "fr": 1.0}  # en: 1.5 against the best earlier, 2


def test_never_trained_domains_are_named_and_change_no_average():
    wide = [[*row, extra] for row, extra in zip(HAND, [8.0, 7.0, 7.5, 7.75], strict=True)]
    m = LossMatrix(wide, [*DOMAINS, "de"], DOMAINS, ONE_EACH)
    assert m.never_trained == ("de",)
    assert m.learned["de"] is None
    assert m.forgetting["de"] == 0.75
    for name in ("bwt", "fwt", "mean_learned", "mean_forgetting", "mean_retained"):
        assert getattr(m, name) == getattr(hand(), name), name
    assert "de°" in m.table() and "° = no stage so far trained it" in m.table()


def test_inputs_are_never_changed_and_the_matrix_is_read_only():
    values = np.array(HAND)
    trained = np.array([[2.0, 0, 0], [0, 3.0, 0], [0, 0, 1.0]])
    before = values.copy(), trained.copy()
    m = hand(values=values, trained=trained)
    m.table(), m.to_dict()
    np.testing.assert_array_equal(values, before[0])
    np.testing.assert_array_equal(trained, before[1])
    values[0, 0] = 99
    assert m.values[0, 0] == 5.0
    with pytest.raises(ValueError):
        m.values[0, 0] = 1


@settings(max_examples=50, deadline=None)
@given(data=st.data(), num_stages=st.integers(1, 4), num_domains=st.integers(1, 5))
def test_relabelling_permutes(data, num_stages, num_domains):
    loss = st.floats(0, 10, allow_nan=False)
    values = np.array(
        data.draw(
            st.lists(
                st.lists(loss, min_size=num_domains, max_size=num_domains),
                min_size=num_stages + 1,
                max_size=num_stages + 1,
            )
        )
    )
    trained = np.array(
        data.draw(
            st.lists(
                st.lists(
                    st.sampled_from([0.0, 0.25, 1.0]), min_size=num_domains, max_size=num_domains
                ),
                min_size=num_stages,
                max_size=num_stages,
            )
        )
    )
    order = data.draw(st.permutations(range(num_domains)))
    domains = [f"d{j}" for j in range(num_domains)]
    stages = [f"s{i}" for i in range(num_stages)]
    one = LossMatrix(values, domains, stages, trained)
    two = LossMatrix(values[:, order], [domains[j] for j in order], stages, trained[:, order])
    for name in ("learned", "forgetting", "retained", "backward", "forward", "home_stage"):
        assert getattr(one, name) == getattr(two, name), name
    for name in ("bwt", "fwt", "mean_learned", "mean_forgetting", "mean_retained"):
        assert getattr(one, name) == pytest.approx(getattr(two, name)), name


@settings(max_examples=50, deadline=None)
@given(shift=st.floats(-3, 3))
def test_a_constant_added_to_a_column_moves_only_what_is_retained(shift):
    values = np.array(HAND)
    values[:, 1] += shift
    m = hand(values=values)
    assert m.learned["code"] == pytest.approx(-5.0)
    assert m.forgetting["code"] == pytest.approx(0.75)
    assert m.retained["code"] == pytest.approx(1.75 + shift)


def eval_line(kind, index, values, step=0):
    return {
        "step": step,
        "stage_index": index,
        "stage": "x",
        "kind": kind,
        "domains": {
            d: {"nats_per_token": v, "bits_per_byte": v / 2, "tokens": 9, "bytes": 9}
            for d, v in values.items()
        },
    }


def test_from_evals_reads_start_and_stage_ends_of_a_half_finished_run():
    lines = [
        eval_line("start", 0, {"en": 5.0, "code": 6.0}),
        eval_line("interval", 0, {"en": 3.0, "code": 6.0}, 5),
        eval_line("stage_end", 0, {"en": 2.0, "code": 5.0}, 10),
        eval_line("interval", 1, {"en": 2.2, "code": 4.0}, 15),
    ]
    m = LossMatrix.from_evals(lines, ["one", "two"], [{"en": 1.0}, {"code": 1.0}])
    assert m.stages == ("one",) and m.domains == ("en", "code")
    np.testing.assert_array_equal(m.values, [[5.0, 6.0], [2.0, 5.0]])
    assert m.never_trained == ("code",)
    bits = LossMatrix.from_evals(
        lines, ["one", "two"], [{"en": 1.0}, {"code": 1.0}], unit="bits_per_byte"
    )
    assert bits.unit == "bits/byte" and bits.values[1, 0] == 1.0


def test_columns_follow_the_order_of_training_so_that_the_diagonal_runs_down():
    line = eval_line("start", 0, {"a": 1.0, "b": 1.0, "z": 1.0})
    m = LossMatrix.from_evals([line], ["s", "t"], [{"z": 1.0}, {"a": 0.3, "b": 0.7}])
    assert m.domains == ("z", "b", "a")


def test_cells_not_measured_are_dashes_not_numbers():
    m = hand(values=[[np.nan] * 3, *HAND[1:]])  # no evaluation at the start
    assert m.learned == {"en": None, "code": None, "fr": None}
    assert m.forgetting["en"] == 0.5
    assert m.fwt is None and m.mean_learned is None
    assert "–" in m.table() and "nan" not in m.table()
    assert m.to_dict()["values"][0] == [None, None, None]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"values": HAND[:3]}, "(3, 3)"),
        ({"domains": ["en", "en", "fr"]}, "twice"),
        ({"trained": [{"english": 1}, {}, {}]}, "'english'"),
        ({"trained": [{"en": 1}]}, "one entry a stage"),
        ({"trained": [{"en": -1}, {}, {}]}, "not negative"),
        ({"values": np.full((4, 3), np.inf)}, "infinite"),
    ],
)
def test_bad_input_is_one_line(changes, said):
    with pytest.raises(ValueError) as error:
        hand(**changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_signs_are_printed_and_true():
    assert SIGNS in hand().table()
    assert hand(values=HAND).mean_forgetting > 0  # this run forgot, and SIGNS says "> 0 = forgot"
    assert "forgetting > 0 = forgot" in SIGNS
    assert format_loss(-0.0001, signed=True) == "0.000"


def test_lines_of_the_table_align_for_long_names():
    m = hand(domains=["en", "libreoffice-help-fr", "fr"], trained=[{"en": 1}, {}, {"fr": 1}])
    rows = m.table(signs=False).splitlines()
    assert len({len(r) for r in (rows[0], *rows[2:6])}) == 1


def test_averages_and_zscl_by_hand():
    m = hand()
    assert m.average == [2.0, (3.0 + 1.0) / 2, pytest.approx((2.5 + 1.75 + 4.0) / 3)]
    assert m.average_incremental == pytest.approx((2.0 + 2.0 + 2.75) / 3)
    # Above the diagonal: code after stage 1; fr after stages 1 and 2.
    transfer = (5.0 + (6.0 + 6.5) / 2) / 2
    every = (2.0 + 3.0 + 2.5 + 5.0 + 1.0 + 1.75 + 6.0 + 6.5 + 4.0) / 9
    assert m.zscl == pytest.approx({"transfer": transfer, "avg": every, "last": 2.75})
    one = LossMatrix([[5.0], [2.0]], ["en"], ["s"], ["en"])
    assert one.zscl == {"transfer": None, "avg": 2.0, "last": 2.0}
    assert one.average_incremental == 2.0
    none = LossMatrix([[5.0]], ["en"], [], [])
    assert none.average_incremental is None and none.average == []
    wide = [[*row, 9.0] for row in HAND]  # a domain that is only watched is in no average
    assert hand(values=wide, domains=[*DOMAINS, "de"]).zscl == m.zscl


def test_intransigence_is_positive_where_the_joint_run_is_better():
    joint = LossMatrix([[5, 6, 7], [1.5, 1.25, 4.0]], DOMAINS, ["all"], [DOMAINS])
    want = {"en": 0.5, "code": -0.25, "fr": 0.0}
    assert hand().intransigence(joint) == want == hand().intransigence(joint.retained)
    assert hand().intransigence({"en": 1.0}) == {"en": 1.0, "code": None, "fr": None}
    bits = LossMatrix([[5.0], [2.0]], ["en"], ["s"], ["en"], unit="bits/byte")
    with pytest.raises(ValueError, match="joint run's losses are in bits/byte, these in nats"):
        hand().intransigence(bits)


def test_branches_have_a_matrix_of_their_own():
    lines = [
        eval_line("start", 0, {"en": 5.0, "fr": 6.0}, 0),
        eval_line("stage_end", 0, {"en": 2.0, "fr": 5.0}, 10),
        eval_line("branch", 0, {"en": 1.5, "fr": 4.5}, 10),
        eval_line("branch", 1, {"en": 9.0, "fr": 9.0}, 15),  # ended within the stage
        eval_line("branch", 1, {"en": 2.25, "fr": 0.5}, 20),
        eval_line("stage_end", 1, {"en": 3.0, "fr": 1.0}, 20),
        eval_line("branch", 2, {"en": 8.0, "fr": 8.0}, 30),  # of a stage that has not ended
    ]
    stages, trained = ["a", "b", "c"], [{"en": 1.0}, {"fr": 1.0}, {"en": 1.0}]
    m = LossMatrix.from_evals(lines, stages, trained, kind="branch")
    np.testing.assert_array_equal(m.values, [[5.0, 6.0], [1.5, 4.5], [2.25, 0.5]])
    assert m.forgetting["en"] == 0.75
    trunk = LossMatrix.from_evals(lines, stages, trained)
    np.testing.assert_array_equal(trunk.values, [[5.0, 6.0], [2.0, 5.0], [3.0, 1.0]])
    some = [line for line in lines if (line["kind"], line["stage_index"]) != ("branch", 0)]
    m = LossMatrix.from_evals(some, stages, trained, kind="branch")
    assert np.isnan(m.values[1]).all() and m.retained == {"en": 2.25, "fr": 0.5}
    with pytest.raises(ValueError, match="kind 'interval' has no row a stage"):
        LossMatrix.from_evals(lines, stages, trained, kind="interval")


def test_docstring_examples_are_true():
    assert doctest.testmod(lcl.evals.loss_matrix).failed == 0
