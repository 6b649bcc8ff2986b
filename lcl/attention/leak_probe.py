"""The mask-leak probe: change one token of one document, count what moves in all the others.

A document mask that leaks fails silently: the loss even falls. So the probe asks the kernel itself:

    segments   1 1 1 1 2 2 2 3 3 0       the same call twice, one token (^) changed in between
    changed      ^
    moved      . x x x . . . . . .       within its document: all that see it, or the probe is blind
    leaks              0 0 0 0 0 0       in other documents and in padding: none, to the last bit

and then the same two calls with all tokens said to be of one document. There every later token
does see the changed one, so these are the leaks of an attention without segments, and the probe
must find each of them: a probe that cannot fail is worthless.

    control    . x x x x x x x x x       found 6 of 6 in the other documents

Outputs and, by choice, dq, dk and dv are compared bit by bit, since a mask that is right multiplies
by an exact 0. Packings lie along the batch, so a case (an implementation, a context degree, a
layout, a mask) is one compiled program, called four times.

Legend: B batch, T row length, N query heads, K key heads, H head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from lcl.attention import layouts
from lcl.attention.api import attend
from lcl.attention.choice import ACROSS_DEVICES
from lcl.attention.mask import Mask

_HEADS, _KV_HEADS, _HEAD_DIM = 8, 4, 8
_AXES = ("data", "fsdp", "context", "tensor")


class Case(NamedTuple):
    """What is probed: one compiled program."""

    impl: str
    context: int = 1
    layout: str = "contiguous"
    window: int | None = None

    def __str__(self) -> str:
        """Such as "ring, context 4, zigzag, window 16"."""
        parts = [self.impl, f"context {self.context}", self.layout]
        return ", ".join(parts + ([f"window {self.window}"] if self.window else []))


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one probe of one row gave; counts of positions.

    Attributes:
      case: name of what was probed.
      packing: name of the row's documents.
      token: original index of the changed token.
      leaks: positions of other documents, or padding, where the output or a gradient moved.
      inside, inside_expected: later positions of the token's own document whose output moved, and
        how many see the token.
      control, control_expected: the leaks found with the segments taken away, and how many there
        are then.
    """

    case: str
    packing: str
    token: int
    leaks: int
    inside: int
    inside_expected: int
    control: int
    control_expected: int

    @property
    def good(self) -> bool:
        """No leak, and a probe that saw all there was to see."""
        return (
            self.leaks == 0
            and self.inside == self.inside_expected
            and self.control == self.control_expected
        )


