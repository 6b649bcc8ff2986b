"""Every collective of a compiled program: its bytes, how often it runs, over which mesh axes.

Read from the optimised program's text, because nothing else tells:

    %all-gather.7 = bf16[4096,512] all-gather(%p), channel_id=3, replica_groups=[8,2]<=[16], ...
                    |                                            |
                    bytes                                        which devices -> which mesh axes

- A loop's body counts as often as it runs: the text's own trip count, or the constant that the
  loop's condition compares its counter with. A loop whose count cannot be read counts once, and the
  report says so.
- A collective in flight is written several times (start, done, and on a TPU once more in each
  fusion that it overlaps): it counts once.
- Between slices there is no such instruction: a `send` to the host, from which the data-centre
  network takes it on, says what it is part of (`_xla_megascale_transfer_type`).
- On a TPU a reduce-scatter is written as an all-reduce and a slice inside one fusion; it is counted
  as what it is.

Bytes a device sends for an array of b bytes over n devices, by the ring algorithm, which is
optimal: all-gather and reduce-scatter b (n-1)/n (b the whole array), all-reduce twice that,
all-to-all b (n-1)/n, collective-permute b.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_DTYPE_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_ATTRIBUTE = r"\b{}=%?([\w.\-]+)"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: its name, its result's type as text, its opcode and the rest."""

    name: str
    result: str
    opcode: str
    rest: str

    def attribute(self, name: str) -> str | None:
        """The value of `name=value` where value is a plain word."""
        match = re.search(_ATTRIBUTE.format(name), self.rest)
        return match[1] if match else None

    @property
    def op_name(self) -> str:
        """Which of our operations it came from."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
        kind: one of KINDS.
        num_bytes: of the whole array that a group holds together (all-gather, all-reduce,
            reduce-scatter, all-to-all) or that a device passes on (collective-permute).
        sent_bytes: what one device sends each time.
        dcn_bytes: the part of it that leaves the slice.
        times: how often it runs in a step.
        axes: the mesh axes over which its devices differ, "data+fsdp"; "?" if it fits none.
        group_size: devices that take part together (collective-permute: 2).
        op: which of our operations it came from.
    """

    kind: str
    num_bytes: float
    sent_bytes: float
    dcn_bytes: float
    times: int
    axes: str
    group_size: int
    op: str

    @property
    def total_sent(self) -> float:
        """Bytes that one device sends for it in a step."""
        return self.sent_bytes * self.times


@dataclasses.dataclass(frozen=True)
class Program:
    """A program's computations by name, and the entry's name."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str


def parse_program(text: str) -> Program:
    """Splits a program's text into computations and instructions."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in _logical_lines(text):
        header = _HEADER.match(line)
        if header and not line.startswith(" "):
            current = computations.setdefault(header[1], [])
            if line.startswith("ENTRY"):
                entry = header[1]
        elif line.rstrip() == "}":
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            opcode = _OPCODE.search(" " + found[2])
            if opcode:
                at = opcode.start()
                current.append(
                    Instruction(found[1], found[2][:at], opcode[1], found[2][max(at - 1, 0) :])
                )
    return Program({name: tuple(lines) for name, lines in computations.items()}, entry)


def _logical_lines(text: str) -> Iterator[str]:
    """The text's lines, those that a kernel's metadata broke in two joined again."""
    line = ""
    for part in text.splitlines():
        if part.startswith((" ", "%", "ENTRY", "HloModule")) or part.rstrip() in ("}", ""):
            yield line
            line = part
        else:
            line += part
    yield line


def array_bytes(result: str) -> list[float]:
    """Bytes of each array in the text of a type, tuples flattened.

    Example:
        >>> array_bytes("(bf16[4,128]{1,0}, f32[2])")
        [1024.0, 8.0]
    """
    return [
        math.prod(int(dim) for dim in dims.split(",") if dim) * float(_DTYPE_BYTES[dtype])
        for dtype, dims, _ in _ARRAY.findall(result)
        if dtype in _DTYPE_BYTES
    ]


def trip_count(program: Program, loop: Instruction, where: Sequence[Instruction]) -> int | None:
    """How often a `while` runs: what the text says, or what its condition compares with."""
    known = re.search(r'known_trip_count"?[=:]\{"?n"?[=:]"?(\d+)', loop.rest)
    if known:
        return int(known[1])
    condition = program.computations.get(loop.attribute("condition") or "", ())
    compares = list(_compares(program, condition))
    if len(compares) != 1 or "direction=LT" not in compares[0].rest:
        return None
    bounds = {_constant(line) for line in condition} - {None}
    if len(bounds) == 1:
        return bounds.pop()
    # The bound may be carried by the loop: find it in the tuple that the loop starts from.
    operands = re.findall(r"%([\w.\-]+)", compares[0].rest.partition(")")[0])
    by_name = {line.name: line for line in condition}
    start = {line.name: line for line in where}
    loop_input = start.get((re.findall(r"%([\w.\-]+)", loop.rest) or [""])[0])
    for operand in operands[1:]:
        index = re.search(r"index=(\d+)", by_name[operand].rest) if operand in by_name else None
        if index and loop_input is not None and loop_input.opcode == "tuple":
            given = re.findall(r"%([\w.\-]+)", loop_input.rest)[int(index[1])]
            return _constant(start[given]) if given in start else None
    return None


