"""The least time a step can take: each resource's work over what a chip has of it.

    compute   executed FLOPs / peak
    HBM       bytes that must pass between memory and core / bandwidth
    ICI       bytes that leave the chip for its neighbours / all links of it, one way
    DCN       bytes that leave the slice / the chip's share of its host's network
    PCIe      bytes that wait in host memory, there and back

Assumed is the best case: everything overlaps with everything, so the step takes as long as its
slowest resource, and every link of a chip is busy in the useful direction. Seconds are therefore
bounds from below, and MFU and tokens/s bounds from above. What is *not* assumed away: a ring whose
steps wait for one neighbour uses one link, not six; `ici_one_link_s` says what the step would need
if every transfer had one link only, and a real step lies between the two.

HBM bytes are a count from the shapes, again from below: the state is read and written once, the
gradients written and read, a layer's gathered weights written and read in each pass, what the
remat policy keeps written and read. What stays in VMEM or is fused away is not counted, nor is
attention's reading of its own keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lcl.parallel import chips, flops
from lcl.parallel.chips import Chip
from lcl.parallel.collectives import Collective

RESOURCES = ("compute", "HBM", "ICI", "DCN", "PCIe")
_LAYER_MATMULS = ("query_proj", "key_proj", "value_proj", "out_proj", "mlp_gate", "mlp_up")


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step by resource, on one chip; None where the chip's figure is not known.

    Attributes:
        compute_s, hbm_s, ici_s, dcn_s, pcie_s: see the top of this file.
        ici_one_link_s: as `ici_s`, with one link a chip.
        step_s: the largest of them.
        bound: which one that is.
        mfu: model FLOPs over what the chip could do in `step_s`: an upper bound.
        tokens_per_second_per_chip: an upper bound.
    """

    compute_s: float
    hbm_s: float
    ici_s: float
    dcn_s: float
    pcie_s: float
    ici_one_link_s: float
    step_s: float
    bound: str
    mfu: float
    tokens_per_second_per_chip: float


def executed_flops_per_token(
    config: Any, sequence_length: int, kept: Iterable[str] | None
) -> tuple[float, str]:
    """FLOPs that really run for a token: the model's, what is recomputed, attention's second look.

    Args:
        config: anything with the size fields of lcl.models.DecoderConfig.
        sequence_length: tokens in a row.
        kept: tags that the remat policy keeps, on the device or on the host; None: all.

    Returns:
        The FLOPs, and in words what they are.

    Recomputed are the matmuls whose results the policy drops (the last of a layer, mlp/down, never:
    nothing waits for it), and the attention if its output is dropped. A flash backward always
    multiplies queries and keys once more: 2 L N H c.
    """
    context = (sequence_length + 1) / 2
    heads_dim = config.num_heads * config.head_dim
    kv_dim = config.num_kv_heads * config.head_dim
    scores = 2 * config.num_layers * heads_dim * context
    total = flops.train_flops_per_token(config, sequence_length) + scores
    words = "model FLOPs + the scores once more in attention's backward"
    if kept is None:
        return total, words + "; no remat"
    kept = set(kept)
    wide = {
        "query_proj": heads_dim, "key_proj": kv_dim, "value_proj": kv_dim,
        "out_proj": heads_dim, "mlp_gate": config.mlp_dim, "mlp_up": config.mlp_dim,
    }  # fmt: skip
    again = [name for name in _LAYER_MATMULS if name not in kept]
    total += sum(2 * config.num_layers * config.embed_dim * wide[name] for name in again)
    if "context" not in kept:
        total += 2 * scores
        again.append("attention")
    return total, words + f"; recomputed: {', '.join(again) or 'no matmul'}"


def hbm_bytes(
    *,
    state_bytes: float,
    parameter_bytes: float,
    layer_weight_bytes: float,
    kept_bytes: float,
    num_passes: int,
) -> float:
    """Bytes a chip must move between memory and core in a step, from below.

    Args:
        state_bytes: the chip's part of parameters and moments.
        parameter_bytes: the chip's part of the parameters, float32; the gradients are as large.
        layer_weight_bytes: all layers' and the head's weights as the matmuls read them: gathered,
            in the compute dtype, the chip's part of the tensor axis.
        kept_bytes: what the remat policy keeps on the chip for the backward pass.
        num_passes: passes over the weights: 2, or 3 with remat.
    """
    return (
        2 * state_bytes + 2 * parameter_bytes + 2 * num_passes * layer_weight_bytes + 2 * kept_bytes
    )


def roofline(
    chip: Chip,
    *,
    num_devices: int,
    tokens: int,
    model_flops: float,
    executed_flops: float,
    hbm_bytes: float,
    collectives: Iterable[Collective],
    host_bytes: float = 0.0,
) -> Roofline:
    """The bounds of one step.

    Args:
        chip: what one device can do.
        num_devices: devices of the mesh.
        tokens: of the global batch.
        model_flops, executed_flops: of the whole step, all devices together.
        hbm_bytes: of one device.
        collectives: of the compiled program.
        host_bytes: what one device keeps in host memory.

    Example:
        >>> chip = Chip("made up", 1e12, 1e9, 1e12, 4, 1e9, 1e9)
        >>> bounds = roofline(
        ...     chip,
        ...     num_devices=2,
        ...     tokens=100,
        ...     model_flops=1e12,
        ...     executed_flops=2e12,
        ...     hbm_bytes=5e11,
        ...     collectives=[],
        ... )
        >>> bounds.bound, bounds.step_s, bounds.mfu
        ('compute', 1.0, 0.5)
    """
    found = list(collectives)
    inside = sum((one.sent_bytes - min(one.dcn_bytes, one.sent_bytes)) * one.times for one in found)
    outside = sum(one.dcn_bytes * one.times for one in found)

    def over(amount: float, rate: float | None) -> float:
        return amount / rate if rate else 0.0

    link = chip.ici_bytes_per_second
    seconds = {
        "compute": executed_flops / num_devices / chip.flops_per_second,
        "HBM": over(hbm_bytes, chip.hbm_bytes_per_second),
        "ICI": over(inside, link and link * chip.ici_links),
        "DCN": over(outside, chip.dcn_bytes_per_second),
        "PCIe": over(2 * host_bytes, chips.PCIE_BYTES_PER_SECOND),
    }
    return bounded(
        seconds,
        ici_one_link_s=over(inside, link),
        chip=chip,
        num_devices=num_devices,
        tokens=tokens,
        model_flops=model_flops,
    )


def bounded(
    seconds: Mapping[str, float],
    *,
    ici_one_link_s: float,
    chip: Chip,
    num_devices: int,
    tokens: int,
    model_flops: float,
) -> Roofline:
    """What follows from the seconds of each resource: the slowest of them bounds the step.

    Args:
        seconds: of each of RESOURCES.
        ici_one_link_s: of the ICI, with one link a chip.
        chip, num_devices, tokens, model_flops: as for `roofline`.
    """
    bound = max(seconds, key=lambda name: seconds[name])
    step_s = seconds[bound]
    return Roofline(
        **{f"{name.lower()}_s": value for name, value in seconds.items()},
        ici_one_link_s=ici_one_link_s,
        step_s=step_s,
        bound=bound,
        mfu=model_flops / num_devices / chip.flops_per_second / step_s,
        tokens_per_second_per_chip=tokens / num_devices / step_s,
    )
