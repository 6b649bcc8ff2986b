"""TPU slices by the names people use, as compile-only devices: no TPU is needed, only libtpu.

    v5e-256     256 chips      16 x 16          the number counts chips on v5e and v6e,
    v6e-64       64 chips       8 x 8
    v5p-128      64 chips       4 x 4 x 4       and TensorCores, two a chip, on v4 and v5p
    2x v5e-256  512 chips       two slices of 16 x 16, joined by the data-centre network
    v5p:2x2x4    16 chips       a shape, for what has no name

The names are those of the cloud's accelerator types; the shapes are the ones it gives a slice of
that name unless it is asked for another.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import TYPE_CHECKING

from lcl.parallel.chips import CHIPS, Chip

if TYPE_CHECKING:
    import jax

# Size in the name -> shape, smallest first.
_FLAT: dict[int, tuple[int, ...]] = {
    1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)
}  # fmt: skip
_CUBES: dict[int, tuple[int, ...]] = {
    8: (2, 2, 1), 16: (2, 2, 2), 32: (2, 2, 4), 64: (2, 4, 4), 128: (4, 4, 4), 256: (4, 4, 8),
    384: (4, 4, 12), 512: (4, 8, 8), 1024: (8, 8, 8), 1536: (8, 8, 12), 2048: (8, 8, 16),
    4096: (8, 16, 16),
}  # fmt: skip
_LARGE_CUBES: dict[int, tuple[int, ...]] = {
    6144: (12, 16, 16),
    8192: (16, 16, 16),
    12288: (16, 16, 24),
    17920: (16, 20, 28),
}
_SHAPES: dict[str, dict[int, tuple[int, ...]]] = {
    "v5e": _FLAT,
    "v6e": _FLAT,
    "v4": _CUBES,
    "v5p": {**_CUBES, **_LARGE_CUBES},
}
_KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p"}

NEEDS_LIBTPU = (
    "compiling for a TPU needs libtpu, which is not installed: pip install -e '.[tpu]' "
    "(Linux x86-64; no TPU is needed), or give --abstract for a table from shapes alone"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, or several, of one kind of chip.

    Attributes:
        name: as it was given.
        generation: "v5e", "v5p", "v6e" or "v4".
        shape: chips along each dimension of one slice.
        num_slices: slices joined by the data-centre network.
    """

    name: str
    generation: str
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def num_devices(self) -> int:
        """Chips of all slices; each is one JAX device."""
        return math.prod(self.shape) * self.num_slices

    @property
    def wraps(self) -> tuple[bool, bool, bool]:
        """Which dimensions close to rings; the compiler chooses its collectives by that.

        Chips in space (v4, v5p) are wired in cubes of 4 x 4 x 4, whose faces optical switches join:
        a slice of whole cubes is a torus, a smaller one a mesh. In the plane (v5e, v6e) a dimension
        of all 16 chips is a ring.
        """
        if len(self.shape) == 3:
            whole_cubes = all(dim % 4 == 0 for dim in self.shape)
            return (whole_cubes,) * 3
        return self.shape[0] == 16, self.shape[1] == 16, False

    @property
    def device_kind(self) -> str:
        """What JAX calls a device of it."""
        return _KINDS[self.generation]

    @property
    def chip(self) -> Chip:
        """What one device can do."""
        return CHIPS[self.device_kind]

    def __str__(self) -> str:
        slices = f"{self.num_slices} slices of " if self.num_slices > 1 else ""
        shape = " x ".join(map(str, self.shape))
        return f"{self.name} ({self.num_devices} {self.generation} chips, {slices}{shape})"


def names() -> list[str]:
    """Every name that `parse_topology` knows, without the multi-slice forms."""
    return [f"{generation}-{size}" for generation, shapes in _SHAPES.items() for size in shapes]