def packings(length: int) -> dict[str, np.ndarray]:
    """Rows of documents, int32 [length]; 0 is padding.

    Example:
      >>> {name: row.tolist() for name, row in packings(16).items()}["padding"]
      [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0]
    """
    place = np.arange(length)
    cuts = {
        "two": [length * 5 // 8],
        # Uneven, so that no border is a border of devices or blocks too.
        "many": sorted({length * n // 32 for n in (3, 4, 9, 15, 16, 22, 29)}),
        "spanning": [max(1, length // 20)],
        "padding": [length * 5 // 16],
    }
    rows = {name: 1 + np.searchsorted(cut, place, side="right") for name, cut in cuts.items()}
    rows["padding"] = np.where(place < length * 5 // 8, rows["padding"], 0)
    return {name: row.astype(np.int32) for name, row in rows.items()}


def probe(
    run: Callable[[Any, jax.Array], Any],
    base: Any,
    other: Any,
    *,
    name: str,
    mask: Mask,
    row_index_BT: np.ndarray,
    documents: str = "first",
) -> list[Finding]:
    """Probes a function of a batch of packed rows.

    Args:
      run: (inputs, segment_ids int32 [B, T]) -> arrays [B, T, ...], the output first; other leaves
        (gradients) are searched for leaks only. It is called four times with the same shapes.
      base, other: two trees of inputs [B, T, ...] that differ everywhere; one token of `other` is
        put into `base`.
      name: of the case.
      mask: the rule on rows that `run` follows within a document.
      row_index_BT: int32 [B, T], the original index of the token at each place. B is a multiple of
        twice the number of packings.
      documents: whose token is changed: "first" (then later documents would hear of it) or "last"
        (then earlier ones would).

    Returns:
      A finding a row; for each packing the first and the last token of the document are changed.
    """
    base, other = jax.tree.map(jnp.asarray, (base, other))  # so that both calls get one dtype
    batch, length = row_index_BT.shape
    names, rows = zip(*packings(length).items(), strict=True)
    if batch % (2 * len(names)):
        raise ValueError(f"a batch of {batch} rows: use a multiple of {2 * len(names)}")
    number = np.arange(batch)
    segments = np.stack(rows)[number % len(names)]
    wanted = segments == (1 if documents == "first" else segments.max(axis=1, keepdims=True))
    late = number // len(names) % 2
    first, last = wanted.argmax(axis=1), length - 1 - wanted[:, ::-1].argmax(axis=1)
    token = np.where(late, last, first)
    if documents == "first":
        token = np.where(late, np.maximum(first, last - 1), first)  # one inside sees it at least

    ids_BT = np.take_along_axis(segments, row_index_BT, axis=1)
    here_BT = row_index_BT == token[:, None]
    changed = jax.tree.map(
        lambda a, b: jnp.where(here_BT.reshape(here_BT.shape + (1,) * (a.ndim - 2)), b, a),
        base,
        other,
    )

    def moved(segment_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the output, and where any leaf, is not what it was: bool [B, T] each."""
        ids = jnp.asarray(segment_ids)
        before, after = (jax.tree.leaves(run(inputs, ids)) for inputs in (base, changed))
        differs = []
        for a, b in zip(before, after, strict=True):
            a, b = np.asarray(a), np.asarray(b)
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise FloatingPointError(f"{name}: not all outputs are finite")
            differs.append((a != b).reshape(batch, length, -1).any(axis=-1))
        return differs[0], np.any(differs, axis=0)

    output, anything = moved(ids_BT)
    control, _ = moved(np.ones_like(ids_BT))
    same = ids_BT == segments[number, token][:, None]
    sees = np.asarray(mask.visible(row_index_BT, token[:, None]))
    counts = {
        "leaks": anything & ~same,
        "inside": output & same & sees,
        "inside_expected": same & sees,
        "control": control & ~same & sees,
        "control_expected": ~same & sees,
    }
    return [
        Finding(
            case=name,
            packing=names[b % len(names)],
            token=int(token[b]),
            **{key: int(value[b].sum()) for key, value in counts.items()},
        )
        for b in range(batch)
    ]


def cases(
    num_devices: int,
    *,
    impls: Sequence[str] = ("reference", "blockwise", *ACROSS_DEVICES),
    layouts_: Sequence[str] = layouts.LAYOUTS,
    contexts: Sequence[int] = (1, 2, 4, 8),
    windows: Sequence[int | None] = (None, 16),
) -> list[Case]:
    """Every implementation x context degree x layout x window that there is on so many devices.

    Example:
      >>> [str(case) for case in cases(8, impls=["ring"], contexts=[8], windows=[None])][:2]
      ['ring, context 8, contiguous', 'ring, context 8, zigzag']
    """
    found = []
    for impl in impls:
        across = impl in ACROSS_DEVICES
        degrees = [c for c in contexts if num_devices % c == 0 and (c > 1) == across]
        orders = ["contiguous"] if impl == "splash" else layouts_
        found += [
            Case(impl, degree, layout, window)
            for degree in degrees
            for layout in orders
            for window in windows
        ]
    return found


def mesh_and_batch(case: Case, devices: Sequence[jax.Device]) -> tuple[Mesh, int]:
    """A mesh data x context over `devices`, and rows that hold every packing and split over it."""
    parts = len(devices) // case.context
    mesh = Mesh(
        np.asarray(devices).reshape(parts, 1, case.context, 1),
        _AXES,
        axis_types=(AxisType.Auto,) * len(_AXES),
    )
    return mesh, int(np.lcm(2 * len(packings(64)), parts))


def probe_attention(
    case: Case,
    *,
    length: int = 64,
    gradients: bool = True,
    documents: str = "first",
    devices: Sequence[jax.Device] | None = None,
) -> list[Finding]:
    """Probes `attend` in one case, on a mesh data x context over all devices.

    Args:
      case: what to probe. Without a context axis the tokens still stand in the layout's order (as
        for 4 devices), which the kernel then learns from the row index alone.
      length: tokens in a row.
      gradients: whether dq, dk and dv are searched too; costs the backward's compilation.
      documents: see `probe`.
      devices: default: all there are.

    Returns:
      A finding a row of a batch of 8, or of as many rows as the batch needs to split.
    """
    devices = list(jax.devices() if devices is None else devices)
    mesh, batch = mesh_and_batch(case, devices)
    row_index = layouts.row_index(
        case.layout, batch, length, case.context if case.context > 1 else 4
    )
    in_order = case.layout == "contiguous"
    mask = Mask(window=case.window)

    def heads(seed: int) -> tuple[jax.Array, ...]:
        keys = jax.random.split(jax.random.key(seed), 4)
        numbers = (_HEADS, _KV_HEADS, _KV_HEADS, _HEADS)
        return tuple(
            jax.random.normal(key, (batch, length, n, _HEAD_DIM))
            for key, n in zip(keys, numbers, strict=True)
        )

    @jax.jit
    def run(inputs, segment_ids):
        q, k, v, g = inputs

        def output(q, k, v):
            return attend(
                q,
                k,
                v,
                mask=mask,
                segment_ids_BT=segment_ids,
                row_index_BT=None if in_order else jnp.asarray(row_index),
                layout=case.layout if case.context > 1 else "contiguous",
                impl=case.impl,
                interpret=case.impl == "splash" and devices[0].platform != "tpu",
            )

        if not gradients:
            return output(q, k, v)
        out, vjp = jax.vjp(output, q, k, v)
        return out, *vjp(g)

    with jax.set_mesh(mesh):
        return probe(
            run,
            heads(0),
            heads(1),
            name=str(case),
            mask=mask,
            row_index_BT=row_index,
            documents=documents,
        )


def table(findings: Sequence[Finding]) -> str:
    """A line a case: leaks, and what the probe saw of what it had to see."""
    names = list(dict.fromkeys(finding.case for finding in findings))
    width = max(map(len, names), default=4)
    lines = [f"{'case':{width}}  leaks   within its document   without segments"]
    for name in names:
        own = [finding for finding in findings if finding.case == name]
        total = {
            key: sum(getattr(finding, key) for finding in own)
            for key in ("leaks", "inside", "inside_expected", "control", "control_expected")
        }
        inside = f"{total['inside']} of {total['inside_expected']}"
        control = f"{total['control']} of {total['control_expected']}"
        lines.append(f"{name:{width}}  {total['leaks']:5d}   {inside:>19}   {control:>16}")
    return "\n".join(lines)
