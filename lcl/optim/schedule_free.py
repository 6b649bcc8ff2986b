r"""Schedule-free AdamW: an average takes the place of the learning-rate schedule.

Gradients are taken at y, steps are made by z, and x, a weighted average of z, is what is judged:

    y_t     = (1 - b1) z_t + b1 x_t
    z_{t+1} = z_t - rate_t * (g(y_t) / (sqrt(v_hat) + eps) + weight_decay * y_t)
    x_{t+1} = (1 - c) x_t + c z_{t+1},   c = w_t / (w_1 + ... + w_t),   w = (largest rate so far)^2

"The Road Less Scheduled" (Defazio et al., 2405.15682, equations 3 to 5 and algorithm 1). The
training state's parameters are y, and z lies in the optimizer state; x is computed from the two
where an evaluation asks for it. b1 takes the place of Adam's momentum, so there is no first moment
and memory is AdamW's. The rate warms up and then stays; there is no total, so a stage can always
be added, and no schedule to anneal: the average does what an anneal is for. That is why it is here,
as the baseline of the infinite schedules.

Cost: AdamW's memory and, at each evaluation, one pass that makes x.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lcl.optim.adamw import DECAY_RULES, clip, decay
from lcl.optim.optimizer import Optimizer
from lcl.optim.schedule import Schedule
from lcl.optim.schedules import constant


@dataclasses.dataclass(frozen=True)
class ScheduleFree(Optimizer):
    """`optax.contrib.schedule_free` over Adam without momentum, decay by parameter name.

    Attributes:
      rate: the learning rate after the warm-up; usually larger than a schedule's peak.
      warmup_steps: linear warm-up, 0 or more.
      b1: how far gradients are taken towards the average, in (0, 1).
      b2, eps: Adam's constants; the second moment is float32 and shaped like the parameters.
      weight_decay: decoupled, at y; multiplied by the rate.
      clip_norm: the gradient is scaled down to this global L2 norm; None switches clipping off.
      decay_rules: as `AdamW.decay_rules`.

    >>> optimizer = ScheduleFree(rate=0.1, weight_decay=0.0)
    >>> params = {"dense": {"kernel": jnp.ones(2)}}
    >>> state = optimizer.build().init(params)
    >>> optimizer.eval_params(params, state)["dense"]["kernel"].tolist()
    [1.0, 1.0]
    """

    rate: float
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    decay_rules: Sequence[tuple[str, bool]] = DECAY_RULES

    def __post_init__(self) -> None:
        """Refuses constants outside their range."""
        _ = self.schedule
        if not 0.0 < self.b1 < 1.0:
            raise ValueError(f"ScheduleFree.b1={self.b1} must lie in (0, 1); 0.9 is usual")
        if not 0.0 <= self.b2 < 1.0:
            raise ValueError(f"ScheduleFree.b2={self.b2} must lie in [0, 1)")
        if self.weight_decay < 0.0 or self.eps <= 0.0:
            raise ValueError(
                f"ScheduleFree.weight_decay={self.weight_decay} must be >= 0 and eps={self.eps} > 0"
            )
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise ValueError(
                f"ScheduleFree.clip_norm={self.clip_norm} must be above 0, or None for none"
            )

    @property
    def schedule(self) -> Schedule:
        """The warm-up, and the rate for ever."""
        return constant(rate=self.rate, warmup_steps=self.warmup_steps)

    def build(self) -> optax.GradientTransformation:
        """The chain; its state is Optax's ScheduleFreeState around a dictionary by name."""
        base = optax.named_chain(
            ("clip", clip(self.clip_norm)),
            # Adam whose b1 is 0, without the first moment that would be a copy of the gradient.
            (
                "adam",
                optax.scale_by_rms(self.b2, self.eps, eps_in_sqrt=False, bias_correction=True),
            ),
            ("decay", decay(self.weight_decay, self.decay_rules)),
            ("lr", optax.scale_by_learning_rate(self.schedule)),
        )
        return optax.contrib.schedule_free(base, self.schedule, b1=self.b1)

    def learning_rate(self, opt_state: Any) -> jax.Array:
        """See `Optimizer`: the rate of z's next step."""
        return jnp.asarray(self.schedule(opt_state.base_optimizer_state["lr"].count), jnp.float32)

    def carry_over(
        self, opt_state: Any, fresh_state: Any, *, keep_moments: bool, keep_clock: bool
    ) -> Any:
        """See `Optimizer`; a clock that starts again starts a new average, from y."""
        base = opt_state.base_optimizer_state.copy()
        fresh = fresh_state.base_optimizer_state
        if not keep_moments:
            base["adam"] = fresh["adam"]
        if not keep_clock:
            base["lr"] = fresh["lr"]
        return (opt_state if keep_clock else fresh_state)._replace(base_optimizer_state=base)

    def skipped(self, opt_state: Any) -> Any:
        """See `Optimizer`."""
        base = opt_state.base_optimizer_state
        clock = base["lr"]._replace(count=base["lr"].count + 1)
        return opt_state._replace(
            step_count=opt_state.step_count + 1, base_optimizer_state=base | {"lr": clock}
        )

    def moved(self, params: Any, opt_state: Any) -> Any:
        """See `Optimizer`; a new average begins where the transform has put the parameters."""
        return opt_state._replace(
            z=jax.tree.map(lambda p, z: p.astype(z.dtype), params, opt_state.z),
            weight_sum=jnp.zeros_like(opt_state.weight_sum),
        )

    @property
    def changes_eval_params(self) -> bool:
        """See `Optimizer`."""
        return True

    def eval_params(self, params: Any, opt_state: Any) -> Any:
        """See `Optimizer`: x, the average."""
        return optax.contrib.schedule_free_eval_params(opt_state, params)

    def annealed(self, anneal_steps: int) -> ScheduleFree:
        """Refuses: there is nothing to anneal."""
        raise ValueError(
            f"ScheduleFree has no schedule to anneal over {anneal_steps} steps: its evaluations "
            "judge the average already; leave HeldOut.branches out"
        )

    def constant_from(self) -> int:
        """Refuses: see `annealed`."""
        raise ValueError(
            "ScheduleFree has nothing to branch from: its evaluations judge the average already; "
            "leave HeldOut.branches out"
        )
