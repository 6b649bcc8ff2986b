"""Gradient alignment: cosines by hand, the real layers apart, and that a look changes nothing."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcl.analysis import GradientAlignment
from lcl.assembly import assemble
from lcl.models import Decoder
from lcl.objectives import AGem, NextToken
from lcl.train import train
from tests import tiny
from tests.objectives import toy


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "byte"
    tiny.stores(path)
    return path


@pytest.mark.parametrize(
    "rows, sources, want",
    [
        ([[1, 1], [2, 0]], [0, 2], -1 / np.sqrt(2)),
        ([[1, 1], [1, 0]], [1, 3], 1.0),
        ([[1, 2], [3, 0]], [0, 1], np.nan),  # nothing replayed: no direction to compare with
    ],
)
@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: AGem(objective=loss)])
def test_the_cosine_by_hand(rows, sources, want, wrap):
    measure = GradientAlignment().build(None, wrap(toy.Linear()), 4)
    found = jax.jit(measure)({"theta": jnp.zeros(2)}, toy.batch(rows, sources))
    assert list(found) == ["gradient_cosine"]
    np.testing.assert_allclose(found["gradient_cosine"], want, rtol=1e-6)


def test_layers_are_told_apart(root):
    """By layer: against gradients of the two parts' rows alone, layer for layer, in NumPy."""
    settings = tiny.settings(root, "unused")
    for name in ("run_dir", "checkpoint", "logging"):
        settings.pop(name)
    run = assemble(**settings)
    batch, params = run.put(run.stream.batch(6), 6), run.init_state().params
    measure = GradientAlignment().build(Decoder(run.model), run.objective, run.num_sources)
    found = jax.jit(measure)(params, batch)
    assert sorted(found) == [
        "gradient_cosine",
        "gradient_cosine/layer_00",
        "gradient_cosine/layer_01",
    ]

    @jax.jit
    def alone(params, rows):
        return jax.grad(NextToken(), argnums=1, has_aux=True)(Decoder(run.model), params, rows, 4)[
            0
        ]

    new, old = (
        jax.device_get(alone(params, jax.tree.map(lambda x, part=part: np.asarray(x)[part], batch)))
        for part in (slice(0, 4), slice(4, 8))
    )

    def cosine(a, b):
        a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    np.testing.assert_allclose(found["gradient_cosine"], cosine(new, old), atol=1e-4)
    for layer in range(2):
        parts = [jax.tree.map(lambda x, at=layer: x[at], tree["layers"]) for tree in (new, old)]
        name = f"gradient_cosine/layer_{layer:02d}"
        np.testing.assert_allclose(found[name], cosine(*parts), atol=1e-4)


def test_a_look_changes_no_bit_and_stands_in_its_steps_lines(root, tmp_path):
    logging = tiny.settings(root, "unused")["logging"]
    looking = dataclasses.replace(logging, diagnostics=(GradientAlignment(every_steps=4),))
    without = train(**tiny.settings(root, tmp_path / "without"))
    run_dir = train(**tiny.settings(root, tmp_path / "with", logging=looking))
    lines, plain = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run_dir, without)
    )
    seen = [line["step"] for line in lines if "gradient_cosine" in line]
    assert seen == [8], "0 and 4 replay nothing, 8 does, no other step is due"
    assert -1 <= lines[8]["gradient_cosine/layer_01"] <= 1
    strip = [
        {key: value for key, value in line.items() if not key.startswith("gradient_cosine")}
        for line in lines
    ]
    assert strip == plain
    assert (run_dir / "evals.jsonl").read_text() == (without / "evals.jsonl").read_text()
    # It is no part of what the run is: the same run may go on with or without it.
    train(**tiny.settings(root, run_dir))


def test_an_interval_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="every_steps=0"):
        GradientAlignment(every_steps=0)
