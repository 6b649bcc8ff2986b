"""`lcl reproduce`: a paper's claims, the runs that decide them, and a verdict for each."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

from lcl.commands.shared import AddCommand, prepare_jax

TIERS = ("cpu", "tiny", "pod")


def add(command: AddCommand) -> None:
    """Adds the commands of this file to the parser."""
    sub = command("reproduce", _reproduce, "Run a paper's grid, and decide what it claims.")
    sub.add_argument("paper", nargs="?", metavar="NAME", help="which; see --list")
    sub.add_argument("--list", action="store_true", help="list the papers, and their claims")
    sub.add_argument(
        "--tier",
        choices=TIERS,
        default="cpu",
        help="cpu: minutes on two cores; tiny: seconds, decides nothing; pod: the paper's own "
        "sizes, compiled and printed, not run",
    )
    sub.add_argument("--seeds", type=int, default=3, help="repetitions; 3 or more for verdicts")
    sub.add_argument(
        "--claim",
        action="append",
        default=[],
        metavar="NAME",
        help="only the runs that decide this one; repeatable, and no report is written",
    )
    sub.add_argument(
        "--out", default=None, metavar="DIR", help="where to; runs/papers/NAME if absent"
    )
    sub.add_argument(
        "--abstract",
        action="store_true",
        help="of --tier pod: bytes from shapes alone; needs no libtpu",
    )


def _reproduce(arguments: argparse.Namespace) -> int:
    from lcl.papers import registry

    if arguments.gin_files or arguments.bindings:
        raise ValueError("a paper's runs are declared in its file; lcl reproduce takes no --gin")
    if arguments.list:
        return _list(arguments.paper)
    if arguments.paper is None:
        raise ValueError(f"no paper: name one of {', '.join(registry.names())}, or give --list")
    name = registry.check_name(arguments.paper)
    if arguments.tier == "pod":
        return _pod(name, arguments)
    suffix = "" if arguments.tier == "cpu" else f"-{arguments.tier}"
    out = arguments.out or os.path.join("runs", "papers", name + suffix)
    prepare_jax()
    from lcl.papers import reproduce

    outcome = reproduce(
        registry.load(name, arguments.tier),
        seeds=arguments.seeds,
        out=out,
        claims=arguments.claim,
    )
    print(outcome.text)
    if not arguments.claim:
        print(f"\nreport: {out}: table.txt, results.json, figure.png, figure.svg, runs/")
    return 0


def _list(name: str | None) -> int:
    """All papers with their first lines; or one, with its claims."""
    from lcl.papers import registry

    if name is None:
        for one in registry.names():
            print(f"{one:24s} {registry.summary(one)}")
        return 0
    paper = registry.load(registry.check_name(name))
    print(f"{paper.title}\nequal: {paper.equal}\n")
    for claim in paper.claims:
        print(f"{claim.name}: {claim.text}")
        if claim.published:
            print(f"    published: {claim.published}" + f" [{claim.source}]" * bool(claim.source))
    return 0


def _pod(name: str, arguments: argparse.Namespace) -> int:
    """The commands of the full-size runs, and what the compiler says of each of them."""
    from lcl import config
    from lcl.papers import registry
    from lcl.parallel import compile_report
    from lcl.parallel.topologies import aot_environment, libtpu_installed

    os.environ.update(aot_environment())
    abstract = arguments.abstract or not libtpu_installed()
    if abstract and not arguments.abstract:
        print("libtpu is not installed: bytes from shapes alone (pip install libtpu to compile)\n")
    runs = registry.pod_runs(name)
    print(f"{name}: {len(runs)} full-size runs\n")
    for run in runs:
        folder = re.sub(r"[^a-zA-Z0-9.]+", "_", run.arm).strip("_")
        print(f"# {run.arm}\nlcl train {run.arguments()} --run_dir=DIR/{folder}")
    # Arms that only read other rows or follow another schedule have the same program.
    reports: dict[str, Any] = {}
    for run in runs:
        settings = config.load(list(run.gin_files), list(run.bindings))
        train = settings.kwargs("train", run_dir="none")
        key = _program(train)
        if key not in reports:
            reports[key] = settings.call("compile", train=train, title=run.arm, abstract=abstract)
            print(f"\n{compile_report.report_text(reports[key])}", end="")
    return 1 if any("out_of_memory" in report for report in reports.values()) else 0


def _program(train: dict[str, Any]) -> str:
    """What decides a run's largest step: its model, batch, objective, optimizer and mesh."""
    from lcl.compile import largest_stage, rows_a_step

    stage = largest_stage(train["stages"])
    rows, length = rows_a_step(train["stages"], stage), stage.data.sequence_length
    parts = [repr(train[name]) for name in ("model", "objective", "mesh")]
    return "\n".join([*parts, type(train["optimizer"]).__name__, f"{rows} x {length}"])
