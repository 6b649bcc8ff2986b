"""What the code around us has said about devices: the platform, and the mesh to shard over.

Kernels and losses are called from inside `jax.jit`, where the arrays are tracers and no device is
in sight. `jax.set_mesh(mesh)` around the step is the one channel by which they learn of it; nothing
here is global state of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import jax
from jax.sharding import AbstractMesh

BATCH_AXES = ("data", "fsdp")
CONTEXT_AXIS = "context"
TENSOR_AXIS = "tensor"


def ambient_platform() -> str:
    """The platform being compiled for: "cpu", "tpu" or "gpu".

    The ambient mesh's word comes first, because an ahead-of-time compilation for a TPU topology
    runs on a machine whose own backend is a CPU.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def ambient_mesh() -> AbstractMesh | None:
    """The mesh to shard over, or None where there is nothing left to shard.

    None without `jax.set_mesh`, on a mesh of one device, and inside a `shard_map` that has already
    taken the axes (the arrays are per-device blocks there).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return None
    return mesh


def manual_axis_size(axis: str) -> int:
    """Devices along `axis` if we stand inside a `shard_map` that has taken it, else 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def axis_size(mesh: AbstractMesh, axes: str | Sequence[str]) -> int:
    """The number of devices along `axes`; an axis that the mesh lacks counts 1."""
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    return prod(mesh.shape.get(name, 1) for name in names)


def present_axes(mesh: AbstractMesh, axes: Sequence[str]) -> tuple[str, ...]:
    """Those of `axes` that the mesh has and that hold more than one device."""
    return tuple(name for name in axes if mesh.shape.get(name, 1) > 1)
