"""Schedule-free AdamW: the average by hand, Optax's own as the peer, borders, and a whole run."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcl.optim import ScheduleFree
from lcl.train import evaluate, train
from tests import tiny

PARAMS = {
    "mlp": {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)},
    "norm": {"scale": jnp.ones(2)},
}


def gradient(params, step):
    return jax.tree.map(lambda p: jnp.cos(3.0 * p + step) * 2.0 - p, params)


def trajectory(chain, steps):
    params, state, zs = PARAMS, chain.init(PARAMS), []
    for step in range(steps):
        updates, state = chain.update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
        zs.append(state.z)
    return params, state, zs


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_at_one_rate_it_judges_the_mean_of_all_steps():
    optimizer = ScheduleFree(rate=0.05, b1=0.8)
    params, state, zs = trajectory(optimizer.build(), 7)
    mean = jax.tree.map(lambda *z: sum(z) / 7, *zs)
    close(optimizer.eval_params(params, state), mean, atol=1e-6)
    between = jax.tree.map(lambda x, z: 0.8 * x + 0.2 * z, mean, zs[-1])
    close(params, between, atol=1e-6)


def test_in_a_warm_up_the_average_is_weighted_by_the_squared_rate():
    optimizer = ScheduleFree(rate=0.08, warmup_steps=4)
    params, state, zs = trajectory(optimizer.build(), 6)
    # Optax weighs step t (from 1) by the largest rate so far, squared: 1 4 9 16 16 16.
    weights = np.array([1, 2, 3, 4, 4, 4]) ** 2
    mean = jax.tree.map(
        lambda *z: sum(w * each for w, each in zip(weights, z, strict=True)) / weights.sum(), *zs
    )
    close(optimizer.eval_params(params, state), mean, atol=1e-6)


def test_equals_optax_schedule_free_adamw():
    ours = ScheduleFree(
        rate=0.05, weight_decay=0.1, clip_norm=None, decay_rules=((".", True),), b2=0.95
    )
    peer = optax.contrib.schedule_free_adamw(0.05, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    params, state, _ = trajectory(ours.build(), 12)
    theirs, their_state, _ = trajectory(peer, 12)
    close(params, theirs, atol=1e-6)
    close(state.z, their_state.z, atol=1e-6)


def test_memory_is_adamws():
    size = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    state = ScheduleFree(rate=0.1).build().init(PARAMS)
    floats = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert floats == 2 * size, "z and the second moment"


@pytest.mark.parametrize("keep_moments", [True, False])
@pytest.mark.parametrize("keep_clock", [True, False])
def test_a_new_stage_keeps_or_resets_each_part(keep_moments, keep_clock):
    optimizer = ScheduleFree(rate=0.05, warmup_steps=2)
    chain = optimizer.build()
    params, state, _ = trajectory(chain, 5)
    fresh = chain.init(params)
    after = optimizer.carry_over(state, fresh, keep_moments=keep_moments, keep_clock=keep_clock)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    base = after.base_optimizer_state
    assert int(base["lr"].count) == (5 if keep_clock else 0)
    assert int(base["adam"].count) == (5 if keep_moments else 0)
    judged = optimizer.eval_params(params, after)
    close(judged, optimizer.eval_params(params, state) if keep_clock else params, atol=1e-6)
    assert float(optimizer.learning_rate(after)) == pytest.approx(0.05 if keep_clock else 0.0)


def test_a_transform_moves_the_average_and_a_left_out_step_only_the_clock():
    optimizer = ScheduleFree(rate=0.05, warmup_steps=20)
    params, state, _ = trajectory(optimizer.build(), 5)
    doubled = jax.tree.map(lambda p: 2.0 * p, params)
    close(optimizer.eval_params(doubled, optimizer.moved(doubled, state)), doubled, rtol=1e-5)
    skipped = optimizer.skipped(state)
    close(skipped.z, state.z, rtol=0, atol=0)
    assert float(optimizer.learning_rate(skipped)) == pytest.approx(0.05 * 6 / 20)


def test_a_run_is_judged_by_its_average_and_resumes(tmp_path):
    root = tmp_path / "byte"
    tiny.stores(root)
    optimizer = ScheduleFree(rate=1e-2, warmup_steps=2)
    run_dir = train(**tiny.settings(root, tmp_path / "run", optimizer=optimizer))
    want = (run_dir / "metrics.jsonl").read_text()
    last = json.loads((run_dir / "evals.jsonl").read_text().splitlines()[-1])
    _, domains = evaluate(**tiny.settings(root, run_dir, optimizer=optimizer))
    assert domains == last["domains"]
    (run_dir / "checkpoints" / "00000012").rename(tmp_path / "gone")
    train(**tiny.settings(root, run_dir, optimizer=optimizer))
    assert (run_dir / "metrics.jsonl").read_text() == want


@pytest.mark.parametrize(
    "build, names",
    [
        (lambda: ScheduleFree(rate=0.0), "rate=0.0"),
        (lambda: ScheduleFree(rate=0.1, warmup_steps=-1), "-1"),
        (lambda: ScheduleFree(rate=0.1, b1=0.0), "b1=0.0"),
        (lambda: ScheduleFree(rate=0.1, b2=1.0), "b2=1.0"),
        (lambda: ScheduleFree(rate=0.1, clip_norm=0.0), "clip_norm=0.0"),
        (lambda: ScheduleFree(rate=0.1).annealed(5), "judge the average"),
        (lambda: ScheduleFree(rate=0.1).constant_from(), "leave HeldOut.branches out"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(build, names):
    with pytest.raises(ValueError, match=names) as error:
        build()
    assert "\n" not in str(error.value)
