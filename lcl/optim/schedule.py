"""What a schedule is: a curve that prints itself, and knows its constant phase if it has one.

The curves are in schedules.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Curve = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]


class Schedule:
    """A curve, step -> learning rate, that prints as the call that made it.

    The run card holds this text, so that two runs with different rates can be told apart.

    Attributes:
      constant_from: first step of the constant phase, from which a branch may be annealed; None:
        there is no such phase.
      constant_until: its last step; None: it never ends.

    >>> from lcl.optim import constant
    >>> constant(rate=0.5)
    constant(rate=0.5, warmup_steps=0)
    """

    def __init__(
        self,
        curve: Curve,
        text: str,
        *,
        constant_from: int | None = None,
        constant_until: int | None = None,
        fall: Callable[[jax.Array], jax.Array] | None = None,
    ) -> None:
        """Wraps `curve`.

        Args:
          curve: step -> rate.
          text: what `repr` gives.
          constant_from, constant_until: see the class.
          fall: the anneal from the constant phase: progress in [0, 1] -> rate.
        """
        assert (constant_from is None) == (fall is None)
        self.constant_from = constant_from
        self.constant_until = constant_until
        self._curve = curve
        self._text = text
        self._fall = fall

    def __call__(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The learning rate at `step` (an int or an integer array): float32 of the same shape."""
        return jnp.asarray(self._curve(step), jnp.float32)

    def __repr__(self) -> str:
        return self._text

    def anneal(self, steps: int) -> Schedule:
        """The way down from the constant phase, counted from 0: what a branch trains with.

        At 0 the rate is still the constant one, at `steps` it is `final` and stays there, exactly
        as the schedule itself would with its anneal starting at the branch.

        Args:
          steps: length of the anneal, at least 1.

        Raises:
          ValueError: no constant phase, or no steps.

        >>> from lcl.optim import infinite
        >>> rate = infinite(peak=1.0, constant=0.1, final=0.001, warmup_steps=5, cooldown_steps=5)
        >>> rate.constant_from, [round(float(rate.anneal(4)(n)), 4) for n in (0, 2, 4, 9)]
        (10, [0.1, 0.01, 0.001, 0.001])
        """
        if self._fall is None:
            raise ValueError(
                f"the schedule {self._text} has no constant phase to anneal from; use infinite, "
                "wsd or constant"
            )
        if steps < 1 or int(steps) != steps:
            raise ValueError(f"an anneal of {steps} steps: give a whole number of at least 1")
        fall = self._fall

        def curve(step: jax.typing.ArrayLike) -> jax.Array:
            return fall(jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0.0, 1.0))

        return Schedule(curve, f"{self._text}.anneal(steps={steps})")


class Phased(NamedTuple):
    """A curve with a constant phase, as the functions of schedules.py hand it to `Schedule`."""

    curve: Curve
    constant_from: int
    constant_until: int | None
    fall: Callable[[jax.Array], jax.Array]


def schedule_of(build: Callable[..., Curve | Phased]) -> Callable[..., Schedule]:
    """Lets `build` return a `Schedule` that remembers its settings, defaults included."""

    @functools.wraps(build)
    def wrapped(**settings: Any) -> Schedule:
        bound = inspect.signature(build).bind(**settings)
        bound.apply_defaults()
        text = ", ".join(f"{name}={value!r}" for name, value in bound.arguments.items())
        text = f"{build.__name__}({text})"
        made = build(**settings)
        if isinstance(made, Phased):
            return Schedule(
                made.curve,
                text,
                constant_from=made.constant_from,
                constant_until=made.constant_until,
                fall=made.fall,
            )
        return Schedule(made, text)

    # What the configuration's type check reads: a call of it gives a Schedule.
    wrapped.__annotations__ = build.__annotations__ | {"return": Schedule}
    signature = inspect.signature(build).replace(return_annotation=Schedule)
    wrapped.__signature__ = signature  # type: ignore[attr-defined]
    return wrapped


def anneal(schedule: Callable[[Any], Any], steps: int) -> Schedule:
    """`schedule.anneal(steps)`, also refusing a function that is no `Schedule` in one line."""
    constant_phase(schedule)
    assert isinstance(schedule, Schedule)
    return schedule.anneal(steps)


def constant_phase(schedule: Callable[[Any], Any]) -> tuple[int, int | None]:
    """First and last step of a schedule's constant phase; None: it has no last.

    Raises:
      ValueError: there is no constant phase.

    >>> from lcl.optim import wsd
    >>> constant_phase(wsd(peak=1.0, final=0.1, warmup_steps=3, decay_start=9, decay_steps=2))
    (3, 9)
    """
    first = getattr(schedule, "constant_from", None)
    if first is None:
        raise ValueError(
            f"the schedule {schedule!r} has no constant phase to branch from; use infinite, wsd or "
            "constant"
        )
    return first, getattr(schedule, "constant_until", None)
