"""What `lcl compile` found, as one JSON object and as a page to read.

The JSON is the record; the page is made from it alone, so a committed report can be printed anew.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lcl.parallel.ahead_of_time import OutOfMemory
from lcl.parallel.collectives import Collective, array_bytes, parse_program, walk

NUM_BUFFERS = 12


def group_collectives(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Equal collectives summed: kind, axes and place in our code; most bytes first."""
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in collectives:
        key = one.kind, one.axes, short_op(one.op)
        group = groups.setdefault(
            key,
            {
                "kind": one.kind, "axes": one.axes, "op": key[2], "group_size": one.group_size,
                "in_program": 0, "times": 0, "array_bytes": 0, "sent_bytes": 0, "dcn_bytes": 0,
            },
        )  # fmt: skip
        group["in_program"] += 1
        group["times"] += one.times
        group["array_bytes"] = max(group["array_bytes"], int(one.num_bytes))
        group["sent_bytes"] += int(one.total_sent)
        group["dcn_bytes"] += int(one.dcn_bytes * one.times)
    return sorted(groups.values(), key=lambda group: -group["sent_bytes"])


def short_op(op: str) -> str:
    """An operation's name without the wrappers that every one has.

    Example:
        >>> short_op(
        ...     "jit(train_step)/transpose(jvp(D.hidden))/while/body/layers/mlp/up/dot_general"
        ... )
        'backward layers/mlp/up/dot_general'
    """
    way = "backward " if "transpose(" in op else "forward " if "jvp(" in op else ""
    if "rematted_computation" in op:
        way = "recompute "
    noise = r"^(jit|jvp|transpose|custom|closed_call|checkpoint|rematted|while|body|cond|shard_map)"
    words = [word for word in op.split("/") if word and not re.match(noise, word)]
    return (way + "/".join(words[-4:])).strip() or "?"


def largest_buffers(text: str, count: int = NUM_BUFFERS) -> list[dict[str, Any]]:
    """The largest arrays that the program makes in the chip's main memory, from its text.

    Every result is listed once by shape and operation; which of them share their place, only the
    compiler knows, so these are candidates and not a sum.
    """
    views = {
        "parameter",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "constant",
    }
    views |= {"copy-start", "call", "optimization-barrier", "iota", "opt-barrier"}
    program = parse_program(text)
    fused = {line.attribute("calls") for lines in program.computations.values() for line in lines
             if line.opcode == "fusion"}  # fmt: skip
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for visit in walk(program):
        line = visit.line
        if line.opcode in views or line.opcode.endswith("-done") or visit.computation in fused:
            continue
        for array in re.findall(r"[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?", line.result):
            if "S(" in array or not array_bytes(array):
                continue  # not in main memory (VMEM, scalars), or a token
            size = int(array_bytes(array)[0])
            key = array.partition("{")[0], short_op(visit.op)
            if size >= 2**16:
                host = "S(5)" in array
                found.setdefault(key, {"bytes": size, "shape": key[0], "op": key[1], "host": host})
    return sorted(found.values(), key=lambda one: -one["bytes"])[:count]


def advice(memory: OutOfMemory, settings: Mapping[str, Any]) -> list[str]:
    """What to change so that a program fits, the cheapest first."""
    rows = settings["batch_size"] // (settings["mesh"]["data"] * settings["mesh"]["fsdp"])
    steps = []
    if settings["remat"] in ("none", "dots", "save_qkv", "save_qkv_context"):
        steps.append(
            f"DecoderConfig.remat = 'full' (now {settings['remat']!r}): keep layers' inputs only"
        )
    if settings["residual_dtype"] == "float32":
        steps.append(
            "DecoderConfig.residual_dtype = 'bfloat16': the kept inputs take half the room"
        )
    if rows > 1:
        steps.append(
            f"objective Accumulate(pieces={rows}): a chip works on its {rows} rows one by one"
        )
    steps.append(
        "more chips on the mesh's context axis (now "
        f"{settings['mesh']['context']}): each holds a shorter part of every row"
    )
    if not str(settings["remat"]).startswith("offload"):
        steps.append(
            "DecoderConfig.remat = 'offload_residual': the kept inputs wait in host memory"
        )
    if settings["mesh"]["data"] > settings["num_slices"]:
        steps.append(
            f"MeshConfig.fsdp instead of data (now {settings['mesh']['data']}): parameters and "
            "moments are cut, not copied"
        )
    return steps


def gb(num_bytes: float | None) -> str:
    """Bytes in GB (1e9), three digits.

    Example:
        >>> gb(4.386e9), gb(25_000), gb(None)
        ('4.386 GB', '0.025 MB', '-')
    """
    if num_bytes is None:
        return "-"
    return f"{num_bytes / 1e9:.3f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.3f} MB"


def report_text(report: Mapping[str, Any]) -> str:
    """The page, in Markdown."""
    lines = [f"# {report['name']}", ""]
    lines += [f"- {text}" for text in report["what"]]
    lines += ["", f"**{report['verdict']}**", ""]
    for section in (_memory, _anchor, _buffers, _collectives, _flops, _roofline):
        lines += section(report)
    if report["remarks"]:
        lines += ["## Remarks", "", *[f"- {text}" for text in report["remarks"]], ""]
    return "\n".join(lines).rstrip() + "\n"


