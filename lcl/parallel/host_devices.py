"""Several devices on one CPU, for trying a mesh without the chips: the environment it takes.

XLA reads these variables when its CPU backend starts, so they are set before the first use of JAX:
in the environment of a child process, or at the top of a notebook.

Why more than the number of devices: on a CPU every open collective holds one thread of XLA's pool
until all its partners have come, and a device may have several open at once. The pool has
max(cores, devices) threads, so on a small machine all of them can be held by collectives whose
partners find no thread: the program stands still and XLA ends it after 40 s ("Termination timeout
... rendezvous"). On two cores under load, data 2 x context 2 x tensor 2 stood still in 5 of 12
runs; with the larger pool, or with the schedule that opens fewer collectives at once, in none of 52
each. We ask for the schedule always, since it costs nothing, and for the pool where devices are
only pretended, since idle threads beside real cores make a step about 20% slower.

Why no compilation cache: the devices of a program must begin its collectives in one order, which
XLA's CPU backend keeps by edges between them. A program read back from JAX's persistent cache has
lost the edges between a loop that holds collectives and those outside it: each level of nesting
gets an order of its own (jaxlib 0.10.2 and 0.12; `ThunkSequenceSerDesProtobuf`). One device then
waits in the ring of its layers while another waits in an all-gather after them: a resumed run on
data 2 x context 4 stood still so, with 122 of its threads idle. Compiled afresh the order is whole.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping

THREADS_PER_DEVICE = 8
FEWER_OPEN_COLLECTIVES = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# XLA ends a process whose partners in a collective are 40 s late; beside other work on the same
# cores a device that is only slow can be that late.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=300"
CACHE = "JAX_ENABLE_COMPILATION_CACHE"  # read by JAX when it is imported
_COUNT = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def host_device_environment(
    count: int | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    cores: int | None = None,
) -> dict[str, str]:
    """The variables that give a process `count` CPU devices which cannot starve each other.

    Args:
        count: devices; None takes what `environ` already asks for in XLA_FLAGS.
        environ: what is set already (default: this process's environment). Its other XLA flags
            are kept, and its own choice of the schedule, of PJRT_NPROC or of the compilation
            cache wins.
        cores: cores of the machine (default: those that this process may use).

    Returns:
        The variables to set, for `os.environ.update` or a child's `env`; empty for one device.

    Raises:
        ValueError: `count` is below 1.

    Example:
        >>> host_device_environment(8, {}, cores=2)["PJRT_NPROC"]
        '64'
        >>> host_device_environment(1, {})
        {}
    """
    environ = os.environ if environ is None else environ
    flags = environ.get("XLA_FLAGS", "")
    asked = _COUNT.findall(flags)
    if count is None:
        count = int(asked[-1]) if asked else 1
    elif count < 1:
        raise ValueError(f"{count} CPU devices: give a positive whole number")
    if count == 1:
        return {}
    words = [_COUNT.sub("", flags).strip(), f"--xla_force_host_platform_device_count={count}"]
    if "xla_cpu_enable_concurrency_optimized_scheduler" not in flags:
        words.append(FEWER_OPEN_COLLECTIVES)
    if "xla_cpu_collective_call_terminate_timeout_seconds" not in flags:
        words.append(PATIENCE)
    wanted = {"XLA_FLAGS": " ".join(word for word in words if word)}
    if CACHE not in environ:
        wanted[CACHE] = "false"
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    if count > cores and not {"PJRT_NPROC", "NPROC"} & set(environ):
        wanted["PJRT_NPROC"] = str(THREADS_PER_DEVICE * count)
    return wanted


def cache_is_wanted(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the environment asks for the compilation cache even with several CPU devices."""
    environ = os.environ if environ is None else environ
    return environ.get(CACHE, "false").lower() in ("true", "1", "yes", "on", "y", "t")


def without_accelerator() -> bool:
    """Whether this machine plainly has neither a TPU nor a GPU: no such device file.

    Says False where it cannot know (not Linux). With libtpu installed for `lcl compile`, JAX would
    otherwise look for a TPU at every start.
    """
    if not os.path.isdir("/dev"):
        return False
    patterns = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")
    return os.uname().sysname == "Linux" and not any(glob.glob(one) for one in patterns)
