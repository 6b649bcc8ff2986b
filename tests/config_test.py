"""The gin door: what it builds, what it refuses and with which words."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import pytest

from lcl import config
from lcl.config import ConfigError

pytestmark = pytest.mark.smoke


@dataclasses.dataclass(frozen=True)
class TeaLeaf:
    """A leaf of the tree of objects."""

    weights: Mapping[str, float]
    kind: str = "green"

    def __post_init__(self) -> None:
        if any(weight < 0 for weight in self.weights.values()):
            raise ValueError(f"weights {self.weights} must not be negative: take them out")


@dataclasses.dataclass(frozen=True)
class TeaPot:
    """A named object with a nested one."""

    name: str
    leaf: TeaLeaf
    cups: int = 2
    degrees: float = 80.0
    sizes: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class TeaTray:
    """An object that only ever stands as a default."""

    colour: str = "red"


def tea_timer(minutes: float, *, scale: float = 60.0) -> Callable[[int], float]:
    """A function that returns a function, like a schedule."""
    return lambda step: minutes * scale + step


def tea_party(
    *,
    pots: Sequence[TeaPot],
    seed: int = 0,
    timer: Callable[[int], float] | None = None,
    tray: TeaTray = TeaTray(),  # noqa: B008
    guests: Sequence[str] | None = None,
) -> int:
    """What stands for train(): the one function whose arguments are bound."""
    return seed + len(pots)


PARTY = """
tea_party.pots = [@english/TeaPot(), @code/TeaPot()]
tea_party.seed = %SEED
SEED = 1
TeaPot.leaf = @TeaLeaf()
english/TeaPot.name = "english"
english/TeaLeaf.weights = {"manpages-en": 1.0}
code/TeaPot.name = "code"
code/TeaPot.sizes = [1, 2]
code/TeaLeaf.weights = {"python": 3, "pydoc": 1.0}
"""


@pytest.fixture(autouse=True)
def tea(monkeypatch):
    """The throw-away objects are registered, the rooms' are not: these tests need none of them."""
    monkeypatch.setattr(config, "ROOMS", ())
    monkeypatch.setattr(config, "_CONFIGURABLES", {})
    # gin's registry is for the process: what it already knows is replaced there.
    for target in (TeaLeaf, TeaPot, TeaTray, tea_timer, tea_party):
        with config._redefinition():
            config.register(target)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "party.gin").write_text(PARTY)
    return tmp_path