def _compares(program: Program, lines: Iterable[Instruction]) -> Iterator[Instruction]:
    for line in lines:
        if line.opcode == "compare":
            yield line
        elif called := line.attribute("calls"):
            yield from _compares(program, program.computations.get(called, ()))


def _constant(line: Instruction) -> int | None:
    match = re.match(r"\s*constant\((-?\d+)\)", line.rest)
    return int(match[1]) if line.opcode == "constant" and match else None


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction that runs.

    Attributes:
        line: the instruction.
        computation: the one it stands in.
        context: the loop body, or the entry, that it runs in.
        times: how often it runs.
        op: which of our operations it came from; a fused one's, if it does not say, its fusion's.
    """

    line: Instruction
    computation: str
    context: str
    times: int
    op: str


def walk(
    program: Program, name: str = "", times: int = 1, context: str = "", op: str = ""
) -> Iterator[Visit]:
    """Every instruction that runs. Branches of a conditional count each: which one is taken, only
    the data know.
    """
    name = name or program.entry
    context = context or name
    lines = program.computations.get(name, ())
    for line in lines:
        here = line.op_name or op
        yield Visit(line, name, context, times, here)
        if line.opcode == "while":
            count = trip_count(program, line, lines)
            body = line.attribute("body") or ""
            yield from walk(program, body, times * (1 if count is None else count), body)
        elif line.opcode in ("fusion", "call", "async-start", "custom-call"):
            for called in _CALLED.findall(line.rest):
                yield from walk(program, called, times, context, here)
        elif line.opcode == "conditional":
            branches = _BRANCHES.search(line.rest)
            called_names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
            for word in ("true_computation", "false_computation"):
                called_names += [found for found in [line.attribute(word)] if found]
            for called in called_names:
                yield from walk(program, called, times, context, here)


def find_collectives(
    text: str, mesh_shape: Mapping[str, int], *, num_slices: int = 1
) -> tuple[list[Collective], list[str]]:
    """The collectives of a compiled program.

    Args:
        text: `compiled.as_text()`.
        mesh_shape: axis -> size, in the mesh's order; a device's number in the text is its place
            in the mesh, row by row.
        num_slices: slices that the first axis spans.

    Returns:
        The collectives, most bytes first, equal ones kept apart; and remarks on what could not be
        read.
    """
    program = parse_program(text)
    remarks, found, seen = [], [], set()
    for visit in walk(program):
        line = visit.line
        if line.opcode == "while":
            if trip_count(program, line, program.computations[visit.computation]) is None:
                where = visit.op or line.name
                remarks.append(f"a loop's count could not be read ({where}): counted once")
            continue
        if line.opcode == "send" and (between := _MEGASCALE.search(line.rest)):
            kind = between[1].lower().replace("_", "-")
            if kind in KINDS:
                found.append(_between_slices(visit, kind, mesh_shape, num_slices))
            else:
                remarks.append(f"a transfer between slices of unknown kind {between[1]}: left out")
            continue
        kind = line.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        chain = re.search(r'\bchain_id="?(\w+)', line.rest)
        if chain:  # one collective, written in every fusion that it overlaps
            key = visit.context, line.attribute("channel_id"), chain[1]
            if key in seen:
                continue
            seen.add(key)
        if kind == "all-reduce" and visit.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        found.append(_read(visit, kind, mesh_shape, num_slices))
    found = [one for one in found if one.group_size > 1]
    return sorted(found, key=lambda one: -one.total_sent), list(dict.fromkeys(remarks))


def _read(visit: Visit, kind: str, mesh_shape: Mapping[str, int], num_slices: int) -> Collective:
    line = visit.line
    sizes = array_bytes(line.result)
    if line.opcode.endswith("-start") and line.result.lstrip().startswith("("):
        # (operands, results, contexts...): the results are what the operation makes.
        sizes = [size for size in sizes if size > 4]
        half = len(sizes) // 2
        sizes = sizes[half : 2 * half] if kind != "all-reduce" else sizes
    num_bytes = sum(sizes)
    num_devices = math.prod(mesh_shape.values())
    if kind == "collective-permute":
        groups = _pairs(line.rest)
        size, sent = (2 if len(groups) else 1), num_bytes
    else:
        groups = parse_groups(line.rest, num_devices)
        size = groups.shape[1]
        if kind == "reduce-scatter" and line.opcode.startswith("reduce-scatter"):
            num_bytes *= size  # its result is one part of the array
        sent = num_bytes * (size - 1) / size * (2 if kind == "all-reduce" else 1)
    return Collective(
        kind=kind,
        num_bytes=num_bytes,
        sent_bytes=sent,
        dcn_bytes=_dcn_bytes(kind, num_bytes, groups, num_devices, num_slices),
        times=visit.times,
        axes=axes_of(groups, mesh_shape),
        group_size=size,
        op=visit.op,
    )


def _between_slices(
    visit: Visit, kind: str, mesh_shape: Mapping[str, int], num_slices: int
) -> Collective:
    """A transfer over the data-centre network, which the mesh's first axis spans."""
    part = array_bytes(visit.line.result)[0]  # beside a context and a token
    num_bytes = part * num_slices if kind == "all-gather" else part
    sent = num_bytes * (num_slices - 1) / num_slices * (2 if kind == "all-reduce" else 1)
    if kind == "collective-permute":
        sent = num_bytes
    return Collective(
        kind=kind,
        num_bytes=num_bytes,
        sent_bytes=sent,
        dcn_bytes=sent,
        times=visit.times,
        axes=next(iter(mesh_shape)),
        group_size=num_slices,
        op=visit.op,
    )


