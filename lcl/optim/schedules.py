"""Learning-rate schedules: plain functions of the step, composed from Optax.

A schedule is a function `step -> learning rate`. An infinite schedule takes no total: a stage can
always be added behind it. What a stage does with the clock (goes on, or starts again at zero) is
the stage's business (`lcl.stages.Stage.clock`), not the schedule's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from lcl.optim.schedule import Curve, Phased, schedule_of

# How the infinite schedule goes from its peak to its constant phase; x in [0, 1] is the progress.
# The names are what the curves are; the paper's released code calls the linear one "constant".
_INVERSE_SQRT_TIMESCALE = 10.0


@schedule_of
def infinite(
    *,
    peak: float,
    constant: float,
    final: float,
    warmup_steps: int,
    cooldown_steps: int,
    anneal_start: int | None = None,
    anneal_steps: int | None = None,
    cooldown: str = "cosine",
) -> Phased:
    r"""The infinite schedule: warm-up, cool-down, constant for as long as one likes, anneal.

        peak      /\
                 /  \
        constant      `-----------------.
                /                        \
        0, final                           `-----
              warm-up cool-down constant   anneal

    With N_w = warmup_steps, N_c = N_w + cooldown_steps, N_d = anneal_start, t_a = anneal_steps:

        n <= N_w:        peak * n / N_w
        N_w < n <= N_c:  constant + (peak - constant) * h((n - N_w) / (N_c - N_w))
        N_c < n <= N_d:  constant
        n > N_d:         constant * (final / constant) ** ((n - N_d) / t_a), then `final`

    Args:
      peak: learning rate at the end of the warm-up.
      constant: learning rate of the constant phase.
      final: learning rate at the end of the anneal, N_d + t_a; above zero, since the decay is
        exponential.
      warmup_steps: N_w >= 0.
      cooldown_steps: N_c - N_w >= 0.
      anneal_start: N_d, or None for never (the default: the schedule has no end).
      anneal_steps: t_a >= 1; needed with anneal_start.
      cooldown: "cosine" (the paper's equation), "linear" or "inverse_sqrt" (its variants), the
        shape h with h(0) = 1 and h(1) = 0.

    Returns:
      The schedule.

    Raises:
      ValueError: an impossible knee or rate.

    Source: Beyond Cosine Decay (2503.02844), equation 1. A re-implementation divides by
    t_a + N_d in the last line; we take t_a, so that the rate at N_d + t_a is exactly `final`.

    >>> rate = infinite(peak=1e-3, constant=5e-4, final=1e-5, warmup_steps=10, cooldown_steps=10)
    >>> [round(float(rate(n)), 6) for n in (0, 5, 10, 15, 20, 10**6)]
    [0.0, 0.0005, 0.001, 0.00075, 0.0005, 0.0005]
    """
    _check_rates(peak=peak, constant=constant, final=final)
    _check_counts(warmup_steps=warmup_steps, cooldown_steps=cooldown_steps)
    settled = warmup_steps + cooldown_steps  # N_c
    pieces: list[Curve] = [
        optax.linear_schedule(0.0, peak, warmup_steps) if warmup_steps else _constant(peak),
        _cooldown(peak, constant, cooldown_steps, cooldown),
        _constant(constant),
    ]
    knees = [warmup_steps, settled]
    if anneal_start is not None:
        if not anneal_steps or anneal_steps < 1:
            raise ValueError(
                f"infinite schedule: anneal_start={anneal_start} needs anneal_steps >= 1, "
                f"got {anneal_steps}"
            )
        if anneal_start < settled:
            raise ValueError(
                f"infinite schedule: anneal_start={anneal_start} lies before the constant phase; "
                f"start at step {settled} (warmup_steps + cooldown_steps) or later"
            )
        pieces.append(
            optax.exponential_decay(
                constant,
                transition_steps=anneal_steps,
                decay_rate=final / constant,
                end_value=final,
            )
        )
        knees.append(anneal_start)
    return Phased(
        optax.join_schedules(pieces, knees),
        constant_from=settled,
        constant_until=anneal_start,
        fall=lambda x: _DECAYS["exponential"](constant, final, x),
    )


@schedule_of
def cosine(*, peak: float, final: float, warmup_steps: int, total_steps: int) -> Curve:
    """Linear warm-up to `peak`, then half a cosine down to `final` at `total_steps`, then `final`.

    The schedule to compare with: it must know its total, so a stage added later starts at `final`.

    Raises:
      ValueError: rates that are not positive, or a warm-up that does not fit into the total.

    >>> rate = cosine(peak=1.0, final=0.1, warmup_steps=10, total_steps=110)
    >>> [round(float(rate(n)), 3) for n in (0, 10, 60, 110, 500)]
    [0.0, 1.0, 0.55, 0.1, 0.1]
    """
    _check_rates(peak=peak, final=final)
    _check_counts(warmup_steps=warmup_steps)
    if total_steps <= warmup_steps:
        raise ValueError(
            f"cosine schedule: total_steps={total_steps} must exceed warmup_steps={warmup_steps}"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else peak,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=total_steps,
        end_value=final,
    )


@schedule_of
def repeated_cosine(*, peak: float, final: float, warmup_steps: int, cycle_steps: int) -> Curve:
    r"""Warm up, decay along half a cosine, and again from the start, every `cycle_steps`, for ever.

        peak    /\      /\      /\
               /  `.   /  `.   /  `.
        final /     `./     `./     `.        re-warming and re-decaying: one cycle a stage

    What "Simple and Scalable Strategies to Continually Pre-train" (2403.08763) does at every new
    dataset, and the schedule that an infinite one is compared with. Each cycle starts at zero, as
    the first does; a cycle's last step is the one before its end, so the rate `final` is only
    approached (`optax.sgdr_schedule`, of which this is the equal-cycle case, does the same).

    Args:
      peak: learning rate at the end of each warm-up.
      final: learning rate at the end of each cycle.
      warmup_steps: steps of a cycle that warm up, 0 or more.
      cycle_steps: length of a cycle, above warmup_steps.

    Raises:
      ValueError: rates that are not positive, or a warm-up that does not fit into the cycle.

    >>> rate = repeated_cosine(peak=1.0, final=0.1, warmup_steps=10, cycle_steps=110)
    >>> [round(float(rate(n)), 3) for n in (0, 10, 60, 110, 120, 10 * 110 + 60)]
    [0.0, 1.0, 0.55, 0.0, 1.0, 0.55]
    """
    _check_rates(peak=peak, final=final)
    _check_counts(warmup_steps=warmup_steps)
    if cycle_steps <= warmup_steps:
        raise ValueError(
            f"repeated_cosine schedule: cycle_steps={cycle_steps} must exceed "
            f"warmup_steps={warmup_steps}"
        )
    cycle = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else peak,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=cycle_steps,
        end_value=final,
    )
    return lambda step: cycle(jnp.asarray(step) % cycle_steps)


@schedule_of
def inverse_sqrt(*, peak: float, warmup_steps: int, timescale: int | None = None) -> Curve:
    """Linear warm-up to `peak`, then peak * sqrt(timescale / (timescale + n - warmup_steps)).

    It never ends and never settles: the reciprocal square root of T5 (1910.10683, section 3.1.2)
    and of "Scaling Vision Transformers" (2106.04560, section 3.5, whose timescale it has).

    Args:
      peak: learning rate at the end of the warm-up.
      warmup_steps: 0 or more.
      timescale: steps after the warm-up at which the rate is peak / sqrt(2); None is warmup_steps,
        which makes it peak * sqrt(warmup_steps / n), T5's.

    Raises:
      ValueError: a rate that is not positive, or no timescale (a warm-up of 0 gives none).

    >>> rate = inverse_sqrt(peak=1.0, warmup_steps=100)
    >>> [round(float(rate(n)), 3) for n in (0, 50, 100, 400, 10_000)]
    [0.0, 0.5, 1.0, 0.5, 0.1]
    """
    _check_rates(peak=peak)
    _check_counts(warmup_steps=warmup_steps)
    scale = warmup_steps if timescale is None else timescale
    if scale < 1:
        raise ValueError(
            f"inverse_sqrt schedule: timescale={timescale} with warmup_steps={warmup_steps}: "
            "give a timescale of at least 1 step"
        )

    def fall(step: jax.typing.ArrayLike) -> jax.Array:
        return peak * jnp.sqrt(scale / (scale + jnp.asarray(step, jnp.float32)))

    if not warmup_steps:
        return fall
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), fall], [warmup_steps]
    )


@schedule_of
def wsd(
    *,
    peak: float,
    final: float,
    warmup_steps: int,
    decay_start: int | None = None,
    decay_steps: int | None = None,
    decay: str = "exponential",
) -> Phased:
    r"""Warm-up, stable, decay: `peak` for as long as one likes, then down to `final`.

        peak      .-----------------.
                 /                   \
        0, final                      `-----
              warm-up    stable     decay

    Args:
      peak: learning rate of the stable phase.
      final: learning rate from decay_start + decay_steps on.
      warmup_steps: 0 or more.
      decay_start: first step of the decay, or None for never (the default: it has no end).
      decay_steps: length of the decay; needed with decay_start.
      decay: "exponential" (MiniCPM's), "linear", "cosine", "sqrt" (1 - sqrt(x), 2405.18392) or
        "inverse" (1 / rate goes linearly, 2410.05192, which calls it the decay of WSD-S).

    Raises:
      ValueError: an impossible knee, rate or shape.

    Source: MiniCPM (2404.06395), section 4.2.

    >>> rate = wsd(peak=1.0, final=0.01, warmup_steps=10, decay_start=100, decay_steps=20)
    >>> [round(float(rate(n)), 3) for n in (0, 5, 10, 100, 110, 120, 500)]
    [0.0, 0.5, 1.0, 1.0, 0.1, 0.01, 0.01]
    """
    ends = () if decay_start is None else (decay_start + (decay_steps or 0),)
    curve = _wsd("wsd", peak, final, warmup_steps, ends, decay_steps, decay, resume=False)
    return Phased(
        curve,
        constant_from=warmup_steps,
        constant_until=decay_start,
        fall=lambda x: _DECAYS[decay](peak, final, x),
    )


@schedule_of
def wsd_s(
    *,
    peak: float,
    final: float,
    warmup_steps: int,
    decay_ends: Sequence[int],
    decay_steps: int,
    decay: str = "inverse",
) -> Curve:
    r"""WSD simplified: decays before each checkpoint one wants, and goes on from the decayed state.

        peak      .--------.   .--------.   .-----
                 /          \  |         \  |
        final   /            `-'          `-'            no branch: the same run, again at `peak`

    "Understanding Warmup-Stable-Decay Learning Rates" (2410.05192): a decayed checkpoint is worth
    as much as a branch's, and what the decay learned is not thrown away.

    Args:
      peak, final, warmup_steps: as in `wsd`.
      decay_ends: the steps at which a decay has reached `final`, ascending; the rate is `peak`
        again one step later.
      decay_steps: length of each decay.
      decay: as in `wsd`.

    Raises:
      ValueError: decays that overlap each other or the warm-up.

    >>> rate = wsd_s(peak=1.0, final=0.1, warmup_steps=10, decay_ends=[100, 200], decay_steps=18)
    >>> [round(float(rate(n)), 3) for n in (10, 82, 91, 100, 101, 182, 200, 201)]
    [1.0, 1.0, 0.182, 0.1, 1.0, 1.0, 0.1, 1.0]
    """
    if not decay_ends:
        raise ValueError("wsd_s schedule: decay_ends is empty; name the steps to decay towards")
    return _wsd("wsd_s", peak, final, warmup_steps, decay_ends, decay_steps, decay, resume=True)


# Shapes of a decay: from `peak` at x = 0 to `final` at x = 1.
_DECAYS: dict[str, Callable[[float, float, jax.Array], jax.Array]] = {
    "exponential": lambda peak, final, x: peak * (final / peak) ** x,
    "linear": lambda peak, final, x: peak + (final - peak) * x,
    "cosine": lambda peak, final, x: final + (peak - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * x)),
    "sqrt": lambda peak, final, x: final + (peak - final) * (1.0 - jnp.sqrt(x)),
    "inverse": lambda peak, final, x: 1.0 / ((1.0 - x) / peak + x / final),
}


def _wsd(
    name: str,
    peak: float,
    final: float,
    warmup_steps: int,
    decay_ends: Sequence[int],
    decay_steps: int | None,
    decay: str,
    *,
    resume: bool,
) -> Curve:
    """Warm-up, then `peak` but for the decays; `resume`: at `peak` again after each."""
    _check_rates(peak=peak, final=final)
    _check_counts(warmup_steps=warmup_steps)
    if decay not in _DECAYS:
        raise ValueError(
            f"{name} schedule: decay={decay!r} is unknown; use one of {', '.join(_DECAYS)}"
        )
    if decay_ends and (decay_steps is None or decay_steps < 1):
        raise ValueError(f"{name} schedule: a decay needs decay_steps >= 1, got {decay_steps}")
    before = warmup_steps
    for end in decay_ends:
        if end - (decay_steps or 0) < before:
            raise ValueError(
                f"{name} schedule: the decay that ends at step {end} begins at "
                f"{end - (decay_steps or 0)}, but the stable phase only at {before}; decay later "
                "or shorter"
            )
        before = end
    rise = optax.linear_schedule(0.0, peak, warmup_steps) if warmup_steps else _constant(peak)
    ends, fall = jnp.asarray(tuple(decay_ends), jnp.int32), _DECAYS[decay]

    def curve(step: jax.typing.ArrayLike) -> jax.Array:
        now = jnp.asarray(step, jnp.int32)
        rate = jnp.where(now < warmup_steps, rise(now), peak)
        if not decay_ends:
            return rate
        # The first end that is not past; once all are, the last (or none, where one goes on).
        place = jnp.searchsorted(ends, now)
        left = ends[jnp.minimum(place, len(decay_ends) - 1)] - now
        assert decay_steps is not None
        x = jnp.clip(1.0 - left / decay_steps, 0.0, 1.0)
        decaying = x > 0.0
        if resume:
            decaying = decaying & (place < len(decay_ends))
        return jnp.where(decaying, fall(peak, final, x), rate)

    return curve


@schedule_of
def constant(*, rate: float, warmup_steps: int = 0) -> Phased:
    """Linear warm-up to `rate`, then `rate` for ever: the lower-learning-rate control.

    It has no floor of its own, so a branch anneals linearly to zero (`Schedule.anneal`).

    >>> schedule = constant(rate=2.0, warmup_steps=4)
    >>> [float(schedule(n)) for n in (0, 1, 4, 100)]
    [0.0, 0.5, 2.0, 2.0]
    """
    _check_rates(rate=rate)
    _check_counts(warmup_steps=warmup_steps)
    curve = _constant(rate)
    if warmup_steps:
        rise = optax.linear_schedule(0.0, rate, warmup_steps)
        curve = optax.join_schedules([rise, curve], [warmup_steps])
    return Phased(curve, warmup_steps, None, fall=lambda x: rate * (1.0 - x))


def _cooldown(peak: float, floor: float, steps: int, shape: str) -> Curve:
    """From `peak` at 0 to `floor` at `steps` along one of the three shapes."""
    shapes: dict[str, Callable[[jax.Array], jax.Array]] = {
        "cosine": lambda x: 0.5 * (1.0 + jnp.cos(jnp.pi * x)),
        "linear": lambda x: 1.0 - x,
        "inverse_sqrt": _inverse_sqrt,
    }
    if shape not in shapes:
        raise ValueError(
            f"infinite schedule: cooldown={shape!r} is unknown; use one of {', '.join(shapes)}"
        )
    height = shapes[shape]

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        progress = jnp.clip(jnp.asarray(step, jnp.float32) / max(steps, 1), 0.0, 1.0)
        return floor + (peak - floor) * height(progress)

    return schedule


def _inverse_sqrt(x: jax.Array) -> jax.Array:
    """1 at x = 0 and 0 at x = 1, falling like an inverse square root in between."""

    def fall(x: jax.typing.ArrayLike) -> jax.Array:
        return 1.0 / jnp.sqrt(1.0 + _INVERSE_SQRT_TIMESCALE * jnp.asarray(x)) - 1.0

    return 1.0 - fall(x) / fall(1.0)


def _constant(rate: float) -> Curve:
    return lambda step: jnp.full(jnp.shape(step), rate, jnp.float32)


def _check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        if not rate > 0.0 or rate == float("inf"):
            raise ValueError(f"learning rate {name}={rate} must be a finite number above zero")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 0 or int(count) != count:
            raise ValueError(f"{name}={count} must be a whole number of steps, zero or more")
