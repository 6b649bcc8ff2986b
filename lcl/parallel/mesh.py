"""The device mesh: four named axes, built in one place.

    data     whole model copies; the batch is split (gradients are all-reduced)
    fsdp     the batch is split too, and every parameter is cut along "embed" (all-gather,
    reduce-scatter)
    context  a row's tokens are split (ring or all-gather attention)
    tensor   heads, mlp and vocabulary are split inside every matmul

`data` comes first (slowest network), `tensor` last (neighbouring chips), as in MaxText and T5X.
All axes are of type Auto: XLA's partitioner propagates shardings from the logical rules of
rules.py.

Slices of a pod are joined by the data-centre network, which is some twenty times slower than the
links inside one. So `data`, whose one all-reduce a step is the least traffic, spans the slices, and
every other axis lies inside one:

    data 4 on 2 slices      slice 0: data 0 1    slice 1: data 2 3
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

AXES: tuple[str, ...] = ("data", "fsdp", "context", "tensor")
# How a row lies on the context axis; lcl.attention.layouts has the pictures.
CONTEXT_LAYOUTS: tuple[str, ...] = ("contiguous", "zigzag", "striped")


@dataclass(frozen=True)
class MeshConfig:
    """How many devices stand along each axis of the mesh; at most one axis may be -1, "the rest".

    Args:
        data: copies of the model.
        fsdp: parts that each parameter (and the batch) is cut into.
        context: parts that each row of tokens is cut into.
        tensor: parts that heads, mlp and vocabulary are cut into.
        context_layout: "zigzag", "striped" or "contiguous": which tokens of a row each device of a
            context axis holds (`lcl.attention.layouts`); of no effect where `context` is 1.

    Raises:
        ValueError: a size that is neither positive nor -1, or more than one -1.

    Example:
        >>> MeshConfig(data=-1, tensor=2).sizes(8)
        {'data': 4, 'fsdp': 1, 'context': 1, 'tensor': 2}
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    context_layout: str = "zigzag"

    def __post_init__(self) -> None:
        """Refuses impossible sizes at the door, before any device is asked for."""
        for axis in AXES:
            size = getattr(self, axis)
            if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
                raise ValueError(
                    f"MeshConfig.{axis} = {size!r}: give a positive whole number, or -1 for "
                    "'the devices that are left'"
                )
        if sum(getattr(self, axis) == -1 for axis in AXES) > 1:
            free = " and ".join(axis for axis in AXES if getattr(self, axis) == -1)
            raise ValueError(
                f"MeshConfig leaves {free} at -1: only one axis can take the rest; "
                "give the others a number"
            )
        if self.context_layout not in CONTEXT_LAYOUTS:
            raise ValueError(
                f"MeshConfig.context_layout = {self.context_layout!r} must be one of "
                f"{', '.join(CONTEXT_LAYOUTS)}"
            )

    def sizes(self, num_devices: int) -> dict[str, int]:
        """The size of each axis on `num_devices` devices.

        Returns:
            {"data": ..., "fsdp": ..., "context": ..., "tensor": ...}; the product is `num_devices`.

        Raises:
            ValueError: the sizes do not multiply to `num_devices`; names both counts and the mend.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        product = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != -1)
        free = [axis for axis, size in sizes.items() if size == -1]
        if free:
            if num_devices % fixed or num_devices < fixed:
                raise ValueError(
                    f"mesh {product} = {fixed} does not divide the {num_devices} devices that are "
                    f"there: choose sizes whose product divides {num_devices}"
                )
            sizes[free[0]] = num_devices // fixed
        elif fixed != num_devices:
            raise ValueError(
                f"mesh {product} = {fixed} devices, but {num_devices} are there: set one axis to "
                f"-1 to take the rest, or choose sizes whose product is {num_devices}"
            )
        return sizes

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh over `devices` (default: all devices of all processes).

        Args:
            devices: real devices, or those of an ahead-of-time topology.

        Returns:
            A `jax.sharding.Mesh` with axes (data, fsdp, context, tensor), all of type Auto. Where
            the devices belong to several slices, `data` spans them.

        Raises:
            ValueError: sizes that do not fit the devices, or slices that `data` cannot span.

        Example:
            >>> MeshConfig().build().axis_names
            ('data', 'fsdp', 'context', 'tensor')
        """
        import jax
        from jax.experimental import mesh_utils
        from jax.sharding import AxisType, Mesh

        devices = list(jax.devices() if devices is None else devices)
        sizes = self.sizes(len(devices))
        shape = tuple(sizes[axis] for axis in AXES)
        # The default is Explicit since jax 0.9; flax's logical constraints need Auto.
        types = (AxisType.Auto,) * len(AXES)
        num_slices = len({slice_of(device) for device in devices})
        if num_slices == 1:
            # `jax.make_mesh` gives up where an axis is no product of whole torus dimensions, such
            # as 2 x 64 on 4 x 4 x 8; splitting one is what is left then, and only then done.
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(grid, AXES, axis_types=types)
        if sizes["data"] % num_slices:
            raise ValueError(
                f"mesh data {sizes['data']} cannot span {num_slices} slices, and no other axis may "
                f"(they are joined by the data-centre network): set data to a multiple of "
                f"{num_slices}"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes["data"] // num_slices, *shape[1:]),
            (num_slices, 1, 1, 1),
            devices=devices,
            allow_split_physical_axes=True,
        )
        return Mesh(grid, AXES, axis_types=types)


def slice_of(device: jax.Device) -> int:
    """Which slice of a multi-slice system a device belongs to; 0 where there is only one."""
    return getattr(device, "slice_index", None) or 0


def describe(mesh: jax.sharding.Mesh) -> str:
    """The mesh in a few words, for logs and run cards, such as "data 2 x fsdp 4 on 8 cpu"."""
    parts = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1] or ["one device"]
    device = mesh.devices.flat[0]
    kind = getattr(device, "device_kind", device.platform)
    return f"{' x '.join(parts)} on {mesh.size} {kind}"
