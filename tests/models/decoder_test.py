"""The decoder: its loop, rematerialisation, documents, dtypes, initialisation, axes."""

from __future__ import annotations

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcl.attention import Mask
from lcl.models import (
    Decoder,
    DecoderConfig,
    abstract_params_with_axes,
    init_params,
)
from lcl.models.remat import OFFLOADED, REMAT_POLICIES, TAGS
from lcl.parallel.rules import LOGICAL_AXIS_RULES

CONFIG = DecoderConfig(
    vocab_size=61,
    num_layers=2,
    embed_dim=16,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    qk_norm=True,
    attention_bias=True,
    attention="reference",
)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12), dtype=np.int32)


def fresh(config: DecoderConfig, seed: int = 0):
    return jax.jit(lambda key: init_params(config, key))(jax.random.key(seed))


@pytest.fixture(scope="module")
def params():
    made = fresh(CONFIG)
    # Scales and biases that a mistake would show in: not all ones and zeros.
    leaves, tree = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def loss_and_gradients(config: DecoderConfig, params, tokens=TOKENS):
    def loss_fn(params):
        logits = Decoder(config).apply({"params": params}, tokens)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

    return jax.jit(jax.value_and_grad(loss_fn))(params)


@pytest.fixture(scope="module")
def baseline(params):
    return loss_and_gradients(CONFIG, params)


def assert_trees_close(ours, theirs, rtol):
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(theirs), strict=True
    ):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(
            a, b, atol=rtol * scale, rtol=0, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [
        *((True, name) for name in REMAT_POLICIES if name != "none"),
        (False, "none"),
        (False, "full"),
    ],
)
def test_loop_and_rematerialisation_change_no_number(scan_layers, remat, params, baseline):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers, remat=remat)
    loss, gradients = loss_and_gradients(config, params)
    np.testing.assert_allclose(loss, baseline[0], rtol=1e-6)
    assert_trees_close(gradients, baseline[1], rtol=2e-5)


def backward_matmuls(remat: str, params, attention: str = "reference") -> int:
    """Matmuls of the loop's forward and backward together: more of them, more is recomputed."""
    config = dataclasses.replace(CONFIG, remat=remat, attention=attention)

    def loss_fn(params):
        return Decoder(config).apply({"params": params}, TOKENS).sum()

    return str(jax.make_jaxpr(jax.grad(loss_fn))(params)).count("dot_general")


def test_policies_recompute_what_they_say(params):
    count = {name: backward_matmuls(name, params) for name in REMAT_POLICIES}
    # A layer has 7 weight matmuls and 2 in attention. `down` is never needed again.
    assert count["full"] - count["none"] == 8
    # q, k, v are kept: 3 fewer.
    assert count["save_qkv"] - count["none"] == 5
    # ... and the context: the values' matmul is not needed, the scores' is.
    assert count["save_qkv_context"] - count["none"] == 4
    # ... and out, gate and up: only the scores.
    assert count["dots"] - count["none"] == 1
    # Where a value waits changes nothing in what is computed.
    assert count["offload_residual"] == count["full"]
    assert count["offload_residual_save_context"] == count["save_context"]
    assert count["offload_context"] == count["save_context"] < count["full"]


@pytest.mark.parametrize("remat", sorted(OFFLOADED))
def test_what_is_offloaded_leaves_the_device_and_comes_back(remat, params):
    config = dataclasses.replace(CONFIG, remat=remat, attention="blockwise")

    def loss_fn(params):
        return Decoder(config).apply({"params": params}, TOKENS).sum()

    # The text names the memory, whatever a version of JAX calls the operation.
    jaxpr = str(jax.make_jaxpr(jax.grad(loss_fn))(params))
    there = len(re.findall(r"pinned_host|MemorySpace\.Host", jaxpr))
    assert there >= len(OFFLOADED[remat]), "nothing is offloaded"


def test_a_head_that_is_masked_gives_nothing_and_the_others_all(params):
    """head_mask[l, n] = 0 is the model whose out-projection has no rows of that head."""
    mask = np.ones((2, 4), np.float32)
    mask[0, 1] = mask[1, 3] = 0.0
    cut = jax.tree.map(jnp.array, params)
    kernel = cut["layers"]["attention"]["out"]["kernel"]
    cut["layers"]["attention"]["out"]["kernel"] = kernel.at[0, 1].set(0).at[1, 3].set(0)
    model = Decoder(CONFIG)
    got = model.apply({"params": params}, TOKENS, head_mask_LN=mask, method="hidden")
    want = model.apply({"params": cut}, TOKENS, method="hidden")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert (
        float(jnp.abs(got - model.apply({"params": params}, TOKENS, method="hidden")).max()) > 0.1
    )


