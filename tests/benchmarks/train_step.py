"""Our train step against Hugging Face transformers + PyTorch's, the same work on the same machine.

    python tests/benchmarks/train_step.py                       # both cores, float32 and bfloat16
    python tests/benchmarks/train_step.py --devices 2           # ours as a mesh of two CPU devices
    python tests/benchmarks/train_step.py --cores 1 --rounds 7  # the ratio that holds under load

Two worker processes take turns, one step at a time, over a pipe; the other one sleeps meanwhile.
Same weights (copied across once), same tokens, same AdamW, same clipping; the losses of the first
steps must agree before anything is timed. Ours is the real step: `lcl.train.make_train_step` with
the shipped config, packed-row inputs (segment ids, positions, weights) and donated state. Theirs is
LlamaForCausalLM with scaled_dot_product_attention and fused AdamW; bfloat16 is autocast.

MFU convention: FLOPs of a token = 6 x parameters in matmuls that every token passes (embedding
excluded, head included) + 6 x layers x T x heads x head_dim (causal attention: half the square, two
matmuls, backward counted twice), over the best matmul rate that either library reached in this run.

Exit status 1 if the first losses disagree. Times are printed and never asserted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from lcl.parallel import host_device_environment

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
CHECKED_STEPS = 3
# How far the losses of the first steps may lie apart, absolutely. In bfloat16 the two frameworks
# round at different places.
LOSS_BOUND = {"float32": 1e-3, "bfloat16": 1e-2}
# Given to both sides. Huge pages for malloc, and freed memory kept by the process: otherwise a
# step's temporaries (0.9 GB) go back to the kernel and are faulted in again every step, which costs
# 0.1 s on a fresh machine and up to 2 s once memory is fragmented. It must be set before a process
# starts.
GLIBC_TUNABLES = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("hugetlb=1", "mmap_max=0", "trim_threshold=17179869184", "arena_max=1")
)
PEAK_SHAPES = {"2048^3": (2048, 2048, 2048), "head": (1024, 512, 32000)}


@dataclasses.dataclass(frozen=True)
class Job:
    """What both workers are told: everything that defines the work."""

    size: str
    dtype: str
    batch: int
    length: int
    cores: int
    devices: int
    tunables: str
    weights: str
    seed: int = 0

    def tokens(self, vocab_size: int) -> Any:
        """int32 [batch, length + 1]: one fixed batch, the same for both."""
        import numpy as np

        shape = (self.batch, self.length + 1)
        return np.random.default_rng(self.seed).integers(0, vocab_size, shape, dtype=np.int32)


# ---- the two sides ------------------------------------------------------------------------------


class Ours:
    """lcl: Decoder, NextToken and AdamW through the run's own step, jitted with donated state."""

    def __init__(self, job: Job) -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from flax.linen import logical_axis_rules
        from jax.sharding import NamedSharding, PartitionSpec

        from lcl.checkpoints.huggingface import from_hf_state_dict
        from lcl.data import Batch
        from lcl.models import Decoder
        from lcl.objectives import NextToken
        from lcl.optim import AdamW
        from lcl.optim.schedules import constant
        from lcl.parallel import MeshConfig, rules
        from lcl.step import TrainState, make_train_step

        self.job, self.versions = job, {"jax": jax.__version__}
        config = dataclasses.replace(load_config(job.size), dtype=job.dtype)
        optimizer = AdamW(
            schedule=constant(rate=LEARNING_RATE),
            b1=BETAS[0],
            b2=BETAS[1],
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            clip_norm=CLIP,
        )
        chain = optimizer.build()
        with np.load(job.weights) as weights:
            params = jax.tree.map(jnp.asarray, from_hf_state_dict(config, dict(weights)))
        self.state = TrainState(
            step=jnp.zeros((), jnp.int32), params=params, opt_state=chain.init(params)
        )
        tokens = job.tokens(config.vocab_size)
        shape = tokens[:, 1:].shape
        self.batch = jax.tree.map(
            jnp.asarray,
            Batch(
                tokens=tokens[:, :-1],
                targets=tokens[:, 1:],
                segment_ids=np.ones(shape, np.int32),
                positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
                loss_weights=np.ones(shape, np.float32),
                source_ids=np.zeros(shape, np.int32),
            ),
        )
        step = make_train_step(Decoder(config), NextToken(), optimizer, chain, num_sources=6)
        jitted = jax.jit(step, donate_argnums=0)
        if job.devices == 1:
            self._step = jitted
            return
        # As a run does it: rows split over the devices, the state on each of them.
        mesh = MeshConfig().build()
        everywhere = NamedSharding(mesh, PartitionSpec())
        self.state = jax.device_put(self.state, everywhere)
        self.batch = rules.put_batch(self.batch, mesh)
        with jax.set_mesh(mesh), logical_axis_rules(rules.LOGICAL_AXIS_RULES):
            jitted = jax.jit(step, donate_argnums=0, out_shardings=(everywhere, None))
            self._step = jitted.lower(self.state, self.batch).compile()

    def step(self) -> float:
        """One update; the loss before it. Returns when everything is done."""
        import jax

        self.state, metrics = self._step(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])

    def matmul(self, m: int, k: int, n: int) -> Any:
        """A function that multiplies [m, k] by [k, n] once."""
        import jax
        import jax.numpy as jnp

        a = jnp.ones((m, k), self.job.dtype)
        b = jnp.ones((k, n), self.job.dtype)
        dot = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
        return lambda: dot(a, b).block_until_ready()