def _pairs(rest: str) -> np.ndarray:
    match = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    pairs = re.findall(r"\{(\d+),(\d+)", match[0]) if match else []
    return np.array([[int(a), int(b)] for a, b in pairs if a != b], int).reshape(-1, 2)


def parse_groups(rest: str, num_devices: int) -> np.ndarray:
    """The groups of devices that act together, int [groups, size], from any of three notations.

    Example:
        >>> parse_groups("replica_groups={{0,1},{2,3}}, x=1", 4).tolist()
        [[0, 1], [2, 3]]
        >>> parse_groups("replica_groups=[2,2]<=[2,2]T(1,0), x=1", 4).tolist()
        [[0, 2], [1, 3]]
        >>> parse_groups(
        ...     "replica_groups=mesh['a'=2,'b'=2], device_ids=([4]) {'a'}, x=1", 4
        ... ).tolist()
        [[0, 2], [1, 3]]
    """
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if iota:
        return _iota(iota[2]).reshape([int(n) for n in iota[1].split(",")])
    mesh = re.search(
        r"replica_groups=@?mesh\w*\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))?"
        r"\s*\{([^}]*)\}",
        rest,
    )
    if mesh:
        return _mesh_groups(mesh[1], mesh[2], mesh[3], num_devices)
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
    if listed:
        groups = [re.findall(r"\d+", group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
        return np.array([[int(n) for n in group] for group in groups], int)
    return np.arange(num_devices)[None, :]  # none named: all of them


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers from 0, so shaped and then so transposed, flat."""
    dims = [int(n) for n in re.findall(r"\d+", text.partition("]")[0])]
    order = [int(n) for n in re.findall(r"\d+", text.partition("]")[2])]
    array = np.arange(math.prod(dims)).reshape(dims)
    return (array.transpose(order) if order else array).reshape(-1)


def _mesh_groups(mesh: str, devices: str | None, axes: str, num_devices: int) -> np.ndarray:
    """Groups along axes of a mesh that the text gives; an axis may be cut in parts, 'x':(2)4."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    flat = _iota(devices) if devices else np.arange(num_devices)
    parts: list[tuple[str, int]] = []
    wanted = []
    cut = {
        name: (int(before), int(size))
        for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", axes)
    }
    named = re.findall(r"'([^']+)'", axes)
    for name, size in sizes.items():
        if name in cut:
            before, middle = cut[name]
            pieces = [before, middle, size // (before * middle)]
            wanted.append(len(parts) + 1)
        else:
            pieces = [size]
            if name in named:
                wanted.append(len(parts))
        parts += [(name, piece) for piece in pieces]
    grid = flat.reshape([size for _, size in parts])
    rest = [i for i in range(len(parts)) if i not in wanted]
    group_size = math.prod(parts[i][1] for i in wanted)
    return grid.transpose(rest + wanted).reshape(-1, group_size)


def axes_of(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> str:
    """The mesh axes along which the devices of a group differ, joined by "+"; "?" for no groups."""
    if not groups.size:
        return "?"
    coordinates = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))
    differs = (coordinates != coordinates[:, :, :1]).any(axis=(1, 2))
    names = [name for name, differ in zip(mesh_shape, differs, strict=True) if differ]
    return "+".join(names) if names else "?"


def _dcn_bytes(
    kind: str, num_bytes: float, groups: np.ndarray, num_devices: int, num_slices: int
) -> float:
    """What a device sends out of its slice, if slices first reduce among themselves."""
    if num_slices == 1 or not groups.size:
        return 0.0
    slices = groups // (num_devices // num_slices)
    spans = max(len(set(row)) for row in slices.tolist())
    if spans == 1:
        return 0.0
    if kind == "collective-permute":
        return num_bytes
    inside = groups.shape[1] // spans
    return num_bytes / inside * (spans - 1) / spans * (2 if kind == "all-reduce" else 1)


def count_kinds(collectives: Iterable[Collective]) -> dict[str, int]:
    """How many of each kind stand in the program (not how often they run)."""
    return dict(collections.Counter(one.kind for one in collectives))


def count_kernels(text: str) -> int:
    """How many Pallas kernels (`tpu_custom_call`) stand in the program."""
    return text.count('custom_call_target="tpu_custom_call"')
