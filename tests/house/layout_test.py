"""The house's outside: what lies at the top, how long a file is, what every room shows."""

from __future__ import annotations

import ast
import json
import pathlib
import re
import subprocess

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TOP_LEVEL = {
    "setup.py",
    "lcl",
    "configs",
    "launch",
    "tests",
    "BUILD",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
}
ROOMS = sorted(p.parent.name for p in (REPOSITORY / "lcl").glob("*/__init__.py"))
SOURCES = sorted((REPOSITORY / "lcl").rglob("*.py"))
MAX_LINES = 500


def tracked() -> list[str]:
    """Committed and about-to-be-committed files; outside a git checkout there is nothing to say."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (REPOSITORY / name).exists()]


def test_the_top_level_is_what_the_design_says():
    top = {name.split("/")[0] for name in tracked()}
    assert {name for name in top if not name.startswith(".")} == TOP_LEVEL


def test_nothing_large_or_binary_is_committed():
    allowed = {".png", ".npz", ".npy"}
    for name in tracked():
        path = REPOSITORY / name
        assert path.stat().st_size < 400_000, f"{name} is large: make it where it is needed"
        if path.suffix not in allowed:
            assert b"\0" not in path.read_bytes(), f"{name} is binary"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_a_file_has_one_concept(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES, f"{path} is longer than {MAX_LINES} lines: split it"
    if text:
        assert ast.get_docstring(ast.parse(text)), f"{path} does not say what it is"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_a_door_and_a_page(room):
    folder = REPOSITORY / "lcl" / room
    tree = ast.parse((folder / "__init__.py").read_text())
    targets = [ast.unparse(t) for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
    assert "__all__" in targets, f"lcl/{room}/__init__.py lists no public names in __all__"
    assert (folder / "README.md").exists(), f"lcl/{room} has no README.md"


def test_public_names_exist(run_python):
    code = (
        "import importlib, json, sys\n"
        "bad = []\n"
        "for room in sys.argv[1:]:\n"
        "    module = importlib.import_module('lcl.' + room)\n"
        "    bad += [f'lcl.{room}.{n}' for n in module.__all__ if not hasattr(module, n)]\n"
        "print(json.dumps(bad))"
    )
    assert json.loads(run_python(code, *ROOMS)) == []


def test_tests_mirror_the_package():
    """tests/<room>/<file>_test.py is of lcl/<room>/<file>.py; house and launch are their own."""
    rooms = {p.name for p in (REPOSITORY / "tests").iterdir() if p.is_dir()}
    own = {"house", "golden", "benchmarks", "end_to_end", "launch", "__pycache__"}
    assert rooms - own <= set(ROOMS)


def test_committed_text_names_no_machine():
    """Paths of one machine, and hosts of registries, are not for a repository."""
    # Written in pieces, so that this file does not find itself.
    words = [
        "/wor" + "k/",
        "/tmp" + "/w/",
        "/ro" + "ot/",
        "py" + "pi.org",
        "file" + "s.pythonhosted",
    ]
    pattern = re.compile("|".join(map(re.escape, words)))
    found = []
    for name in tracked():
        path = REPOSITORY / name
        if path.suffix in {".png", ".npz", ".npy"}:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{name}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)
