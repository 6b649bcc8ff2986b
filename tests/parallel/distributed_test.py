"""Several processes: who joins when, and two real ones whose batch and checkpoint equal one's."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from lcl.parallel import host_device_environment
from lcl.parallel.distributed import initialize_distributed, is_pod

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def test_one_process_is_left_alone():
    assert initialize_distributed({}) == 1
    assert initialize_distributed({"TPU_WORKER_HOSTNAMES": "localhost"}) == 1
    hand_made = {
        "LCL_COORDINATOR_ADDRESS": "localhost:1", "LCL_NUM_PROCESSES": "1", "LCL_PROCESS_ID": "0",
    }  # fmt: skip
    assert initialize_distributed(hand_made) == 1


def test_a_pod_is_known_by_its_workers_or_slices():
    assert is_pod({"TPU_WORKER_HOSTNAMES": "t1k-0,t1k-1"})
    assert is_pod({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"})
    assert is_pod({"LCL_POD": "1"})  # set by launch/worker.sh: a TPU VM's variables do not tell
    assert not is_pod({"LCL_POD": "0"})
    assert not is_pod({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": ""})


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"LCL_COORDINATOR_ADDRESS": "h:1"}, "LCL_NUM_PROCESSES, LCL_PROCESS_ID is not: set all"),
        (
            {"LCL_COORDINATOR_ADDRESS": "h:1", "LCL_NUM_PROCESSES": "2", "LCL_PROCESS_ID": "2"},
            r"LCL_PROCESS_ID=2 is not in 0\.\.1",
        ),
        (
            {"LCL_COORDINATOR_ADDRESS": "h:1", "LCL_NUM_PROCESSES": "two", "LCL_PROCESS_ID": "0"},
            "must be whole numbers",
        ),
    ],
)
def test_a_half_named_cluster_is_refused(env, message):
    with pytest.raises(ValueError, match=message):
        initialize_distributed(env)


WORKER = """
import sys
from lcl.parallel import MeshConfig, global_batch, initialize_distributed, process_rows
assert initialize_distributed() == 2
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from lcl.checkpoints import Checkpointer, state_digest
from lcl.preemption import Preemption

class Stream:  # the whole batch 5 is 0..127 + 5; a process only ever builds its own rows
    built = []
    def batch_shape(self, t):
        return 8, 16
    def batch(self, t, rows=None):
        self.built.append(rows)
        whole = np.arange(128, dtype=np.int32).reshape(8, 16) + t
        return {"tokens": whole if rows is None else whole[rows]}

run_dir, me = sys.argv[1], jax.process_index()
whole = np.arange(128, dtype=np.int32).reshape(8, 16) + 5
for sizes in [dict(data=4), dict(data=2, context=2), dict(data=1, context=4)]:
    mesh = MeshConfig(**sizes).build()
    rows = process_rows(mesh, 8)
    batch = global_batch(Stream(), 5, mesh)["tokens"]
    want = {4: 4, 2: 4, 1: 8}[sizes["data"]]
    assert len(rows) == want == len(Stream.built[-1]), (sizes, rows)
    for shard in batch.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
    assert int(jax.jit(jnp.sum)(batch)) == int(whole.sum())

mesh = MeshConfig(fsdp=4, data=1).build()
sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
state = {"w": jax.jit(lambda: jnp.arange(64.0).reshape(8, 8), out_shardings=sharding)()}
abstract = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
with Checkpointer(run_dir) as checkpointer:
    for step in (1, 2, 3):
        checkpointer.save(step, state, {"me": 0})
    checkpointer.wait()
    restored = checkpointer.restore_latest(abstract)
assert restored.step == 3 and state_digest(restored.state) == state_digest(state)

with Preemption(agree_every=2, agree_seconds=1e6) as preemption:
    if me == 1:
        preemption._requested.set()
    print(me, [preemption.should_stop(step) for step in (1, 2, 3, 4)], flush=True)
"""


def test_two_processes_hold_one_batch_and_one_checkpoint(tmp_path):
    """Gloo on one machine, two devices each; then one process reads what the two have saved."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(2):
        env = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            **host_device_environment(2),
            "LCL_COORDINATOR_ADDRESS": f"localhost:{port}",
            "LCL_NUM_PROCESSES": "2",
            "LCL_PROCESS_ID": str(number),
        }
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(tmp_path)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
        )
    try:
        for number, child in enumerate(children):
            out, err = child.communicate(timeout=120)
            assert child.returncode == 0, err[-4000:]
            # a signal at one process stops both; they ask at the first two steps, then every 2
            assert out.splitlines()[-1] == f"{number} [True, True, False, True]"
    finally:
        for child in children:
            child.kill()

    import jax
    import jax.numpy as jnp
    import numpy as np

    from lcl.checkpoints import Checkpointer

    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.steps() == [2, 3]
        restored = checkpointer.restore({"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}, 3)
    np.testing.assert_array_equal(restored.state["w"], np.arange(64.0).reshape(8, 8))
    assert restored.metadata == {"me": 0}
