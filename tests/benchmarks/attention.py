"""Attention, forward + backward: ours, the dense reference and PyTorch's, time and memory, on CPU.

    python tests/benchmarks/attention.py                        # T = 2K, 8K, 32K on every core
    python tests/benchmarks/attention.py --cores 1              # one pinned core: trust this ratio
    python tests/benchmarks/attention.py --lengths 65536 --sides blockwise --devices 1 --kv-heads 8

Batch 1, 8 query heads of 64 on 2 key heads (grouped queries), causal. Each side is a process of its
own on the same cores and they take turns call by call (in one process they spoil each other's
memory). Ours gets its cores the way a training run does: as that many host devices that share the
heads out (mesh axis tensor); PyTorch gets as many threads. Printed are medians over the rounds of
wall seconds and of process-CPU seconds, the median of the rounds' own ratios (above 1: ours is
faster), and the peak resident memory above what the process held after its imports, and in all.

PyTorch reads grouped heads with `enable_gqa` or from repeated copies, whichever is faster at 1,024
tokens. The dense reference is left out where the compiler says that it needs more than
`--reference-gib`.
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
SIDES = ("reference", "blockwise", "torch")


def documents(length: int, count: int):
    """Segment ids of a row with `count` documents of one length."""
    import numpy as np

    return 1 + np.arange(length) * count // length


def our_call(case: dict):
    """A function that runs one forward and backward of ours, or the GiB it would need."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from lcl.attention import attend

    devices = case["devices"] if case["side"] == "blockwise" else 1
    mesh = jax.make_mesh(
        (1, 1, 1, devices), ("data", "fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 4
    )
    jax.set_mesh(mesh)
    heads = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    length, count = case["length"], case["documents"]
    segment_ids = jnp.asarray(documents(length, count)[None], jnp.int32) if count > 1 else None

    def run(q, k, v, g):
        kwargs = dict(segment_ids_BT=segment_ids, impl=case["side"])
        out, vjp = jax.vjp(lambda *x: attend(*x, **kwargs), q, k, v)
        return out, vjp(g)

    shapes = [(1, length, n, HEAD_DIM) for n in (HEADS, case["kv_heads"], case["kv_heads"], HEADS)]
    structs = [jax.ShapeDtypeStruct(s, case["dtype"], sharding=heads) for s in shapes]
    compiled = jax.jit(run).lower(*structs).compile()
    gib = compiled.memory_analysis().temp_size_in_bytes / 2**30
    if case["side"] == "reference" and gib > case["reference_gib"]:
        return gib
    # Made by NumPy, whose pages go back at once: they are no part of what attention needs.
    rng = np.random.default_rng(0)
    args = [
        jax.device_put(rng.standard_normal(x.shape, np.float32).astype(x.dtype), x.sharding)
        for x in structs
    ]
    return lambda: jax.block_until_ready(compiled(*args))


def torch_call(case: dict):
    """A function that runs one forward and backward of PyTorch's."""
    import torch

    torch.set_num_threads(case["devices"])
    group = HEADS // case["kv_heads"]

    def make(length: int, grouped: bool):
        q, k, v, g = (
            torch.randn((1, n, length, HEAD_DIM), dtype=getattr(torch, case["dtype"]))
            for n in (HEADS, case["kv_heads"], case["kv_heads"], HEADS)
        )
        for x in (q, k, v):
            x.requires_grad_()
        mask = None
        if case["documents"] > 1:
            ids = torch.tensor(documents(length, case["documents"]))
            mask = (ids[:, None] == ids[None, :]) & torch.ones(length, length).bool().tril()

        def run():
            q.grad = k.grad = v.grad = None
            keys = (k, v) if grouped else (x.repeat_interleave(group, 1) for x in (k, v))
            attention = torch.nn.functional.scaled_dot_product_attention
            causal = mask is None
            out = attention(q, *keys, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
            out.backward(g)

        return run

    seconds = {}
    for grouped in (False, True) if group > 1 else (False,):
        call = make(1024, grouped)
        call()
        start = time.process_time()
        call()
        seconds[grouped] = time.process_time() - start
    return make(case["length"], min(seconds, key=seconds.__getitem__))


def memory(name: str) -> int:
    """VmRSS or VmHWM (the peak) of this process, bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise AssertionError(name)


def worker(case: dict) -> None:
    """Times one call for each line that comes in."""
    if case["side"] == "torch":
        import torch  # noqa: F401
    else:
        import jax

        import lcl.attention  # noqa: F401

        jax.devices()
    baseline = memory("VmRSS")
    call = torch_call(case) if case["side"] == "torch" else our_call(case)
    if isinstance(call, float):
        print(json.dumps({"needs_gib": call}), flush=True)
        return
    if case["warm"]:
        call()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = memory("VmHWM")
        print(json.dumps(dict(wall=wall, cpu=cpu, above=peak - baseline, peak=peak)), flush=True)


class Side:
    """The process of one side, pinned to the first `cores` cores."""

    def __init__(self, case: dict, cores: int) -> None:
        env = dict(os.environ, PYTHONPATH=str(REPOSITORY), JAX_PLATFORMS="cpu")
        env["OMP_NUM_THREADS"] = str(case["devices"])
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={case['devices']}"
        if cores == 1:
            env["XLA_FLAGS"] += " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        allowed = sorted(os.sched_getaffinity(0))[:cores]
        command = ["taskset", "-c", ",".join(map(str, allowed)), sys.executable, __file__]
        self.process = subprocess.Popen(
            [*command, "--worker", json.dumps(case)],
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.needs_gib = self._read().get("needs_gib")

    def _read(self) -> dict:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"a side's process ended, return code {self.process.wait()}")
        return json.loads(line)

    def call(self) -> dict:
        print(file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(case: dict, sides: list[str], rounds: int, cores: int) -> dict[str, dict]:
    """Medians of every side, which take turns; each round begins with another side."""
    running = {side: Side(dict(case, side=side), cores) for side in sides}
    results = {s: {"needs_gib": x.needs_gib} for s, x in running.items() if x.needs_gib}
    calls: dict[str, list[dict]] = {side: [] for side in sides if side not in results}
    order = list(calls)
    for i in range(rounds if order else 0):
        for side in order[i % len(order) :] + order[: i % len(order)]:
            calls[side].append(running[side].call())
    for x in running.values():
        x.close()
    for side, xs in calls.items():
        results[side] = {key: statistics.median(x[key] for x in xs) for key in ("wall", "cpu")}
        results[side].update({key: max(x[key] for x in xs) / 2**30 for key in ("above", "peak")})
        if "blockwise" in calls:
            for key in ("wall", "cpu"):
                pairs = zip(xs, calls["blockwise"], strict=True)
                results[side][f"{key}_ratio"] = statistics.median(a[key] / b[key] for a, b in pairs)
    return results


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--documents", type=int, nargs="+", default=[1])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=cores)
    parser.add_argument("--devices", type=int, help="host devices and threads; default: the cores")
    parser.add_argument("--reference-gib", type=float, default=8.0)
    parser.add_argument("--no-warm-up", action="store_true", help="for one long call")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    devices = args.devices or args.cores
    print(f"{args.cores} cores, {devices} devices or threads; ratios are side / blockwise")
    print(
        "tokens  documents  dtype     side       wall s   cpu s  wall ratio  cpu ratio  "
        "GiB above imports  in all"
    )
    for length in args.lengths:
        for count in args.documents:
            for dtype in args.dtypes:
                case = dict(length=length, documents=count, dtype=dtype, kv_heads=args.kv_heads)
                case |= dict(
                    devices=devices, reference_gib=args.reference_gib, warm=not args.no_warm_up
                )
                for side, x in measure(case, args.sides, args.rounds, args.cores).items():
                    head = f"{length:6}  {count:9}  {dtype:8}  {side:9}"
                    if "needs_gib" in x:
                        print(f"{head}  not run: needs {x['needs_gib']:.1f} GiB", flush=True)
                        continue
                    print(
                        f"{head}  {x['wall']:7.3f} {x['cpu']:7.3f}  "
                        f"{x.get('wall_ratio', 1):10.2f}  {x.get('cpu_ratio', 1):9.2f}  "
                        f"{x['above']:17.2f}  {x['peak']:6.2f}",
                        flush=True,
                    )
                    print(json.dumps(case | x | {"side": side}), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
