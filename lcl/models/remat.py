"""Rematerialisation by name: which values of a layer are kept for its backward pass.

The layers tag their values with `checkpoint_name`; a policy is the set of tags it keeps, and all
else is computed again in the backward pass. Time against memory, per token and layer, with D model,
Q = N H query, 2 K H key and value, F mlp width:

    policy             keeps (elements a token and layer, beside the layer's input D)  recomputes
    none               everything                                                      nothing
    dots               2 Q + 2 K H + D + 2 F: the result of every matmul               norms, silu
    save_qkv_context   2 Q + 2 K H                                                     + out, mlp
    save_qkv           Q + 2 K H                                                       + attention
    save_context       Q + N (the context and its lse)                                 not attention
    full               nothing                                                         the layer
    offload_residual   as full, but the layer's input waits in host memory             the layer
    offload_residual_save_context   the same, with Q + N kept on the device            not attention
    offload_context    the layer's input, Q + N: all wait in host memory               not attention

What a layer keeps is kept L times, so at length the layers' inputs (B T D L values) are most of
what a device holds. The offload policies copy them to the host's pinned memory as they are made and
fetch them back in the backward pass; on a TPU the copies run beside the matmuls. On a CPU the
policies run too, and save nothing: both memories are the same.

A kernel that can tell its softmax's sums apart from its output tags these too, so that keeping both
spares the second forward; the dense reference computes its scores again. "dots" costs next to no
time (measured on a CPU: none), because what it drops is cheap to make and dear to write.

The tags are MaxText's idea (its `query_proj`, `mlpwi_0`, ...); matmuls are kept by tag and not by
JAX's `dots_*` policies, because those would also keep the score blocks inside the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

_QKV = ("query_proj", "key_proj", "value_proj")
_CONTEXT = ("context", "context_lse")
_DOTS = ("out_proj", "mlp_gate", "mlp_up")
_INPUT = ("layer_input",)

# Every tag that the layers and lcl.attention put on a value; a test holds them to this list.
TAGS = _INPUT + _QKV + _CONTEXT + _DOTS

# Policy name -> the tags it keeps on the device; None: no rematerialisation at all.
REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
    "none": None,
    "full": (),
    "save_context": _CONTEXT,
    "save_qkv": _QKV,
    "save_qkv_context": _QKV + _CONTEXT,
    "dots": _QKV + _CONTEXT + _DOTS,
    "offload_residual": (),
    "offload_residual_save_context": _CONTEXT,
    "offload_context": (),
}

# Policy name -> the tags it keeps in the host's memory.
OFFLOADED: dict[str, tuple[str, ...]] = {
    "offload_residual": _INPUT,
    "offload_residual_save_context": _INPUT,
    "offload_context": _INPUT + _CONTEXT,
}


def remat_policy(name: str) -> Callable[..., Any] | None:
    """The `jax.checkpoint` policy of that name, or None for "none".

    Args:
      name: a key of REMAT_POLICIES.

    Returns:
      A policy for `jax.checkpoint(..., policy=)`.

    Example:
      >>> remat_policy("none") is None, callable(remat_policy("dots"))
      (True, True)
    """
    tags = REMAT_POLICIES[name]
    if tags is None:
        return None
    if name not in OFFLOADED:
        return jax.checkpoint_policies.save_only_these_names(*tags)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(tags),
        names_which_can_be_offloaded=list(OFFLOADED[name]),
        offload_src="device",
        offload_dst="pinned_host",
    )
