"""What a step costs, in process-CPU seconds: how runs of equal seconds are told their lengths.

    round 0   concat  masked  best-fit  32 64 128 256 512     one step of each shape, one arm after
    round 1   concat  masked  best-fit  32 64 128 256 512     the other, so that a busy moment of
    ...                                                       the machine meets all of them
    median over rounds -> seconds of a step of each arm and shape

Seconds are those that the process's threads spent computing (`time.process_time`), not those on the
wall: on a machine that others use, wall time says how long one waited for them. On an idle machine
the two differ by how well a step uses the cores.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lcl.assembly import assemble

Shape = tuple[int, int]


class StepCost(NamedTuple):
    """Steps of one shape (B, T): process-CPU seconds of each, how many a run has."""

    shape: Shape
    seconds: float
    steps: int


def step_costs(
    settings: Mapping[str, Mapping[str, Any]], *, rounds: int = 9, warm: int = 2
) -> dict[str, list[StepCost]]:
    """Process-CPU seconds of one training step, measured in turns.

    Args:
      settings: arm -> arguments of `train` (run_dir aside).
      rounds: measured rounds; the median counts.
      warm: rounds before them that do not.

    Returns:
      arm -> one StepCost a shape, longest rows first. The seconds are those of the step
      with its batch made and put on the device.
    """
    arms = {}
    for arm, arguments in settings.items():
        names = ("seed", "model", "data", "stages", "optimizer", "objective", "mesh", "evaluation")
        run = assemble(**{name: arguments[name] for name in (*names, "guard")})
        first_steps = run.stream.first_steps(0)
        arms[arm] = [run, run.train_step(run.spans[0]), run.init_state(), first_steps]
    seconds: dict[str, dict[Shape, list[float]]] = {
        arm: {shape: [] for shape in first_steps} for arm, (_, _, _, first_steps) in arms.items()
    }
    for number in range(warm + rounds):
        for arm, parts in arms.items():
            run, step_fn, _, first_steps = parts
            for shape, step in first_steps.items():
                begin = time.process_time()
                batch = run.put(run.stream.batch(step), step)
                parts[2], metrics = step_fn(parts[2], batch)
                jax.block_until_ready((parts[2], metrics))
                if number >= warm:
                    seconds[arm][shape].append(time.process_time() - begin)
    costs = {}
    for arm, by_shape in seconds.items():
        stream = arms[arm][0].stream
        counts = collections.Counter(stream.batch_shape(t) for t in range(stream.num_steps))
        costs[arm] = [
            StepCost(shape, float(np.median(found)), counts[shape])
            for shape, found in by_shape.items()
        ]
    return costs


def mean_seconds(costs: Sequence[StepCost]) -> float:
    """Seconds of a step at a run's own mix of shapes."""
    return sum(c.seconds * c.steps for c in costs) / sum(c.steps for c in costs)


def steps_within(budget: float, costs: Sequence[StepCost]) -> int:
    """How many steps fit into a budget of seconds; at least 1.

    >>> steps_within(6.0, [StepCost((1, 8), 2.0, 1), StepCost((2, 4), 1.0, 3)])  # 1.25 s on average
    4
    """
    return max(1, int(budget / mean_seconds(costs)))
