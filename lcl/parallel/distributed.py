"""Many processes, one program: joining them before the first device is asked for.

On a TPU pod every worker runs the same `lcl train`; this makes them one JAX program. On one host it
does nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

log = logging.getLogger(__name__)

# Set by our launchers for a hand-made cluster (CPU hosts, tests); TPU pods need none of them.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = (
    "LCL_COORDINATOR_ADDRESS",
    "LCL_NUM_PROCESSES",
    "LCL_PROCESS_ID",
)


def initialize_distributed(environment: Mapping[str, str] | None = None) -> int:
    """Joins this process to the others, if there are others; must run before JAX touches a device.

    Four cases, read from the environment:
        LCL_COORDINATOR_ADDRESS, LCL_NUM_PROCESSES, LCL_PROCESS_ID    a cluster named by hand
        LCL_POD=1                                                     a TPU VM that launch/ set up
        several TPU_WORKER_HOSTNAMES, or MEGASCALE_NUM_SLICES > 1     TPUs on GKE
        none of these                                                 one process: nothing is done

    On TPUs JAX finds the rest. A TPU VM has its neighbours in its metadata, not in variables, and
    asking for metadata costs half a minute where there is none, hence LCL_POD.

    Args:
        environment: default `os.environ`.

    Returns:
        The number of processes.

    Raises:
        ValueError: a hand-made cluster that is named only in part.
    """
    import jax

    env = os.environ if environment is None else environment
    named = [name for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if env.get(name)]
    if named and len(named) < 3:
        missing = ", ".join(sorted({COORDINATOR, NUM_PROCESSES, PROCESS_ID} - set(named)))
        raise ValueError(f"{', '.join(named)} is set but {missing} is not: set all three or none")
    if named:
        try:
            num_processes, process_id = int(env[NUM_PROCESSES]), int(env[PROCESS_ID])
        except ValueError:
            raise ValueError(
                f"{NUM_PROCESSES}={env[NUM_PROCESSES]!r} and {PROCESS_ID}={env[PROCESS_ID]!r} must "
                "be whole numbers"
            ) from None
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"{PROCESS_ID}={process_id} is not in 0..{num_processes - 1}: number the "
                f"{num_processes} processes from 0"
            )
        if num_processes == 1:
            return 1
        jax.config.update("jax_cpu_collectives_implementation", "gloo")  # only read on CPU
        jax.distributed.initialize(env[COORDINATOR], num_processes, process_id)
    elif is_pod(env):
        jax.distributed.initialize()
    else:
        return 1
    log.info("process %d of %d", jax.process_index(), jax.process_count())
    return jax.process_count()


def is_pod(environment: Mapping[str, str]) -> bool:
    """Whether the environment of a TPU VM says that there may be other workers or slices."""
    if environment.get("LCL_POD") == "1":
        return True
    workers = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    return len(workers) > 1 or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1