def test_a_soft_cap_bounds_the_scores(params):
    """A cap far above the scores changes nothing; a small one does."""

    def hidden(cap):
        config = dataclasses.replace(CONFIG, attention_soft_cap=cap)
        return Decoder(config).apply({"params": params}, TOKENS, method="hidden")

    np.testing.assert_allclose(hidden(1e4), hidden(None), rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(hidden(0.1) - hidden(None)).max()) > 1e-2


def test_the_blockwise_kernel_s_softmax_sums_are_kept_with_its_output(params):
    count = {name: backward_matmuls(name, params, "blockwise") for name in ("none", "dots")}
    assert count["dots"] == count["none"], "attention must not run twice"


def test_every_tag_is_put_on_a_value(params):
    config = dataclasses.replace(CONFIG, attention="blockwise")

    def loss_fn(params):
        return Decoder(config).apply({"params": params}, TOKENS).sum()

    jaxpr = str(jax.make_jaxpr(jax.grad(loss_fn))(params))
    found = set(re.findall(r"name=(\w+_proj|context\w*|mlp_\w+|layer_\w+)\b", jaxpr))
    assert found == set(TAGS)


def test_the_loop_is_compiled_once():
    def size(num_layers: int) -> int:
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        abstract = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
        jaxpr = jax.make_jaxpr(lambda p: Decoder(config).apply({"params": p}, TOKENS))(abstract)
        return len(str(jaxpr).splitlines())

    assert size(12) == size(3)


def test_documents_do_not_see_each_other(params):
    """The mask-leak probe: change one document, count the outputs of others that move."""
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3] * 2, np.int32)
    positions = np.array([[*range(5), *range(4), *range(3)]] * 2, np.int32)
    hidden = jax.jit(
        lambda tokens, segments: Decoder(CONFIG).apply(
            {"params": params}, tokens, positions, segments, method="hidden"
        )
    )
    changed = TOKENS.copy()
    changed[:, 1] = (changed[:, 1] + 1) % 61
    moved = np.any(hidden(TOKENS, segments) != hidden(changed, segments), axis=(0, 2))
    assert not moved[0], "causality"
    assert moved[1:5].all(), "the probe must see its own document move"
    assert not moved[5:].any()
    # The probe can fail: without segments it finds the leak.
    whole = np.ones_like(segments)
    assert np.any(hidden(TOKENS, whole) != hidden(changed, whole), axis=(0, 2))[5:].all()


def test_row_index_undoes_a_permutation(params):
    order = np.random.default_rng(1).permutation(12)
    apply = jax.jit(
        lambda tokens, positions, row_index: Decoder(CONFIG).apply(
            {"params": params}, tokens, positions, None, row_index
        )
    )
    index = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    plain = apply(TOKENS, index, index)
    permuted = apply(TOKENS[:, order], index[:, order], index[:, order])
    np.testing.assert_allclose(permuted, plain[:, order], atol=1e-5)


def test_positions_default_to_the_row(params):
    model = Decoder(CONFIG)
    index = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    given = model.apply({"params": params}, TOKENS, index)
    np.testing.assert_array_equal(model.apply({"params": params}, TOKENS), given)


def test_the_mask_of_the_config_is_used(params):
    config = dataclasses.replace(CONFIG, mask=Mask(causal=True, window=2), num_layers=1)
    one = {**params, "layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    changed = TOKENS.copy()
    changed[:, 0] = (changed[:, 0] + 1) % 61
    apply = jax.jit(lambda tokens: Decoder(config).apply({"params": one}, tokens))
    moved = np.any(apply(TOKENS) != apply(changed), axis=(0, 2))
    assert moved.tolist() == [True, True] + [False] * 10


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_and_head_kernel_are_the_logits(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    params = fresh(config)
    model = Decoder(config)
    hidden = model.apply({"params": params}, TOKENS, method="hidden")
    kernel = model.head_kernel(params)
    assert kernel.shape == (16, 61)
    np.testing.assert_allclose(hidden @ kernel, model.apply({"params": params}, TOKENS), atol=1e-5)
    assert ("head" in params) != tied


def test_bfloat16_computes_low_and_keeps_float32_where_it_says(params, baseline):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    loss, gradients = loss_and_gradients(config, params)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradients))
    np.testing.assert_allclose(loss, baseline[0], rtol=1e-2)
    flat = [
        jnp.concatenate([g.ravel() for g in jax.tree.leaves(t)]) for t in (gradients, baseline[1])
    ]
    error = jnp.linalg.norm(flat[0] - flat[1]) / jnp.linalg.norm(flat[1])
    assert 1e-5 < error < 3e-2, "low precision, but not lost"
    hidden = Decoder(config).apply({"params": params}, TOKENS, method="hidden")
    assert hidden.dtype == jnp.bfloat16
    # The residual stream (the loop's carry) is float32 unless asked otherwise.
    for residual in ("float32", "bfloat16"):
        chosen = dataclasses.replace(config, residual_dtype=residual)
        jaxpr = str(jax.make_jaxpr(lambda p: Decoder(chosen).apply({"params": p}, TOKENS))(params))  # noqa: B023
        kind = {"float32": "f32", "bfloat16": "bf16"}[residual]
        assert re.search(rf"\]:{kind}\[2,12,16\] = scan|:{kind}\[2,12,16\] = scan", jaxpr)


