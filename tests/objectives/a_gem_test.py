"""A-GEM's projection against its closed form, on toys and on a decoder; what it refuses."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcl.data import Replay
from lcl.models import Decoder
from lcl.objectives import Accumulate, AGem, NextToken
from lcl.objectives.a_gem import project
from lcl.objectives.parts import both_gradients, dot, new_part
from lcl.train import train
from tests import tiny
from tests.objectives import toy

THETA = {"theta": jnp.array([0.3, -0.2])}


def gradient_of(rows, sources, objective=None):
    objective = AGem(objective=objective or toy.Linear())
    batch = toy.batch(rows, sources)
    value, gradient = jax.jit(lambda p: objective.value_and_grad(None, p, batch, 4))(THETA)
    return value, np.asarray(gradient["theta"])


def test_a_conflict_is_projected_away():
    # New: (1, 0). Replayed: (-1, 1). g . r = -1, r . r = 2, so g' = (1, 0) + (-1, 1) / 2.
    (loss, sums), gradient = gradient_of([[1, 1], [2, 0]], [0, 2])
    np.testing.assert_allclose(gradient, [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(gradient @ toy.VECTORS[2], 0.0, atol=1e-7)
    found = sums["diagnostics"]
    np.testing.assert_allclose(found["gradient_cosine"], -1 / np.sqrt(2), rtol=1e-6)
    assert float(found["gradient_projected"]) == 1.0
    # Loss and sums are the whole batch's, as without the method.
    want, want_sums = toy.Linear()(None, THETA, toy.batch([[1, 1], [2, 0]], [0, 2]), 4)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    for name, value in want_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6)


def test_agreement_leaves_the_new_gradient_alone():
    (_, sums), gradient = gradient_of([[1, 1], [3, 3]], [0, 2])
    np.testing.assert_allclose(gradient, [1.0, 0.0])  # replayed tokens are a reference only
    assert float(sums["diagnostics"]["gradient_projected"]) == 0.0


def test_without_replay_it_is_the_plain_gradient():
    (_, sums), gradient = gradient_of([[1, 2], [3, 0]], [0, 1])
    np.testing.assert_allclose(gradient, toy.VECTORS[[1, 2, 3]].mean(0), rtol=1e-6)
    assert all(np.isnan(value) for value in sums["diagnostics"].values())


def test_accumulation_goes_inside():
    rows, sources = [[1, 1], [2, 0], [3, 4], [4, 2]], [0, 2, 1, 3]
    (loss, _), whole = gradient_of(rows, sources)
    (again, _), pieces = gradient_of(rows, sources, Accumulate(2, toy.Linear()))
    np.testing.assert_allclose(pieces, whole, rtol=1e-6)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert AGem(objective=Accumulate(2)).pieces == 2
    with pytest.raises(ValueError, match="put Accumulate inside"):
        Accumulate(2, AGem())


def test_a_tree_is_projected_as_one_vector():
    g = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([-4.0])}
    r = {"a": jnp.array([2.0, 1.0]), "b": jnp.array([1.0])}
    projected, _ = project(g, r)  # g . r = -2, r . r = 6
    np.testing.assert_allclose(projected["a"], [1 + 2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(projected["b"], [-4 + 1 / 3], rtol=1e-6)
    assert abs(float(dot(projected, r))) < 1e-6


def test_in_a_run(tmp_path):
    root = tmp_path / "byte"
    tiny.stores(root)
    settings = tiny.settings(root, tmp_path / "run", objective=AGem())
    lines = (train(**settings) / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert not any("gradient_cosine" in line for line in lines[:6]), "nothing replayed yet"
    assert all(-1 <= line["gradient_cosine"] <= 1 for line in lines[6:])
    assert {line["gradient_projected"] for line in lines[6:]} <= {0.0, 1.0}
    card = json.loads((tmp_path / "run" / "run_card.json").read_text())
    assert card["identity"]["objective.kind"] == "AGem"

    without = (tiny.stage("alpha"), tiny.stage("beta"))
    with pytest.raises(ValueError, match="stage 'beta' replays none") as error:
        train(**tiny.settings(root, tmp_path / "other", objective=AGem(), stages=without))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "other").exists()


def test_both_gradients_of_a_decoder_are_those_of_the_parts_alone(tmp_path):
    """Through the real model: the new tokens' gradient does not feel the replayed rows."""
    from lcl.assembly import assemble

    root = tmp_path / "byte"
    tiny.stores(root)
    settings = tiny.settings(root, "unused", stages=(tiny.stage("alpha"), REPLAYED))
    run = assemble(
        **{k: v for k, v in settings.items() if k not in ("run_dir", "checkpoint", "logging")}
    )
    batch, params = run.put(run.stream.batch(6), 6), run.init_state().params
    assert 0 < float(np.mean(np.asarray(batch.source_ids) >= 2)) < 1
    model = Decoder(run.model)

    @jax.jit
    def both(params, batch):
        return both_gradients(NextToken(), model, params, batch, run.num_sources)[1:]

    @jax.jit
    def alone(params, batch):
        return jax.grad(NextToken(), argnums=1, has_aux=True)(model, params, batch, 4)[0]

    new, replayed = both(params, batch)
    rows = jax.tree.map(lambda x: np.asarray(x)[:4], batch)  # the new ones come first
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new, alone(params, rows))
    both_parts = jax.tree.map(lambda a, b: (a + b) / 2, new, replayed)  # as many of each
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        both_parts,
        alone(params, batch),
    )
    assert float(jnp.sum(new_part(batch, 4).loss_weights)) == 4 * 64


REPLAYED = tiny.stage("beta", replay=Replay(0.5, mode="substitute"))
