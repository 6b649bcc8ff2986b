"""Names of slices: what they are, and one-line refusals with the nearest."""

from __future__ import annotations

import pytest

from lcl.parallel.topologies import aot_environment, names, parse_topology


@pytest.mark.parametrize(
    ("name", "generation", "shape", "slices", "devices"),
    [
        ("v5e-256", "v5e", (16, 16), 1, 256),
        ("v5litepod-16", "v5e", (4, 4), 1, 16),
        ("v6e-64", "v6e", (8, 8), 1, 64),
        ("v5p-128", "v5p", (4, 4, 4), 1, 64),  # v5p counts cores
        ("V5P-256", "v5p", (4, 4, 8), 1, 128),
        ("v4-8", "v4", (2, 2, 1), 1, 4),
        ("2x v5e-256", "v5e", (16, 16), 2, 512),
        ("2xv5e-256", "v5e", (16, 16), 2, 512),
        ("v5p:2x2x4", "v5p", (2, 2, 4), 1, 16),
        ("4 x v6e:4x4", "v6e", (4, 4), 4, 64),
    ],
)
def test_names(name, generation, shape, slices, devices):
    topology = parse_topology(name)
    assert (topology.generation, topology.shape) == (generation, shape)
    assert (topology.num_slices, topology.num_devices) == (slices, devices)
    assert topology.chip.hbm_bytes > 15e9


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5p-64", (False, False, False)),  # 2 x 4 x 4 is less than a cube
        ("v5p-128", (True, True, True)),
        ("v4-384", (True, True, True)),
        ("v5e-64", (False, False, False)),
        ("v6e-128", (False, True, False)),
        ("2x v5e-256", (True, True, False)),
    ],
)
def test_whole_cubes_and_whole_sides_close_to_rings(name, wraps):
    """Without it a v5p pod's parameters are gathered by all-reduces, at twice the bytes."""
    assert parse_topology(name).wraps == wraps


def test_every_name_counts_its_chips_or_cores():
    for name in names():
        generation, size = name.split("-")
        cores = 2 if generation in ("v4", "v5p") else 1
        assert parse_topology(name).num_devices * cores == int(size), name


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("v5e-250", "'v5e-256'"),
        ("v5p-100", "'v5p-128'"),
        ("2x v5e-200", "'2x v5e-256'"),
        ("v5x-64", "'v5[ep]-64'"),
        ("v7-64", "'v.+-64'"),
        ("v5p:4x4", "'v5p-.+'"),
        ("0x v5e-4", "'0?x? ?v5e-4'"),
        ("", "'v5e-256'"),
    ],
)
def test_an_unknown_name_is_one_line_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=rf"there is no topology .* \(nearest: {nearest}") as error:
        parse_topology(name)
    assert "\n" not in str(error.value)


def test_what_is_set_already_is_kept():
    wanted = aot_environment({"JAX_PLATFORMS": "tpu"})
    assert "JAX_PLATFORMS" not in wanted
    assert wanted["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
