"""The command line: `lcl prepare | data | train | evaluate | report | info | probe | compile`.

Thin; the work is elsewhere. A mistake of the user's is one line on stderr and exit code 2. Nothing
heavy is imported before a command has been recognised, so `lcl --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from lcl import files

EPILOG = """\
bindings:
  --gin_file=FILE        a configuration; may be given several times, later files win
  --gin.NAME=VALUE       one binding on top, such as --gin.train.seed=1

examples:
  lcl prepare manpages-en python manpages-fr --root data/byte
  lcl data report --root data/byte
  lcl train --gin_file=configs/runs/quickstart.gin --run_dir=runs/quickstart
  lcl report runs/quickstart runs/quickstart_replay
  lcl info runs/quickstart
"""

CONFIG_FILE = "config.gin"


def run(argv: Sequence[str] | None = None) -> None:
    """The console script: runs a command and exits with its code."""
    sys.exit(main(sys.argv[1:] if argv is None else argv))


def main(argv: Sequence[str]) -> int:
    """Runs one command.

    Args:
      argv: the words after `lcl`.

    Returns:
      0; 1 when a run ended itself (a NaN); 2 for a mistake, explained in one line on stderr.
    """
    words, gin_files, bindings = split_gin(argv)
    arguments = _parser().parse_args(words)
    arguments.gin_files, arguments.bindings = gin_files, bindings
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("lcl").setLevel(logging.INFO)
    try:
        return arguments.command(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        text = _one_line(error)
        if text is None or os.environ.get("LCL_TRACEBACK"):
            raise
        print(f"lcl {arguments.name}: {text}", file=sys.stderr)
        return 1 if type(error).__name__ == "NonFiniteError" else 2


def split_gin(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Takes `--gin_file` and `--gin.NAME=VALUE` out of the words of a command.

    >>> split_gin(["train", "--gin_file=a.gin", "--gin.train.seed=1", "--run_dir", "r"])
    (['train', '--run_dir', 'r'], ['a.gin'], ['train.seed=1'])
    """
    words, files, bindings = [], [], []
    rest = iter(argv)
    for word in rest:
        if word in ("--gin_file", "--gin-file"):
            files.append(next(rest, ""))
        elif word.startswith(("--gin_file=", "--gin-file=")):
            files.append(word.partition("=")[2])
        elif word.startswith("--gin."):
            binding = word.removeprefix("--gin.")
            bindings.append(binding if "=" in binding else f"{binding}={next(rest, '')}")
        else:
            words.append(word)
    return words, files, bindings


