"""`lcl score`: how surprising each document of a corpus is to a run's model."""

from __future__ import annotations

import argparse

from lcl.commands.shared import AddCommand, config_of_run, prepare_jax


def add(command: AddCommand) -> None:
    """Adds the commands of this file to the parser."""
    sub = command("score", _score, "Score a corpus's documents by a run's model, for a Subset.")
    sub.add_argument("run_dir", metavar="RUN", help="the reference run")
    sub.add_argument("--domain", action="append", default=[], help="which; repeatable")
    sub.add_argument("--name", default="reference", help="for Subset.by = 'scores:NAME'")
    sub.add_argument("--split", default="train", choices=["train", "heldout"])
    sub.add_argument(
        "--step", type=int, default=None, help="which checkpoint; the newest if absent"
    )


def _score(arguments: argparse.Namespace) -> int:
    from lcl import config

    if not arguments.domain:
        raise ValueError("nothing to score: give --domain NAME, once or more")
    own = config_of_run(arguments.run_dir)
    settings = config.load([own, *arguments.gin_files], arguments.bindings)
    kwargs = settings.kwargs("train", run_dir=arguments.run_dir)
    prepare_jax()
    import numpy as np

    from lcl.scoring import score

    found = score(
        **kwargs,
        domains=arguments.domain,
        name=arguments.name,
        split=arguments.split,
        step=arguments.step,
    )
    for domain, scores in found.items():
        low, middle, high = np.quantile(scores.values, (0.1, 0.5, 0.9))
        print(
            f"{domain:22s} {len(scores.values):,} documents, nats/token: "
            f"{low:.3f} (10%)  {middle:.3f} (median)  {high:.3f} (90%)"
        )
    print(f"read the likeliest half with Subset.by = 'scores:{arguments.name}', .best = 'low',")
    print(".share = 0.5")
    return 0
