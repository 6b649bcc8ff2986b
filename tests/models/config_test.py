"""DecoderConfig: what follows from what, what is refused, and the analytic parameter count."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import jax
import pytest

from lcl import config as gin_door
from lcl.models import DecoderConfig, abstract_params_with_axes, num_parameters

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SIZES = sorted(p.stem for p in (REPOSITORY / "configs" / "models").glob("*.gin"))
SIZES.remove("llama")
TINY = dict(vocab_size=64, num_layers=2, embed_dim=16, mlp_dim=24, num_heads=4)


def shipped(size: str) -> DecoderConfig:
    path = REPOSITORY / "configs" / "models" / f"{size}.gin"
    return gin_door.load([str(path)], []).call("DecoderConfig")


def count(config: DecoderConfig) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params_with_axes(config)))


def test_what_follows_from_the_other_sizes():
    config = DecoderConfig(**TINY)
    assert (config.num_kv_heads, config.head_dim) == (4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_layers=0), "num_layers = 0 must be a whole number, at least 1"),
        (dict(embed_dim=16.0), "embed_dim = 16.0 must be a whole number"),
        (dict(vocab_size=True), "vocab_size = True must be a whole number"),
        (dict(embed_dim=18), "num_heads = 4 does not divide embed_dim = 18"),
        (dict(num_kv_heads=3), "num_kv_heads = 3 must divide num_heads = 4"),
        (dict(head_dim=5), "head_dim = 5 must be even"),
        (dict(dtype="bfloat61"), r"dtype = 'bfloat61' .*nearest: 'bfloat16'"),
        (dict(remat="ful"), r"remat = 'ful' must be one of .*nearest: 'full'"),
        (
            dict(attention="blockwis"),
            r"attention = 'blockwis' must be one of .*nearest: 'blockwise'",
        ),
        (dict(rope=10_000.0), "rope = 10000.0 must be a Rope"),
        (dict(mask="causal"), "mask = 'causal' must be a Mask"),
        (dict(attention_soft_cap=0.0), "attention_soft_cap = 0.0 must be above 0, or None"),
        (dict(context_layout="zigzap"), r"context_layout = 'zigzap' .*nearest: 'zigzag'"),
        (dict(norm_eps=0.0), "norm_eps = 0.0 must be above 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        DecoderConfig(**{**TINY, **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(num_kv_heads=1, head_dim=6),
        dict(tie_embeddings=True, qk_norm=True),
        dict(attention_bias=True),
        dict(attention_bias=True, attention_out_bias=True, mlp_bias=True, num_kv_heads=2),
    ],
)
def test_the_analytic_count_is_the_real_one(changes):
    config = DecoderConfig(**{**TINY, **changes})
    assert num_parameters(config) == count(config)


@pytest.mark.parametrize("size", SIZES)
def test_shipped_sizes_count_right_and_override_at_most_eight_things(size):
    config = shipped(size)
    assert num_parameters(config) == count(config)
    text = (REPOSITORY / "configs" / "models" / f"{size}.gin").read_text()
    bindings = [line for line in text.splitlines() if line.startswith("DecoderConfig.")]
    numbers = [line for line in bindings if line.split("=")[1].strip()[0].isdigit()]
    assert len(numbers) <= 8
    assert f"{num_parameters(config):,} parameters" in text, "the header states the exact count"


def test_the_published_counts():
    assert num_parameters(shipped("llama3_8b")) == 8_030_261_248
    assert num_parameters(shipped("llama3_70b")) == 70_553_706_496
    assert num_parameters(shipped("bench_58m")) == 58_466_816
    assert num_parameters(shipped("nano")) < 1_000_000


def test_a_config_is_a_value():
    config = DecoderConfig(**TINY)
    assert config == DecoderConfig(**TINY)
    assert hash(config) == hash(DecoderConfig(**TINY))
    assert dataclasses.replace(config, num_layers=3) != config