class Theirs:
    """transformers' LlamaForCausalLM and torch's fused AdamW."""

    def __init__(self, job: Job) -> None:
        import torch
        import transformers

        torch.set_num_threads(job.cores)
        torch.manual_seed(job.seed)
        transformers.logging.set_verbosity_error()
        self.job = job
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.dtype = getattr(torch, job.dtype)
        config = load_config(job.size)
        self.model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.embed_dim,
                intermediate_size=config.mlp_dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.context_length,
                rms_norm_eps=config.norm_eps,
                tie_word_embeddings=config.tie_embeddings,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
        self.model.train()
        groups = [
            {"params": [p for p in self.model.parameters() if p.ndim > 1]},
            {"params": [p for p in self.model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
        )
        tokens = torch.from_numpy(job.tokens(config.vocab_size)).long()
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def save_weights(self) -> None:
        """Writes the fresh weights for both sides to start from."""
        import numpy as np

        state_dict = self.model.state_dict()
        np.savez(self.job.weights, **{name: array.numpy() for name, array in state_dict.items()})

    def step(self) -> float:
        """One update; the loss before it."""
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype == torch.bfloat16):
            loss = self.model(self.inputs, labels=self.targets, shift_labels=self.targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.item()

    def matmul(self, m: int, k: int, n: int) -> Any:
        """A function that multiplies [m, k] by [k, n] once."""
        import torch

        a, b = torch.ones((m, k), dtype=self.dtype), torch.ones((k, n), dtype=self.dtype)
        return lambda: torch.mm(a, b)


def load_config(size: str) -> Any:
    """The shipped model config of that name."""
    from lcl import config

    return config.load([str(REPOSITORY / "configs" / "models" / f"{size}.gin")], []).call(
        "DecoderConfig"
    )


def flops_per_token(config: Any, length: int) -> float:
    """See the convention at the top."""
    from lcl.models import num_parameters

    matmul_parameters = num_parameters(config)
    if not config.tie_embeddings:
        matmul_parameters -= config.vocab_size * config.embed_dim
    matmul_parameters -= (2 * config.num_layers + 1) * config.embed_dim  # norms
    attention = 6 * config.num_layers * length * config.num_heads * config.head_dim
    return 6.0 * matmul_parameters + attention


# ---- worker and pipe ----------------------------------------------------------------------------


def work(side: str, job: Job) -> None:
    """A worker: builds its side, then answers one JSON line for each line on stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    worker: Any = (Ours if side == "ours" else Theirs)(job)

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    answer(versions=worker.versions)
    for line in sys.stdin:
        command = json.loads(line)
        if command == "save":
            worker.save_weights()
            answer()
        elif command == "step":
            wall, cpu = time.perf_counter(), time.process_time()
            loss = worker.step()
            answer(loss=loss, wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
        elif command == "memory":
            answer(bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        else:
            run = worker.matmul(*command)
            run()
            wall = time.perf_counter()
            run()
            repeats = max(1, int(0.3 / (time.perf_counter() - wall)))
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                run()
            m, k, n = command
            flops = 2.0 * m * k * n * repeats
            answer(
                wall=flops / (time.perf_counter() - wall), cpu=flops / (time.process_time() - cpu)
            )


class Worker:
    """The other end of a worker's pipe."""

    def __init__(self, side: str, job: Job) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "JAX_PLATFORMS": "cpu",
            "GLIBC_TUNABLES": job.tunables,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, __file__, "--worker", side, json.dumps(dataclasses.asdict(job))]
        if job.cores == 1:
            command = ["taskset", "-c", str(max(os.sched_getaffinity(0))), *command]
            environment["XLA_FLAGS"] = (
                "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
            )
            environment["OMP_NUM_THREADS"] = "1"
        elif side == "ours" and job.devices > 1:
            environment.update(host_device_environment(job.devices))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self._answer()["versions"]

    def ask(self, command: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Lets the process go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker died: exit status {self.process.wait()}; see above")
        return json.loads(line)


# ---- the comparison -----------------------------------------------------------------------------


def compare(job: Job, rounds: int) -> dict[str, Any]:
    """One dtype: builds both sides, checks their losses, takes turns, returns the record."""
    theirs = Worker("theirs", job)
    theirs.ask("save")
    ours = Worker("ours", job)
    sides = {"ours": ours, "theirs": theirs}
    try:
        return _measure(sides, job, rounds)
    finally:
        for worker in sides.values():
            worker.close()


def _measure(sides: dict[str, Worker], job: Job, rounds: int) -> dict[str, Any]:
    losses = {
        name: [w.ask("step")["loss"] for _ in range(CHECKED_STEPS)] for name, w in sides.items()
    }
    apart = max(abs(a - b) for a, b in zip(losses["ours"], losses["theirs"], strict=True))
    print(f"{job.dtype}: losses of the first {CHECKED_STEPS} steps {losses}: apart {apart:.1e}")
    if not apart <= LOSS_BOUND[job.dtype]:
        raise SystemExit(f"not the same work: losses {apart:.2e} apart, above the bound")

    times: dict[str, dict[str, list[float]]] = {n: {"wall": [], "cpu": []} for n in sides}
    peaks: dict[str, dict[str, list[float]]] = {n: {"wall": [], "cpu": []} for n in sides}
    for _ in range(rounds):
        for name, worker in sides.items():
            answer = worker.ask("step")
            for clock in ("wall", "cpu"):
                times[name][clock].append(answer[clock])
        for name, worker in sides.items():
            rates = [worker.ask(shape) for shape in PEAK_SHAPES.values()]
            for clock in ("wall", "cpu"):
                peaks[name][clock].append(max(rate[clock] for rate in rates))

    config = load_config(job.size)
    clock = "cpu" if job.cores == 1 else "wall"
    peak = max(statistics.median(peaks[name][clock]) for name in sides)
    tokens = job.batch * job.length
    record: dict[str, Any] = {
        "benchmark": "train_step",
        **{k: v for k, v in dataclasses.asdict(job).items() if k not in ("weights", "seed")},
        "rounds": rounds,
        "machine": f"{_cpu_model()}, {job.cores} of {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **sides["ours"].versions}
        | sides["theirs"].versions,
        "losses": losses,
        "flops_per_token": flops_per_token(config, job.length),
        "matmul_peak_gflops": peak / 1e9,
        "ratio": {
            c: statistics.median(times["theirs"][c]) / statistics.median(times["ours"][c])
            for c in ("wall", "cpu")
        },
    }
    for name, worker in sides.items():
        median = {c: statistics.median(times[name][c]) for c in ("wall", "cpu")}
        record[name] = {
            "seconds": median,
            "spread": {c: [min(times[name][c]), max(times[name][c])] for c in ("wall", "cpu")},
            "tokens_per_second": tokens / median["wall"],
            "share_of_peak": record["flops_per_token"] * tokens / median[clock] / peak,
            "matmul_gflops": {c: statistics.median(peaks[name][c]) / 1e9 for c in ("wall", "cpu")},
            "max_resident_bytes": worker.ask("memory")["bytes"],
        }
    return record


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")


def table(record: dict[str, Any]) -> str:
    """The record as a few lines for people."""
    clock = "CPU" if record["cores"] == 1 else "wall"
    lines = [
        f"{record['size']}, {record['dtype']}, {record['batch']} x {record['length']} tokens, "
        f"{record['machine']}, medians of {record['rounds']} rounds; peak "
        f"{record['matmul_peak_gflops']:.0f} GFLOP/s ({clock})",
        f"{'':8}{'wall s/step':>24}{'CPU s/step':>24}{'tokens/s':>10}{'of peak':>9}{'GB':>6}",
    ]
    for name in ("ours", "theirs"):
        side = record[name]
        cells = []
        for c in ("wall", "cpu"):
            low, high = side["spread"][c]
            cells.append(f"{side['seconds'][c]:.3f} ({low:.3f}..{high:.3f})")
        lines.append(
            f"{name:8}{cells[0]:>24}{cells[1]:>24}{side['tokens_per_second']:>10.0f}"
            f"{side['share_of_peak']:>8.0%}{side['max_resident_bytes'] / 1e9:>6.1f}"
        )
    ratio = record["ratio"]
    lines.append(f"theirs / ours: wall {ratio['wall']:.2f}x, CPU {ratio['cpu']:.2f}x")
    return "\n".join(lines)


def main() -> None:
    """Parses the command line and runs the comparisons."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="bench_58m", help="a file of configs/models")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, choices=(1, 2), default=2)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of ours")
    parser.add_argument("--tunables", default=GLIBC_TUNABLES, help="GLIBC_TUNABLES of both sides")
    parser.add_argument("--json", help="append each record to this file as one line")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "JOB"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        side, job = arguments.worker
        work(side, Job(**json.loads(job)))
        return
    sys.path.insert(0, str(REPOSITORY))
    for dtype in arguments.dtypes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            job = Job(
                size=arguments.size,
                dtype=dtype,
                batch=arguments.batch,
                length=arguments.length,
                cores=arguments.cores,
                devices=arguments.devices,
                tunables=arguments.tunables,
                weights=f"{folder}/weights.npz",
            )
            record = compare(job, arguments.rounds)
        line = json.dumps(record)
        print(table(record))
        print(line, flush=True)
        if arguments.json:
            with open(arguments.json, "a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
