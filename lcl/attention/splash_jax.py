"""The one place that knows JAX's splash attention by name, some of it private.

The kernel lives in `jax.experimental` and its backward passes are private functions. Everything
that lcl takes from there is looked up, and its arguments checked, here, so that a JAX that has
moved something says so in one line. Tested with JAX 0.10.2 and 0.12.0.1.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any, NamedTuple

import jax

_ROOM = "jax.experimental.pallas.ops.tpu.splash_attention"
_BACKWARD = (
    "q k v segment_ids sinks logsumexp do di bq bkv is_mqa mask_info mask_value "
    "attn_logits_soft_cap q_layout k_layout v_layout mask_function interpret"
)
# What lcl passes by name to each; a parameter that is missing, or a new one without a default, is
# a kernel that we do not know.
_ARGUMENTS = {
    "BlockSizes": (
        "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute "
        "block_q_dq block_kv_dq use_fused_bwd_kernel"
    ),
    "SegmentIds": "q kv",
    "SplashAttentionKernel": "fwd_mask_info dq_mask_info dkv_mask_info",
    "_splash_attention": (
        "fwd_mask_info dq_mask_info dkv_mask_info q k v is_mqa block_sizes save_residuals "
        "mask_value attn_logits_soft_cap residual_checkpoint_name mask_function interpret"
    ),
    "_splash_attention_bwd_dq": _BACKWARD,
    "_splash_attention_bwd_dkv": _BACKWARD + " bkv_compute use_fused_bwd_kernel",
}


class SplashNames(NamedTuple):
    """What lcl uses of JAX's splash attention."""

    BlockSizes: Any
    MaskInfo: Any
    QKVLayout: Any
    SegmentIds: Any
    SplashAttentionKernel: Any
    backward_dkv: Any
    backward_dq: Any
    mask_value: float


@functools.cache
def splash_names() -> SplashNames:
    """JAX's splash attention, checked.

    Raises:
      ImportError: this JAX has moved or changed something that lcl uses; says what.
    """
    try:
        kernel = importlib.import_module(f"{_ROOM}.splash_attention_kernel")
        mask_info = importlib.import_module(f"{_ROOM}.splash_attention_mask_info")
    except ImportError as error:
        raise _moved(str(error)) from error
    for name, wanted in _ARGUMENTS.items():
        _check(kernel, name, wanted.split())
    _check(
        mask_info,
        "MaskInfo",
        "data_next mask_next block_mask partial_mask_blocks q_sequence".split(),
    )
    for name in ("QKVLayout", "DEFAULT_MASK_VALUE"):
        _check(kernel, name, [])
    return SplashNames(
        kernel.BlockSizes,
        mask_info.MaskInfo,
        kernel.QKVLayout,
        kernel.SegmentIds,
        kernel.SplashAttentionKernel,
        kernel._splash_attention_bwd_dkv,
        kernel._splash_attention_bwd_dq,
        kernel.DEFAULT_MASK_VALUE,
    )


def _check(module: Any, name: str, wanted: list[str]) -> None:
    if not hasattr(module, name):
        raise _moved(f"{name} is gone")
    if not wanted:
        return
    parameters = inspect.signature(getattr(module, name)).parameters
    needed = {
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    if missing := set(wanted) - set(parameters):
        raise _moved(f"{name} no longer takes {', '.join(sorted(missing))}")
    if new := needed - set(wanted):
        raise _moved(f"{name} now needs {', '.join(sorted(new))}")


def _moved(what: str) -> ImportError:
    return ImportError(
        f"JAX {jax.__version__} has changed the splash attention that lcl builds on ({what}): "
        "use impl='blockwise', or a JAX that lcl is tested with (0.10.2, 0.12.0.1)"
    )