def _one_line(error: Exception) -> str | None:
    """The text of a mistake of the user's; None for a fault of ours, which keeps its traceback.

    Our own errors are one line and name the mend; those from inside a library seldom are.
    """
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    text = str(error)
    return text if text and "\n" not in text else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lcl",
        description="Teach a language model in stages, and see what it gained and what it forgot.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(command=function)
        return sub

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

    sub = command("train", _train, "Train through the stages of a configuration, or go on.")
    sub.add_argument("--run_dir", help="the run's directory; an unfinished run in it goes on")
    sub.add_argument(
        "--allow_changes",
        action="store_true",
        help="go on although the configuration differs from the run's",
    )
    sub.add_argument(
        "--print_config", action="store_true", help="print the whole configuration and stop"
    )

    sub = command("evaluate", _evaluate, "Held-out loss of every domain at a run's checkpoint.")
    sub.add_argument("run_dir", metavar="RUN")
    sub.add_argument(
        "--step", type=int, default=None, help="which checkpoint; the newest if absent"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("report", _report, "Build the report of one run, or of several side by side.")
    sub.add_argument("run_dirs", nargs="+", metavar="RUN")
    sub.add_argument(
        "--out",
        default=None,
        help="where to; RUN/report if absent, FIRST_RUN/report/compare for several",
    )

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

    sub = command("info", _info, "Show a run's stages, checkpoints and configuration.")
    sub.add_argument("run_dir", metavar="RUN")
    return parser


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
        name: _pairs(f"--{option}", getattr(arguments, option))
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
        own = pathlib.Path(arguments.run_dir) / CONFIG_FILE
        if not own.exists():
            raise ValueError(f"{arguments.run_dir} holds no run ({CONFIG_FILE} is missing)")
        files, name = [str(own), *files], own.parent.resolve().name
        out = str(own.parent / "report" / "data")
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


def _train(arguments: argparse.Namespace) -> int:
    from lcl import config

    run_dir = files.place(arguments.run_dir) if arguments.run_dir else None
    gin_files = arguments.gin_files
    if not gin_files and run_dir is not None and (run_dir / CONFIG_FILE).exists():
        gin_files = [str(run_dir / CONFIG_FILE)]  # An unfinished run knows its own configuration.
    if not gin_files:
        raise ValueError("no configuration: give --gin_file, such as configs/runs/quickstart.gin")
    overrides: dict[str, Any] = {"allow_changes": arguments.allow_changes}
    if run_dir is not None:
        overrides["run_dir"] = str(run_dir)
    settings = config.load(gin_files, arguments.bindings)
    if arguments.print_config:
        print(settings.operative_text("train", **overrides))
        return 0
    _prepare_jax()
    from tqdm.contrib.logging import logging_redirect_tqdm

    from lcl.train import train

    text = settings.operative_text("train", **overrides)
    with logging_redirect_tqdm():  # a log line stands above the progress bar, not in it
        train(**settings.kwargs("train", **overrides) | {"config_text": text})
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from lcl import config

    own = files.place(arguments.run_dir) / CONFIG_FILE
    if not own.exists():
        raise ValueError(f"{arguments.run_dir} holds no run ({CONFIG_FILE} is missing)")
    _prepare_jax()
    from lcl.train import evaluate

    settings = config.load([str(own), *arguments.gin_files], arguments.bindings)
    kwargs = settings.kwargs("train", run_dir=arguments.run_dir)
    step, domains = evaluate(**kwargs, step=arguments.step)
    if arguments.json:
        print(json.dumps({"step": step, "domains": domains}, indent=2))
        return 0
    print(f"held-out loss at step {step}")
    for domain, scores in domains.items():
        print(
            f"  {domain:22s} {scores['nats_per_token']:.4f} nats/token"
            f"  {scores['bits_per_byte']:.4f} bits/byte  ({scores['tokens']:,} tokens)"
        )
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from lcl.report import build_report, matrix_text

    with files.here(arguments.run_dirs) as run_dirs:
        print(matrix_text(run_dirs))
        page = build_report(run_dirs, out=arguments.out)
        if arguments.out is None and files.is_remote(arguments.run_dirs[0]):
            page = files.place(arguments.run_dirs[0]) / page.relative_to(run_dirs[0])
    print(f"report: {page}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from lcl.report import info_text

    with files.here([arguments.run_dir]) as (run_dir,):
        print(info_text(run_dir))
    return 0


def _probe(arguments: argparse.Namespace) -> int:
    from lcl.parallel import host_device_environment

    os.environ.update(host_device_environment(8))  # a CPU pretends; other devices are what they are
    _prepare_jax()
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


def _prepare_jax() -> None:
    """Process-wide settings of JAX, made here and nowhere in the library."""
    import jax

    from lcl.parallel import host_device_environment, initialize_distributed
    from lcl.parallel.host_devices import without_accelerator

    if "JAX_PLATFORMS" not in os.environ and without_accelerator():
        jax.config.update("jax_platforms", "cpu")  # libtpu would look for a TPU, and take its time
    os.environ.update(host_device_environment())  # read when the backend starts
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "lcl", "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    initialize_distributed()


def _pairs(option: str, values: Sequence[str]) -> dict[str, str]:
    """`NAME=PATH` options as a dictionary."""
    pairs = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise ValueError(f"{option} {value!r} should be NAME=PATH")
        pairs[name] = path
    return pairs


if __name__ == "__main__":
    run()
