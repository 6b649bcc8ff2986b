"""Simple quality filters: each a small frozen object that says why a text is dropped, or None.

    Length(200, 100_000)        too short, too long: characters
    Repetition(0.3, 0.3)        lines, or runs of five words, that were there before
    Script("Latin", 0.5)        letters of another script
    Compression(0.1, 0.9)       packs too well (repeats itself) or too badly (noise, base64)

    text -> filter.reason(text) -> "repeats itself (lines)"  -> the ledger, by reason

A filter looks at one text and nothing else, so the order of documents and the number of processes
change nothing. Your own: any frozen dataclass with `reason(text)` and `settings()`, defined in a
module (not in `__main__`) if several processes tokenise. Thresholds in the spirit of Gopher's
rules (Rae et al. 2021, 2112.11446, table A1); they are defaults to look at, not truths.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import unicodedata
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

_WORD = re.compile(r"\w+")
# A measure of a text looks at no more than this: a giant document must not cost minutes.
_LOOK_AT = 1 << 20
_RUN = 5


class FilterError(ValueError):
    """A filter that cannot be; one line that names the value and the mend."""


class Filter(Protocol):
    """What `prepare(filters=...)` takes."""

    def reason(self, text: str) -> str | None:
        """Why this text is dropped, in a few words that the ledger counts by; None keeps it."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Plain values that say what it does; part of the store's fingerprint."""
        ...


