"""Where a run's files are: a folder of this machine, or a bucket such as gs://bucket/run.

The hosts of a pod share no disk, so a pod's run directory is a bucket. Checkpoints go there by
Orbax, which knows buckets; this is for the small files beside them. An object in a bucket cannot be
appended to, it only appears whole: so logs are written to a folder of this machine and copied over
when a checkpoint is due, before it commits. What a kill loses is what a resume would drop anyway.

    train --append--> /tmp/.../metrics.jsonl --push, at flush()--> gs://bucket/run/metrics.jsonl

Reading and writing buckets needs `gcsfs` (or TensorFlow), for credentials the usual ones of gcloud.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

# What both etils (these files) and TensorStore (the checkpoints) can reach.
SCHEMES = ("gs://", "s3://")
# The files of a run that a report reads.
SMALL = (
    *("run_card.json", "config.gin", "left_out_steps.json"),
    *("metrics.jsonl", "evals.jsonl", "timings.jsonl"),
)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether it names a place outside this machine.

    >>> is_remote("gs://bucket/run"), is_remote("runs/tiny")
    (True, False)
    """
    return "://" in os.fspath(path)


def place(path: str | os.PathLike[str]) -> Any:
    """A path object for `path`: pathlib's here, etils' for a bucket (which has the same methods).

    Raises:
      ValueError: an unknown scheme, or a bucket that nothing installed can reach.

    >>> place("runs/tiny").name
    'tiny'
    """
    text = os.fspath(path)
    if not is_remote(text):
        return pathlib.Path(text)
    if not text.startswith(SCHEMES):
        raise ValueError(f"{text}: use a local path, or one that begins with {', '.join(SCHEMES)}")
    from etils import epath

    _check_reachable(text.partition("://")[0])
    return epath.Path(text)


@functools.cache
def _check_reachable(scheme: str) -> None:
    from etils import epath

    try:
        epath.Path(f"{scheme}://").exists()
    except ImportError as error:
        package = {"gs": "gcsfs", "s3": "s3fs"}[scheme]
        raise ValueError(
            f"{scheme}:// paths need {package}, which is not here: pip install {package}"
        ) from error
    except Exception:  # noqa: S110  (no credentials, no network: said where a file is wanted)
        pass


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that a reader, or a crash, sees as it was or as it will be, nothing between."""
    target = place(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(target):
        target.write_bytes(data)  # an object appears whole
        return
    draft = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with open(draft, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file
    draft.replace(target)


class Mirror:
    """A folder of this machine that stands for a remote one until it is pushed.

    Attributes:
      remote: the place it stands for.
      folder: the local folder, of the same name.
    """

    def __init__(self, remote: str | os.PathLike[str]) -> None:
        self.remote = place(remote)
        self._temporary = tempfile.mkdtemp(prefix="lcl-")
        self.folder = pathlib.Path(self._temporary) / self.remote.name
        self.folder.mkdir()
        self._sent: dict[str, tuple[int, int]] = {}

    def fetch(self, *names: str) -> None:
        """Copies those of the files that are there."""
        for name in names:
            if (self.remote / name).exists():
                file = self.folder / name
                file.write_bytes((self.remote / name).read_bytes())
                self._sent[name] = _stamp(file)

    def push(self) -> None:
        """Copies every file that has changed since the last time."""
        for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name, stamp = str(file.relative_to(self.folder)), _stamp(file)
            if self._sent.get(name) != stamp:
                write_whole(self.remote / name, file.read_bytes())
                self._sent[name] = stamp

    def close(self) -> None:
        """Removes the local folder."""
        shutil.rmtree(self._temporary, ignore_errors=True)


@contextlib.contextmanager
def here(run_dirs: Sequence[str | os.PathLike[str]]) -> Iterator[list[str]]:
    """The run directories as folders of this machine; what is written into them is brought back.

    A remote one holds the small files, and an empty folder for every checkpoint.
    """
    mirrors: list[Mirror] = []
    local = []
    try:
        for run_dir in run_dirs:
            if not is_remote(run_dir):
                local.append(os.fspath(run_dir))
                continue
            mirror = Mirror(run_dir)
            mirrors.append(mirror)
            mirror.fetch(*SMALL)
            checkpoints = mirror.remote / "checkpoints"
            for step in checkpoints.iterdir() if checkpoints.exists() else ():
                (mirror.folder / "checkpoints" / step.name).mkdir(parents=True)
            local.append(str(mirror.folder))
        yield local
        for mirror in mirrors:
            mirror.push()
    finally:
        for mirror in mirrors:
            mirror.close()


def _stamp(file: pathlib.Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
