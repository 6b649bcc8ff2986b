"""The chain against optax.adamw, its masks, and what a stage border keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcl.optim import AdamW, constant, decay_mask, infinite

PARAMS = {
    "embedding": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3),
    "layers": {"norm": {"scale": jnp.ones(3)}, "mlp": {"kernel": jnp.full((3, 2), 0.5)}},
}


def gradient(step: int):
    return jax.tree.map(lambda p: jnp.cos(p * (step + 1.0)) * 3.0, PARAMS)


def trajectory(chain: optax.GradientTransformation, steps: int):
    params, state = PARAMS, chain.init(PARAMS)
    for step in range(steps):
        updates, state = chain.update(gradient(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_equals_optax_adamw_with_clipping_and_mask():
    schedule = infinite(peak=0.1, constant=0.05, final=0.01, warmup_steps=3, cooldown_steps=3)
    ours, _ = trajectory(AdamW(schedule=schedule, weight_decay=0.2).build(), 10)
    peer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, 0.9, 0.95, 1e-8, weight_decay=0.2, mask=decay_mask(PARAMS)),
    )
    theirs, _ = trajectory(peer, 10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), ours, theirs)


def test_norms_do_not_decay_and_matrices_do():
    chain = AdamW(schedule=constant(rate=0.1), weight_decay=1.0).build()
    still = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = chain.update(still, chain.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["layers"]["norm"]["scale"], 0.0)
    np.testing.assert_allclose(updates["layers"]["mlp"]["kernel"], -0.05)
    np.testing.assert_allclose(updates["embedding"], -0.1 * PARAMS["embedding"], rtol=1e-6)


def test_an_unmatched_parameter_is_an_error():
    with pytest.raises(ValueError, match="'mystery/tensor'"):
        AdamW(schedule=constant(rate=0.1)).build().init({"mystery": {"tensor": jnp.ones(2)}})


@pytest.mark.parametrize("keep_moments", [True, False])
@pytest.mark.parametrize("keep_clock", [True, False])
def test_a_stage_keeps_or_resets_each_part(keep_moments, keep_clock):
    optimizer = AdamW(schedule=constant(rate=0.1))
    chain = optimizer.build()
    params, state = trajectory(chain, 4)
    fresh = chain.init(params)
    after = optimizer.carry_over(state, fresh, keep_moments=keep_moments, keep_clock=keep_clock)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert int(after["lr"].count) == (4 if keep_clock else 0)
    assert int(after["adam"].count) == (4 if keep_moments else 0)
    moments_kept = all(jax.tree.leaves(jax.tree.map(jnp.array_equal, after["adam"], state["adam"])))
    assert moments_kept == keep_moments


def test_the_logged_rate_is_the_rate_used():
    """llm-foundry#194: a resumed run logged one rate and trained with another."""
    schedule = infinite(peak=0.1, constant=0.05, final=0.01, warmup_steps=4, cooldown_steps=4)
    optimizer = AdamW(schedule=schedule, weight_decay=0.0, clip_norm=None)
    chain = optimizer.build()
    state = chain.init(PARAMS)
    for step in range(6):
        logged = float(optimizer.learning_rate(state))
        # With one gradient for all steps, |m_hat / sqrt(v_hat)| is 1 and the update is the rate.
        updates, state = chain.update(gradient(0), state, PARAMS)
        assert float(jnp.abs(updates["embedding"]).max()) == pytest.approx(logged, rel=1e-4)
        assert logged == pytest.approx(float(schedule(step)))


@pytest.mark.parametrize(
    "settings, names",
    [
        ({"schedule": 1e-3}, "0.001"),
        ({"b1": 1.0}, "b1=1.0"),
        ({"weight_decay": -1.0}, "-1.0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, names):
    with pytest.raises(ValueError, match=names) as error:
        AdamW(**({"schedule": constant(rate=0.1)} | settings))
    assert "\n" not in str(error.value)
