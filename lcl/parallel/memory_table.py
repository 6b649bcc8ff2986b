"""Bytes a chip of a train step, from shapes alone: no compiler, no libtpu, seconds to answer.

    always there      parameters, moments (float32), batch
    during the step   gradients (float32, cut as the parameters are)
                      kept for the backward pass: L x the remat policy's tensors of a layer
                      one layer at work: its gathered weights, its widest activations
                      the loss: a chunk's logits a few times, the head gathered

The first two groups grow with the model and are cut by fsdp x context x tensor; the kept tensors
grow with the tokens a chip holds, B T / (data x fsdp x context), times the depth, and are what a
long row is made of. They are the terms of the sizing guide in README.md. The compiler does better
or worse by a factor (fused or padded arrays, one layer's gathers prefetched during another), which
tests hold to a band.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class MemoryTable:
    """Bytes of one device.

    Attributes:
        rows: kind -> bytes, in the order of the file's top.
        host: bytes in host memory, for the offload policies.
    """

    rows: Mapping[str, int]
    host: int = 0

    @property
    def argument(self) -> int:
        """What the step is given: parameters, moments, batch."""
        return sum(self.rows[name] for name in ("parameters", "moments", "batch"))

    @property
    def peak(self) -> int:
        """The most that is alive at once.

        The loss, a layer at work and the whole of the gradients are not alive together: the
        gradients fill as the kept tensors are used up, so the larger of the two counts.
        """
        rows = self.rows
        working = max(rows["layer at work"], rows["loss"])
        return self.argument + max(rows["kept"] + working, rows["gradients"] + working)


def tree_bytes(tree: Any) -> int:
    """Bytes a device of a tree of ShapeDtypeStructs, as their shardings cut them."""
    import jax

    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * np.dtype(leaf.dtype).itemsize
    return total


def kept_bytes_per_token(config: Any, tags: Iterable[str] | None) -> int:
    """Bytes that one layer keeps of one token for its backward pass.

    Args:
        config: anything with the size fields of lcl.models.DecoderConfig.
        tags: names of the kept values beside the layer's input; None: no remat, all of them.

    Example: Llama 3 8B, bfloat16 throughout, nothing but the input kept: 2 x 4,096 = 8,192.
    """
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    width, residual = _BYTES[config.dtype], _BYTES[config.residual_dtype]
    sizes = {
        "query_proj": heads * width,
        "key_proj": kv_heads * width,
        "value_proj": kv_heads * width,
        "context": heads * width,
        "context_lse": config.num_heads * 4,
        "out_proj": config.embed_dim * residual,
        "mlp_gate": config.mlp_dim * width,
        "mlp_up": config.mlp_dim * width,
        "layer_input": config.embed_dim * residual,
    }
    if tags is None:
        # Beside the matmuls' results: two norms' outputs, the stream between, silu's and gate's.
        extra = 2 * config.embed_dim * width + config.embed_dim * residual
        return sum(sizes.values()) + extra + 2 * config.mlp_dim * width
    return sum(sizes[tag] for tag in tags)


def memory_table(
    config: Any,
    *,
    params: Any,
    opt_state: Any,
    batch: Any,
    mesh_shape: Mapping[str, int],
    batch_shape: tuple[int, int],
    kept: Iterable[str] | None,
    offloaded: Iterable[str] = (),
    whole_head_bytes: int,
    head_chunk_bytes: int,
    loss_chunk: int = 512,
    accumulate: int = 1,
) -> MemoryTable:
    """The table of a train step.

    Args:
        config: anything with the size fields of lcl.models.DecoderConfig.
        params, opt_state, batch: trees of ShapeDtypeStructs with shardings.
        mesh_shape: axis -> size.
        batch_shape: (B, T) of the global batch.
        kept: tags that the remat policy keeps on the device; None: no remat.
        offloaded: tags that wait in host memory.
        whole_head_bytes: a float32 head above this is gathered in chunks of its vocabulary.
        head_chunk_bytes: and this is the most of such a chunk.
        loss_chunk: tokens of a device whose logits are alive at once.
        accumulate: pieces that the batch's rows are worked on in turn.

    Returns:
        Bytes of one device.
    """
    rows, length = batch_shape
    devices = mesh_shape["data"] * mesh_shape["fsdp"]
    tokens = rows // accumulate * length // (devices * mesh_shape["context"])
    tensor = mesh_shape["tensor"]
    width, residual = _BYTES[config.dtype], _BYTES[config.residual_dtype]
    offloaded = tuple(offloaded)
    on_device = None if kept is None else set(kept) | ({"layer_input"} - set(offloaded))
    residual_bytes = kept_bytes_per_token(config, ("layer_input",))
    # The residual stream is whole on every device of a tensor group; the rest is cut by heads, mlp.
    per_token = kept_bytes_per_token(config, on_device)
    whole = residual_bytes if on_device is None or "layer_input" in on_device else 0
    kept_total = config.num_layers * tokens * (whole + (per_token - whole) // tensor)
    host = config.num_layers * tokens * kept_bytes_per_token(config, offloaded)

    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    matrices = config.embed_dim * (heads + config.num_heads * config.head_dim)
    matrices += 3 * config.embed_dim * config.mlp_dim
    weights = matrices // tensor * width
    # A layer's backward: input, norm, gate, up and their gradients.
    wide = 2 * config.embed_dim * residual + config.embed_dim * 4
    wide += (4 * config.mlp_dim + 2 * heads) // tensor * width
    layer = 2 * weights + matrices // tensor * 4 + tokens * wide

    split = math.prod(mesh_shape[axis] for axis in ("fsdp", "context"))
    head = config.embed_dim * config.vocab_size // tensor
    hidden = tokens * config.embed_dim * (2 * width + 4)  # hidden, and its gradient in float32
    if split > 1 and head * 4 > whole_head_bytes:  # chunk by chunk of the vocabulary as well
        columns = head_chunk_bytes // (4 * config.embed_dim)
        loss = columns * config.embed_dim * (2 * width + 4)
    else:
        columns = config.vocab_size // tensor
        loss = head * (width + 4)
    loss += hidden + 3 * min(loss_chunk, tokens) * columns * 4

    params_bytes = tree_bytes(params)
    return MemoryTable(
        {
            "parameters": params_bytes,
            "moments": tree_bytes(opt_state),
            "batch": tree_bytes(batch),
            "gradients": params_bytes,
            "kept": kept_total,
            "layer at work": layer,
            "loss": loss,
        },
        host=host,
    )