def _memory(report: Mapping[str, Any]) -> list[str]:
    lines = ["## Bytes a chip", ""]
    memory, table = report["memory"], report["table"]
    if memory:
        lines += ["| kind | by the compiler | |", "|---|---|---|"]
        notes = {
            "argument": "; ".join(f"{k} {gb(v)}" for k, v in report["arguments"].items()),
            "alias": "outputs that lie where arguments lay (donated)",
            "peak": f"of {gb(report['hbm_bytes'])}: {memory['peak'] / report['hbm_bytes']:.0%}",
        }
        for kind, value in memory.items():
            if value or not kind.startswith("host"):
                lines.append(f"| {kind} | {gb(value)} | {notes.get(kind, '')} |")
        lines.append("")
    lines += ["| kind | from shapes alone |", "|---|---|"]
    lines += [f"| {kind} | {gb(value)} |" for kind, value in table["rows"].items()]
    lines += [f"| peak | {gb(table['peak'])} |"]
    if table["host"]:
        lines.append(f"| in host memory | {gb(table['host'])} |")
    return [*lines, ""]


def _anchor(report: Mapping[str, Any]) -> list[str]:
    anchor = report.get("anchor")
    if not anchor:
        return []
    memory = report["memory"]
    ours = {
        **memory,
        "collective": report["collective_bytes"],
        "lowering_s": report["seconds"].get("lowering"),
        "compile_s": report["seconds"].get("compile"),
    }
    lines = [f"## Beside {anchor['name']}", "", "| | ours | theirs | ours / theirs |"]
    lines.append("|---|---|---|---|")
    for kind, theirs in anchor.items():
        mine = ours.get(kind)
        if kind == "name" or mine is None:
            continue
        show = (lambda x: f"{x:.1f} s") if kind.endswith("_s") else gb
        lines.append(f"| {kind} | {show(mine)} | {show(theirs)} | {mine / theirs:.2f} |")
    return [*lines, ""]


def _buffers(report: Mapping[str, Any]) -> list[str]:
    if not report["buffers"]:
        return []
    lines = ["## Largest arrays", "", "| bytes | shape | operation |", "|---|---|---|"]
    for one in report["buffers"]:
        lines.append(f"| {gb(one['bytes'])} | {one['shape']} | {one['op']} |")
    return [*lines, ""]


def _collectives(report: Mapping[str, Any]) -> list[str]:
    groups = report["collectives"]
    if not groups:
        return []
    sums: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    for group in groups:
        total = sums[group["axes"], group["kind"]]
        total[0] += group["times"]
        total[1] += group["sent_bytes"]
    lines = ["## Collectives, bytes a chip sends in a step", ""]
    lines += ["| mesh axes | kind | times | sent |", "|---|---|---|---|"]
    for (axes, kind), (times, sent) in sorted(sums.items(), key=lambda item: -item[1][1]):
        lines.append(f"| {axes} | {kind} | {times} | {gb(sent)} |")
    lines += [f"| all | | | {gb(report['collective_bytes'])} |", ""]
    lines += ["| operation | axes | kind | array | times | sent |", "|---|---|---|---|---|---|"]
    for group in groups[:20]:
        lines.append(
            f"| {group['op']} | {group['axes']} | {group['kind']} | {gb(group['array_bytes'])} | "
            f"{group['times']} | {gb(group['sent_bytes'])} |"
        )
    if len(groups) > 20:
        rest = sum(group["sent_bytes"] for group in groups[20:])
        lines.append(f"| {len(groups) - 20} more | | | | | {gb(rest)} |")
    return [*lines, ""]


def _flops(report: Mapping[str, Any]) -> list[str]:
    flops = report["flops"]
    lines = [
        "## FLOPs a step, all chips", "",
        f"- model: {flops['model']:.4g}. {flops['convention']}",
        f"- executed: {flops['executed']:.4g}. {flops['executed_convention']}",
    ]  # fmt: skip
    if flops.get("compiler"):
        lines.append(
            f"- the compiler's count, a chip: {flops['compiler']:.4g} (a loop's body once, Pallas "
            "kernels not at all)"
        )
    return [*lines, ""]


def _roofline(report: Mapping[str, Any]) -> list[str]:
    bounds = report["roofline"]
    if bounds is None:
        return []
    lines = ["## Roofline: the least a step can take", "", "| resource | seconds |", "|---|---|"]
    for name in ("compute", "hbm", "ici", "dcn", "pcie"):
        lines.append(f"| {name} | {bounds[name + '_s']:.4g} |")
    lines.append(f"| ici, were each transfer on one link | {bounds['ici_one_link_s']:.4g} |")
    lines += [
        "",
        f"Bound by {bounds['bound']}: at least {bounds['step_s']:.4g} s a step, so at most MFU "
        f"{bounds['mfu']:.1%} and {bounds['tokens_per_second_per_chip']:,.0f} tokens/s/chip. "
        "What is assumed: lcl/parallel/roofline.py; the chip's figures: lcl/parallel/chips.py.",
        "",
    ]
    return lines


def as_dict(value: Any) -> Any:
    """A dataclass as a plain dictionary; None stays None."""
    return None if value is None else dataclasses.asdict(value)
