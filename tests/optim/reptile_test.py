"""Reptile against optax.lookahead, in the run's own step, at its borders, restored and sharded."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcl.assembly import assemble
from lcl.checkpoints import Checkpointer, CheckpointPolicy
from lcl.checkpoints.digest import state_digest
from lcl.models import Decoder
from lcl.objectives import Accumulate, NextToken
from lcl.optim import AdamW, Optimizer, Reptile, constant, infinite, reptile
from lcl.parallel import MeshConfig
from lcl.programs import abstract_step
from lcl.step import make_train_step
from lcl.train import train
from tests import tiny

PARAMS = {
    "embedding": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3),
    "mlp": {"kernel": jnp.full((3, 2), 0.5)},
}
SCHEDULE = infinite(peak=0.1, constant=0.05, final=0.01, warmup_steps=3, cooldown_steps=3)


def adamw(**changes) -> AdamW:
    return AdamW(**({"schedule": SCHEDULE, "clip_norm": 0.5} | changes))


def gradient(params, step):
    return jax.tree.map(lambda p: jnp.cos(3.0 * p + step) * 2.0 - p, params)


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def lookahead(inner, params, every, step_size, gradient_fn, steps):
    """Slow and fast weights after `steps` by Optax's own pair."""
    chain = optax.lookahead(inner, every, step_size)
    pair = optax.LookaheadParams.init_synced(params)
    state = chain.init(pair)

    @jax.jit
    def follow(gradients, state, pair):
        updates, state = chain.update(gradients, state, pair)
        return state, optax.apply_updates(pair, updates)

    for step in range(steps):
        state, pair = follow(gradient_fn(pair.fast, step), state, pair)
    return pair


@pytest.mark.parametrize("clip_norm", [0.5, None])
@pytest.mark.parametrize("every, step_size", [(5, 0.3), (4, 0.1), (1, 0.5), (3, 1.0)])
def test_equals_lookahead_over_many_syncs(every, step_size, clip_norm):
    optimizer = adamw(clip_norm=clip_norm)
    chain = Reptile(optimizer, every=every, step_size=step_size).build()
    params, state = PARAMS, chain.init(PARAMS)
    syncs = 0
    for step in range(23):
        updates, state = chain.update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
        syncs += int(state.since_sync) == 0
    assert syncs >= 4
    pair = lookahead(optimizer.build(), PARAMS, every, step_size, gradient, 23)
    close(params, pair.fast, atol=1e-6)
    close(state.slow, pair.slow, atol=1e-6)


# ---- in the run's own step -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "byte"
    tiny.stores(path)
    return path


def assembled(root, **changes):
    settings = tiny.settings(root, "unused", **changes)
    for name in ("run_dir", "checkpoint", "logging"):
        settings.pop(name)
    return assemble(**settings)


def host_step(run):
    """The run's step, undonated, and the batches of its first stage."""
    step = make_train_step(
        Decoder(run.model), run.objective, run.optimizer, run.chain, run.num_sources
    )
    return jax.jit(step), [run.put(run.stream.batch(t), t) for t in range(6)]


def test_equals_lookahead_with_accumulated_gradients(root):
    """The whole train step: clipping, decay by name, gradients summed over two pieces."""
    optimizer = Reptile(tiny_adamw(), every=3, step_size=0.25)
    run = assembled(root, optimizer=optimizer, objective=Accumulate(pieces=2))
    step, batches = host_step(run)
    state = start = run.init_state()
    for t in range(10):
        state, _ = step(state, batches[t % 6])

    @jax.jit
    def gradient_at(params, batch):
        return run.objective.value_and_grad(Decoder(run.model), params, batch, run.num_sources)[1]

    pair = lookahead(
        optimizer.inner.build(), start.params, 3, 0.25,
        lambda params, t: gradient_at(params, batches[t % 6]), 10,
    )  # fmt: skip
    # Three syncs; what is left is float32 rounding, blown up by Adam's division where a gradient
    # is almost zero.
    close(state.params, pair.fast, atol=2e-5)
    close(state.opt_state.slow, pair.slow, atol=2e-5)


def tiny_adamw() -> AdamW:
    return AdamW(
        schedule=infinite(peak=1e-2, constant=5e-3, final=1e-4, warmup_steps=2, cooldown_steps=4)
    )


