"""FLOPs against hand counts, and the table of peaks."""

from __future__ import annotations

import types

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from lcl.parallel import (
    CONVENTION,
    Peak,
    chip_peak_flops,
    matmul_parameters,
    mean_context,
    mfu,
    train_flops_per_token,
)


def sizes(**fields):
    defaults = dict(
        vocab_size=32_000, num_layers=8, embed_dim=512, num_heads=8, num_kv_heads=8, head_dim=64,
        mlp_dim=1408, tie_embeddings=False,
    )  # fmt: skip
    return types.SimpleNamespace(**{**defaults, **fields})


def test_the_yardstick_by_hand():
    """58,466,816 parameters and 277.6 MFLOP a token at T 1024 (6 x 42.07 M + 25.2 M)."""
    parts = matmul_parameters(sizes())
    assert parts == {
        "attention": 8 * 4 * 512 * 512,
        "mlp": 8 * 3 * 512 * 1408,
        "head": 512 * 32_000,
        "total": 42_074_112,
    }
    embedding, norms = 32_000 * 512, 17 * 512
    assert parts["total"] + embedding + norms == 58_466_816
    attention = 8 * 8 * 3 * (2 * 64 + 2 * 64) * 1025 / 2  # 25.19 M
    assert train_flops_per_token(sizes(), 1024) == 6 * 42_074_112 + attention
    assert train_flops_per_token(sizes(), 1024) == pytest.approx(277.7e6, rel=5e-4)


def test_llama_3_8b_by_hand():
    """GQA 32/8: 7.504 G of its 8.03 G parameters stand in matmuls."""
    llama = sizes(
        vocab_size=128_256, num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=8,
        head_dim=128, mlp_dim=14_336,
    )  # fmt: skip
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14_336
    assert matmul_parameters(llama)["total"] == 32 * layer + 4096 * 128_256 == 7_504_658_432
    # 8,192 tokens: 12 * 32 * 4096 * 4096.5 = 6.44 G on top of 45.03 G
    assert train_flops_per_token(llama, 8192) == 6 * 7_504_658_432 + 12 * 32 * 4096 * 4096.5


def test_tying_the_embedding_saves_parameters_but_no_flops():
    assert train_flops_per_token(sizes(tie_embeddings=True), 64) == train_flops_per_token(
        sizes(), 64
    )


@hypothesis.given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 5))
def test_mean_context_is_what_a_dense_mask_counts(lengths, padding):
    row = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    row = np.concatenate([row, np.zeros(padding, row.dtype)])
    mask = (row[:, None] == row[None, :]) & np.tri(len(row), dtype=bool)
    visible = mask.sum(1)[row > 0].mean()
    assert mean_context(np.stack([row, row])) == pytest.approx(visible)
    formula = sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)
    assert mean_context(row) == pytest.approx(formula)


def test_mean_context_of_one_document_is_the_causal_default():
    row = np.ones((3, 128), np.int32)
    assert mean_context(row) == 64.5
    assert train_flops_per_token(sizes(), 128, mean_context(row)) == train_flops_per_token(
        sizes(), 128
    )
    assert mean_context(np.zeros((2, 8), np.int32)) == 0.0


def test_document_masks_count_less():
    row = np.repeat(np.arange(1, 9), 128)[None]
    assert train_flops_per_token(sizes(), 1024, mean_context(row)) < train_flops_per_token(
        sizes(), 1024
    )


def test_mfu():
    assert mfu(1000.0, 2e9, Peak(4e12, "made up"), num_devices=2) == 0.25
    assert mfu(1000.0, 2e9, Peak(None, "unknown")) is None
    assert "causal" in CONVENTION and "remat" in CONVENTION


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_the_table_of_tpus(kind, teraflops):
    peak = chip_peak_flops(types.SimpleNamespace(platform="tpu", device_kind=kind))
    assert peak.flops_per_second == teraflops * 1e12
    assert kind in peak.source


def test_an_unknown_chip_has_no_peak():
    peak = chip_peak_flops(types.SimpleNamespace(platform="gpu", device_kind="Brand 1"))
    assert peak.flops_per_second is None and "Brand 1" in peak.source


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_is_measured_once(dtype):
    first = chip_peak_flops(jax.devices()[0], dtype)
    assert first.flops_per_second is not None and first.flops_per_second > 1e8
    assert chip_peak_flops(jax.devices()[0], dtype) == first
    assert dtype in first.source
