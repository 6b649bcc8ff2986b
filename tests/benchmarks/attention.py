"""Attention, forward + backward, against PyTorch's scaled_dot_product_attention on one CPU core.

    python tests/benchmarks/attention.py                    # T 1,024 and 4,096
    python tests/benchmarks/attention.py --lengths 8192 --rounds 9

Each side has a process of its own, pinned to one core, and they take turns call by call (in one
process they spoil each other's memory). What is printed is process-CPU time, which is stable on a
shared machine where wall time is not: medians in milliseconds and their ratio. Batch 1, 8 heads of
64.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

HEADS, HEAD_DIM = 8, 64
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def documents(length: int, count: int):
    """Segment ids of a row with `count` documents of one length."""
    import numpy as np

    return np.repeat(np.arange(1, count + 1), length // count)


def our_call(length: int, count: int, dtype: str):
    """A function that runs one forward and backward of ours."""
    import jax
    import jax.numpy as jnp

    from lcl.attention import attend

    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(x, (1, length, HEADS, HEAD_DIM), dtype) for x in keys)
    segment_ids = jnp.asarray(documents(length, count)[None]) if count > 1 else None

    @jax.jit
    def run(q, k, v, g, segment_ids):
        out, vjp = jax.vjp(
            lambda *x: attend(*x, segment_ids_BT=segment_ids, impl="blockwise"), q, k, v
        )
        return out, vjp(g)

    return lambda: jax.block_until_ready(run(q, k, v, g, segment_ids))


def torch_call(length: int, count: int, dtype: str):
    """A function that runs one forward and backward of PyTorch's."""
    import torch

    torch.set_num_threads(1)
    shape = (1, HEADS, length, HEAD_DIM)
    q, k, v, g = (torch.randn(shape, dtype=getattr(torch, dtype)) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    mask = None
    if count > 1:
        ids = torch.tensor(documents(length, count))
        mask = (ids[:, None] == ids[None, :]) & torch.ones(length, length, dtype=torch.bool).tril()

    def run():
        q.grad = k.grad = v.grad = None
        attention = torch.nn.functional.scaled_dot_product_attention
        attention(q, k, v, attn_mask=mask, is_causal=mask is None).backward(g)

    return run


def worker(side: str, case: list) -> None:
    """Times one call for each line that comes in."""
    call = {"ours": our_call, "torch": torch_call}[side](*case)
    for _ in range(2):
        call()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        call()
        print(time.process_time() - start, flush=True)


def start_worker(side: str, case: tuple) -> subprocess.Popen:
    """A pinned process of one side, warmed up."""
    env = dict(os.environ, PYTHONPATH=str(REPOSITORY), JAX_PLATFORMS="cpu")
    env["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    command = [sys.executable, __file__, "--worker", side, "--case", json.dumps(case)]
    process = subprocess.Popen(
        ["taskset", "1", *command],
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def measure(case: tuple, rounds: int) -> dict[str, float]:
    """Median milliseconds of both sides, which take turns."""
    workers = {side: start_worker(side, case) for side in ("ours", "torch")}
    times: dict[str, list[float]] = {side: [] for side in workers}
    for _ in range(rounds):
        for side, process in workers.items():
            print(file=process.stdin, flush=True)
            times[side].append(float(process.stdout.readline()))
    for process in workers.values():
        process.stdin.close()
        process.wait()
    return {side: 1e3 * statistics.median(x) for side, x in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker")
    parser.add_argument("--case", type=json.loads)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.case)
    print("tokens  documents  dtype     ours ms  torch ms  torch / ours")
    for length in args.lengths:
        for count in (1, 8):
            for dtype in ("float32", "bfloat16"):
                ms = measure((length, count, dtype), args.rounds)
                ratio = ms["torch"] / ms["ours"]
                print(
                    f"{length:6}  {count:9}  {dtype:8}  {ms['ours']:7.1f}  {ms['torch']:8.1f}  "
                    f"{ratio:12.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