def test_the_sync_moves_the_float32_masters_and_the_next_step_starts_there(root):
    """With bfloat16 compute: the released code's sync is gone after one step, ours is not."""
    optimizer = Reptile(tiny_adamw(), every=2, step_size=0.1)
    model = dataclasses.replace(tiny.MODEL, dtype="bfloat16")
    run = assembled(root, optimizer=optimizer, model=model)
    step, batches = host_step(run)
    inner = optimizer.inner.build()

    @jax.jit
    def inner_step(params, inner_state, batch):
        gradient = jax.grad(run.objective, argnums=1, has_aux=True)
        gradients, _ = gradient(Decoder(run.model), params, batch, run.num_sources)
        updates, _ = inner.update(gradients, inner_state, params)
        return optax.apply_updates(params, updates)

    state = run.init_state()
    for t in range(6):
        before, slow = state, state.opt_state.slow
        fast = inner_step(before.params, before.opt_state.inner, batches[t])
        state, _ = step(state, batches[t])
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        if t % 2 == 0:  # an ordinary update, from where the last sync (if any) has led
            close(state.params, fast, rtol=1e-6, atol=1e-7)
            close(state.opt_state.slow, slow, rtol=0, atol=0)
            continue
        want = jax.tree.map(lambda s, f: s + 0.1 * (f - s), slow, fast)
        close(state.params, want, rtol=1e-6, atol=1e-7)
        close(state.opt_state.slow, want, rtol=1e-6, atol=1e-7)
        # Most moves of this sync are smaller than bfloat16 can hold: the masters have them.
        moved = np.concatenate(
            [np.ravel(a != b) for a, b in zip(*map(jax.tree.leaves, (want, slow)), strict=True)]
        )
        halves = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree) for tree in (want, slow)]
        seen = np.concatenate(
            [np.ravel(a != b) for a, b in zip(*map(jax.tree.leaves, halves), strict=True)]
        )
        assert moved.mean() > 0.5 and seen.mean() < moved.mean()


# ---- borders -------------------------------------------------------------------------------------


def trained(chain, steps):
    params, state = PARAMS, chain.init(PARAMS)
    for step in range(steps):
        updates, state = chain.update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_a_stage_end_closes_an_open_window_and_leaves_a_closed_one():
    optimizer = Reptile(adamw(), every=4, step_size=0.25)
    params, state = trained(optimizer.build(), 6)
    after, flushed = optimizer.at_stage_end(params, state)
    want = jax.tree.map(lambda s, f: s + 0.25 * (f - s), state.slow, params)
    close(after, want, rtol=1e-6)
    close(flushed.slow, after, rtol=0, atol=0)
    assert int(flushed.since_sync) == 0 and int(state.since_sync) == 2
    close(flushed.inner["adam"].mu, state.inner["adam"].mu, rtol=0, atol=0)
    again, same = optimizer.at_stage_end(after, flushed)
    close((again, same.slow), (after, after), rtol=0, atol=0)
    assert optimizer.changes_at_stage_end

    reaching_over = dataclasses.replace(optimizer, sync_at_stage_end=False)
    kept, state_kept = reaching_over.at_stage_end(params, state)
    close((kept, state_kept), (params, state), rtol=0, atol=0)
    assert not reaching_over.changes_at_stage_end


def test_the_last_update_of_a_stage_can_be_told_to_sync():
    """`stage_end=True` in the update gives what `at_stage_end` gives after it."""
    optimizer = Reptile(adamw(), every=10, step_size=0.25)
    chain = optimizer.build()
    params, state = trained(chain, 3)
    updates, told = chain.update(gradient(params, 3), state, params, stage_end=True)
    by_update = optax.apply_updates(params, updates)
    updates, state = chain.update(gradient(params, 3), state, params)
    after, flushed = optimizer.at_stage_end(optax.apply_updates(params, updates), state)
    close(by_update, after, atol=1e-7)
    close(told, flushed, atol=1e-7)

    deaf = reptile(optax.sgd(1.0), every=10, step_size=0.25, sync_at_stage_end=False)
    _, state = deaf.update(PARAMS, deaf.init(PARAMS), PARAMS, stage_end=True)
    assert int(state.since_sync) == 1


def test_a_reset_takes_the_moments_and_leaves_the_clock():
    optimizer = Reptile(adamw(), every=3, step_size=0.5, reset_inner=True)
    chain = optimizer.build()
    _, state = trained(chain, 3)
    assert int(state.inner["adam"].count) == 0 and int(state.inner["lr"].count) == 3
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.inner["adam"].mu))
    params, state = trained(chain, 4)
    assert int(state.inner["adam"].count) == 1 and int(state.inner["lr"].count) == 4
    _, flushed = optimizer.at_stage_end(params, state)
    assert int(flushed.inner["adam"].count) == 0 and int(flushed.inner["lr"].count) == 4
    # Without a rule of its own everything goes, as lookahead's reset_state does.
    peer = optax.lookahead(adamw().build(), 3, 0.5, reset_state=True)
    pair = optax.LookaheadParams.init_synced(PARAMS)
    peer_state = peer.init(pair)
    ours = reptile(adamw().build(), every=3, step_size=0.5, reset_inner=True)
    params, state = PARAMS, ours.init(PARAMS)
    for step in range(8):
        updates, peer_state = peer.update(gradient(pair.fast, step), peer_state, pair)
        pair = optax.apply_updates(pair, updates)
        updates, state = ours.update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
    close(params, pair.fast, atol=1e-6)


