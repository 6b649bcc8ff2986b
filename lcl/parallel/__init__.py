"""Mesh, logical-axis rules, batches on devices, FLOP counts. Needs nothing else of ours."""

from __future__ import annotations

from lcl.parallel.distributed import initialize_distributed
from lcl.parallel.flops import (
    CONVENTION,
    Peak,
    chip_peak_flops,
    matmul_parameters,
    mean_context,
    mfu,
    train_flops_per_token,
)
from lcl.parallel.host_devices import host_device_environment
from lcl.parallel.mesh import AXES, MeshConfig, describe
from lcl.parallel.rules import (
    LOGICAL_AXIS_RULES,
    abstract_state,
    batch_sharding,
    check_batch_shape,
    check_model_splits,
    global_batch,
    mesh_spec,
    process_rows,
    put_batch,
    replace_rules,
    sharding_dump,
    state_shardings,
    unbox,
)

__all__ = [
    "AXES",
    "CONVENTION",
    "LOGICAL_AXIS_RULES",
    "MeshConfig",
    "Peak",
    "abstract_state",
    "batch_sharding",
    "check_batch_shape",
    "check_model_splits",
    "chip_peak_flops",
    "describe",
    "global_batch",
    "host_device_environment",
    "initialize_distributed",
    "matmul_parameters",
    "mean_context",
    "mesh_spec",
    "mfu",
    "process_rows",
    "put_batch",
    "replace_rules",
    "sharding_dump",
    "state_shardings",
    "train_flops_per_token",
    "unbox",
]
