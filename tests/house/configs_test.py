"""Every shipped configuration: it loads, says what it is, and is short enough to be read."""

from __future__ import annotations

import pathlib
import re

import pytest

from lcl import config, config_reader

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
FILES = sorted(str(p.relative_to(REPOSITORY)) for p in CONFIGS.rglob("*.gin"))
# A model's file sets its sizes and nothing else.
MAX_SIZES = 8


def test_there_are_configurations():
    assert FILES


def is_run(name: str) -> bool:
    """Whether a file is a whole run: it has stages, itself or by an include."""
    return any(s.key == "train.stages" for s in config_reader.read_file(name)) and (
        "Laid over" not in (REPOSITORY / name).read_text()
    )


RUNS = [name for name in FILES if is_run(name)]


def required_bindings(name: str) -> list[str]:
    """`# Required: NUM_STEPS=10` lines of a header: what the command must give, with an example."""
    text = (REPOSITORY / name).read_text()
    return [m.strip() for m in re.findall(r"^# Required: *(.+)$", text, re.MULTILINE)]


@pytest.mark.parametrize("name", FILES)
def test_header_says_what_it_is(name):
    lines = (REPOSITORY / name).read_text().splitlines()
    assert lines[0].startswith("# "), f"{name} begins with a line that says what it is"
    assert len(lines[0]) > 20


@pytest.mark.parametrize("name", FILES)
def test_names_and_includes_are_right(name):
    """Also for a fragment: it need not be whole, but what it names must exist."""
    config.register_rooms()
    statements = list(config_reader.read_file(name))
    assert statements
    checker = config_reader._Checker(statements, config._CONFIGURABLES)
    for statement in checker.bindings:
        checker._name(statement)
    for _, reference in checker.references:
        assert reference.name in config._CONFIGURABLES


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("configs/models/")])
def test_a_size_file_sets_few_numbers(name):
    if not re.search("^include", (REPOSITORY / name).read_text(), re.MULTILINE):
        pytest.skip("no size: what all sizes of a family have in common")
    statements = [s for s in config_reader.read_file(name) if s.where.startswith(name)]
    own = [s for s in statements if type(s.value) in (int, float)]
    assert len(own) <= MAX_SIZES, f"{name} sets {len(own)} numbers, at most {MAX_SIZES}"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_says_its_command_hardware_and_result(name):
    text = (REPOSITORY / name).read_text()
    header = text[: re.search(r"^[^#\n]", text, re.MULTILINE).start()]
    for word in ("Command:", "Hardware:"):
        assert word in header, f"the header of {name} has no line `# {word} ...`"
    commanded = re.findall(r"--gin_file=(\S+)", header)
    for other in commanded:
        assert (REPOSITORY / other).exists(), f"{name} speaks of {other}"


@pytest.mark.parametrize("name", RUNS)
def test_operative_configuration_is_golden(name, golden, tmp_path):
    """A refactor changes no experiment silently; `pytest --update-golden` when it is meant."""
    loaded = config.load([name], required_bindings(name))
    text = loaded.operative_text("train", run_dir="runs/golden")
    assert "0x" not in text
    golden(name.removesuffix(".gin") + ".txt", text)
    # It is a normal form: read again, it gives itself.
    again = tmp_path / "operative.gin"
    again.write_text(text)
    assert config.load([str(again)]).operative_text("train") == text
