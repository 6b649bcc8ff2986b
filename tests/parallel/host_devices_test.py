"""The environment for several CPU devices: what is asked for, what is kept, and that it holds."""

from __future__ import annotations

import pytest

from lcl.parallel.host_devices import FEWER_OPEN_COLLECTIVES, PATIENCE, host_device_environment


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