@pytest.mark.parametrize("keep_moments", [True, False])
@pytest.mark.parametrize("keep_clock", [True, False])
def test_a_new_stage_keeps_or_resets_each_part(keep_moments, keep_clock):
    optimizer = Reptile(adamw(), every=5, step_size=0.5)
    chain = optimizer.build()
    params, state = trained(chain, 7)
    fresh = chain.init(params)
    after = optimizer.carry_over(state, fresh, keep_moments=keep_moments, keep_clock=keep_clock)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert int(after.inner["lr"].count) == (7 if keep_clock else 0)
    assert int(after.inner["adam"].count) == (7 if keep_moments else 0)
    assert int(after.since_sync) == (2 if keep_moments else 0)
    close(after.slow, state.slow if keep_moments else params, rtol=0, atol=0)


def test_slow_weights_follow_a_transform_and_a_left_out_step_is_no_update():
    optimizer = Reptile(adamw(), every=5, step_size=0.5)
    params, state = trained(optimizer.build(), 7)
    doubled = jax.tree.map(lambda p: 2.0 * p, params)
    moved = optimizer.moved(doubled, state)
    close(moved.slow, doubled, rtol=0, atol=0)
    assert int(moved.since_sync) == 0 and int(moved.inner["lr"].count) == 7
    skipped = optimizer.skipped(state)
    assert int(skipped.since_sync) == 2 and int(skipped.inner["lr"].count) == 8
    assert float(optimizer.learning_rate(skipped)) == pytest.approx(float(SCHEDULE(8)))


def test_a_branch_anneals_the_inner_schedule():
    optimizer = Reptile(adamw(), every=5, step_size=0.5)
    assert optimizer.constant_from() == 6 and optimizer.constant_until() is None
    branch = optimizer.annealed(10)
    assert branch.every == 5 and float(branch.inner.schedule(10)) == pytest.approx(0.01)
    chain = branch.build()
    assert jax.tree.structure(chain.init(PARAMS)) == jax.tree.structure(
        optimizer.build().init(PARAMS)
    )


# ---- a whole run ---------------------------------------------------------------------------------


def advance(run, state, step, until):
    """The loop of lcl/train.py without its logs, from a state to a state."""
    for t in range(step, until):
        span = run.span_at(t)
        if t == span.first_step:
            state = run.enter(span, state)
        state, _ = run.train_step(span)(state, run.put(run.stream.batch(t), t))
        if t + 1 == span.end_step:
            state = run.exit(span, state)
    return state


def test_restored_at_every_step_it_goes_on_alike(root, tmp_path):
    """4 does not divide a stage's 6 steps: windows open, closed by a sync, and by a border."""
    optimizer = Reptile(tiny_adamw(), every=4, step_size=0.3)
    run = assembled(root, optimizer=optimizer)
    end = run.num_steps
    with Checkpointer(tmp_path, CheckpointPolicy(every_steps=1, keep_last=end)) as checkpoints:
        state = run.init_state()
        for step in range(end):
            state = advance(run, state, step, step + 1)
            checkpoints.save(step + 1, state, {"tokens": 0}, blocking=True)
        want = state_digest(state)
        assert int(state.opt_state.since_sync) == 0
        for step in range(1, end):
            restored = checkpoints.restore(run.abstract_state, step).state
            assert state_digest(advance(run, restored, step, end)) == want, (
                f"restored at step {step}"
            )


def test_a_run_with_reptile_resumes_and_names_it_in_its_card(root, tmp_path):
    optimizer = Reptile(tiny_adamw(), every=4, step_size=0.3)
    run_dir = train(**tiny.settings(root, tmp_path / "run", optimizer=optimizer))
    card = (run_dir / "run_card.json").read_text()
    for line in ('"optimizer.every": 4', '"optimizer.inner.b1"', '"optimizer.kind": "Reptile"'):
        assert line in card
    want = (run_dir / "metrics.jsonl").read_text()
    for step in ("00000012", "00000008"):
        (run_dir / "checkpoints" / step).rename(tmp_path / step)
    train(**tiny.settings(root, run_dir, optimizer=optimizer))
    assert (run_dir / "metrics.jsonl").read_text() == want
    with pytest.raises(ValueError, match="optimizer.step_size"):
        other = dataclasses.replace(optimizer, step_size=0.1)
        train(**tiny.settings(root, run_dir, optimizer=other))


