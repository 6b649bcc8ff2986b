"""The bound on programs under way."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from lcl.parallel.run_ahead import RunAhead


class Under:
    """A result that tells when it was waited for."""

    def __init__(self, number: int, waited: list[int]) -> None:
        self.number, self.waited = number, waited

    def block_until_ready(self) -> None:
        self.waited.append(self.number)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_each_start_waits_for_the_one_that_many_before(depth):
    waited: list[int] = []
    ahead = RunAhead(depth)
    for number in range(6):
        ahead.add({"loss": Under(number, waited)})
        assert waited == list(range(max(0, number + 1 - depth)))


def test_a_step_that_was_left_out_counts_and_is_not_waited_for():
    waited: list[int] = []
    ahead = RunAhead(1)
    for started in (Under(0, waited), None, Under(2, waited), jnp.ones(2)):
        ahead.add(started)
    assert waited == [0, 2]
