"""Filters: each against a text made to be caught and its neighbour that is not."""

from __future__ import annotations

import base64
import doctest
import random

import numpy as np
import pytest

from lcl.data import filters
from lcl.data.filters import (
    Compression,
    FilterError,
    Length,
    Repetition,
    Script,
    parse_filter,
)
from lcl.data.prepare import prepare
from lcl.data.testing import make_lexicon, make_text


@pytest.fixture(scope="module")
def prose() -> str:
    return make_text(np.random.default_rng(0), make_lexicon("any"), 400)


def test_length():
    assert Length(3, 5).reason("  ab\n") == "shorter than 3 characters"
    assert Length(3, 5).reason("abc") is None and Length(3, 5).reason("abcde ") is None
    assert Length(3, 5).reason("abcdef") == "longer than 5 characters"


def test_repetition(prose):
    assert Repetition().reason(prose) is None
    assert Repetition().reason("menu\n" * 9 + prose) is None
    assert Repetition().reason(prose + "\nthe same line\n" * 200) == "repeats itself (lines)"
    words = " ".join(["five words come again and", "then", "there"] * 30)
    assert Repetition().reason(words) == "repeats itself (runs of words)"
    # 6 of 10 characters are in lines seen before: the share is of characters.
    assert Repetition(max_lines=0.6).reason("aaaa\naaaa\naaaa\nbbbb\n"[:-1]) is None
    assert Repetition(max_lines=0.49).reason("aaaa\naaaa\naaaa\nbbbb") is not None
    assert Repetition(0.2).reason("one two") is None  # too short to say


def test_script(prose):
    russian = "Это обычный русский текст, в котором есть word."
    assert Script("Cyrillic").reason(russian) is None
    assert Script("Latin").reason(russian) == "not in the script Latin"
    assert Script("Latin", 0.05).reason(russian) is None
    assert Script("Latin").reason(prose) is None
    assert Script("Latin").reason("12345 !!!") is not None  # no letters
    assert Script("Hiragana+CJK").reason("日本語で書いた文です") is None


def test_compression(prose):
    assert Compression().reason(prose) is None
    assert Compression().reason("all the same " * 500) == "packs too well"
    noise = base64.b85encode(random.Random(0).randbytes(4000)).decode()
    assert Compression(0.1, 0.8).reason(noise) == "packs too badly"
    assert Compression().reason("all the same " * 30) is None  # under 512 bytes


def test_each_drop_is_counted_by_its_reason_and_settings_make_another_store(tmp_path, prose):
    texts = {"good": prose, "good2": prose[100:], "short": "too short", "menu": "a menu\n" * 300}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    options = {"folders": {"mine": str(tmp_path)}, "log": lambda line: None}
    with_filters = prepare(root=tmp_path / "r", filters=[Length(50), Repetition()], **options)
    assert with_filters[0].meta["ledger"]["dropped"] == {
        "shorter than 50 characters": 1,
        "repeats itself (lines)": 1,
    }
    assert with_filters[0].meta["ledger"]["tokens"]["dropped"] == {
        "shorter than 50 characters": len("too short") + 2,
        "repeats itself (lines)": 7 * 300 + 2,
    }
    assert with_filters[0].meta["settings"]["filters"][0] == {
        "filter": "Length",
        "min_characters": 50,
        "max_characters": None,
    }
    lines: list[str] = []
    without = prepare(root=tmp_path / "r", **options | {"log": lines.append})
    assert "changed" in lines[0] and "filters" not in without[0].meta["settings"]


def test_filters_from_the_command_line():
    assert parse_filter("length:5") == Length(5)
    assert parse_filter("repetition") == Repetition()
    assert parse_filter("compression:0.2:0.7") == Compression(0.2, 0.7)
    assert doctest.testmod(filters).failed == 0


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Length(5, 3), "5"),
        (lambda: Repetition(max_lines=30), "30"),
        (lambda: Script("Latn"), "'Latn'"),
        (lambda: Script("Latin", 0.0), "0.0"),
        (lambda: Compression(0.9, 0.1), "0.9"),
        (lambda: parse_filter("lenght:3"), "'lenght'"),
        (lambda: parse_filter("length:three"), "three"),
        (lambda: parse_filter("length:1:2:3"), "more values"),
    ],
)
def test_filters_that_cannot_be(make, word):
    with pytest.raises(FilterError, match=word) as caught:
        make()
    assert "\n" not in str(caught.value)