SHARDED = """
import jax, numpy as np
from lcl.assembly import named_key
from lcl.data import Batch
from lcl.models import DecoderConfig
from lcl.objectives import NextToken
from lcl.optim import AdamW, Reptile, constant
from lcl.parallel import MeshConfig, rules
from lcl.programs import abstract_step, boxed_state, on_mesh, shardings

model = DecoderConfig(384, num_layers=2, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2)
optimizer = Reptile(AdamW(schedule=constant(rate=1e-2)), every=3, step_size=0.2)
chain = optimizer.build()
random = np.random.default_rng(0)
tokens = random.integers(3, 380, (7, 8, 33)).astype(np.int32)
ends = {}
for name, mesh in {
    "one": MeshConfig().build(jax.devices()[:1]),
    "fsdp 2 x tensor 2 x data 2": MeshConfig(data=2, fsdp=2, tensor=2).build(),
}.items():
    step, (abstract, _) = abstract_step(model, NextToken(), optimizer, mesh, (8, 32))
    with on_mesh(mesh):
        init = lambda key: rules.unbox(boxed_state(model, chain, key))
        state = jax.jit(init, out_shardings=shardings(abstract))(named_key(0, "params"))
        where = [[leaf.sharding for leaf in jax.tree.leaves(tree)]
                 for tree in (state.params, state.opt_state.slow)]
        assert where[0] == where[1], "slow weights lie as the parameters lie"
        for row in tokens:
            ones = np.ones((8, 32), np.int32)
            at = np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32))
            weights = ones.astype(np.float32)
            batch = Batch(row[:, :-1], row[:, 1:], ones, at, weights, 0 * ones, None)
            state, _ = step(state, rules.put_batch(batch, mesh))
    ends[name] = jax.device_get((state.params, state.opt_state.slow))
one, many = ends.values()
worst = max(abs(a - b).max() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many)))
assert worst < 2e-4, worst
print("worst", worst)
"""


def test_sharded_equals_unsharded_and_slow_lies_where_params_lie(run_python):
    assert "worst" in run_python(SHARDED, devices=8)


def test_memory_is_one_more_copy_of_the_parameters():
    mesh = MeshConfig().build(jax.devices()[:1])
    inner = tiny_adamw()
    sizes = []
    for optimizer in (inner, Reptile(inner, every=500)):
        step, (state, batch) = abstract_step(tiny.MODEL, NextToken(), optimizer, mesh, (8, 64))
        with jax.set_mesh(mesh):
            sizes.append(step.lower(state, batch).compile().memory_analysis())
    copy = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    counter = 4
    without, with_reptile = sizes
    assert with_reptile.argument_size_in_bytes - without.argument_size_in_bytes == copy + counter
    assert with_reptile.alias_size_in_bytes - without.alias_size_in_bytes == copy + counter
    assert with_reptile.temp_size_in_bytes <= without.temp_size_in_bytes + 1024


class Averaging(AdamW):
    """AdamW that would be judged by other parameters."""

    changes_eval_params = True


@pytest.mark.parametrize(
    "build, names",
    [
        (lambda: Reptile(adamw(), every=0), "every=0"),
        (lambda: Reptile(adamw(), every=2.5), "every=2.5"),
        (lambda: Reptile(adamw(), step_size=0.0), "step_size=0.0"),
        (lambda: Reptile(adamw(), step_size=1.5), "step_size=1.5"),
        (lambda: Reptile(optax.sgd(1.0)), "@AdamW"),
        (lambda: Reptile(Averaging(schedule=SCHEDULE)), "Averaging"),
    ],
)
def test_bad_settings_are_refused_in_one_line(build, names):
    with pytest.raises(ValueError, match=names) as error:
        build()
    assert "\n" not in str(error.value)


def test_the_protocol_has_answers_for_an_optimizer_without_a_constant_phase():
    assert issubclass(Reptile, Optimizer) and issubclass(AdamW, Optimizer)
    with pytest.raises(ValueError, match="no constant phase"):
        AdamW(schedule=lambda step: 1e-3).constant_from()
    assert AdamW(schedule=constant(rate=1.0, warmup_steps=3)).constant_from() == 3
