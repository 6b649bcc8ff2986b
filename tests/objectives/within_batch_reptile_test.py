"""Within-batch Reptile against MER's algorithms 1 and 6, written out in NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcl.objectives import Accumulate, WithinBatchReptile
from lcl.train import train
from tests import tiny
from tests.objectives import toy

START = np.array([0.3, -0.2], np.float32)
ROWS = [[1, 1], [2, 0], [3, 4], [4, 2], [1, 3], [2, 2], [4, 4], [3, 1]]
SOURCES = [0, 0, 1, 1, 2, 2, 3, 3]


def means():
    """The vector that each row pulls towards: the mean of its tokens that count."""
    return [toy.VECTORS[[n for n in row if n]].mean(0) for row in ROWS]


def mer(groups, alpha, beta, gamma):
    """Algorithm 1 (algorithm 6: one group, beta 1), from the paper's lines."""
    theta_a = theta = START
    for group in groups:
        theta_w = theta
        for pull in group:
            theta = theta - alpha * (theta - pull)
        theta = theta_w + beta * (theta - theta_w)
    return theta_a + gamma * (theta - theta_a)


@pytest.mark.parametrize("groups, beta, gamma", [(1, 1.0, 0.3), (2, 0.5, 0.7), (4, 0.1, 1.0)])
def test_with_plain_sgd_it_is_the_papers_algorithm(groups, beta, gamma):
    alpha = 0.2
    objective = WithinBatchReptile(
        inner_rate=alpha, objective=toy.Quadratic(), groups=groups, step_size=beta
    )
    params = {"theta": jnp.asarray(START)}
    batch = toy.batch(ROWS, SOURCES)
    _, gradient = jax.jit(lambda p: objective.value_and_grad(None, p, batch, 4))(params)
    chain = optax.sgd(gamma * alpha * beta * 8)
    updates, _ = chain.update(gradient, chain.init(params), params)
    got = optax.apply_updates(params, updates)["theta"]
    dealt = [means()[first::groups] for first in range(groups)]
    np.testing.assert_allclose(got, mer(dealt, alpha, beta, gamma), rtol=1e-5, atol=1e-6)


def test_a_small_inner_rate_gives_the_mean_gradient_of_the_examples():
    objective = WithinBatchReptile(inner_rate=1e-3, objective=toy.Quadratic())
    params = {"theta": jnp.asarray(START)}
    (loss, sums), gradient = objective.value_and_grad(None, params, toy.batch(ROWS, SOURCES), 4)
    np.testing.assert_allclose(gradient["theta"], START - np.mean(means(), axis=0), atol=2e-2)
    want, want_sums = toy.Quadratic()(None, params, toy.batch(ROWS, SOURCES), 4)
    np.testing.assert_allclose(loss, want, rtol=1e-2)
    np.testing.assert_allclose(sums["weight_by_source"], want_sums["weight_by_source"])


def test_it_favours_directions_on_which_examples_agree():
    """Two examples of gradients g and Hessians H: g_1 + g_2 - alpha H_2 g_1, and H is 1 here."""
    alpha = 0.1
    objective = WithinBatchReptile(inner_rate=alpha, objective=toy.Quadratic())
    _, gradient = objective.value_and_grad(
        None, {"theta": jnp.asarray(START)}, toy.batch([[1], [2]], [0, 2]), 4
    )
    first, second = START - toy.VECTORS[1], START - toy.VECTORS[2]
    np.testing.assert_allclose(gradient["theta"], (first + second - alpha * first) / 2, rtol=1e-5)


def test_an_example_of_several_rows_takes_every_nth():
    objective = WithinBatchReptile(
        inner_rate=0.2, objective=toy.Quadratic(), rows_per_example=2, groups=2
    )
    dealt = objective._deal(jnp.arange(8)[:, None])[..., 0]
    assert dealt.tolist() == [[[0, 4], [2, 6]], [[1, 5], [3, 7]]]


def test_in_a_run(tmp_path):
    root = tmp_path / "byte"
    tiny.stores(root)
    objective = WithinBatchReptile(inner_rate=0.05, groups=2, rows_per_example=2)
    run_dir = train(**tiny.settings(root, tmp_path / "run", objective=objective))
    assert '"objective.kind": "WithinBatchReptile"' in (run_dir / "run_card.json").read_text()
    with pytest.raises(ValueError, match="8 rows do not fall into groups=3") as error:
        other = dataclasses.replace(objective, groups=3)
        train(**tiny.settings(root, tmp_path / "other", objective=other))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "build, names",
    [
        (lambda: WithinBatchReptile(inner_rate=0.0), "inner_rate=0.0"),
        (lambda: WithinBatchReptile(inner_rate=0.1, step_size=2.0), "step_size=2.0"),
        (lambda: WithinBatchReptile(inner_rate=0.1, groups=0), "groups=0"),
        (lambda: WithinBatchReptile(inner_rate=0.1, rows_per_example=True), "rows_per_example"),
        (lambda: WithinBatchReptile(inner_rate=0.1, objective=Accumulate(2)), "Accumulate"),
        (lambda: WithinBatchReptile(inner_rate=0.1).check_rows(8, 2), "a multiple of 2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(build, names):
    with pytest.raises(ValueError, match=names) as error:
        build()
    assert "\n" not in str(error.value)
