"""The mesh: sizes, and one-line errors that name the counts and the mend."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import jax
import pytest
from jax.sharding import AxisType

from lcl.parallel import AXES, MeshConfig, describe


def test_one_device_by_default():
    mesh = MeshConfig().build(jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert describe(mesh) == "one device on 1 cpu"


@hypothesis.given(
    st.tuples(*[st.integers(1, 6)] * 4), st.integers(0, 3), st.integers(1, 5), st.booleans()
)
def test_the_rest_goes_to_the_free_axis(sizes, free, multiple, exact):
    fixed = math.prod(size for i, size in enumerate(sizes) if i != free)
    config = MeshConfig(**{axis: -1 if i == free else sizes[i] for i, axis in enumerate(AXES)})
    num_devices = fixed * multiple + (0 if exact or fixed == 1 else 1)
    if num_devices % fixed == 0:
        solved = config.sizes(num_devices)
        assert solved[AXES[free]] == num_devices // fixed
        assert math.prod(solved.values()) == num_devices
    else:
        with pytest.raises(ValueError, match=f"= {fixed} does not divide the {num_devices} dev"):
            config.sizes(num_devices)


class Device:
    """A device of some slice, which is all that laying out slices asks."""

    device_kind = platform = "cpu"
    process_index = 0

    def __init__(self, number: int, slice_index: int) -> None:
        self.id, self.slice_index = number, slice_index


def test_data_spans_the_slices_and_nothing_else_does():
    devices = [Device(number, number % 2) for number in range(8)]
    grid = MeshConfig(data=-1, fsdp=2).build(devices).devices
    slices = [
        [{device.slice_index for device in row.flat} for row in half] for half in grid[:, None]
    ]
    assert grid.shape == (4, 2, 1, 1)
    assert slices == [[{0}], [{0}], [{1}], [{1}]]
    with pytest.raises(ValueError, match=r"data 1 cannot span 2 slices.* a multiple of 2"):
        MeshConfig(data=1, fsdp=8).build(devices)


class TorusDevice(Device):
    """A chip of a v5p slice, which has a place."""

    device_kind, platform, core_on_chip = "TPU v5", "tpu", 0

    def __init__(self, number: int, coords: tuple[int, int, int]) -> None:
        super().__init__(number, 0)
        self.coords = coords


def test_an_axis_may_take_part_of_a_torus_dimension():
    """2 x 64 on 4 x 4 x 8: 64 is no product of whole dimensions."""
    places = [(x, y, z) for z in range(8) for y in range(4) for x in range(4)]
    devices = [TorusDevice(number, place) for number, place in enumerate(places)]
    grid = MeshConfig(fsdp=2, context=64).build(devices).devices
    assert grid.shape == (1, 2, 64, 1)
    assert {device.id for device in grid.flat} == set(range(128))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeshConfig(tensor=0), r"MeshConfig.tensor = 0: give a positive whole number"),
        (lambda: MeshConfig(fsdp=-2), r"MeshConfig.fsdp = -2"),
        (lambda: MeshConfig(data=2.0), r"MeshConfig.data = 2.0"),
        (lambda: MeshConfig(context=True), r"MeshConfig.context = True"),
        (lambda: MeshConfig(context_layout="zag"), r"'zag' must be one of contiguous, zigzag"),
        (lambda: MeshConfig(fsdp=-1), r"leaves data and fsdp at -1: only one axis"),
        (
            lambda: MeshConfig(data=2, tensor=2).sizes(8),
            r"data 2 x fsdp 1 x context 1 x tensor 2 = 4 devices, but 8 are there: set one axis to",
        ),
        (lambda: MeshConfig(data=16).sizes(8), r"= 16 devices, but 8 are there"),
        (lambda: MeshConfig(tensor=16).sizes(8), r"tensor 16 = 16 does not divide the 8 devices"),
    ],
)
def test_mistakes_are_one_line_with_the_mend(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
