"""`lcl prepare` and `lcl data`: text into stores, and what they give a model to read."""

from __future__ import annotations

import argparse
import os
import pathlib
from typing import Any

from lcl.commands.shared import AddCommand, config_of_run, pairs


def add(command: AddCommand) -> None:
    """Adds the commands of this file to the parser."""
    sub = command("prepare", _prepare, "Turn corpora and your own text into tokenised stores.")
    sub.add_argument("corpora", nargs="*", metavar="CORPUS", help="names; see --list")
    sub.add_argument("--list", action="store_true", help="list the corpora that can be built here")
    sub.add_argument("--show", action="store_true", help="show what lies under --root")
    sub.add_argument("--root", default="data/byte", help="where the stores go")
    sub.add_argument(
        "--tokenizer", default="byte", help="byte, sentencepiece:N or PATH, hf:PATH, seqio:PATH"
    )
    sub.add_argument(
        "--folder", action="append", default=[], metavar="NAME=PATH", help="a folder of text files"
    )
    sub.add_argument(
        "--jsonl", action="append", default=[], metavar="NAME=PATH", help='lines of {"text": ...}'
    )
    for option, place, text in (
        ("--parquet", "PATH", "parquet files with a column of text"),
        (
            "--arrayrecord",
            "PATH[:SPLIT]",
            "a dataset of TFDS, or ArrayRecord files of JSON objects",
        ),
        ("--tfds", "BUILDER[:SPLIT]", "a TFDS builder; prepared if it is not there"),
        ("--seqio", "TASK[:SPLIT]", "a registered SeqIO task"),
    ):
        sub.add_argument(option, action="append", default=[], metavar=f"NAME={place}", help=text)
    sub.add_argument("--text_field", default="text", help="key, column or feature with the text")
    sub.add_argument(
        "--module", action="append", default=[], help="import it: it registers tasks or builders"
    )
    sub.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="NAME[:VALUE[:VALUE]]",
        help="drop by length:MIN:MAX, repetition:LINES:RUNS, script:NAME:SHARE or "
        "compression:MIN:MAX",
    )
    sub.add_argument(
        "--near_duplicates",
        default=None,
        metavar="MEASURE[:THRESHOLD]",
        help="drop near copies, by minhash:0.8 (needs lcl[dedup]) or embedding:0.95",
    )
    sub.add_argument(
        "--max_document_tokens", type=int, default=None, help="cut longer documents, and count it"
    )
    sub.add_argument(
        "--processes", type=int, default=None, help="how many tokenise; all cores if absent"
    )
    sub.add_argument("--heldout_fraction", type=float, default=0.05, help="share of documents")
    sub.add_argument("--limit_documents", type=int, default=None, help="at most so many a corpus")
    sub.add_argument("--force", action="store_true", help="build again, from nothing")

    sub = command("data", _data, "Show what a root of stores, or a run, gives a model to read.")
    sub.add_argument("action", choices=["report"], help="tables here, pictures in an HTML page")
    sub.add_argument("run_dir", nargs="?", metavar="RUN", help="a run, for its configuration")
    sub.add_argument("--root", default=None, help="show stores, without any run")
    sub.add_argument("--domain", action="append", default=[], help="of --root; all if absent")
    sub.add_argument("--sequence_length", type=int, default=1024, help="of the rows of --root")
    sub.add_argument("--out", default=None, help="where to; ROOT/report or RUN/report/data")


def _prepare(arguments: argparse.Namespace) -> int:
    from lcl.data import corpora, prepare

    if arguments.list:
        for name, info in corpora.available().items():
            state = corpora.why_not(name) or "can be built here"
            print(f"{name:22s} {info.language:5s} {info.description}")
            print(f"{'':28s} {info.licence}; {state}")
        return 0
    if arguments.show:
        _show(arguments.root)
        return 0
    from lcl.data import dedup, filters, seqio_bridge

    sources: dict[str, Any] = {
        name: pairs(f"--{option}", getattr(arguments, option))
        for option, name in {
            "folder": "folders",
            "jsonl": "jsonl",
            "parquet": "parquet",
            "arrayrecord": "arrayrecord",
            "tfds": "tfds",
            "seqio": "seqio",
        }.items()
    }
    if not arguments.corpora and not any(sources.values()):
        raise ValueError(
            "nothing to prepare: name corpora (see --list), or text of your own: --folder, "
            "--jsonl, --parquet, --arrayrecord, --tfds, --seqio"
        )
    seqio_bridge.import_modules(arguments.module)
    near = arguments.near_duplicates
    prepare.prepare(
        arguments.corpora,
        root=arguments.root,
        tokenizer=arguments.tokenizer,
        heldout_fraction=arguments.heldout_fraction,
        text_field=arguments.text_field,
        filters=[filters.parse_filter(one) for one in arguments.filter],
        near_duplicates=dedup.parse_near_duplicates(near) if near else None,
        max_document_tokens=arguments.max_document_tokens,
        limit_documents=arguments.limit_documents,
        processes=arguments.processes,
        force=arguments.force,
        **sources,
    )
    print(prepare.show(arguments.root))
    return 0


def _show(root: str) -> None:
    from lcl.data import Data, prepare
    from lcl.report import data_read, data_text

    print(prepare.show(root))
    if Data(root).domains():
        report = data_read.read_root(Data(root), samples=False)
        print(f"\n{data_text.layouts_text(report)}")
        print(f"\nmore, with pictures: lcl data report --root {root}")


def _data(arguments: argparse.Namespace) -> int:
    from lcl.data import Data
    from lcl.report import data_page, data_read, data_text

    out = arguments.out
    if arguments.root is not None:
        if arguments.run_dir or arguments.gin_files:
            raise ValueError("give --root, a run or --gin_file, not several of them")
        report = data_read.read_root(
            Data(arguments.root),
            domains=arguments.domain,
            sequence_length=arguments.sequence_length,
        )
        out = out or os.path.join(arguments.root, "report")
    else:
        report, place = _read_run_data(arguments)
        out = out or place
    print(data_text.data_text(report))
    print(f"\nreport: {data_page.build_data_report(report, out)}")
    return 0


def _read_run_data(arguments: argparse.Namespace) -> tuple[Any, str]:
    """The stages of a run's, or of any, configuration; and where their report goes."""
    from lcl import config
    from lcl.report import data_read

    files, name, out = arguments.gin_files, "data", "data_report"
    if arguments.run_dir:
        own = config_of_run(arguments.run_dir)
        files, name = [own, *files], pathlib.Path(own).parent.resolve().name
        out = os.path.join(os.path.dirname(own), "report", "data")
    elif files:
        name = pathlib.Path(files[0]).stem
    else:
        raise ValueError("nothing to report on: give --root, a run's directory or --gin_file")
    settings = config.load(files, arguments.bindings).kwargs("train", run_dir=out)
    report = data_read.read_stages(
        settings["data"],
        [(stage.name, stage.data, stage.num_steps) for stage in settings["stages"]],
        seed=settings["seed"],
        domains=settings["evaluation"].domains,
        plan_dir=os.path.join(settings["data"].root, "plans"),
        title=name,
    )
    return report, out