def parse_topology(name: str) -> Topology:
    """The topology of a name.

    Args:
        name: "v5e-256", "v5p-128" (64 chips), "2x v5e-256", or a shape such as "v5p:2x2x4".

    Returns:
        The topology; nothing has been loaded yet.

    Raises:
        ValueError: an unknown name; says the nearest.

    Example:
        >>> parse_topology("v5p-128").shape, parse_topology("2x v5e-256").num_devices
        ((4, 4, 4), 512)
    """
    match = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?([a-z]\w*?)([-:])([\dx]+)\s*", name.lower())
    if match is None:
        raise _unknown(name)
    slices, generation, separator, size = match.groups()
    generation = _ALIASES.get(generation, generation)
    num_slices = int(slices or 1)
    if generation not in _SHAPES or num_slices < 1:
        raise _unknown(name)
    if separator == ":":
        dims = [int(dim) if dim else 0 for dim in size.split("x")]
        if len(dims) != len(next(iter(_SHAPES[generation].values()))) or min(dims) < 1:
            raise _unknown(name)
        return Topology(name.strip(), generation, tuple(dims), num_slices)
    shape = _SHAPES[generation].get(int(size)) if size.isdigit() else None
    if shape is None:
        raise _unknown(name)
    return Topology(name.strip(), generation, shape, num_slices)


def _unknown(name: str) -> ValueError:
    match = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(\w+)-(\d+)\s*", name.lower())
    prefix, nearest = "", ""
    if match is not None:
        generation = _ALIASES.get(match[2], match[2])
        if generation not in _SHAPES:
            close = difflib.get_close_matches(generation, _SHAPES, 1, cutoff=0.3)
            generation = close[0] if close else generation
        if generation in _SHAPES:
            want = int(match[3])
            size = min(_SHAPES[generation], key=lambda size: abs(math.log(size / max(want, 1))))
            prefix, nearest = f"{match[1]}x " if match[1] else "", f"{generation}-{size}"
    if not nearest:
        close = difflib.get_close_matches(name.lower(), names(), 1, cutoff=0.3)
        nearest = close[0] if close else "v5e-256"
    return ValueError(
        f"there is no topology {name!r} (nearest: {prefix + nearest!r}); names are v5e-N and v6e-N "
        "for N chips, v4-N and v5p-N for N cores, '2x v5e-256' for two slices, or a shape such as "
        "'v5p:2x2x4'"
    )


def libtpu_installed() -> bool:
    """Whether the compiler for TPUs is here."""
    return importlib.util.find_spec("libtpu") is not None


def aot_environment(environ: dict[str, str] | None = None) -> dict[str, str]:
    """The variables under which libtpu compiles and nothing else; set before its first use.

    It then asks no metadata server for a TPU, leaves JAX's own backend a CPU, writes no log files,
    and several processes may do so at once. What is set already is kept.

    Args:
        environ: default `os.environ`.

    Returns:
        The variables that are missing, for `os.environ.update` or a child's `env`.
    """
    wanted = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # only keeps it from asking; any topology compiles
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    environ = dict(os.environ) if environ is None else environ
    return {name: value for name, value in wanted.items() if name not in environ}


def topology_devices(topology: Topology) -> list[jax.Device]:
    """The topology's devices, for a mesh to compile on; nothing can run on them.

    Raises:
        ValueError: libtpu is not installed, or does not know the shape.
    """
    if not libtpu_installed():
        raise ValueError(NEEDS_LIBTPU)
    os.environ.update(aot_environment())
    from jax.experimental import topologies

    shape = topology.shape
    options: dict[str, object] = {"wrap": topology.wraps}
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.generation == "v4":
        options["chip_config_name"] = "megacore"
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    text = f"{topology.generation}:{'x'.join(map(str, shape))}"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=text, **options)
    except Exception as error:  # of a type that differs by version
        reason = str(error).splitlines()[0]
        raise ValueError(f"libtpu has no topology {text}: {reason}") from error
    return list(described.devices)
