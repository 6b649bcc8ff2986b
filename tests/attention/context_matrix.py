"""Every attention that crosses devices, in every setting, held to dense float32 attention.

    python tests/attention/context_matrix.py            # the whole matrix, 8 CPU devices, minutes
    python tests/attention/context_matrix.py --pairs    # every pair of settings at least once (CI)
    python tests/attention/context_matrix.py --splash   # the TPU kernel inside, interpreted

    documents  x  heads  x  mask  x  layout  x  mesh (data x context)  x  implementation

The documents lie along the batch, so that one program tests all of them:

    row 0   1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1     one document
    row 1   1 1 1 2 3 3 3 3 4 4 5 5 5 6 7 7     many
    row 2   1 1 1 1 2 2 2 3 3 3 0 0 0 0 0 0     a tail of padding, which sees and gives nothing
    row 3   1 2 2 2 2 2 2 2 2 2 2 2 2 2 2 3     a document that begins and ends inside the outer
            |dev 0  |dev 1  |dev 2  |dev 3      shards and spans all the others

Output and gradients of q, k, v must agree within 1e-5; padding must give exactly 0. In the whole
matrix the row index is data, as in a batch, so that one program serves all layouts (but for
ulysses); with --pairs each program derives it from the layout.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from typing import NamedTuple

from lcl.parallel import host_device_environment

if __name__ == "__main__":
    # Before JAX starts its backend.
    os.environ.update(host_device_environment(8))

import jax
import numpy as np
from jax.sharding import AxisType

from lcl.attention import Mask, attend, layouts

TOLERANCE = 1e-5
DOCUMENTS = ("one", "many", "padding", "spanning")
NUM_HEADS, HEAD_DIM = 8, 8


class Setting(NamedTuple):
    """One program of the matrix."""

    impl: str
    layout: str
    mesh: tuple[int, int]
    num_kv_heads: int
    window: int | None

    def __str__(self) -> str:
        data, context = self.mesh
        heads = {NUM_HEADS: "MHA", 1: "MQA"}.get(self.num_kv_heads, "GQA")
        mask = "causal" if self.window is None else "window"
        return f"{self.impl:10} {self.layout:10} {data}x{context} {heads} {mask}"


AXES = (
    ("ring", "all_gather", "ulysses", "blockwise"),
    layouts.LAYOUTS,
    ((1, 8), (2, 4), (4, 2)),
    (NUM_HEADS, 2, 1),
    (None, 13),
)


def whole() -> list[Setting]:
    """All settings."""
    return [Setting(*values) for values in itertools.product(*AXES)]


def pairs() -> list[Setting]:
    """Few settings that hold every pair of values of two axes: greedy, always the same ones."""

    def held(setting):
        return set(itertools.combinations(enumerate(setting), 2))

    settings = whole()
    missing = set().union(*(held(setting) for setting in settings))
    chosen = []
    while missing:
        best = max(settings, key=lambda setting: len(held(setting) & missing))
        chosen.append(best)
        missing -= held(best)
    return chosen


def documents(length: int, context: int) -> np.ndarray:
    """int32 [4, length], the rows of the picture above."""
    place = np.arange(length)
    rng = np.random.default_rng(0)
    many = 1 + np.cumsum(rng.random(length) < 8 / length)
    part = length // (2 * context)
    rows = [
        np.ones(length),
        many,
        np.where(place < length * 5 // 8, 1 + place // (length // 5), 0),
        1 + (place >= part) + (place >= length - part),
    ]
    return np.stack(rows).astype(np.int32)


def arrays(length: int, num_heads: int, num_kv_heads: int, head_dim: int) -> list[np.ndarray]:
    """q, k, v and a cotangent, one row for each kind of document."""
    rng = np.random.default_rng(1)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [
        rng.normal(size=(len(DOCUMENTS), length, n, head_dim)).astype(np.float32) for n in heads
    ]


def forward_and_gradients(q, k, v, g, segment_ids, row_index=None, **kwargs):
    """(out, dq, dk, dv)."""

    def run(q, k, v):
        return attend(q, k, v, segment_ids_BT=segment_ids, row_index_BT=row_index, **kwargs)

    out, pull = jax.vjp(run, q, k, v)
    return (out, *pull(g))


def make_mesh(data: int, context: int) -> jax.sharding.Mesh:
    """The project's mesh on the first data x context devices."""
    axes = ("data", "fsdp", "context", "tensor")
    devices = jax.devices()[: data * context]
    kinds = (AxisType.Auto,) * 4
    return jax.make_mesh((data, 1, context, 1), axes, axis_types=kinds, devices=devices)


def largest_error(got, want, order, segment_ids) -> float:
    """Of `got` (laid out by `order`) from `want`; refuses anything but 0 for padding."""
    got = [np.asarray(x) for x in got]
    padding = segment_ids[:, order] == 0
    for name, x in zip(("out", "dq", "dk", "dv"), got, strict=True):
        assert (x[padding] == 0).all(), f"{name} of padding is not 0"
    return max(np.abs(a - b[:, order]).max() for a, b in zip(got, want, strict=True))


_wanted: dict = {}
_programs: dict = {}


