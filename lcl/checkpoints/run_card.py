"""The run card: one JSON file beside every run that says what it is, `RUN/run_card.json`.

    {"identity": {"model": "DecoderConfig(...)", "seed": 0, ...},    what a resume may not change
     "config": "...",                                                the operative configuration
     "versions": {"jax": "0.10.2", ...}, "git_revision": "1a2b3c4",
     "mesh": "fsdp 4 on 4 TPU v5e", "data": {...}, "ledger": {...}, "flops": {...}, ...}

Only `identity` is compared when a run goes on: mesh, checkpoint cadence and logging may change
(they change no batch and, up to rounding, no loss); versions are recorded, not compared.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from lcl import files
from lcl.checkpoints.errors import CheckpointError, reason

FILE_NAME = "run_card.json"

_PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "seqio",
    "tensorflow-datasets", "gin-config", "numpy",
)  # fmt: skip


def write_card(run_dir: str | os.PathLike[str], card: Mapping[str, Any]) -> pathlib.Path:
    """Writes the card: a reader, or a crash, sees the old one or the new one, nothing between.

    Args:
        run_dir: the run's directory; made if it isn't there.
        card: anything JSON can hold.

    Returns:
        The card's path.

    Raises:
        CheckpointError: the directory can't be written.
    """
    path = files.place(run_dir) / FILE_NAME
    text = json.dumps(card, indent=2, sort_keys=True) + "\n"
    try:
        files.write_whole(path, text.encode())
    except OSError as error:
        raise CheckpointError(
            f"can't write {path} ({reason(error)}): mend its permissions or free some space, "
            "or give another --run_dir"
        ) from None
    return path


def read_card(run_dir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The card of a run, or None where there is none.

    Raises:
        CheckpointError: there is one that is not JSON.
    """
    path = files.place(run_dir) / FILE_NAME
    try:
        return json.loads(path.read_bytes()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"can't read {path} ({reason(error)}): put a copy back, or give another --run_dir"
        ) from None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Every line in which two trees of plain values differ, as "path: old -> new".

    Example:
        >>> differences({"seed": 0, "model": {"dim": 64}}, {"seed": 1, "model": {"dim": 64}})
        ['seed: 0 -> 1']
    """
    before, after = _lines(_as_json(old)), _lines(_as_json(new))
    names = [*after, *(name for name in before if name not in after)]
    return [
        f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def check_card(
    old: Mapping[str, Any], new: Mapping[str, Any], *, allow_changes: bool = False
) -> list[str]:
    """Refuses to go on with a run under a changed identity.

    Args:
        old: the identity on the run's card: configuration lines, data fingerprints, seed; without
            what may change (mesh, cadence, logging).
        new: the identity of the process that wants to go on.
        allow_changes: go on all the same.

    Returns:
        The differing lines (for the log), empty when nothing differs.

    Raises:
        CheckpointError: they differ and changes are not allowed; names the first three.
    """
    lines = differences(old, new)
    if lines and not allow_changes:
        shown = "; ".join(_shorten(line) for line in lines[:3])
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise CheckpointError(
            f"this run directory was begun with another configuration ({len(lines)} "
            f"line{'s' if len(lines) > 1 else ''}): {shown}{more}; set them back, give another "
            "--run_dir, or allow it with --gin.train.allow_changes=True"
        )
    return lines


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide a result, where they are installed."""
    import lcl

    found = {"lcl": lcl.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision(directory: str | os.PathLike[str] | None = None) -> str | None:
    """The commit that is checked out, with "+changes" when tracked files differ from it.

    Args:
        directory: somewhere in a repository; default: where this package lies.

    Returns:
        None outside a repository (an installed package) or without git.
    """
    place = pathlib.Path(directory) if directory else pathlib.Path(__file__).resolve().parent
    revision = _git(place, "rev-parse", "HEAD")
    # A package installed into somebody's own repository is not that repository's revision.
    if revision is None or (directory is None and not _git(place, "ls-files", __file__)):
        return None
    dirty = _git(place, "status", "--porcelain", "--untracked-files=no")
    return revision + ("+changes" if dirty else "")


def _git(place: pathlib.Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=place, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _as_json(value: Any) -> Any:
    """As it will be after a round through the file: tuples are lists, keys are strings."""
    return json.loads(json.dumps(value))


def _lines(value: Any, path: str = "") -> dict[str, str]:
    """A tree of plain values as {"a.b[0]": text}; the lines of a long text are told apart."""
    if isinstance(value, Mapping) and value:
        pairs: Sequence[tuple[str, Any]] = [
            (f"{path}.{key}" if path else str(key), item) for key, item in value.items()
        ]
    elif isinstance(value, list) and value:
        pairs = [(f"{path}[{i}]", item) for i, item in enumerate(value)]
    else:
        return {path: json.dumps(value, ensure_ascii=False)}
    lines: dict[str, str] = {}
    for name, item in pairs:
        lines.update(_lines(item, name))
    return lines


def _shorten(line: str, limit: int = 160) -> str:
    return line if len(line) <= limit else line[: limit - 3] + "..."
