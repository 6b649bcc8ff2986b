"""The chips: one table of what each can do, and where every figure comes from.

A row is one JAX *device*, which is a chip except on v2, v3 and 7x (two devices a chip): what the
compiler counts, it counts per device. The sources, by the letters at the columns:

    peak    bf16 FLOP/s: the vendor's system architecture pages; v2, v3, 7x halved         [vendor]
    HBM     bytes that a program may use: asked of the compiler itself, by compiling a program that
            is too big (v4, v5e, v6e); for the others the vendor's figure, of which the compiler
            keeps up to a GiB for itself                                         [compiler, vendor]
    GB/s    HBM bandwidth: the vendor's pages                                              [vendor]
    links   ICI links of a chip: 4 in a 2-D torus, 6 in a 3-D one                          [vendor]
    link    bytes/s of one link, one way: the vendor's "ICI bandwidth per chip" (both ways summed)
            over links and directions; agrees with "How to Scale Your Model", part 2      [derived]
    DCN     bytes/s of a chip's share of its host's network card. ASSUMED: 25 GB/s a host of 4
            chips, the order of magnitude in "How to Scale Your Model". It differs by machine type,
            so a step that the DCN bounds should be measured before it is believed        [assumed]

Not in the table because it is one figure for all: PCIe to the host, about 16 GB/s a chip one way
([assumed], "How to Scale Your Model"), which offloaded activations travel over.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30
PCIE_BYTES_PER_SECOND = 16e9  # [assumed], see above


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device can do; the figures' sources are at the top of this file.

    Attributes:
        name: as people say it, "v5p".
        flops_per_second: bf16 matmul peak.
        hbm_bytes: memory that a program may use.
        hbm_bytes_per_second: memory bandwidth.
        ici_links: links to neighbouring chips.
        ici_bytes_per_second: of one link in one direction.
        dcn_bytes_per_second: a device's share of its host's network.
    """

    name: str
    flops_per_second: float
    hbm_bytes: float | None = None
    hbm_bytes_per_second: float | None = None
    ici_links: int = 4
    ici_bytes_per_second: float | None = None
    dcn_bytes_per_second: float | None = None


_V4 = Chip("v4", 275e12, 30.75 * GIB, 1228e9, 6, 50e9, 6.25e9)
_V5E = Chip("v5e", 197e12, 15.75 * GIB, 819e9, 4, 50e9, 6.25e9)
_V5P = Chip("v5p", 459e12, 95 * GIB, 2765e9, 6, 100e9, 6.25e9)
_V6E = Chip("v6e", 918e12, 31.25 * GIB, 1640e9, 4, 112e9, 6.25e9)
_V7X = Chip("7x", 2307e12 / 2, 96 * 1e9, 7380e9 / 2, 6, 100e9, 6.25e9)

# By `device_kind`.
CHIPS: dict[str, Chip] = {
    "TPU v2": Chip("v2", 45e12 / 2),
    "TPU v3": Chip("v3", 123e12 / 2),
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _V7X,
}
