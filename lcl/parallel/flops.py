"""How many floating-point operations a trained token costs, and how many a chip could do.

Model FLOPs, counted from the configuration and never from the compiler (which counts a scan's body
once and a Pallas kernel as nothing). With P parameters standing in matmuls that every token passes,
L layers, N query heads of H dims and c keys visible to a query on average:

    forward    2 P + 4 L N H c      (multiply and add; scores and weighted values 2 N H c each)
    backward   twice that
    train      6 P + 12 L N H c

A causal row of T tokens has c = (T + 1) / 2: the halving for causality. Packed documents that don't
see each other have c = sum n (n + 1) / 2 / sum n over their lengths n; `mean_context` computes it.
Work that is done again (remat) and work that is masked away are not model FLOPs. Convention of
PaLM, appendix B (2204.02311), with the causal halving. The name of the convention goes beside every
MFU: CONVENTION.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lcl.parallel.chips import CHIPS

if TYPE_CHECKING:
    import jax

CONVENTION = (
    "model FLOPs: 6 x matmul parameters + 12 x layers x heads x head_dim x mean visible keys "
    "(causal: halved; documents: only their own keys); no remat, no embedding lookup"
)


class Peak(NamedTuple):
    """The matmul peak of one device: FLOP/s (None where none is known) and where it comes from."""

    flops_per_second: float | None
    source: str


def matmul_parameters(config: Any) -> dict[str, int]:
    """Parameters that stand in matmuls which every token passes, by part; the embedding lookup is
    none.

    Args:
        config: anything with the size fields of lcl.models.DecoderConfig.

    Returns:
        {"attention", "mlp", "head", "total"}.

    Example: d_model 512, 8 layers, 8 heads of 64, SwiGLU 1408, vocabulary 32,000:
        attention  8 x 4 x 512 x 512    =  8,388,608
        mlp        8 x 3 x 512 x 1408   = 17,301,504
        head       512 x 32,000         = 16,384,000     together 42,074,112
    """
    query_dim = config.num_heads * config.head_dim
    kv_dim = config.num_kv_heads * config.head_dim
    attention = config.num_layers * config.embed_dim * 2 * (query_dim + kv_dim)
    mlp = config.num_layers * 3 * config.embed_dim * config.mlp_dim
    head = config.embed_dim * config.vocab_size
    return {"attention": attention, "mlp": mlp, "head": head, "total": attention + mlp + head}


def mean_context(segment_ids: np.ndarray) -> float:
    """How many keys a real token sees on average under a causal document mask.

    Args:
        segment_ids: int [..., T]; 0 is padding, equal neighbours are one document.

    Returns:
        Mean over the tokens that are not padding; 0.0 if there are none.

    Example:  rows of one document of 4 tokens, and of two of 2:
        1 1 1 1  ->  (1 + 2 + 3 + 4) / 4 = 2.5          1 1 2 2  ->  (1 + 2 + 1 + 2) / 4 = 1.5
    """
    rows = np.asarray(segment_ids).reshape(-1, np.shape(segment_ids)[-1])
    starts = np.ones(rows.shape, bool)
    starts[:, 1:] = rows[:, 1:] != rows[:, :-1]
    column = np.arange(rows.shape[1])
    first = np.maximum.accumulate(np.where(starts, column, 0), axis=1)
    real = rows != 0
    return float((column - first + 1)[real].mean()) if real.any() else 0.0


def train_flops_per_token(
    config: Any, sequence_length: int, mean_context: float | None = None
) -> float:
    """Model FLOPs of forward and backward for one token; the convention is CONVENTION.

    Args:
        config: anything with the size fields of lcl.models.DecoderConfig.
        sequence_length: tokens in a row, T.
        mean_context: keys visible to a query on average; default (T + 1) / 2, one causal document a
        row.

    Returns:
        FLOPs, such as 2.776e8 for the 58 M model above at T 1,024 (252.4 M in matmuls, 25.2 M in
        attention).
    """
    context = (sequence_length + 1) / 2 if mean_context is None else mean_context
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * context
    return 6 * matmul_parameters(config)["total"] + attention


def mfu(
    tokens_per_second: float, flops_per_token: float, peak: Peak, num_devices: int = 1
) -> float | None:
    """Model FLOPs utilisation, 0..1: useful FLOP/s over what the devices could do; None where no
    peak is known.

    Example:
        >>> mfu(1000.0, 2e9, Peak(4e12, "made up"), num_devices=2)
        0.25
    """
    if not peak.flops_per_second:
        return None
    return tokens_per_second * flops_per_token / (peak.flops_per_second * num_devices)


def chip_peak_flops(device: jax.Device, dtype: str = "bfloat16") -> Peak:
    """The matmul peak of one device.

    Args:
        device: a JAX device, also one of an ahead-of-time topology.
        dtype: "bfloat16" or "float32"; matters on CPU only (a TPU's float32 matmuls run on the bf16
        units).

    Returns:
        A TPU's from the table; a CPU's as measured in this process (under a second, once a dtype),
        shared evenly among the host devices it pretends to be; Peak(None, ...) for anything else.
    """
    if device.platform == "cpu":
        import jax

        share = len([other for other in jax.local_devices() if other.platform == "cpu"])
        peak = _measured_cpu_peak(dtype)
        source = f"measured {dtype} matmul on this machine's CPU"
        return Peak(peak / share, source + (f", shared by {share} devices" if share > 1 else ""))
    kind = device.device_kind
    if kind in CHIPS:
        return Peak(CHIPS[kind].flops_per_second, f"bf16 peak of {kind} by its data sheet")
    return Peak(None, f"no peak known for {kind!r}")


@functools.cache
def _measured_cpu_peak(dtype: str) -> float:
    """Best FLOP/s of a square matmul in the models' form (float32 result), within a time limit."""
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    cpu = jax.local_devices(backend="cpu")[0]
    best, deadline = 0.0, time.perf_counter() + 0.6
    for size in (512, 1024, 2048):  # a small one first, so that a slow machine is not kept waiting
        if time.perf_counter() + 8 * 2 * size**3 / max(best, 1e9) > deadline and best:
            break
        a = jax.device_put(np.ones((size, size), np.float32), cpu).astype(dtype)
        multiply(a, a).block_until_ready()
        for _ in range(4):
            begin = time.perf_counter()
            multiply(a, a).block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best
