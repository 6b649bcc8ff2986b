"""The environment for several CPU devices: what is asked for, what is kept, and that it holds."""

from __future__ import annotations

import pytest

from lcl.parallel.host_devices import (
    CACHE,
    FEWER_OPEN_COLLECTIVES,
    PATIENCE,
    cache_is_wanted,
    host_device_environment,
)


def test_pretended_devices_get_a_larger_pool_and_real_cores_do_not():
    pretended = host_device_environment(8, {}, cores=2)
    assert pretended["PJRT_NPROC"] == "64"
    real = host_device_environment(2, {}, cores=2)
    assert "PJRT_NPROC" not in real
    for wanted in (pretended, real):
        assert FEWER_OPEN_COLLECTIVES in wanted["XLA_FLAGS"].split()


def test_what_the_user_has_set_is_kept():
    given = {
        "XLA_FLAGS": "--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=4"
        " --xla_cpu_enable_concurrency_optimized_scheduler=true",
        "NPROC": "12",
    }
    wanted = host_device_environment(8, given, cores=2)
    assert wanted["XLA_FLAGS"].split() == [
        "--xla_dump_to=/tmp/x",
        "--xla_cpu_enable_concurrency_optimized_scheduler=true",
        "--xla_force_host_platform_device_count=8",
        PATIENCE,
    ]
    assert "PJRT_NPROC" not in wanted


def test_the_count_comes_from_the_flags_and_asking_twice_changes_nothing():
    environ = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    wanted = host_device_environment(environ=environ, cores=2)
    assert "--xla_force_host_platform_device_count=8" in wanted["XLA_FLAGS"]
    again = host_device_environment(environ={**environ, **wanted}, cores=2)
    assert sorted(again["XLA_FLAGS"].split()) == sorted(wanted["XLA_FLAGS"].split())
    assert host_device_environment(environ={}) == {}


def test_no_devices_is_refused():
    with pytest.raises(ValueError, match="0 CPU devices"):
        host_device_environment(0, {})


def test_several_devices_read_no_stored_program():
    assert host_device_environment(2, {})[CACHE] == "false"
    assert CACHE not in host_device_environment(2, {CACHE: "true"})
    assert cache_is_wanted({CACHE: "true"})
    assert not cache_is_wanted({CACHE: "false"}) and not cache_is_wanted({})


@pytest.mark.parametrize("devices", [1, 2])
def test_a_command_stores_programs_of_one_device_only(run_python, tmp_path, devices):
    code = """
import os, pathlib
import jax, jax.numpy as jnp
from lcl.commands.shared import prepare_jax
prepare_jax()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((8, 8))).block_until_ready()
stored = [path for path in pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache")]
print(jax.device_count(), len(stored) > 0)
"""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "stored"), "XLA_FLAGS": flags}
    assert run_python(code, env=env).split() == [str(devices), str(devices == 1)]
