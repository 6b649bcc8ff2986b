"""In which language is this line? Stop words and scripts, to find what was left untranslated.

Translated documentation is often only partly translated: of the French Debian handbook some 40% is
still English. A share in a store's metadata keeps a "French" loss honest.
"""

from __future__ import annotations

import re

# Frequent short words; those that two of the languages share (de, la, die, on, ...) are out.
_STOP_WORDS = {
    "en": "the of and to is in that for it with as be this are by not or from an if which can will",
    "fr": "le les des une est dans pour que qui sur par pas avec ce cette sont ou vous au aux et",
    "de": "der das und ist nicht mit von den ein eine werden wird für auf dem im sich des zu oder",
    "es": "el los las una es del que por para con se como su al si está son este esta más no y",
}
_PATTERNS = {
    language: re.compile(rf"(?<![\w-])(?:{'|'.join(words.split())})(?![\w-])", re.IGNORECASE)
    for language, words in _STOP_WORDS.items()
}
_SCRIPTS = {
    "ja": re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]"),
    "zh": re.compile(r"[\u4e00-\u9fff]"),
    "ru": re.compile(r"[\u0400-\u04ff]"),
}
_LATIN = re.compile(r"[A-Za-z]")
MIN_LINE = 30  # Shorter lines (names, options) say little about a language.


def line_language(line: str, language: str) -> str | None:
    """Says whether a line is in `language`, still in English, or neither can be told.

    Args:
        line: one line of text.
        language: "fr", "de", "es", "ja", "ru" or "zh".

    Returns:
        `language`, "en", or None (code, options, names, short lines).

    >>> line_language("La commande affiche le nom de tous les fichiers du répertoire.", "fr")
    'fr'
    >>> line_language("This option is ignored and will be removed in the future.", "fr")
    'en'
    >>> line_language("-rw-r--r-- 1 root root 1024 /etc/passwd", "fr")
    """
    script = _SCRIPTS.get(language)
    if len(line) < (MIN_LINE if script is None else MIN_LINE // 3):
        return None
    english = len(_PATTERNS["en"].findall(line))
    if script is not None:
        target = len(script.findall(line))
        if target >= 0.3 * (target + len(_LATIN.findall(line))) and target:
            return language
        return "en" if english >= 2 and target < 3 else None
    target = len(_PATTERNS[language].findall(line))
    if target == english:
        return None
    return language if target > english else "en"


def language_bytes(text: str, language: str) -> tuple[int, int]:
    """UTF-8 bytes of the lines in `language` and of those still in English."""
    sizes = {language: 0, "en": 0, None: 0}
    for line in text.split("\n"):
        sizes[line_language(line, language)] += len(line.encode("utf-8"))
    return sizes[language], sizes["en"]
