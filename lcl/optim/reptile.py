r"""Reptile: every k updates, go back most of the way to where the last k began.

Fast weights theta are trained by any optimizer; slow weights phi are where the window began. With
t counting the updates of a window:

    theta <- theta + u(gradient)                            an ordinary update of the inner chain
    t = k:   phi   <- phi + eps * (theta - phi)             the sync
             theta <- phi

        phi ---------------- eps of the way ----> phi'
          \                                      theta'
           \__ u1 __ u2 __ ... __ uk __ theta        the rest of the way is given up

"First-order meta-learning" (Nichol et al., 1803.02999, algorithm 1); the optimisation half of MER
(Riemer et al., 1810.11910) and, with replay, of "Revisiting Replay and Gradient Alignment for
Continual Pre-Training" (2508.01908): k = 500, eps = 0.1. In expectation over the window's batches
(1803.02999, section 5) the direction phi' - phi is that of their mean loss plus a term which grows
the inner products of their gradients, of size k (k - 1) / 2 * rate: alignment between batches of
one window, and of no others. The same update is Lookahead (1907.08610), whose Optax form is the
oracle of our test; that one turns the parameters into a pair, which checkpoints, evaluations and
sharding would all have to know of.

Cost. Memory: one more copy of the parameters in float32, sharded like them, nothing more. Compute:
one pass over parameters and slow weights a step (it is fused with the update, and chooses by
`where`), and about 4 FLOPs a parameter where a step costs 6 a parameter and *token*. No collective.

What it moves. The update of the *whole* chain, learning rate and weight decay included, goes
through here, and what is moved are the parameters of the training state: float32, the masters of
any bfloat16 compute. That has to be said because in the paper's released code (a GPT-NeoX fork) the
sync loads interpolated weights into the bfloat16 module, while the optimizer keeps float32 masters
of its own and at its next step writes them over the module: as released, a sync lives for one
forward and backward. Its default step is also 0.01 where the paper says 0.1, its flag `reptile` is
never read, it interpolates at iteration 0 too, and it copies the state twice on the host each time.

The learning rate alone can imitate it: small eps with nothing else changed is mostly a slower run.
Compare with a lower-learning-rate run at equal learned loss before you believe in a gain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lcl.optim.optimizer import Optimizer


class ReptileState(NamedTuple):
    """What Reptile remembers.

    Attributes:
      inner: state of the chain that trains the fast weights.
      slow: float32 tree shaped and sharded like the parameters: where this window began.
      since_sync: int32 scalar, updates of this window so far, 0 .. every - 1.
    """

    inner: Any
    slow: Any
    since_sync: jax.Array


def reptile(
    inner: optax.GradientTransformation,
    *,
    every: int,
    step_size: float,
    reset_inner: bool = False,
    sync_at_stage_end: bool = True,
    reset_fn: Callable[[Any, Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps a whole chain, learning rate included; nothing may come after it.

    Args:
      inner: the chain that makes the fast weights' updates.
      every: k, updates from one sync to the next.
      step_size: eps in (0, 1]; 1 leaves the inner chain as it is.
      reset_inner: reset the inner state at each sync. The papers do not.
      sync_at_stage_end: a call of `update(..., stage_end=True)` syncs too, wherever the window is.
        (`lcl.train` asks `Reptile.at_stage_end` instead, once the last update is made.)
      reset_fn: what a reset leaves, (inner state, fresh inner state) -> inner state; None: the
        fresh one whole, which sets a schedule back to its start.

    Returns:
      The transformation. Its `update` needs `params`, and passes other extra arguments on.

    Raises:
      ValueError: a window or a step that is none.

    >>> chain = reptile(optax.sgd(1.0), every=2, step_size=0.25)
    >>> weight = jnp.array(0.0)
    >>> state, seen = chain.init(weight), []
    >>> for _ in range(4):
    ...     update, state = chain.update(jnp.array(-1.0), state, weight)
    ...     weight = optax.apply_updates(weight, update)
    ...     seen.append(float(weight))
    >>> seen  # 0 + 1, then a quarter of the way to 2; 0.5 + 1, a quarter of the way to 2.5
    [1.0, 0.5, 1.5, 1.0]
    """
    _check(every, step_size)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> ReptileState:
        return ReptileState(inner.init(params), _float32(params), jnp.zeros((), jnp.int32))

    def update(
        updates: Any,
        state: ReptileState,
        params: Any = None,
        *,
        stage_end: jax.typing.ArrayLike = False,
        **extra: Any,
    ) -> tuple[Any, ReptileState]:
        if params is None:
            raise ValueError(
                "reptile's update needs the parameters: chain.update(u, state, params)"
            )
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        sync = state.since_sync + 1 >= every
        if sync_at_stage_end:
            sync = sync | jnp.asarray(stage_end, bool)
        fast = jax.tree.map(lambda p, u: p.astype(jnp.float32) + u, params, updates)
        slow = _where(sync, _pull(state.slow, fast, step_size), state.slow)
        # From the new slow weights, not from what they were made of: each array is then written
        # in its own place, and no second copy is alive beside it.
        updates = jax.tree.map(
            lambda p, u, s: jnp.where(sync, (s - p).astype(u.dtype), u), params, updates, slow
        )
        if reset_inner:
            fresh = inner.init(params)
            reset = fresh if reset_fn is None else reset_fn(inner_state, fresh)
            inner_state = _where(sync, reset, inner_state)
        since_sync = jnp.where(sync, 0, state.since_sync + 1)
        return updates, ReptileState(inner_state, slow, since_sync)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class Reptile(Optimizer):
    """An optimizer whose fast weights are pulled back to slow ones every so many updates.

    Between two syncs the parameters are the fast weights, and so is what an evaluation there sees:
    choose `HeldOut.every_steps` a multiple of `every`. At a stage's end (and so before the
    evaluation that counts) the window is closed by a sync, and the next stage opens a new one. A
    step that is left out is no update: the window is then closed one step later.

    Attributes:
      inner: the optimizer of the fast weights, its schedule and weight decay included.
      every: k, updates from one sync to the next; the paper's 500.
      step_size: eps in (0, 1]; the paper's 0.1.
      reset_inner: reset the inner moments at each sync (the learning-rate clock goes on).
      sync_at_stage_end: close the window at a stage's end; False lets it reach over the border.

    >>> from lcl.optim import AdamW, constant
    >>> Reptile(AdamW(schedule=constant(rate=1e-3)), every=10).step_size
    0.1
    """

    inner: Optimizer
    every: int = 500
    step_size: float = 0.1
    reset_inner: bool = False
    sync_at_stage_end: bool = True

    def __post_init__(self) -> None:
        """Refuses what is no window or step, and an inner optimizer with an average of its own."""
        _check(self.every, self.step_size)
        if not isinstance(self.inner, Optimizer):
            raise ValueError(f"Reptile.inner={self.inner!r} is no optimizer; bind @AdamW()")
        if self.inner.changes_eval_params:
            # A sync would move the trained point away from under the average that belongs to it.
            raise ValueError(
                f"Reptile.inner={type(self.inner).__name__} judges other parameters than it "
                "trains, and a sync moves only those; use AdamW inside"
            )

    def build(self) -> optax.GradientTransformationExtraArgs:
        """See `reptile`."""

        def reset(state: Any, fresh: Any) -> Any:
            return self.inner.carry_over(state, fresh, keep_moments=False, keep_clock=True)

        return reptile(
            self.inner.build(),
            every=self.every,
            step_size=self.step_size,
            reset_inner=self.reset_inner,
            sync_at_stage_end=self.sync_at_stage_end,
            reset_fn=reset,
        )

    def learning_rate(self, opt_state: ReptileState) -> jax.Array:
        """The inner optimizer's: what the fast weights' next update uses."""
        return self.inner.learning_rate(opt_state.inner)

    def carry_over(
        self,
        opt_state: ReptileState,
        fresh_state: ReptileState,
        *,
        keep_moments: bool,
        keep_clock: bool,
    ) -> ReptileState:
        """See `Optimizer`; a reset of the moments opens a new window where the stage starts."""
        inner = self.inner.carry_over(
            opt_state.inner, fresh_state.inner, keep_moments=keep_moments, keep_clock=keep_clock
        )
        return (opt_state if keep_moments else fresh_state)._replace(inner=inner)

    def skipped(self, opt_state: ReptileState) -> ReptileState:
        """See `Optimizer`; the window waits."""
        return opt_state._replace(inner=self.inner.skipped(opt_state.inner))

    @property
    def changes_at_stage_end(self) -> bool:
        """See `Optimizer`."""
        return self.sync_at_stage_end or self.inner.changes_at_stage_end

    def at_stage_end(self, params: Any, opt_state: ReptileState) -> tuple[Any, ReptileState]:
        """See `Optimizer`; closes a window that is open, and leaves a closed one alone."""
        params, inner = self.inner.at_stage_end(params, opt_state.inner)
        opt_state = opt_state._replace(inner=inner)
        if not self.sync_at_stage_end:
            return params, opt_state
        is_open = opt_state.since_sync > 0
        pulled = _pull(opt_state.slow, _float32(params), self.step_size)
        slow = _where(is_open, pulled, opt_state.slow)
        if self.reset_inner:
            fresh = self.inner.build().init(params)
            reset = self.inner.carry_over(inner, fresh, keep_moments=False, keep_clock=True)
            inner = _where(is_open, reset, inner)
        params = jax.tree.map(lambda p, s: jnp.where(is_open, s.astype(p.dtype), p), params, slow)
        return params, ReptileState(inner, slow, jnp.zeros_like(opt_state.since_sync))

    def moved(self, params: Any, opt_state: ReptileState) -> ReptileState:
        """See `Optimizer`; a new window begins where the transform has put the parameters."""
        return ReptileState(
            self.inner.moved(params, opt_state.inner),
            _float32(params),
            jnp.zeros_like(opt_state.since_sync),
        )

    def annealed(self, anneal_steps: int) -> Reptile:
        """See `Optimizer`; the syncs go on."""
        return dataclasses.replace(self, inner=self.inner.annealed(anneal_steps))

    def constant_from(self) -> int:
        """See `Optimizer`."""
        return self.inner.constant_from()

    def constant_until(self) -> int | None:
        """See `Optimizer`."""
        return self.inner.constant_until()


def _check(every: int, step_size: float) -> None:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"Reptile.every={every!r} must be a whole number of updates, 1 or more")
    if not 0.0 < step_size <= 1.0:
        raise ValueError(
            f"Reptile.step_size={step_size} must lie in (0, 1]: 0 would learn nothing, and 1 is "
            "the inner optimizer alone"
        )


def _float32(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)


def _pull(slow: Any, fast: Any, step_size: float) -> Any:
    return jax.tree.map(lambda s, f: s + step_size * (f - s), slow, fast)


def _where(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
