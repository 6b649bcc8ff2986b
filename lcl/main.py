"""The command line: `lcl COMMAND`, one of prepare, train, evaluate, report, compile and others.

Thin; the work is elsewhere, and each command's words stand in lcl/commands. A mistake of the user's
is one line on stderr and exit code 2. Nothing heavy is imported before a command has been
recognised, so `lcl --help` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from lcl.commands import data, papers, pods, reports, scoring, training

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
  lcl reproduce mer
"""

# The files of commands, in the order of `lcl --help`.
COMMANDS = (data, training, scoring, reports, papers, pods)


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

    def command(
        name: str, function: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(command=function)
        return sub

    for group in COMMANDS:
        group.add(command)
    return parser


if __name__ == "__main__":
    run()
