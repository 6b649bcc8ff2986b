"""What the commands have in common: their form, and the settings of a process that uses JAX."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

from lcl import files

# The whole configuration of a run as gin text, in its directory.
CONFIG_FILE = "config.gin"
# (name, function, one line of help) -> the parser to which the command's own words are added.
AddCommand = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def prepare_jax() -> None:
    """Process-wide settings of JAX, made here and nowhere in the library."""
    import jax

    from lcl.parallel import host_device_environment, initialize_distributed
    from lcl.parallel.host_devices import cache_is_wanted, without_accelerator

    if "JAX_PLATFORMS" not in os.environ and without_accelerator():
        jax.config.update("jax_platforms", "cpu")  # libtpu would look for a TPU, and take its time
    os.environ.update(host_device_environment())  # read when the backend starts
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "lcl", "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    initialize_distributed()
    if jax.default_backend() == "cpu" and jax.device_count() > 1 and not cache_is_wanted():
        jax.config.update("jax_enable_compilation_cache", False)


def config_of_run(run_dir: str) -> str:
    """The path of the configuration that lies in a run's directory.

    Raises:
        ValueError: there is no run, or one that was made from Python and has no gin text.
    """
    own = files.place(run_dir) / CONFIG_FILE
    if own.exists():
        return str(own)
    if (own.parent / "metrics.jsonl").exists():
        raise ValueError(
            f"{run_dir} was run from Python and holds no {CONFIG_FILE}: call lcl.train, "
            "lcl.branches or lcl.scoring with the arguments it was made with"
        )
    raise ValueError(f"{run_dir} holds no run ({CONFIG_FILE} is missing)")


def pairs(option: str, values: Sequence[str]) -> dict[str, str]:
    """`NAME=PATH` options as a dictionary."""
    pairs = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise ValueError(f"{option} {value!r} should be NAME=PATH")
        pairs[name] = path
    return pairs
