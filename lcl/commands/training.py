"""`lcl train` and `lcl evaluate`: a run through its stages, and its loss at any checkpoint."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lcl import files
from lcl.commands.shared import CONFIG_FILE, AddCommand, prepare_jax


def add(command: AddCommand) -> None:
    """Adds the commands of this file to the parser."""
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
    prepare_jax()
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
    prepare_jax()
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