def _share(name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise FilterError(f"{name} {value} must lie between 0 and 1: it is a share")


class _Settings:
    def settings(self) -> dict[str, Any]:
        """The filter's name and its fields."""
        return {"filter": type(self).__name__, **dataclasses.asdict(self)}  # type: ignore[call-overload]


@dataclasses.dataclass(frozen=True)
class Length(_Settings):
    """Keeps texts of min_characters to max_characters (blanks at the ends do not count).

    >>> Length(5, 9).reason("four"), Length(5, 9).reason("right")
    ('shorter than 5 characters', None)
    """

    min_characters: int = 1
    max_characters: int | None = None

    def __post_init__(self) -> None:
        most = self.max_characters
        if self.min_characters < 0 or (most is not None and most < max(1, self.min_characters)):
            raise FilterError(
                f"Length({self.min_characters}, {most}) keeps nothing; give 0 <= minimum <= maximum"
            )

    def reason(self, text: str) -> str | None:
        length = len(text.strip())
        if length < self.min_characters:
            return f"shorter than {self.min_characters} characters"
        if self.max_characters is not None and length > self.max_characters:
            return f"longer than {self.max_characters} characters"
        return None


@dataclasses.dataclass(frozen=True)
class Repetition(_Settings):
    """Drops texts that repeat themselves.

        a menu        lines that are there already: 2 of 3, 12 of 18 characters
        a menu        share .67 > .3 -> dropped
        a menu

    Attributes:
        max_lines: largest share of the characters that may stand in lines seen before.
        max_runs: largest share of the runs of five words that may have been seen before.
    """

    max_lines: float = 0.3
    max_runs: float = 0.3

    def __post_init__(self) -> None:
        _share("max_lines", self.max_lines)
        _share("max_runs", self.max_runs)

    def reason(self, text: str) -> str | None:
        text = text[:_LOOK_AT]
        lines = collections.Counter(line for line in text.split("\n") if line.strip())
        total = sum(len(line) * count for line, count in lines.items())
        again = sum(len(line) * (count - 1) for line, count in lines.items())
        if again > self.max_lines * total:
            return "repeats itself (lines)"
        words = _WORD.findall(text)
        runs = len(words) - _RUN + 1
        if runs < 2 * _RUN:
            return None
        distinct = len(set(zip(*(words[i:] for i in range(_RUN)), strict=False)))
        if runs - distinct > self.max_runs * runs:
            return "repeats itself (runs of words)"
        return None


@dataclasses.dataclass(frozen=True)
class Script(_Settings):
    """Drops texts of whose letters fewer than `min_share` belong to a script.

    Attributes:
        name: as Unicode spells it at the head of its letters' names: Latin, Cyrillic, Greek,
            Arabic, Hebrew, Devanagari, Hangul, Thai, CJK, Hiragana, Katakana; several joined by
            "+", as in "Hiragana+Katakana+CJK" for Japanese.
        min_share: of the letters; a text without letters is dropped.
    """

    name: str = "Latin"
    min_share: float = 0.5

    def __post_init__(self) -> None:
        _share("min_share", self.min_share)
        for name in self.name.split("+"):
            if name.upper() not in _known_scripts():
                some = "Latin, Cyrillic, Greek, Arabic, CJK, Hiragana"
                raise FilterError(f"unknown script {name!r}; Unicode's names are {some}, ...")

    def reason(self, text: str) -> str | None:
        scripts = set(self.name.upper().split("+"))
        letters = inside = 0
        for character, count in collections.Counter(text[:_LOOK_AT]).items():
            script = _script(character)
            if script is not None:
                letters += count
                inside += count * (script in scripts)
        if not letters or inside < self.min_share * letters:
            return f"not in the script {self.name}"
        return None


@functools.lru_cache(maxsize=1 << 16)
def _script(character: str) -> str | None:
    """The script of a letter, None for anything else.

    >>> _script("é"), _script("ж"), _script("漢"), _script("7")
    ('LATIN', 'CYRILLIC', 'CJK', None)
    """
    if not character.isalpha():
        return None
    return unicodedata.name(character, "?").replace("-", " ").partition(" ")[0]


@functools.cache
def _known_scripts() -> frozenset[str]:
    planes = (
        *range(0x3400),
        0x4E00,
        0xAC00,
        0xA000,
    )  # Unified ideographs, Hangul and Yi: one each.
    return frozenset(filter(None, (_script(chr(code)) for code in planes)))


@dataclasses.dataclass(frozen=True)
class Compression(_Settings):
    """Drops texts that zlib packs too well (they repeat themselves) or too badly (noise, base64).

    Ratio = packed bytes / UTF-8 bytes, of at most the first million characters. Prose in one
    language lies about .35-.6. Texts under 512 bytes pack badly whatever they are: not judged.
    """

    min_ratio: float = 0.1
    max_ratio: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_ratio < self.max_ratio:
            raise FilterError(
                f"Compression({self.min_ratio}, {self.max_ratio}) keeps nothing; give minimum < "
                "maximum"
            )

    def reason(self, text: str) -> str | None:
        data = text[:_LOOK_AT].encode("utf-8")
        if len(data) < 512:
            return None
        ratio = len(zlib.compress(data, 1)) / len(data)
        if ratio < self.min_ratio:
            return "packs too well"
        return "packs too badly" if ratio > self.max_ratio else None


def parse_filter(text: str) -> Filter:
    """A filter from the command line's `NAME` or `NAME:VALUE[:VALUE]`.

    >>> parse_filter("length:200:5000"), parse_filter("script:Cyrillic:0.6")
    (Length(min_characters=200, max_characters=5000), Script(name='Cyrillic', min_share=0.6))

    Raises:
        FilterError: unknown name, or values that it cannot use.
    """
    name, *values = text.split(":")
    kinds: dict[str, tuple[type, tuple[type, ...]]] = {
        "length": (Length, (int, int)),
        "repetition": (Repetition, (float, float)),
        "script": (Script, (str, float)),
        "compression": (Compression, (float, float)),
    }
    if name not in kinds:
        raise FilterError(f"unknown filter {name!r}; use {', '.join(kinds)}")
    make, types = kinds[name]
    if len(values) > len(types):
        raise FilterError(f"filter {text!r} has more values than {name} takes ({len(types)})")
    try:
        arguments = [kind(value) for kind, value in zip(types, values, strict=False)]
    except ValueError as error:
        raise FilterError(f"filter {text!r}: {error}") from error
    return make(*arguments)
