"""`lcl report`, `lcl diff` and `lcl info`: what became of runs, as a page and as text."""

from __future__ import annotations

import argparse

from lcl import files
from lcl.commands.shared import AddCommand


def add(command: AddCommand) -> None:
    """Adds the commands of this file to the parser."""
    sub = command("report", _report, "Build the report of one run, or of several side by side.")
    sub.add_argument("run_dirs", nargs="+", metavar="RUN")
    sub.add_argument(
        "--out",
        default=None,
        help="where to; RUN/report if absent, FIRST_RUN/report/compare for several",
    )

    sub = command("diff", _diff, "Name every line in which two runs differ; 1 if any does, else 0.")
    sub.add_argument("run_a", metavar="RUN_A")
    sub.add_argument("run_b", metavar="RUN_B")
    sub.add_argument("--json", action="store_true", help="print JSON, every evaluation included")

    sub = command("info", _info, "Show a run's stages, checkpoints and configuration.")
    sub.add_argument("run_dir", metavar="RUN")


def _report(arguments: argparse.Namespace) -> int:
    from lcl.report import build_report, matrix_text

    with files.here(arguments.run_dirs) as run_dirs:
        print(matrix_text(run_dirs))
        page = build_report(run_dirs, out=arguments.out)
        if arguments.out is None and files.is_remote(arguments.run_dirs[0]):
            page = files.place(arguments.run_dirs[0]) / page.relative_to(run_dirs[0])
    print(f"report: {page}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from lcl.report import diff_runs

    with files.here([arguments.run_a, arguments.run_b]) as (run_a, run_b):
        found = diff_runs(run_a, run_b)
    print(found.to_json() if arguments.json else found.text())
    return 0 if found.same else 1


def _info(arguments: argparse.Namespace) -> int:
    from lcl.report import info_text

    with files.here([arguments.run_dir]) as (run_dir,):
        print(info_text(run_dir))
    return 0
