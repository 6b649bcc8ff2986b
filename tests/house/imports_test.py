"""Who may import whom; what is imported only where it is used; what an import costs."""

from __future__ import annotations

import ast
import functools
import json
import pathlib
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

# Room -> the rooms it may import. A room is lcl/X/ or lcl/X.py. Nobody imports main; nobody but
# main imports its commands, and nobody but they config, which reaches the rooms by name only.
KERNELS = {"attention", "files", "parallel"}
ROOMS = {"data", "models", "optim", "objectives", "checkpoints", "evals", "report"}
STORY = {"assembly", "cards", "describe", "policies", "preemption", "programs", "recorder"}
STORY |= {"stages", "step"}
# What a command, or a paper, may set going.
RUNS = {"baselines", "branches", "scoring", "train"}
ALLOWED: dict[str, set[str]] = {
    "main": {"commands"},
    "commands": RUNS | {"config", "papers", "programs", "compile"} | ROOMS | KERNELS,
    "compile": STORY | ROOMS | KERNELS,
    "config": {"config_reader", "config_types"},
    "config_reader": {"config_types", "files"},
    "files": set(),
    "config_types": set(),
    "papers": {"analysis"} | RUNS | STORY | ROOMS | KERNELS,
    "train": {"analysis", "branches", "sampling"} | STORY | ROOMS | KERNELS,
    "sampling": STORY | ROOMS | KERNELS,
    "scoring": STORY | ROOMS | KERNELS,
    "branches": STORY | ROOMS | KERNELS,
    "baselines": {"stages"} | ROOMS | KERNELS,
    "cards": {"stages"} | ROOMS | KERNELS,
    "assembly": (STORY - {"assembly", "recorder"}) | ROOMS | KERNELS,
    "programs": {"step"} | ROOMS | KERNELS,
    "recorder": {"parallel", "policies", "report", "stages"},
    "step": {"stages"} | ROOMS | KERNELS,
    "stages": ROOMS | KERNELS,
    "policies": {"analysis", "files", "report"},
    "preemption": set(),
    "describe": set(),
    "analysis": ROOMS | KERNELS,
    "report": {"data", "evals"} | KERNELS,
    "evals": {"data"} | KERNELS,
    "checkpoints": {"models"} | KERNELS,
    "objectives": KERNELS,
    "models": KERNELS,
    "optim": KERNELS,
    "data": set(),
    "attention": set(),
    "parallel": set(),
}
# Modules that may import gin, module's first name -> who may import it (None: nobody at top level).
ONLY_IN = {"gin": {"config", "config_reader"}}
# Seconds each, so only inside the functions that need them.
HEAVY = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "matplotlib", "torch"}
HEAVY |= {"transformers", "tensorboardX", "sentencepiece", "tokenizers", "wandb"}
NEVER = {"data": {"jax", "flax", "optax", "torch"}, "attention": {"flax", "optax"}}
# File -> what it may import all the same, inside functions: neighbours are matrix products.
STILL = {"lcl/data/neighbors.py": {"jax"}}


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(REPOSITORY / "lcl").with_suffix("").parts[0]


@functools.cache
def sources() -> list[pathlib.Path]:
    return sorted((REPOSITORY / "lcl").rglob("*.py"))


@functools.cache
def imports_of(path: pathlib.Path) -> list[tuple[str, int, bool]]:
    """(module, line, inside a function) of each import; `from lcl import x` counts as lcl.x."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            inside = True
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it out"
            module = node.module or ""
            names = [f"lcl.{a.name}" for a in node.names] if module == "lcl" else [module]
            found.extend((name, node.lineno, inside) for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), False)
    return found


def test_every_room_has_its_rule():
    rooms = {room_of(path) for path in sources()} - {"__init__"}
    assert rooms <= set(ALLOWED), "say in ALLOWED what these may import"


def test_rooms_import_only_downwards():
    wrong = []
    for path in sources():
        room = room_of(path)
        for module, line, _ in imports_of(path):
            first, _, rest = module.partition(".")
            other = rest.split(".")[0]
            if first == "lcl" and other not in {"", "__version__", room} | ALLOWED.get(room, set()):
                wrong.append(f"{path.relative_to(REPOSITORY)}:{line}: {room} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_the_rules_have_no_circle():
    done: set[str] = set()

    def visit(room: str, trail: tuple[str, ...]) -> None:
        assert room not in trail, f"circle: {' -> '.join([*trail, room])}"
        if room not in done:
            for other in sorted(ALLOWED[room] & set(ALLOWED)):
                visit(other, (*trail, room))
            done.add(room)

    for room in ALLOWED:
        visit(room, ())


def test_other_peoples_modules_stay_where_they_belong():
    wrong = []
    for path in sources():
        room = room_of(path)
        for module, line, inside in imports_of(path):
            first = module.split(".")[0]
            where = f"{path.relative_to(REPOSITORY)}:{line}"
            if first in ONLY_IN and room not in ONLY_IN[first]:
                wrong.append(f"{where}: only {sorted(ONLY_IN[first])} may import {first}")
            still = STILL.get(str(path.relative_to(REPOSITORY)), ()) if inside else ()
            if first in NEVER.get(room, ()) and first not in still:
                wrong.append(f"{where}: {room} may not import {first}")
            if first in HEAVY and not inside:
                wrong.append(f"{where}: import {first} inside the function that needs it")
    assert not wrong, "\n".join(wrong)


def test_imports_are_found_wherever_they_stand(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from lcl import main\ndef f():\n    import torch\n    from lcl.data import x\n")
    assert imports_of(bad) == [("lcl.main", 1, False), ("torch", 3, True), ("lcl.data", 4, True)]


def test_every_third_party_module_is_asked_for_in_setup():
    asked = (REPOSITORY / "setup.py").read_text().replace("-", "_").lower()
    packages = {"gin": "gin_config", "orbax": "orbax_checkpoint", "etils": "orbax_checkpoint"}
    packages |= {"jaxlib": "jax", "PIL": "matplotlib", "yaml": ""}
    wanted = set()
    for path in sources():
        wanted |= {module.split(".")[0] for module, _, _ in imports_of(path)}
    wanted -= {"lcl"} | set(sys.stdlib_module_names) | {"tensorflow", "google"}
    missing = {m for m in wanted if packages.get(m, m).lower() not in asked}
    assert not missing, f"setup.py does not ask for {sorted(missing)}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import lcl", {"numpy", "jax", "gin"}),
        ("import lcl.data", {"jax", "flax", "tensorflow"}),
        ("import lcl.attention", {"flax", "optax", "tensorflow"}),
        (
            "import contextlib, io\n"
            "from lcl import main\n"
            "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
            "    main.main(['--help'])",
            {"jax", "numpy", "gin", "matplotlib"},
        ),
    ],
)
def test_what_is_light_stays_light(run_python, statement, absent):
    heavy = HEAVY | absent
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    loaded = {name.split(".")[0] for name in json.loads(run_python(code))}
    assert not heavy & loaded
