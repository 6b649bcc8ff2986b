"""AdamW as one Optax chain: clip, Adam, decoupled weight decay by parameter name, learning rate.

The chain is named (`optax.named_chain`), so its state is a dictionary and a stage can keep or
reset each part by name: `opt_state["adam"]` holds the moments, `opt_state["lr"]` the clock.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from lcl.optim.optimizer import Optimizer
from lcl.optim.schedule import Schedule, anneal, constant_phase

# The first pattern found in a parameter's path decides whether it decays. Everything a matrix
# product uses does; gains and biases set a scale that decay would fight.
DECAY_RULES: tuple[tuple[str, bool], ...] = (
    (r"(norm|scale|bias)", False),
    (r"(kernel|embedding)", True),
)


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """AdamW with gradient clipping and one learning-rate schedule.

        update = -lr(clock) * (m_hat / (sqrt(v_hat) + eps) + weight_decay * parameter)

    Attributes:
      schedule: learning rate as a function of the clock (`lcl.optim.schedules`).
      b1, b2, eps: Adam's constants; moments are float32 and shaped like the parameters.
      weight_decay: decoupled; multiplied by the learning rate (Loshchilov & Hutter, 1711.05101).
      clip_norm: the gradient is scaled down to this global L2 norm; None switches clipping off.
      decay_rules: (regular expression, decays?) pairs; the first that is found in a parameter's
        path decides. A parameter that no rule names is an error: nothing decays by accident.

    >>> import jax.numpy as jnp
    >>> from lcl.optim.schedules import constant
    >>> chain = AdamW(schedule=constant(rate=0.1), weight_decay=0.0).build()
    >>> params = {"dense": {"kernel": jnp.ones(2)}}
    >>> updates, _ = chain.update(params, chain.init(params), params)
    >>> [round(float(u), 4) for u in updates["dense"]["kernel"]]
    [-0.1, -0.1]
    """

    schedule: Schedule
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    decay_rules: Sequence[tuple[str, bool]] = DECAY_RULES

    def __post_init__(self) -> None:
        """Refuses constants outside their range."""
        if not callable(self.schedule):
            raise ValueError(
                f"AdamW.schedule={self.schedule!r} is not a schedule; bind @infinite() or @cosine()"
            )
        for name in ("b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"AdamW.{name}={getattr(self, name)} must lie in [0, 1)")
        if self.weight_decay < 0.0 or self.eps <= 0.0:
            raise ValueError(
                f"AdamW.weight_decay={self.weight_decay} must be >= 0 and eps={self.eps} > 0"
            )
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise ValueError(f"AdamW.clip_norm={self.clip_norm} must be above 0, or None for none")

    def build(self) -> optax.GradientTransformation:
        """The chain; its state is the dictionary `{"clip", "adam", "decay", "lr"}`."""
        return optax.named_chain(
            ("clip", clip(self.clip_norm)),
            ("adam", optax.scale_by_adam(self.b1, self.b2, self.eps)),
            ("decay", decay(self.weight_decay, self.decay_rules)),
            ("lr", optax.scale_by_learning_rate(self.schedule)),
        )

    def learning_rate(self, opt_state: Any) -> jax.Array:
        """The rate that the next update will use: float32 scalar, traced or not."""
        return jax.numpy.asarray(self.schedule(opt_state["lr"].count), jax.numpy.float32)

    def carry_over(
        self, opt_state: Any, fresh_state: Any, *, keep_moments: bool, keep_clock: bool
    ) -> Any:
        """See `Optimizer`: the moments go with their bias-correction count, the clock alone."""
        kept = opt_state.copy()
        if not keep_moments:
            kept["adam"] = fresh_state["adam"]
        if not keep_clock:
            kept["lr"] = fresh_state["lr"]
        return kept

    def skipped(self, opt_state: Any) -> Any:
        """See `Optimizer`: the moments stay as they are."""
        clock = opt_state["lr"]
        return opt_state | {"lr": clock._replace(count=clock.count + 1)}

    def annealed(self, anneal_steps: int) -> AdamW:
        """See `Optimizer`."""
        return dataclasses.replace(self, schedule=anneal(self.schedule, anneal_steps))

    def constant_from(self) -> int:
        """See `Optimizer`."""
        return constant_phase(self.schedule)[0]

    def constant_until(self) -> int | None:
        """See `Optimizer`."""
        return constant_phase(self.schedule)[1]


def clip(norm: float | None) -> optax.GradientTransformation:
    """Scales the gradient down to this global L2 norm; None leaves it."""
    return optax.identity() if norm is None else optax.clip_by_global_norm(norm)


def decay(rate: float, rules: Sequence[tuple[str, bool]]) -> optax.GradientTransformation:
    """Decoupled weight decay of the parameters that `decay_mask` chooses."""
    return optax.add_decayed_weights(rate, mask=lambda params: decay_mask(params, rules))


def decay_mask(params: Any, rules: Sequence[tuple[str, bool]] = DECAY_RULES) -> Any:
    """Which parameters decay, as a tree of bools shaped like `params`.

    Args:
      params: a parameter tree; only its paths are looked at.
      rules: see `AdamW.decay_rules`.

    Raises:
      ValueError: a parameter that no rule names.

    >>> decay_mask({"mlp": {"kernel": 0.0}, "norm": {"scale": 0.0}})
    {'mlp': {'kernel': True}, 'norm': {'scale': False}}
    """
    compiled = [(re.compile(pattern), decays) for pattern, decays in rules]

    def decides(path: tuple[Any, ...], _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, decays in compiled:
            if pattern.search(name):
                return decays
        raise ValueError(
            f"no weight-decay rule names the parameter {name!r}; "
            f"add a (pattern, decays) pair to AdamW.decay_rules"
        )

    return jax.tree_util.tree_map_with_path(decides, params)
