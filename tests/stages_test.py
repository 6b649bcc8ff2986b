"""Stages: their place on the clock, their policies, and what is refused."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lcl import stages
from lcl.data import Decomposition, Replay
from lcl.optim import AdamW, constant
from lcl.stages import Stage, check_rows_seen, timeline
from tests import tiny

DATA = tiny.stage("alpha").data
REPLAYING = dataclasses.replace(DATA, replay=Replay(0.25, mode="substitute"))


def decomposed(max_log2, **changes):
    """A stage's data in buckets of up to 2 ** max_log2."""
    buckets = Decomposition(min_log2=3, max_log2=max_log2)
    return dataclasses.replace(DATA, decomposition=buckets, sequence_length=2**max_log2, **changes)


def test_timeline_places_stages_one_behind_the_other():
    spans = timeline([Stage("a", DATA, steps=3), Stage("b", DATA, tokens=8 * 64 + 1)])
    assert [(s.index, s.first_step, s.end_step) for s in spans] == [(0, 0, 3), (1, 3, 5)]


@pytest.mark.parametrize("tokens, steps", [(1, 1), (512, 1), (513, 2), (5120, 10)])
def test_tokens_are_rounded_up_to_whole_steps(tokens, steps):
    assert Stage("a", DATA, tokens=tokens).num_steps == steps


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: Stage("", DATA, steps=1), "Stage.name"),
        (lambda: Stage("a", DATA), "steps or tokens"),
        (lambda: Stage("a", DATA, steps=1, tokens=1), "steps or tokens"),
        (lambda: Stage("a", DATA, steps=0), "got 0"),
        (lambda: Stage("a", DATA, steps=1, moments="drop"), "'drop'"),
        (lambda: Stage("a", DATA, steps=1, clock="stop"), "'stop'"),
        (lambda: timeline([]), "no stages"),
        (lambda: timeline([Stage("a", DATA, steps=1)] * 2), "'a'"),
        (lambda: timeline([Stage("a", REPLAYING, steps=1)]), "'a'.*nothing was seen.*replay away"),
        (
            lambda: check_rows_seen([Stage("a", decomposed(5), steps=1)], 64),
            "rows of 64 tokens.*longest bucket has 32.*to 32 or fewer.*max_log2 to 6",
        ),
    ],
)
def test_bad_stages_are_refused_in_one_line(build, named):
    with pytest.raises(ValueError, match=named) as error:
        build()
    assert "\n" not in str(error.value)


def test_rows_that_some_step_trains_may_be_evaluated():
    short, long = Stage("a", decomposed(5), steps=1), Stage("b", decomposed(6), steps=1)
    check_rows_seen([short, long], 64)  # the second stage has them
    check_rows_seen([short], 32)
    check_rows_seen([Stage("a", DATA, steps=1)], 2 * DATA.sequence_length)  # not decomposed
    timeline([Stage("a", REPLAYING, steps=1), Stage("b", REPLAYING, steps=1)])


def test_entering_applies_the_transform_and_the_policy():
    optimizer = AdamW(schedule=constant(rate=0.1))
    chain = optimizer.build()
    params = {"kernel": jnp.ones(3)}
    state = chain.init(params)
    for _ in range(5):
        _, state = chain.update(params, state, params)
    stage = Stage(
        "b",
        DATA,
        steps=1,
        moments="reset",
        on_enter=lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree),
    )
    assert stages.changes_state(stage) and not stages.changes_state(Stage("a", DATA, steps=1))
    after, opt_state = stages.enter(stage, params, state, optimizer, chain)
    assert after["kernel"].tolist() == [2.0, 2.0, 2.0]
    assert not opt_state["adam"].mu["kernel"].any() and int(opt_state["adam"].count) == 0
    assert int(opt_state["lr"].count) == 5, "the clock goes on unless the stage says otherwise"
