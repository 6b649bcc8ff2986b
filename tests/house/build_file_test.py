"""BUILD tells the truth: its targets are compared with the files and imports that there are.

    python tests/house/build_file_test.py --fix

writes BUILD anew. A library is a room (lcl/data/, or a module such as lcl/train.py); a test's
dependencies are the rooms it imports.
"""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / "BUILD"
# Module -> the distribution it comes from, where the names differ.
DISTRIBUTIONS = {
    "gin": "gin-config",
    "orbax": "orbax-checkpoint",
    "tensorflow_datasets": "tensorflow-datasets",
    "IPython": "ipython",
    "google": "protobuf",
}
HEADER = '''\
"""Targets of lcl for Bazel: one library a room, one test a test file.

Kept true by tests/house/build_file_test.py; to write it anew:
    python tests/house/build_file_test.py --fix
"""

load("@pip//:requirements.bzl", "requirement")
load("@rules_python//python:defs.bzl", "py_binary", "py_library", "py_test")

package(default_visibility = ["//visibility:public"])

filegroup(
    name = "files",
    srcs = glob([
        "*.md",
        "configs/**",
        "launch/**",
        "lcl/**/*.md",
        "tests/golden/**",
    ]),
)
'''


@dataclasses.dataclass(frozen=True)
class Target:
    """One py_library, py_binary or py_test."""

    kind: str
    name: str
    srcs: tuple[str, ...]
    deps: tuple[str, ...]
    main: str | None = None
    data: tuple[str, ...] = ()


def room_of(source: str) -> str:
    """The library of a source: lcl/data/store.py is in `data`, lcl/config_types.py in `config`."""
    parts = pathlib.PurePosixPath(source).with_suffix("").parts
    if parts[0] == "tests":
        return "tests_support"
    return {"__init__": "lcl"}.get(parts[1], parts[1])


def dependencies(source: str, sources: set[str], *, but: str) -> set[str]:
    """Labels of what a file imports, at its top or within functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((REPOSITORY / source).read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            first = module.split(".")[0]
            if first in ("lcl", "tests"):
                found.add(f":{library_of(module, sources)}")
            elif first not in sys.stdlib_module_names:
                found.add(f'requirement("{DISTRIBUTIONS.get(first, first.replace("_", "-"))}")')
    return found - {f":{but}"}


def library_of(module: str, sources: set[str]) -> str:
    """The library of `lcl.data.store.Store`: that of the longest prefix which is a file."""
    parts = module.split(".")
    while parts:
        path = "/".join(parts)
        for source in (f"{path}.py", f"{path}/__init__.py"):
            if source in sources:
                return room_of(source)
        if any(source.startswith(f"{path}/") for source in sources) and len(parts) > 1:
            return room_of(f"{path}/x.py")
        parts.pop()
    return "lcl"


def wanted() -> dict[str, Target]:
    """The targets that the files and their imports ask for."""
    found = [
        str(path.relative_to(REPOSITORY))
        for folder in ("lcl", "tests")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
    ]
    sources = set(found)
    rooms: dict[str, list[str]] = {}
    targets = []
    for source in found:
        if source.endswith("_test.py") or source.startswith("tests/benchmarks/"):
            name = source.removesuffix(".py").replace("/", "_")
            deps = dependencies(source, sources, but=name)
            if source.endswith("_test.py"):
                deps |= {":tests_support", 'requirement("pytest")'}
                kind, data = "py_test", (":files",)
            else:
                kind, data = "py_binary", ()
            targets.append(Target(kind, name, (source,), tuple(sorted(deps)), source, data))
        else:
            rooms.setdefault(room_of(source), []).append(source)
    for room, srcs in rooms.items():
        deps = set().union(*(dependencies(s, sources, but=room) for s in srcs))
        if room not in ("lcl", "tests_support"):
            deps.add(":lcl")
        targets.append(Target("py_library", room, tuple(sorted(srcs)), tuple(sorted(deps))))
    targets.append(Target("py_binary", "lcl_main", ("lcl/main.py",), (":main",), "lcl/main.py"))
    return {target.name: target for target in targets}


def render(targets: dict[str, Target]) -> str:
    """BUILD's text: libraries, then binaries, then tests, by name."""

    def listed(key: str, values: tuple[str, ...]) -> str:
        words = [v if v.startswith("requirement(") else f'"{v}"' for v in values]
        if len(words) == 1:
            return f"    {key} = [{words[0]}],\n"
        return f"    {key} = [\n" + "".join(f"        {w},\n" for w in words) + "    ],\n"

    kinds = ("py_library", "py_binary", "py_test")
    text = HEADER
    for target in sorted(targets.values(), key=lambda t: (kinds.index(t.kind), t.name)):
        text += f'\n{target.kind}(\n    name = "{target.name}",\n'
        text += listed("srcs", target.srcs)
        if target.data:
            text += listed("data", target.data)
        if target.main:
            text += f'    main = "{target.main}",\n'
        if target.deps:
            text += listed("deps", target.deps)
        text += ")\n"
    return text


def parse(text: str) -> dict[str, Target]:
    """The py_* targets of a BUILD file; this much of Starlark is Python."""

    def word(node: ast.expr) -> str:
        return node.value if isinstance(node, ast.Constant) else ast.unparse(node).replace("'", '"')

    targets = {}
    for node in ast.parse(text).body:
        call = node.value if isinstance(node, ast.Expr) else None
        if not isinstance(call, ast.Call) or not ast.unparse(call.func).startswith("py_"):
            continue
        given = {k.arg: k.value for k in call.keywords}
        lists = {
            k: tuple(map(word, getattr(given.get(k), "elts", ()))) for k in ("srcs", "deps", "data")
        }
        name = word(given["name"])
        assert name not in targets, f"two targets are called {name}"
        main = word(given["main"]) if "main" in given else None
        targets[name] = Target(ast.unparse(call.func), name, main=main, **lists)
    return targets


def test_build_file_is_true():
    have, want = parse(BUILD.read_text()), wanted()
    wrong = [f"missing target {name}" for name in sorted(want.keys() - have.keys())]
    wrong += [f"target {name} stands for nothing" for name in sorted(have.keys() - want.keys())]
    for name in sorted(have.keys() & want.keys()):
        if have[name] != want[name]:
            wrong.append(f"{name}: BUILD says {have[name]}, the files say {want[name]}")
    mend = "run: python tests/house/build_file_test.py --fix"
    assert not wrong, "\n".join([*wrong, mend])


def test_every_source_is_in_exactly_one_library():
    libraries = [t for t in parse(BUILD.read_text()).values() if t.kind == "py_library"]
    srcs = [source for target in libraries for source in target.srcs]
    assert len(srcs) == len(set(srcs))
    files = {str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "lcl").rglob("*.py")}
    assert files <= set(srcs)


def test_libraries_have_no_circle():
    targets = parse(BUILD.read_text())
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join([*trail, name])}"
        if name not in done:
            for label in targets[name].deps:
                if label.startswith(":"):
                    visit(label[1:], (*trail, name))
            done.add(name)

    for name in targets:
        visit(name, ())


def test_what_is_rendered_can_be_parsed():
    targets = wanted()
    assert parse(render(targets)) == targets


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit(f"usage: {sys.argv[0]} --fix")
    BUILD.write_text(render(wanted()))
    print(f"wrote {BUILD} with {len(wanted())} targets")
