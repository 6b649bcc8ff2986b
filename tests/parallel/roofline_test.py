"""Bounds in closed form, and the FLOPs that run beside the model's."""

from __future__ import annotations

import types

import pytest

from lcl.parallel import flops
from lcl.parallel.chips import CHIPS, Chip
from lcl.parallel.collectives import Collective
from lcl.parallel.roofline import executed_flops_per_token, hbm_bytes, roofline

CHIP = Chip("made up", 1e12, 1e9, 1e11, 4, 1e9, 1e8)
MODEL = types.SimpleNamespace(
    vocab_size=1000,
    num_layers=2,
    embed_dim=64,
    mlp_dim=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)


def bounds(**changes):
    work = {
        "num_devices": 4, "tokens": 1000, "model_flops": 4e12, "executed_flops": 6e12,
        "hbm_bytes": 1e10, "collectives": [],
    }  # fmt: skip
    return roofline(CHIP, **work | changes)


def test_the_slowest_resource_is_the_bound():
    got = bounds()
    assert (got.bound, got.step_s, got.mfu) == ("compute", 1.5, pytest.approx(1 / 1.5))
    assert got.tokens_per_second_per_chip == pytest.approx(1000 / 4 / 1.5)
    assert bounds(hbm_bytes=3e11).bound == "HBM"
    assert bounds(host_bytes=1e12).bound == "PCIe"
    one = Collective("all-reduce", 1e9, 2e9, 5e8, 10, "data", 4, "")
    got = bounds(collectives=[one])
    assert (got.ici_s, got.ici_one_link_s) == (pytest.approx(1.5e10 / 4e9), pytest.approx(15.0))
    assert (got.bound, got.step_s) == ("DCN", pytest.approx(50.0))


def test_executed_flops():
    model = flops.train_flops_per_token(MODEL, 255)
    scores = 2 * 2 * 4 * 16 * 128
    nothing, words = executed_flops_per_token(MODEL, 255, None)
    assert nothing == model + scores and "no remat" in words
    everything, words = executed_flops_per_token(MODEL, 255, ())
    again = 2 * 2 * 64 * (64 + 32 + 32 + 64 + 96 + 96)
    assert everything == model + 3 * scores + again and "attention" in words
    context, _ = executed_flops_per_token(MODEL, 255, ("context", "context_lse"))
    assert context == model + scores + again


def test_traffic():
    got = hbm_bytes(
        state_bytes=30, parameter_bytes=10, layer_weight_bytes=5, kept_bytes=7, num_passes=3
    )
    assert got == 60 + 20 + 30 + 14


def test_every_chip_that_can_be_compiled_for_is_whole():
    for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"):
        chip = CHIPS[kind]
        assert None not in (chip.hbm_bytes, chip.ici_bytes_per_second, chip.dcn_bytes_per_second)