def check(
    setting: Setting,
    *,
    length: int = 128,
    num_heads: int = NUM_HEADS,
    carried: bool = False,
    **kwargs,
) -> float:
    """Runs one setting; its largest error, which is not above the tolerance.

    Args:
      setting: what to run.
      length: tokens of a row.
      num_heads: query heads.
      carried: give the row index, as a batch does; else `attend` derives it from the layout.
      **kwargs: for `attend`.
    """
    data, context = setting.mesh
    mask = Mask(window=setting.window)
    inputs = arrays(length, num_heads, setting.num_kv_heads, HEAD_DIM)
    segment_ids = documents(length, context)
    want = (setting.num_kv_heads, setting.window, context, length)
    if want not in _wanted:
        dense = jax.jit(lambda *x: forward_and_gradients(*x, mask=mask, impl="reference"))
        _wanted[want] = [np.asarray(x) for x in dense(*inputs, segment_ids)]
    order = layouts.permutation(setting.layout, length, context)
    index = np.broadcast_to(order.astype(np.int32), segment_ids.shape) if carried else None
    # These go by the row index alone, so they are not told the layout.
    untold = carried and setting.impl != "ulysses"
    layout = "contiguous" if untold else setting.layout
    key = (setting._replace(layout=layout), carried, length, num_heads)
    if key not in _programs:
        _programs[key] = jax.jit(
            lambda *x: forward_and_gradients(
                *x, mask=mask, layout=layout, impl=setting.impl, **kwargs
            )
        )
    with jax.set_mesh(make_mesh(data, context)):
        got = _programs[key](*(x[:, order] for x in inputs), segment_ids[:, order], index)
    error = largest_error(got, _wanted[want], order, segment_ids)
    assert error <= TOLERANCE, f"{setting}: {error:.1e}"  # a NaN is refused as well
    return error


def check_random_documents(num_examples: int) -> None:
    """Hypothesis draws documents and orders of the row; they are data, so three programs serve."""
    import hypothesis
    from hypothesis import strategies as st

    length, context = 64, 4
    inputs = arrays(length, NUM_HEADS, 2, HEAD_DIM)
    dense = jax.jit(lambda *x: forward_and_gradients(*x, impl="reference"))
    with jax.set_mesh(make_mesh(2, context)):
        programs = {
            impl: jax.jit(lambda *x, impl=impl: forward_and_gradients(*x, impl=impl))
            for impl in ("ring", "all_gather", "ulysses")
        }

    def row(ids):
        return np.asarray(ids, np.int32)

    ids = st.lists(st.integers(0, 3), min_size=length, max_size=length)
    ordered = st.lists(st.integers(1, 9), min_size=1, max_size=24).map(
        lambda lengths: np.repeat(np.arange(1, len(lengths) + 1), lengths)[:length]
    )
    padded = ordered.map(lambda x: np.pad(x, (0, length - len(x))))
    rows = st.lists(st.one_of(ids, padded).map(row), min_size=4, max_size=4).map(np.stack)

    @hypothesis.settings(max_examples=num_examples, deadline=None, derandomize=True, database=None)
    @hypothesis.given(rows, st.integers(0, 2**32 - 1))
    def agree(segment_ids, seed):
        order = np.random.default_rng(seed).permutation(length)
        want = dense(*inputs, segment_ids, None)
        want = [np.asarray(x) for x in want]
        index = np.broadcast_to(order.astype(np.int32), segment_ids.shape)
        for impl, program in programs.items():
            with jax.set_mesh(make_mesh(2, context)):
                got = program(*(x[:, order] for x in inputs), segment_ids[:, order], index)
            error = largest_error(got, want, order, segment_ids)
            assert error <= TOLERANCE, f"{impl}: {error:.1e}"

    agree()


def splash_settings(all_of_them: bool) -> list[Setting]:
    """With the TPU kernel inside: what its cases must get right."""
    few = [
        Setting("ring", "zigzag", (1, 2), 1, None),
        Setting("ring", "striped", (1, 2), 1, 200),
        Setting("all_gather", "zigzag", (1, 2), 1, 200),
    ]
    if not all_of_them:
        return few
    everything = itertools.product(
        ("ring", "all_gather", "ulysses"), layouts.LAYOUTS, ((1, 2), (2, 4)), (1, 2), (None, 200)
    )
    # Refused with the mend: zigzag leaves no static cases for a window.
    return [
        setting
        for setting in (Setting(*values) for values in everything)
        if not (setting.impl == "ring" and setting.layout == "zigzag" and setting.window)
    ]


def main(arguments: list[str] | None = None) -> None:
    """Runs what is asked for and prints a line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", action="store_true", help="every pair of settings once")
    parser.add_argument("--splash", action="store_true", help="the TPU kernel inside, interpreted")
    options = parser.parse_args(arguments)
    assert len(jax.devices()) >= 8, "needs 8 devices; run this file as a script"
    runs = [(setting, {}) for setting in pairs()]
    if not options.pairs:
        # Layouts last, so that those that share a program follow each other.
        ordered = sorted(whole(), key=lambda s: (s.impl, s.mesh, s.num_kv_heads, s.window or 0))
        runs = [(setting, {"carried": True}) for setting in ordered]
    if options.splash or options.pairs:
        # Four heads, rows of 256 a device: the kernel takes multiples of 128, interpreted slowly.
        splash = splash_settings(not options.pairs)
        rules = [dict(num_heads=4, length=256 * s.mesh[1], interpret=True) for s in splash]
        runs = runs * options.pairs + list(zip(splash, rules, strict=True))
    worst, start = 0.0, time.monotonic()
    for setting, rules in runs:
        begin = time.monotonic()
        error = check(setting, **rules)
        worst = max(worst, error)
        inside = " splash inside" if "interpret" in rules else ""
        print(f"{setting}{inside}: {error:.1e}, {time.monotonic() - begin:.1f} s", flush=True)
    if not options.splash:
        check_random_documents(20 if options.pairs else 200)
        print("random documents and orders: ok")
    seconds = time.monotonic() - start
    print(
        f"{len(runs)} settings x {len(DOCUMENTS)} kinds of documents, output and 3 gradients: "
        f"largest error {worst:.1e} (bound {TOLERANCE:.0e}), {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