def test_a_token_outside_the_vocabulary_is_not_another_token(params):
    tokens = TOKENS.copy()
    tokens[0, 3] = 61
    logits = Decoder(CONFIG).apply({"params": params}, tokens)
    assert np.isnan(logits[0, 3]).all()
    assert np.isfinite(logits[1]).all()


class TestInitialisation:
    @pytest.fixture(scope="class")
    def case(self):
        config = DecoderConfig(512, num_layers=2, embed_dim=64, mlp_dim=192, num_heads=4)
        return config, fresh(config)

    def test_deviations_are_the_documented_ones(self, case):
        _, params = case
        layers = params["layers"]
        residual = 1 / np.sqrt(2 * 2)
        for array, deviation in [
            (params["embed"]["embedding"], 64**-0.5),
            (params["head"]["kernel"], 64**-0.5),
            (layers["attention"]["query"]["kernel"], 64**-0.5),
            (layers["attention"]["out"]["kernel"], 64**-0.5 * residual),
            (layers["mlp"]["up"]["kernel"], 64**-0.5),
            (layers["mlp"]["down"]["kernel"], 192**-0.5 * residual),
        ]:
            np.testing.assert_allclose(array.std(), deviation, rtol=0.05)
            assert jnp.max(jnp.abs(array)) < 3.1 * deviation

    def test_it_is_a_function_of_the_key(self, case):
        config, params = case
        again = fresh(config)
        other = fresh(config, seed=1)
        assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(again)))
        assert not np.array_equal(params["embed"]["embedding"], other["embed"]["embedding"])

    def test_no_two_layers_or_parameters_start_alike(self, case):
        _, params = case
        gate, up = (params["layers"]["mlp"][name]["kernel"] for name in ("gate", "up"))
        assert not np.array_equal(gate[0], gate[1])
        assert not np.array_equal(gate, up)

    def test_neither_loop_nor_remat_nor_an_added_module_changes_it(self, case):
        config, params = case
        changed = dataclasses.replace(
            config, scan_layers=False, remat="full", dtype="bfloat16", qk_norm=True
        )
        other = fresh(changed)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            node = other
            for key in path:
                node = node[key.key]
            np.testing.assert_array_equal(leaf, node, err_msg=jax.tree_util.keystr(path))

    def test_the_first_loss_is_that_of_a_guess(self, case):
        config, params = case
        tokens = np.random.default_rng(0).integers(0, 512, (2, 64), dtype=np.int32)
        logits = Decoder(config).apply({"params": params}, tokens)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[::-1, :, None], axis=-1)
        # ln V, plus half the variance (1) of the logits
        assert abs(float(nll.mean()) - (np.log(512) + 0.5)) < 0.3


def test_every_axis_of_every_parameter_has_a_name_that_the_rules_know():
    abstract = abstract_params_with_axes(CONFIG)
    known = dict(LOGICAL_AXIS_RULES)
    boxes = jax.tree_util.tree_flatten_with_path(
        abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )[0]
    for path, box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned), path
        assert len(box.names) == box.value.ndim
        assert set(box.names) <= set(known), path
        assert (box.names[0] == "layers") == (path[0].key == "layers")
    plain = jax.tree.map(lambda x: x.shape, nn.meta.unbox(abstract))
    made = jax.eval_shape(lambda key: init_params(CONFIG, key), jax.random.key(0))
    assert plain == jax.tree.map(lambda x: x.shape, made)


def test_activation_constraints_use_names_that_the_rules_know(monkeypatch):
    used = set()
    plain = nn.with_logical_constraint
    monkeypatch.setattr(
        nn, "with_logical_constraint", lambda x, names: used.update(names) or plain(x, names)
    )
    jax.eval_shape(lambda key: Decoder(CONFIG).init(key, TOKENS), jax.random.key(0))
    assert used >= {"batch", "sequence", "activation_embed", "activation_heads", "activation_mlp"}
    assert used - {None} <= set(dict(LOGICAL_AXIS_RULES))
