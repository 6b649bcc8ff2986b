"""The mask-leak probe for a whole decoder: does a token of one document reach another's states?

What `lcl.attention.leak_probe` asks of a kernel, asked of everything between tokens and hidden
states: embedding, RoPE, the row index that travels with a permuted row, rematerialisation.
"""

from __future__ import annotations

import dataclasses
import json as json_format
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lcl.attention import Mask
from lcl.attention.choice import IMPLEMENTATIONS
from lcl.attention.layouts import LAYOUTS, row_index
from lcl.attention.leak_probe import (
    Case,
    Finding,
    cases,
    mesh_and_batch,
    probe,
    probe_attention,
    table,
)
from lcl.models.config import DecoderConfig
from lcl.models.decoder import Decoder, init_params

log = logging.getLogger("lcl.probe")

NANO = DecoderConfig(
    vocab_size=128, num_layers=2, embed_dim=32, mlp_dim=64, num_heads=8, num_kv_heads=4, head_dim=4
)


def probe_decoder(
    case: Case,
    config: DecoderConfig = NANO,
    *,
    length: int = 64,
    documents: str = "first",
    devices: Sequence[jax.Device] | None = None,
) -> list[Finding]:
    """Probes a causal decoder's hidden states, on a mesh data x context over all devices.

    Args:
      case: its attention, context degree and layout; no window (through several layers it reaches
        further than a mask tells).
      config: the decoder; its attention and mask are replaced by the case's.
      length: tokens in a row.
      documents: whose token is changed, "first" or "last".
      devices: default: all there are.

    Returns:
      A finding a row.
    """
    if case.window is not None:
        raise ValueError(f"window={case.window}: a decoder is probed without one; use window=None")
    devices = list(jax.devices() if devices is None else devices)
    mesh, batch = mesh_and_batch(case, devices)
    across = case.context > 1
    config = dataclasses.replace(
        config,
        attention=case.impl,
        mask=Mask(),
        context_layout=case.layout if across else "contiguous",
    )
    order = row_index(case.layout, batch, length, case.context if across else 4)
    rng = np.random.default_rng(0)
    base = rng.integers(0, config.vocab_size // 2, (batch, length), dtype=np.int32)
    other = base + config.vocab_size // 2  # a different token everywhere
    decoder, params = Decoder(config), init_params(config, jax.random.key(0))

    @jax.jit
    def run(tokens, segment_ids):
        rows = jnp.asarray(order)
        return decoder.apply({"params": params}, tokens, rows, segment_ids, rows, method="hidden")

    with jax.set_mesh(mesh):
        return probe(
            run,
            jnp.asarray(base),
            jnp.asarray(other),
            name=f"decoder, {case}",
            mask=Mask(),
            row_index_BT=order,
            documents=documents,
        )


def report(
    *,
    impl: Sequence[str] | None = None,
    layout: Sequence[str] | None = None,
    context: Sequence[int] | None = None,
    quick: bool = False,
    json: bool = False,
) -> tuple[bool, str]:
    """What `lcl probe` shows: every case on the devices that there are, then whole decoders.

    Args:
      impl, layout, context: only these; None or empty: all.
      quick: outputs only, and no windows.
      json: a list of findings instead of a table.

    Returns:
      Whether all is good, and the text.

    Raises:
      ValueError: a name that there is not, or nothing left to probe.
    """
    chosen = tuple(name for name in IMPLEMENTATIONS if name != "auto")
    for option, given, choices in (("impl", impl, chosen), ("layout", layout, LAYOUTS)):
        for name in given or ():
            if name not in choices:
                raise ValueError(f"--{option}={name}: there is none; use one of {choices}")
    devices = jax.devices()
    on_tpu = devices[0].platform == "tpu"
    found = cases(
        len(devices),
        impls=impl or chosen,
        layouts_=layout or LAYOUTS,
        contexts=context or [2**n for n in range(len(devices).bit_length())],
        windows=[None] if quick else [None, 16],
    )
    if not found:
        raise ValueError(
            f"--context={context} on {len(devices)} devices leaves nothing to probe: use degrees "
            "that divide the devices, 1 for reference, blockwise and splash"
        )
    findings: list[Finding] = []
    for case in found:
        # A TPU kernel's blocks are of 128 at least, and zigzag cuts twice as often as the mesh.
        length = 256 * case.context if on_tpu else 128 if case.impl == "splash" else 64
        # Interpreted, the TPU kernel's backward takes minutes to compile.
        gradients = not quick and (on_tpu or case.impl != "splash")
        findings += probe_attention(case, length=length, gradients=gradients)
        findings += probe_attention(case, length=length, gradients=False, documents="last")
        log.info("%s: %s", case, "good" if findings[-1].good else "BAD")
        if case.window is None and case.context == found[-1].context and case.impl != "splash":
            findings += probe_decoder(case, length=length)
    good = all(finding.good for finding in findings)
    if json:
        return good, json_format.dumps([vars(finding) for finding in findings], indent=1)
    bad = sum(not finding.good for finding in findings)
    return (
        good,
        f"{table(findings)}\n{len(findings)} rows probed on {len(devices)} devices, {bad} bad",
    )
