r"""Baselines on demand: a run's own configuration without what is being tried.

    stages     |en en en en|fr fr fr + 25% en|       what is tried: an order, replay, a method
    naive      |en en en en|fr fr fr fr      |       the same stages in turn, and no more
    joint      |en fr fr en fr en fr en ...  |       the same new tokens in one stage, from scratch

What forgets is judged between these two: naive is what a method must beat, and joint what no order
of the same data can be expected to (`LossMatrix.intransigence` takes its losses). Both keep model,
data, schedule, evaluations and seed; `lcl train --baseline joint` is the run's configuration, so
changed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lcl.data import Mixture
from lcl.objectives.parts import plain
from lcl.stages import Stage

__all__ = ["BASELINES", "baseline", "joint", "naive"]

BASELINES = ("joint", "naive")
# Of StageData: what all stages must agree on before they can be one.
_ALIKE = ("sequence_length", "packing", "document_mask", "order", "decomposition", "transforms")


def naive(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The same stages without replay and without transforms of the parameters at their ends.

    A stage keeps its steps and its batch size. So it reads the same new tokens where replay was
    added to them, and the same tokens in all where replay took their place (`Replay.mode`): say
    which of the two a comparison holds equal.

    Args:
      stages: a run's.

    Returns:
      Stages of the same names, lengths, moments, clocks and context.

    >>> from lcl.data import Replay, StageData
    >>> data = StageData(Mixture({"en": 1.0}), 64, 8, replay=Replay(0.5))
    >>> naive([Stage("en", data, steps=3)])[0].data.replay is None
    True
    """
    return tuple(
        dataclasses.replace(
            stage,
            data=dataclasses.replace(stage.data, replay=None),
            on_enter=None,
            on_exit=None,
        )
        for stage in stages
    )


def joint(stages: Sequence[Stage], *, name: str = "joint") -> tuple[Stage, ...]:
    """One stage over all that the stages read anew, each domain in proportion to its tokens there.

    Args:
      stages: a run's; alike in row length, packing, masks, order, transforms and context.
      name: of the one stage.

    Returns:
      One stage with the first one's batch size and as many steps as give the same new tokens
      (rounded up to a whole step), from the run's initial weights.

    Raises:
      ValueError: stages that cannot be one, in one line.

    >>> from lcl.data import StageData
    >>> stages = [
    ...     Stage(domain, StageData(Mixture({domain: 1.0}), 64, 8), steps=steps)
    ...     for domain, steps in (("en", 30), ("fr", 10))
    ... ]
    >>> (one,) = joint(stages)
    >>> one.num_steps, one.data.mixture.weights
    (40, {'en': 0.75, 'fr': 0.25})
    """
    if not stages:
        raise ValueError("a joint run of no stages; give at least one")
    first = stages[0]
    rows: dict[str, float] = {}
    for stage in stages:
        _check_alike(first, stage)
        for domain, count in _new_rows(stage).items():
            rows[domain] = rows.get(domain, 0.0) + count
    total = sum(rows.values())
    shares = {domain: count / total for domain, count in sorted(rows.items())}
    block = max(1024, *(math.ceil(1.0 / share) for share in shares.values()))
    data = dataclasses.replace(first.data, mixture=Mixture(shares, block=block), replay=None)
    steps = math.ceil(round(total / data.batch_size, 6))
    return (Stage(name=name, data=data, steps=steps, rope=first.rope),)


def baseline(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `train` for a baseline of a run.

    Args:
      name: "joint" or "naive".
      settings: the run's own arguments of `train`.

    Returns:
      Those of the baseline: other stages, and optimizer and objective without a method around
      them (an optimizer's `inner`, an objective's `objective`). `run_dir` is left for the caller.

    Raises:
      ValueError: an unknown name, or stages that cannot be one.
    """
    if name not in BASELINES:
        raise ValueError(f"baseline {name!r} is unknown; use {' or '.join(BASELINES)}")
    stages = settings["stages"]
    return dict(settings) | {
        "stages": joint(stages) if name == "joint" else naive(stages),
        "optimizer": _plain_optimizer(settings["optimizer"]),
        "objective": plain(settings["objective"]),
    }


def _plain_optimizer(optimizer: Any) -> Any:
    while hasattr(optimizer, "inner"):
        optimizer = optimizer.inner
    return optimizer


def _new_rows(stage: Stage) -> dict[str, float]:
    """New rows of each domain over a stage; of constant weights, as the weights say exactly."""
    data = stage.data
    per_step = data.batch_size
    if data.replay is not None:
        per_step, _ = data.replay.rows_per_step(data.batch_size)
    num_rows = per_step * stage.num_steps
    mixture = data.mixture
    if mixture.subsets:
        part = next(iter(mixture.subsets))
        raise ValueError(
            f"stage {stage.name!r} reads a subset of {part!r}, and a joint run would have to say "
            "of which part; write its one stage out"
        )
    if isinstance(mixture, Mixture):
        total = sum(mixture.weights.values())
        return {domain: num_rows * weight / total for domain, weight in mixture.weights.items()}
    bound = mixture.bind(num_rows, data.sequence_length)
    counts = bound.counts_before(num_rows)
    return dict(zip(bound.domains, map(float, counts), strict=True))


def _check_alike(first: Stage, other: Stage) -> None:
    for field in (*_ALIKE, "rope"):
        of = (first, other) if field == "rope" else (first.data, other.data)
        one, two = (getattr(owner, field) for owner in of)
        if one != two:
            raise ValueError(
                f"a joint run has one {field}, but stage {first.name!r} has {one!r} and stage "
                f"{other.name!r} {two!r}; make them equal, or write its one stage out"
            )
