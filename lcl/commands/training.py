"""`lcl train` and `lcl evaluate`: a run through its stages, and its loss at any checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from lcl import files
from lcl.commands.shared import CONFIG_FILE, AddCommand, config_of_run, prepare_jax


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
    sub.add_argument(
        "--baseline",
        default=None,
        metavar="NAME",
        help="train a baseline of the configuration instead: joint (all at once) or naive (the "
        "stages in turn, without replay or method)",
    )
    sub.add_argument(
        "--branch-at",
        "--branch_at",
        type=int,
        default=None,
        metavar="STEP",
        help="anneal and evaluate a copy from this checkpoint of RUN_DIR, into its branches/",
    )
    sub.add_argument(
        "--anneal_steps",
        type=int,
        default=None,
        metavar="N",
        help="length of the branch; that of the run's HeldOut.branches if absent",
    )

    sub = command("evaluate", _evaluate, "Held-out loss of every domain at a run's checkpoint.")
    sub.add_argument("run_dir", metavar="RUN")
    sub.add_argument(
        "--step", type=int, default=None, help="which checkpoint; the newest if absent"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")


def _train(arguments: argparse.Namespace) -> int:
    from lcl import config

    if arguments.branch_at is not None:
        return _branch(arguments)
    if arguments.anneal_steps is not None:
        raise ValueError("--anneal_steps is the length of a branch: give --branch-at STEP too")
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
    kwargs, text = settings.built("train", _change(arguments), **overrides)
    if arguments.print_config:
        print(text)
        return 0
    prepare_jax()
    from tqdm.contrib.logging import logging_redirect_tqdm

    from lcl.train import train

    with logging_redirect_tqdm():  # a log line stands above the progress bar, not in it
        train(**kwargs | {"config_text": text})
    return 0


def _change(arguments: argparse.Namespace) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """What --baseline makes of a run's arguments."""
    if arguments.baseline is None:
        return None
    if not arguments.gin_files:
        raise ValueError("a baseline of what? give the run's --gin_file, such as RUN/config.gin")
    from lcl.baselines import baseline

    return lambda kwargs: baseline(arguments.baseline, kwargs)


def _branch(arguments: argparse.Namespace) -> int:
    if arguments.run_dir is None:
        raise ValueError("which run is to branch? give --run_dir=RUN")
    settings = _own_settings(arguments)
    overrides = {"run_dir": arguments.run_dir, "allow_changes": arguments.allow_changes}
    kwargs, text = settings.built("train", **overrides)
    prepare_jax()
    from tqdm.contrib.logging import logging_redirect_tqdm

    from lcl.branches import branch

    with logging_redirect_tqdm():
        out = branch(
            **kwargs | {"config_text": text},
            at=arguments.branch_at,
            anneal_steps=arguments.anneal_steps,
        )
    before, after = (json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines())
    print(f"held-out loss, nats/token: at step {before['step']}, annealed at {after['step']}")
    for domain, scores in after["domains"].items():
        was = before["domains"][domain]["nats_per_token"]
        print(f"  {domain:22s} {was:.4f} {scores['nats_per_token']:.4f}")
    print(f"branch: {out}")
    return 0


def _own_settings(arguments: argparse.Namespace) -> Any:
    """The configuration that lies in a run's directory, with what the command lays over it."""
    from lcl import config

    own = config_of_run(arguments.run_dir)
    return config.load([own, *arguments.gin_files], arguments.bindings)


def _evaluate(arguments: argparse.Namespace) -> int:
    kwargs = _own_settings(arguments).kwargs("train", run_dir=arguments.run_dir)
    prepare_jax()
    from lcl.train import evaluate

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
