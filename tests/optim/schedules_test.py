"""Every knee of every schedule: the step before, the step itself, the step after."""

from __future__ import annotations

import math

import numpy as np
import optax
import pytest

from lcl.optim import (
    constant,
    cosine,
    infinite,
    inverse_sqrt,
    repeated_cosine,
    wsd,
    wsd_s,
)

PEAK, CONST, FINAL = 1e-3, 2e-4, 1e-5
WARMUP, COOLDOWN, START, ANNEAL = 10, 20, 100, 40


def rates(schedule, steps):
    return np.array([float(schedule(step)) for step in steps])


@pytest.fixture(scope="module")
def schedule():
    return infinite(
        peak=PEAK,
        constant=CONST,
        final=FINAL,
        warmup_steps=WARMUP,
        cooldown_steps=COOLDOWN,
        anneal_start=START,
        anneal_steps=ANNEAL,
    )


def closed_form(n: int) -> float:
    settled = WARMUP + COOLDOWN
    if n <= WARMUP:
        return PEAK * n / WARMUP
    if n <= settled:
        return CONST + (PEAK - CONST) / 2 * (1 + math.cos(math.pi * (n - WARMUP) / COOLDOWN))
    if n <= START:
        return CONST
    return CONST * (FINAL / CONST) ** (min(n - START, ANNEAL) / ANNEAL)


@pytest.mark.parametrize("knee", [0, WARMUP, WARMUP + COOLDOWN, START, START + ANNEAL])
def test_infinite_around_every_knee(schedule, knee):
    steps = [n for n in (knee - 1, knee, knee + 1) if n >= 0]
    np.testing.assert_allclose(rates(schedule, steps), [closed_form(n) for n in steps], rtol=1e-5)


def test_infinite_reaches_final_and_stays(schedule):
    """2503.02844's re-implementation divides by t_a + N_d and never gets there."""
    np.testing.assert_allclose(rates(schedule, [START + ANNEAL, 10**6]), FINAL, rtol=1e-5)


def test_infinite_without_anneal_has_no_end():
    schedule = infinite(
        peak=PEAK, constant=CONST, final=FINAL, warmup_steps=WARMUP, cooldown_steps=COOLDOWN
    )
    np.testing.assert_allclose(rates(schedule, [30, 31, 10**7]), CONST, rtol=1e-6)


@pytest.mark.parametrize("shape", ["cosine", "linear", "inverse_sqrt"])
def test_cooldown_shapes_fall_from_peak_to_constant(shape):
    schedule = infinite(
        peak=PEAK, constant=CONST, final=FINAL, warmup_steps=0, cooldown_steps=50, cooldown=shape
    )
    curve = rates(schedule, range(0, 51))
    assert curve[0] == pytest.approx(PEAK, rel=1e-5)
    assert curve[-1] == pytest.approx(CONST, rel=1e-5)
    assert np.all(np.diff(curve) < 0)
    middle = {
        "cosine": (PEAK + CONST) / 2,
        "linear": (PEAK + CONST) / 2,
        "inverse_sqrt": PEAK
        + (CONST - PEAK) * (1 / math.sqrt(6) - 1) / (1 / math.sqrt(11) - 1),  # x = 1/2, s = 10
    }[shape]
    assert curve[25] == pytest.approx(middle, rel=1e-5)


def test_cosine_and_constant_knees():
    schedule = cosine(peak=PEAK, final=FINAL, warmup_steps=10, total_steps=110)
    middle = (PEAK + FINAL) / 2
    np.testing.assert_allclose(
        rates(schedule, [0, 5, 10, 60, 110, 111]),
        [0, PEAK / 2, PEAK, middle, FINAL, FINAL],
        rtol=1e-4,
        atol=1e-12,
    )
    np.testing.assert_allclose(rates(constant(rate=0.3, warmup_steps=3), [0, 3, 99]), [0, 0.3, 0.3])


