"""The distribution's packages as a source of text: downloaded and read, never installed.

Works for any user on Debian and its relatives (no root): `apt-get download` checks the archive's
signatures and hashes, `dpkg-deb --fsys-tarfile` streams the files; nothing is unpacked to the disk
and no link is followed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence


class AptError(ValueError):
    """A package that cannot be had; the message is one line and says the mend."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A downloaded package: its name, version and file."""

    name: str
    version: str
    path: str


def why_not() -> str | None:
    """The reason why packages cannot be read on this machine, or None if they can."""
    missing = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)} not found: this corpus needs Debian, Ubuntu or a relative"
    return None


def resolve(
    names: Sequence[str], cache_dir: str, *, log: Callable[[str], None] = print
) -> list[Package]:
    """Returns the packages with their current versions; downloads nothing (see `fetch`).

    Args:
        names: package names.
        cache_dir: where .deb files are, or will be, kept.
        log: told if apt's lists must be brought up to date, or if old downloads are used.

    Raises:
        AptError: no apt, or a package that it does not know.
    """
    reason = why_not()
    if reason:
        raise AptError(reason)
    versions = candidate_versions(names)
    if set(versions) != set(names) and _update(log):
        versions = candidate_versions(names)
    missing = [name for name in names if name not in versions]
    if not missing:
        return [Package(n, versions[n], _path(n, versions[n], cache_dir)) for n in names]
    cached = [package for package in (_cached(name, cache_dir) for name in names) if package]
    if len(cached) == len(names):
        log(f"apt does not know {', '.join(missing)} (any more); using packages downloaded before")
        return cached
    raise AptError(
        f"apt does not know the package {', '.join(missing)}; run `sudo apt-get update` (on Ubuntu "
        "with the universe component), or leave this corpus out if the distribution has none"
    )


def fetch(
    packages: Sequence[Package], cache_dir: str, *, log: Callable[[str], None] = print
) -> None:
    """Downloads those of the packages that the cache has not; each appears there whole or not.

    Raises:
        AptError: the download failed.
    """
    wanted = [package for package in packages if not os.path.exists(package.path)]
    if wanted:
        _download(wanted, cache_dir, log)


def candidate_versions(names: Sequence[str]) -> dict[str, str]:
    """Current version of each package that apt knows."""
    result = _run("apt-cache", "show", "--no-all-versions", *names)
    versions, name = {}, ""
    for line in result.stdout.splitlines():
        if line.startswith("Package: "):
            name = line.removeprefix("Package: ")
        elif line.startswith("Version: "):
            versions[name] = line.removeprefix("Version: ")
    return versions


def read_files(package: Package, prefix: str = "./usr/") -> Iterator[tuple[str, bytes | None]]:
    """Yields (path, content) of the package's files in the archive's order; links have None.

    Paths begin with "./usr/...". Only names under `prefix` are yielded.
    """
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", package.path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    if not member.name.startswith(prefix) or member.isdir():
                        continue
                    file = archive.extractfile(member) if member.isreg() else None
                    yield member.name, None if file is None else file.read()
            process.stdout.read()
            if process.wait():  # Else a torn archive would look like a short one.
                raise tarfile.ReadError(process.stderr.read().decode(errors="replace"))
        except tarfile.TarError as error:
            process.kill()
            raise AptError(
                f"package file {package.path!r} is damaged; remove it and prepare again"
            ) from error
        except BaseException:  # A reader that stops early leaves no process behind.
            process.kill()
            raise


def _download(packages: Sequence[Package], cache_dir: str, log: Callable[[str], None]) -> None:
    """Downloads to a folder beside the cache, then renames each file to its place."""
    log(f"downloading {', '.join(p.name for p in packages)} (apt-get download, not installed)")
    os.makedirs(cache_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache_dir) as folder:
        options = ["-qq"]
        if os.geteuid() == 0:  # apt's own user may not write to root's cache.
            options += ["-o", "APT::Sandbox::User=root"]
        targets = [f"{package.name}={package.version}" for package in packages]
        result = _run("apt-get", *options, "download", *targets, cwd=folder)
        if result.returncode:
            last = " ".join((result.stderr.strip().splitlines() or ["no message"])[-1].split())
            raise AptError(
                f"apt-get download {packages[0].name} failed ({last[:200]}); check the network, "
                "run `sudo apt-get update` and try again"
            )
        for package in packages:
            found = glob.glob(os.path.join(glob.escape(folder), f"{package.name}_*.deb"))
            if not found:
                raise AptError(f"apt-get download brought no {package.name}; try again")
            os.replace(found[0], package.path)


def can_update() -> bool:
    """Whether this user may bring apt's lists up to date."""
    return os.geteuid() == 0


def _update(log: Callable[[str], None]) -> bool:
    """Brings apt's lists up to date if this user may; says so."""
    if not can_update():
        return False
    log("apt does not know the packages yet: running apt-get update")
    return _run("apt-get", "-qq", "update").returncode == 0


def _path(name: str, version: str, cache_dir: str) -> str:
    return os.path.join(cache_dir, f"{name}_{version.replace(':', '%3a')}.deb")


def _cached(name: str, cache_dir: str) -> Package | None:
    found = sorted(
        glob.glob(os.path.join(glob.escape(cache_dir), f"{name}_*.deb")), key=os.path.getmtime
    )
    if not found:
        return None
    version = os.path.basename(found[-1]).removeprefix(f"{name}_").removesuffix(".deb")
    return Package(name, version.replace("%3a", ":"), found[-1])


def _run(*command: str, cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace"
        )
    raise AptError(why_not() or f"{command[0]} not found")
