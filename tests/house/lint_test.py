"""Lint, format and types are tests like any other."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def run(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}:\n{done.stdout}{done.stderr}", pytrace=False)


@pytest.mark.parametrize("command", [("check",), ("format", "--check", "--diff")])
def test_ruff(command):
    run("ruff", *command, ".")


def test_mypy():
    run("mypy")