def test_repeated_cosine_equals_optax_sgdr():
    ours = repeated_cosine(peak=PEAK, final=FINAL, warmup_steps=10, cycle_steps=50)
    cycle = {
        "init_value": 0.0,
        "peak_value": PEAK,
        "warmup_steps": 10,
        "decay_steps": 50,
        "end_value": FINAL,
    }
    peer = optax.sgdr_schedule([cycle] * 3)
    steps = [0, 1, 9, 10, 11, 49, 50, 51, 59, 60, 61, 99, 100, 101, 149]
    np.testing.assert_allclose(rates(ours, steps), rates(peer, steps), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(rates(ours, [50 * 9 + 30]), rates(ours, [30]))  # for ever


def test_inverse_sqrt_around_its_knee():
    schedule = inverse_sqrt(peak=PEAK, warmup_steps=16)
    want = [PEAK * min(n / 16, math.sqrt(16 / max(n, 1))) for n in (0, 15, 16, 17, 64, 1600)]
    np.testing.assert_allclose(rates(schedule, [0, 15, 16, 17, 64, 1600]), want, rtol=1e-5)
    slow = inverse_sqrt(peak=PEAK, warmup_steps=0, timescale=100)
    np.testing.assert_allclose(rates(slow, [0, 100]), [PEAK, PEAK / math.sqrt(2)], rtol=1e-5)


DECAYS = {
    "exponential": lambda x: PEAK * (FINAL / PEAK) ** x,
    "linear": lambda x: PEAK + (FINAL - PEAK) * x,
    "cosine": lambda x: FINAL + (PEAK - FINAL) / 2 * (1 + math.cos(math.pi * x)),
    "sqrt": lambda x: FINAL + (PEAK - FINAL) * (1 - math.sqrt(x)),
    "inverse": lambda x: 1 / ((1 - x) / PEAK + x / FINAL),
}


@pytest.mark.parametrize("decay", DECAYS)
def test_wsd_around_every_knee(decay):
    schedule = wsd(
        peak=PEAK, final=FINAL, warmup_steps=10, decay_start=100, decay_steps=20, decay=decay
    )
    steps = [0, 9, 10, 11, 99, 100, 101, 110, 119, 120, 121, 10**6]
    want = [
        PEAK * n / 10 if n < 10 else DECAYS[decay](min(max(n - 100, 0), 20) / 20) for n in steps
    ]
    np.testing.assert_allclose(rates(schedule, steps), want, rtol=1e-4)


def test_wsd_without_a_decay_has_no_end():
    schedule = wsd(peak=PEAK, final=FINAL, warmup_steps=0)
    np.testing.assert_allclose(rates(schedule, [0, 10**7]), PEAK, rtol=1e-6)


def test_wsd_s_goes_on_at_its_peak_from_the_decayed_state():
    schedule = wsd_s(
        peak=PEAK,
        final=FINAL,
        warmup_steps=10,
        decay_ends=[60, 100],
        decay_steps=20,
        decay="linear",
    )
    steps = [9, 10, 40, 41, 50, 59, 60, 61, 80, 81, 90, 100, 101, 10**6]
    fall = DECAYS["linear"]
    want = [PEAK * 0.9, PEAK, PEAK, fall(1 / 20), fall(0.5), fall(19 / 20), FINAL, PEAK, PEAK]
    want += [fall(1 / 20), fall(0.5), FINAL, PEAK, PEAK]
    np.testing.assert_allclose(rates(schedule, steps), want, rtol=1e-4)


@pytest.mark.parametrize(
    "build, names",
    [
        (
            lambda: repeated_cosine(peak=1, final=0.1, warmup_steps=5, cycle_steps=5),
            "cycle_steps=5",
        ),
        (lambda: inverse_sqrt(peak=1, warmup_steps=0), "timescale"),
        (lambda: wsd(peak=1, final=0.1, warmup_steps=0, decay="cubic"), "'cubic'"),
        (lambda: wsd(peak=1, final=0.1, warmup_steps=5, decay_start=9), "decay_steps >= 1"),
        (
            lambda: wsd(peak=1, final=0.1, warmup_steps=5, decay_start=4, decay_steps=3),
            "the stable phase only at 5",
        ),
        (
            lambda: wsd_s(peak=1, final=0.1, warmup_steps=5, decay_ends=[20, 30], decay_steps=12),
            "the stable phase only at 20",
        ),
        (lambda: wsd_s(peak=1, final=0.1, warmup_steps=5, decay_ends=[], decay_steps=2), "empty"),
        (lambda: infinite(peak=0, constant=1, final=1, warmup_steps=0, cooldown_steps=0), "peak=0"),
        (
            lambda: infinite(
                peak=1, constant=1, final=1, warmup_steps=5, cooldown_steps=5, anneal_start=9
            ),
            "anneal_steps",
        ),
        (
            lambda: infinite(
                peak=1,
                constant=1,
                final=1,
                warmup_steps=5,
                cooldown_steps=5,
                anneal_start=9,
                anneal_steps=3,
            ),
            "step 10",
        ),
        (
            lambda: infinite(
                peak=1, constant=1, final=1, warmup_steps=0, cooldown_steps=0, cooldown="cubic"
            ),
            "'cubic'",
        ),
        (lambda: infinite(peak=1, constant=1, final=1, warmup_steps=-1, cooldown_steps=0), "-1"),
        (lambda: cosine(peak=1, final=0.1, warmup_steps=10, total_steps=10), "total_steps=10"),
    ],
)
def test_bad_schedules_are_refused_in_one_line(build, names):
    with pytest.raises(ValueError, match=names) as error:
        build()
    assert "\n" not in str(error.value)


BRANCHED = {
    "infinite": lambda start=None, steps=None: infinite(
        peak=PEAK, constant=CONST, final=FINAL, warmup_steps=WARMUP, cooldown_steps=COOLDOWN,
        anneal_start=start, anneal_steps=steps,
    ),
    **{
        f"wsd, {decay}": lambda start=None, steps=None, decay=decay: wsd(
            peak=PEAK, final=FINAL, warmup_steps=WARMUP, decay_start=start, decay_steps=steps,
            decay=decay,
        )
        for decay in DECAYS
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BRANCHED)
def test_an_anneal_is_the_schedules_own_counted_from_its_branch(name):
    """At every step, before, at and after its knees: what the schedule would do from step 57."""
    build = BRANCHED[name]
    branch = build().anneal(ANNEAL)
    steps = np.arange(ANNEAL + 3)
    np.testing.assert_allclose(
        rates(branch, steps), rates(build(57, ANNEAL), 57 + steps), rtol=1e-4
    )
    settled = WARMUP + COOLDOWN if name == "infinite" else WARMUP
    assert build().constant_from == settled and build().constant_until is None
    assert build(57, ANNEAL).constant_until == 57
    level = float(build()(settled))
    assert float(branch(0)) == pytest.approx(level) == pytest.approx(float(build()(10**6)))
    np.testing.assert_allclose(rates(branch, [ANNEAL, ANNEAL + 1]), FINAL, rtol=1e-4)
    assert repr(branch) == f"{build()!r}.anneal(steps={ANNEAL})"


def test_a_constant_rate_anneals_linearly_to_zero():
    schedule = constant(rate=0.4, warmup_steps=3)
    assert schedule.constant_from == 3
    branch = rates(schedule.anneal(4), range(6))
    np.testing.assert_allclose(branch, [0.4, 0.3, 0.2, 0.1, 0, 0], atol=1e-7)


@pytest.mark.parametrize(
    "build, names",
    [
        (
            lambda: cosine(peak=1, final=0.1, warmup_steps=1, total_steps=9).anneal(3),
            "no constant phase",
        ),
        (lambda: inverse_sqrt(peak=1, warmup_steps=5).anneal(3), "no constant phase"),
        (lambda: constant(rate=1.0).anneal(0), "an anneal of 0 steps"),
    ],
)
def test_what_cannot_be_annealed_is_refused_in_one_line(build, names):
    with pytest.raises(ValueError, match=names) as error:
        build()
    assert "\n" not in str(error.value)


def test_constant_is_bound_by_its_name_although_gin_has_one_too():
    from lcl import config

    for scope, rate in (("", 1e-3), ("low/", 1e-4)):
        given = [f"AdamW.schedule = @{scope}constant()", f"{scope}constant.rate = {rate}"]
        loaded = config.load(["configs/runs/quickstart.gin"], given)
        schedule = loaded.train_kwargs(run_dir="x")["optimizer"].schedule
        assert rates(schedule, (0, 500)) == pytest.approx(rate)
