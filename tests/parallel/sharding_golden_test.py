"""Where every parameter of every shipped model lies (golden), and that nothing large is whole."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest

from lcl import config
from lcl.models import DecoderConfig, abstract_params_with_axes
from lcl.parallel import sharding_dump
from lcl.parallel.rules import dumps

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# llama.gin is what the sizes have in common, not a model.
MODELS = sorted(p.stem for p in (REPOSITORY / "configs/models").glob("*.gin") if p.stem != "llama")
LARGE = 2**20  # bytes

# What may lie whole on every chip although it is large, and why.
WHOLE = {
    "layers/attention_norm/scale": "a vector a layer: to gather it would cost more than to keep it",
    "layers/mlp_norm/scale": "a vector a layer: to gather it would cost more than to keep it",
}


def parameters_of(name: str) -> dict:
    """Path, shape and spec of every parameter of a shipped model; nothing is allocated."""
    sizes = config.load([str(REPOSITORY / f"configs/models/{name}.gin")]).kwargs("DecoderConfig")
    return sharding_dump(abstract_params_with_axes(DecoderConfig(**sizes)))


@pytest.fixture(scope="module")
def dumps_by_name():
    return {name: parameters_of(name) for name in MODELS}


def test_there_are_models():
    assert {"nano", "llama3_8b", "llama3_70b"} <= set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_golden_sharding_of_a_shipped_model(name, dumps_by_name, golden):
    text = dumps(dumps_by_name[name])
    assert json.loads(text) == dumps_by_name[name]
    golden(f"sharding/{name}.json", text)


def large_and_whole(dump: dict) -> set[str]:
    """Parameters of more than 1 MiB in float32 of which no dim lies on any mesh axis."""
    return {
        path
        for path, leaf in dump.items()
        if 4 * np.prod(leaf["shape"], dtype=np.int64) > LARGE and not any(leaf["spec"])
    }


@pytest.mark.parametrize("name", MODELS)
def test_no_large_parameter_is_whole_on_every_chip(name, dumps_by_name):
    found = large_and_whole(dumps_by_name[name])
    assert found <= set(WHOLE), f"{found - set(WHOLE)}: cut them, or say in WHOLE why not"


def test_the_list_of_exceptions_holds_nothing_else(dumps_by_name):
    """Each exception is one that some model needs, and the search finds what is whole."""
    found = set().union(*(large_and_whole(dump) for dump in dumps_by_name.values()))
    assert found == set(WHOLE)
    whole = {"w": {"shape": [1024, 257], "spec": [None, None]}}
    assert large_and_whole(whole) == {"w"}
    assert not large_and_whole({"w": {"shape": [1024, 257], "spec": [["fsdp", "context"], None]}})


@pytest.mark.parametrize("name", MODELS)
def test_matrices_are_cut_over_fsdp_and_context(name, dumps_by_name):
    """ZeRO over both axes: what is not a vector a layer has its model dim cut."""
    vectors = {path for path in dumps_by_name[name] if path.endswith(("scale", "bias"))}
    for path, leaf in dumps_by_name[name].items():
        assert (["fsdp", "context"] in leaf["spec"]) == (path not in vectors), path
    assert jax.local_device_count() == 1  # and all of this was asked without a device in sight
