"""Equal seconds: how many steps fit into a budget, in closed form."""

from __future__ import annotations

from lcl.papers.cost import StepCost, mean_seconds, steps_within

LONG, SHORT = (1, 8), (2, 4)


def test_one_shape_is_a_division():
    assert steps_within(10.0, [StepCost(LONG, 2.0, 7)]) == 5
    assert steps_within(9.9, [StepCost(LONG, 2.0, 7)]) == 4


def test_shapes_count_by_their_share_of_the_steps():
    """A quarter of the steps cost 2 s and the others 1 s: 1.25 s a step, whatever the length."""
    for few, many in ((1, 3), (50, 150)):
        costs = [StepCost(LONG, 2.0, few), StepCost(SHORT, 1.0, many)]
        assert mean_seconds(costs) == 1.25
        assert steps_within(100.0, costs) == 80


def test_there_is_always_a_step():
    assert steps_within(0.1, [StepCost(LONG, 2.0, 1)]) == 1
