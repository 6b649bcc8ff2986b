"""Memory a chip of ring attention when the row and the context degree grow together.

    python tests/benchmarks/ring_memory.py                # 64K tokens on 1 chip ... 1M on 16
    python tests/benchmarks/ring_memory.py --layout striped --tokens 32768 --degrees 1 2 4

Compiles forward and backward, with the splash kernel inside, for a TPU topology that is not there
(libtpu, no TPU), and prints XLA's own memory analysis, the collective traffic of one pass, and how
long compiling took. A ring holds O(T / context) on a chip: the bytes must not grow down the table
(one chip alone sends nothing, so it lacks the buffers in which keys arrive), nor the compile time,
for its loop is rolled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time

# Before JAX and libtpu start: no TPU to look for, and another process may compile too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lcl.attention import attend

AXES = ("data", "fsdp", "context", "tensor")


def measure(degree: int, tokens: int, options: argparse.Namespace) -> dict:
    """Bytes, permutes and seconds for a ring of `degree` chips that hold `tokens` each."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    devices = np.asarray(chips[:degree]).reshape(1, 1, degree, 1)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)
    length = degree * tokens

    def array(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(None, "context")))

    def heads(count):
        return array((1, length, count, options.head_dim))

    def run(q, k, v, segment_ids, g):
        def forward(q, k, v):
            return attend(q, k, v, segment_ids_BT=segment_ids, impl="ring", layout=options.layout)

        out, pull = jax.vjp(forward, q, k, v)
        return (out, *pull(g))

    q, k = heads(options.heads), heads(options.kv_heads)
    begin = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = jax.jit(run).lower(q, k, k, array((1, length), jnp.int32), q)
        compiled = lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "degree": degree,
        "row": length,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "kernels": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        "permutes": len(re.findall(r"collective-permute-start\(|collective-permute\(", text)),
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> None:
    """Prints a line of the table for each degree, and JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of a row on one chip")
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--layout", default="zigzag")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=2)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    print(
        f"{options.topology}, {options.layout}, {options.heads} heads on {options.kv_heads} x "
        f"{options.head_dim}, bfloat16, {options.tokens} tokens of a row on each chip"
    )
    print("   row  chips |  arguments  outputs  temporary     peak MiB | kernels permutes  seconds")
    rows = []
    for degree in options.degrees:
        row = measure(degree, options.tokens, options)
        rows.append(row)
        mib = [row[name] / 2**20 for name in ("arguments", "outputs", "temporary", "peak")]
        print(
            f"{row['row'] // 1024:5d}K  {degree:5d} | {mib[0]:10.1f} {mib[1]:8.1f} {mib[2]:10.1f} "
            f"{mib[3]:12.1f} | {row['kernels']:7d} {row['permutes']:8d} {row['seconds']:8.1f}",
            flush=True,
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