def one_line(bindings: Sequence[str] = (), files: Sequence[str] = ("party.gin",)) -> str:
    """The words with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        config.load(files, bindings).kwargs("tea_party")
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_builds_nested_objects_by_scope(folder):
    kwargs = config.load(["party.gin"], []).kwargs("tea_party")
    assert kwargs == {
        "seed": 1,
        "pots": (
            TeaPot("english", TeaLeaf({"manpages-en": 1.0})),
            TeaPot("code", TeaLeaf({"python": 3, "pydoc": 1.0}), sizes=(1, 2)),
        ),
    }
    assert config.load(["party.gin"], []).call("tea_party") == 3
    assert config.load(["party.gin"], []).call("code/TeaLeaf").weights["python"] == 3


def test_bindings_win_over_files_and_overrides_over_bindings(folder):
    assert config.load(["party.gin"], ["SEED=5"]).kwargs("tea_party")["seed"] == 5
    loaded = config.load(["party.gin"], ["tea_party.seed=7", "TeaPot.cups=9"])
    assert loaded.kwargs("tea_party")["seed"] == 7
    assert loaded.kwargs("tea_party", seed=8)["seed"] == 8
    assert [pot.cups for pot in loaded.kwargs("tea_party")["pots"]] == [9, 9]


def test_later_files_win(folder):
    (folder / "more.gin").write_text("SEED = 11\n")
    assert config.load(["party.gin", "more.gin"]).kwargs("tea_party")["seed"] == 11


def test_two_configurations_do_not_see_one_another(folder):
    first = config.load(["party.gin"], ["TeaPot.cups=9"])
    second = config.load(["party.gin"], [])
    assert first.kwargs("tea_party")["pots"][0].cups == 9
    assert second.kwargs("tea_party")["pots"][0].cups == 2
    assert first.kwargs("tea_party")["pots"][0].cups == 9


def test_blocks_and_includes(folder):
    (folder / "size.gin").write_text("TeaPot:\n  cups = 3\n  degrees = 95\n")
    (folder / "run.gin").write_text('include "size.gin"\ninclude "party.gin"\nTeaPot.cups = 4\n')
    pots = config.load(["run.gin"]).kwargs("tea_party")["pots"]
    assert [(pot.cups, pot.degrees) for pot in pots] == [(4, 95)] * 2


def test_three_include_levels_are_refused(folder):
    for level, name in enumerate("abc"):
        (folder / f"{name}.gin").write_text(f'include "{"bcd"[level]}.gin"\n')
    (folder / "d.gin").write_text(PARTY)
    text = one_line(files=["a.gin"])
    assert text.startswith("c.gin:1: 'd.gin' would be include level 3; 2 are allowed")
    assert config.load(["b.gin"]).kwargs("tea_party")["seed"] == 1


def test_repository_root_is_searched(folder, monkeypatch):
    root = folder / "repository"
    (root / "configs").mkdir(parents=True)
    (root / "configs" / "away.gin").write_text(PARTY)
    monkeypatch.setattr(config.config_reader, "REPOSITORY", root)
    assert config.load(["configs/away.gin"]).kwargs("tea_party")["seed"] == 1
    text = one_line(files=["configs/awya.gin"])
    assert text == "no config file 'configs/awya.gin'; did you mean 'configs/away.gin'?" or (
        "repository/configs/away.gin" in text
    )


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        (
            "tea_party.sed=1",
            "--gin.tea_party.sed: tea_party has no parameter 'sed'; did you mean 'seed'?",
        ),
        (
            "TeePot.cups=1",
            "--gin.TeePot.cups: nothing is called 'TeePot'; did you mean 'TeaPot'?",
        ),
        (
            "english/TeaLeaf.wieghts={'a': 1}",
            "--gin.english/TeaLeaf.wieghts: TeaLeaf has no parameter 'wieghts'; "
            "did you mean 'weights'?",
        ),
        (
            "tea_party.kind='x'",
            "--gin.tea_party.kind: tea_party has no parameter 'kind'; there is TeaLeaf.kind",
        ),
        (
            "tea_party.pots.cups=1",
            "--gin.tea_party.pots.cups: 'tea_party.pots.cups' reaches into an argument; "
            "bind the parameter of the object itself: TeaPot.cups",
        ),
        ("SED=1", "--gin.SED: no line uses the macro 'SED'; did you mean 'SEED'?"),
        ("SEED=%SEDE", "--gin.SEED: macro %SEDE is not defined; did you mean 'SEED'?"),
        (
            "englsh/TeaPot.cups=3",
            "--gin.englsh/TeaPot.cups: no reference uses the scope 'englsh'; "
            "did you mean 'english'?",
        ),
        (
            "TeaPot.leaf=@TeaLeef()",
            "--gin.TeaPot.leaf: nothing is called 'TeaLeef'; did you mean 'TeaLeaf'?",
        ),
        (
            "TeaTray.colour='blue'",
            "--gin.TeaTray.colour: TeaTray.colour has no effect, as nothing refers to @TeaTray(); "
            "write tea_party.tray = @TeaTray()",
        ),
        (
            "tea_timer.minutes=3",
            "--gin.tea_timer.minutes: tea_timer.minutes has no effect, as nothing refers to "
            "@tea_timer(); write tea_party.timer = @tea_timer()",
        ),
        ("TeaPot.cups='3'", "--gin.TeaPot.cups: TeaPot.cups wants int, got '3'"),
        ("TeaPot.cups=1e3", "--gin.TeaPot.cups: TeaPot.cups wants int, got 1000.0; write 1000"),
        ("TeaPot.cups=True", "--gin.TeaPot.cups: TeaPot.cups wants int, got True"),
        (
            "code/TeaPot.sizes=[1, 'x']",
            "--gin.code/TeaPot.sizes: code/TeaPot.sizes wants Sequence[int], got [1, 'x']",
        ),
        (
            "TeaPot.leaf=@TeaTray()",
            "--gin.TeaPot.leaf: TeaPot.leaf wants TeaLeaf, got @TeaTray()",
        ),
        (
            "TeaPot.leaf=@TeaLeaf",
            "--gin.TeaPot.leaf: TeaPot.leaf wants TeaLeaf: write @TeaLeaf() to call it",
        ),
        ("tea_party.timer=3", "--gin.tea_party.timer: tea_party.timer wants"),
        ("tea_party.guests='ann'", "--gin.tea_party.guests: tea_party.guests wants Sequence[str]"),
        ("SEED='one'", "party.gin:3: tea_party.seed wants int, got 'one'"),
        ("SEED=%gin.REQUIRED", "--gin.SEED: SEED is required: give --gin.SEED=..."),
        (
            "code/TeaLeaf.weights={'a': -1.0}",
            "code/TeaLeaf: weights {'a': -1.0} must not be negative: take them out",
        ),
        (
            "TeaLeaf.kind=green",
            "--gin.TeaLeaf.kind: not gin: malformed node or string",
        ),
        ("tea_party.seed", "--gin.tea_party.seed: not gin: Couldn't parse statement"),
        ("code/TeaPot.sizes=[1", "--gin.code/TeaPot.sizes: not gin:"),
    ],
)
def test_a_mistake_is_one_line_with_the_mend(folder, binding, words):
    assert one_line([binding]).startswith(words)


def test_unquoted_text_says_how_to_quote(folder):
    assert one_line(["TeaLeaf.kind=green"]).endswith('a text value needs quotes: name = "value"')


def test_mistake_in_a_file_names_file_and_line(folder):
    (folder / "bad.gin").write_text('# header\n\ninclude "party.gin"\nTeaPot.cusp = 3\n')
    text = one_line(files=["bad.gin"])
    assert text == "bad.gin:4: TeaPot has no parameter 'cusp'; did you mean 'cups'?"
    (folder / "worse.gin").write_text('include "party.gin"\n\nTeaPot.cups = = 3\n')
    assert one_line(files=["worse.gin"]).startswith("worse.gin:3: not gin:")


def test_what_is_bound_after_its_object_was_taken_away_is_lost(folder):
    """A line about an object that a later file replaced is harmless; one after that is lost."""
    (folder / "late.gin").write_text(
        "tea_party.timer = @tea_timer()\ntea_timer.minutes = 3\n" + PARTY
    )
    (folder / "untimed.gin").write_text("tea_party.timer = None\n")
    assert "timer" in config.load(["late.gin"], ["tea_timer.minutes=4"]).kwargs("tea_party")
    files = ["late.gin", "untimed.gin"]
    assert config.load(files).kwargs("tea_party")["timer"] is None
    words = one_line(["tea_timer.minutes=4"], files)
    assert words.startswith("--gin.tea_timer.minutes: tea_timer.minutes has no effect, as nothing")
    (folder / "later.gin").write_text("tea_timer.minutes = 5\n")
    assert one_line(files=[*files, "later.gin"]).startswith("later.gin:1: tea_timer.minutes has no")
    back = config.load([*files, "later.gin"], ["tea_party.timer=@tea_timer()"])
    assert back.kwargs("tea_party")["timer"](0) == 300


def test_misspelt_file_names_the_nearest(folder):
    assert one_line(files=["prty.gin"]) == "no config file 'prty.gin'; did you mean 'party.gin'?"
    (folder / "bad.gin").write_text('include "partie.gin"\n')
    text = one_line(files=["bad.gin"])
    assert text == "bad.gin:1: no config file 'partie.gin'; did you mean 'party.gin'?"


def test_required_must_be_given_and_may_be_given_anywhere(folder):
    (folder / "run.gin").write_text("NUM = %gin.REQUIRED\nTeaPot.cups = %NUM\n" + PARTY)
    assert one_line(files=["run.gin"]) == "run.gin:1: NUM is required: give --gin.NUM=..."
    pots = config.load(["run.gin"], ["NUM=6"]).kwargs("tea_party")["pots"]
    assert [pot.cups for pot in pots] == [6, 6]


def test_unbound_argument_is_named(folder):
    assert one_line(files=[]) == (
        "tea_party.pots is not bound: write tea_party.pots = ... or give --gin.tea_party.pots=..."
    )
    text = one_line(["tea_party.pots=[@english/TeaPot()]"], files=[])
    assert text.startswith("english/TeaPot.name is not bound")


def test_macro_defined_through_itself(folder):
    assert "defined through itself" in one_line(["SEED=%SEED"])


def test_unknown_override_is_named(folder):
    with pytest.raises(ConfigError, match="has no parameter 'sead'; did you mean 'seed'"):
        config.load(["party.gin"]).kwargs("tea_party", sead=1)


def test_an_error_leaves_nothing_behind(folder):
    one_line(["code/TeaLeaf.weights={'a': -1.0}"])
    assert config.load(["party.gin"]).call("tea_party") == 3


def test_operative_text_is_a_normal_form(folder):
    text = config.load(["party.gin"], ["tea_party.timer=@tea_timer()", "tea_timer.minutes=4"])
    assert text.operative_text("tea_party").splitlines() == [
        "tea_party.guests = None",
        "tea_party.pots = [@english/TeaPot(), @code/TeaPot()]",
        "tea_party.seed = 1",
        "tea_party.timer = @timer/tea_timer()",
        "tea_party.tray = @tray/TeaTray()",
        "",
        "code/TeaPot.cups = 2",
        "code/TeaPot.degrees = 80.0",
        "code/TeaPot.leaf = @code_leaf/TeaLeaf()",
        "code/TeaPot.name = 'code'",
        "code/TeaPot.sizes = [1, 2]",
        "",
        "code_leaf/TeaLeaf.kind = 'green'",
        "code_leaf/TeaLeaf.weights = {'pydoc': 1.0, 'python': 3}",
        "",
        "english/TeaPot.cups = 2",
        "english/TeaPot.degrees = 80.0",
        "english/TeaPot.leaf = @english_leaf/TeaLeaf()",
        "english/TeaPot.name = 'english'",
        "english/TeaPot.sizes = []",
        "",
        "english_leaf/TeaLeaf.kind = 'green'",
        "english_leaf/TeaLeaf.weights = {'manpages-en': 1.0}",
        "",
        "timer/tea_timer.minutes = 4",
        "timer/tea_timer.scale = 60.0",
        "",
        "tray/TeaTray.colour = 'red'",
    ]


def test_operative_text_builds_the_same_objects_again(folder):
    loaded = config.load(["party.gin"], ["TeaPot.degrees=1e999", "tea_party.guests=['a', 'b']"])
    text = loaded.operative_text("tea_party")
    (folder / "operative.gin").write_text(text)
    again = config.load(["operative.gin"])
    assert again.operative_text("tea_party") == text
    kwargs = again.kwargs("tea_party")
    assert kwargs["tray"] == TeaTray()
    del kwargs["tray"], kwargs["timer"]
    assert kwargs == loaded.kwargs("tea_party")


def test_operative_text_shows_an_override_and_no_address(folder):
    text = config.load(["party.gin"]).operative_text("tea_party", timer=print, seed=4)
    assert "# tea_party.timer = <builtins.print>" in text
    assert "tea_party.seed = 4" in text
    text = config.load(["party.gin"]).operative_text("tea_party", timer=object())
    assert "# tea_party.timer = <builtins.object>" in text


def test_two_objects_of_one_name_keep_apart(folder):
    text = config.load(["party.gin"], ["code/TeaPot.name='english'"]).operative_text("tea_party")
    assert "tea_party.pots = [@english/TeaPot(), @english_/TeaPot()]" in text


def test_imports_register_a_users_own_objects(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    (folder / "my_tea.py").write_text(
        "import dataclasses\nfrom lcl import config\n"
        "@dataclasses.dataclass(frozen=True)\nclass MyTray:\n    edge: int = 1\n"
        "config.register(MyTray)\n"
    )
    (folder / "run.gin").write_text("import my_tea\nMyTray.edge = 4\n")
    assert config.load(["run.gin"]).call("MyTray").edge == 4
    assert one_line(["import my_teapot"]).startswith("--gin.import my_teapot: cannot import")


def test_redefinition_replaces_and_a_clash_is_refused(folder):
    @dataclasses.dataclass(frozen=True)
    class TeaTray:
        size: int = 3

    config.register(TeaTray)
    assert config.load([], ["TeaTray.size=4"]).call("TeaTray").size == 4
    TeaTray.__module__ = "elsewhere"
    Other = dataclasses.make_dataclass("TeaTray", [], frozen=True)
    Other.__module__ = "third"
    with pytest.raises(ConfigError, match="two configurables are called 'TeaTray'"):
        config.register(Other)


def test_import_lcl_is_light():
    code = (
        "import sys, lcl; "
        "heavy = {'jax', 'flax', 'tensorflow', 'seqio', 'numpy', 'gin', 'matplotlib', 'torch'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    repository = pathlib.Path(config.__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
