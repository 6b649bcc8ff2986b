"""`lcl compile` and `lcl probe`: a pod that nobody has rented yet, and every mask looked at."""

from __future__ import annotations

import argparse
import json
import os
import pathlib

from lcl.commands.shared import AddCommand, prepare_jax


def add(command: AddCommand) -> None:
    """Adds the commands of this file to the parser."""
    sub = command("probe", _probe, "Look for leaks of the document mask in every attention.")
    for option, kind in (("--impl", str), ("--layout", str), ("--context", int)):
        sub.add_argument(option, action="append", type=kind, help="only these; repeatable")
    sub.add_argument("--quick", action="store_true", help="no gradients, no windows")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("compile", _compile, "Compile a run's train step for a TPU pod; needs no TPU.")
    sub.add_argument("--topology", default=None, help="v5p-128, 2x v5e-256; over the file's own")
    sub.add_argument("--stage", default=None, help="which; the one of the longest rows if absent")
    sub.add_argument("--abstract", action="store_true", help="from shapes alone; needs no libtpu")
    sub.add_argument(
        "--layers",
        type=int,
        dest="num_layers",
        default=None,
        help="compile few layers, extrapolate",
    )
    sub.add_argument("--out", default=None, metavar="FOLDER", help="write NAME.json and NAME.md")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--save", default=None, metavar="FILE", help="write the executable")
    sub.add_argument("--load", default=None, metavar="FILE", help="print what --save wrote beside")
    sub.add_argument(
        "--hlo", default=None, metavar="FILE", help="write the compiled program's text"
    )


def _probe(arguments: argparse.Namespace) -> int:
    from lcl.parallel import host_device_environment

    os.environ.update(host_device_environment(8))  # a CPU pretends; other devices are what they are
    prepare_jax()
    from lcl.models.leak_probe import report

    words = vars(arguments)
    good, text = report(
        **{key: words[key] for key in ("impl", "layout", "context", "quick", "json")}
    )
    print(text)
    return 0 if good else 1


def _compile(arguments: argparse.Namespace) -> int:
    from lcl import config
    from lcl.parallel.topologies import aot_environment

    os.environ.update(aot_environment())
    if arguments.load:
        from lcl.parallel import ahead_of_time, compile_report

        saved = ahead_of_time.read_report(pathlib.Path(arguments.load))
        print(json.dumps(saved, indent=1) if arguments.json else compile_report.report_text(saved))
        return 0
    if not arguments.gin_files:
        raise ValueError("no configuration: give --gin_file, such as one of configs/pods")
    settings = config.load(arguments.gin_files, arguments.bindings)
    train = settings.kwargs("train", run_dir="none")
    name = pathlib.Path(arguments.gin_files[-1]).stem
    words = ("topology", "stage", "num_layers", "save", "hlo")
    overrides = {word: getattr(arguments, word) for word in words if getattr(arguments, word)}
    report = settings.call(
        "compile", train=train, title=name, abstract=arguments.abstract, **overrides
    )
    from lcl.compile import write_report
    from lcl.parallel.compile_report import report_text

    print(json.dumps(report, indent=1) if arguments.json else report_text(report), end="")
    if arguments.out:
        stem = f"{name}_abstract" if arguments.abstract else name
        print("\n".join(f"wrote {path}" for path in write_report(report, arguments.out, stem)))
    return 0 if "out_of_memory" not in report else 1
