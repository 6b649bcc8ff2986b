"""Real corpora, by name. A builder is shipped, never the text.

`python` and `pydoc` are on every machine; the others are read out of the distribution's packages
(downloaded, not installed). `available()` lists all, `why_not(name)` says why one cannot be had.
"""

from __future__ import annotations

import difflib
import functools

from lcl.data.corpora import apt, packages, standard_library
from lcl.data.corpora.corpus import CorpusInfo

__all__ = ["CorpusInfo", "available", "get", "is_available", "why_not"]

_LANGUAGES = {
    "en": "English", "fr": "French", "de": "German", "ja": "Japanese", "es": "Spanish",
    "ru": "Russian", "zh": "Chinese",
}  # fmt: skip
_MAN_PACKAGES = {
    "en": ("manpages", "manpages-dev"),
    "fr": ("manpages-fr", "manpages-fr-dev"),
    "de": ("manpages-de", "manpages-de-dev"),
    "ja": ("manpages-ja", "manpages-ja-dev"),
    "es": ("manpages-es",),
}
_MAN_LICENCES = {
    "en": "page by page: Linux-man-pages-copyleft, GPL-2.0-or-later, BSD, MIT",
    "ja": "page by page (JM Project)",
}
_OFFICE = {"en": ("en-us", "en-US"), "fr": ("fr", "fr"), "de": ("de", "de"), "ja": ("ja", "ja")}
_HANDBOOK = {
    "en": "en-US", "fr": "fr-FR", "de": "de-DE", "ja": "ja-JP", "es": "es-ES", "ru": "ru-RU",
    "zh": "zh-CN",
}  # fmt: skip


@functools.cache
def _registry() -> dict[str, CorpusInfo]:
    corpora = [
        CorpusInfo(
            "python",
            "sources of Python's standard library, one document a module",
            "code",
            "PSF-2.0",
            standard_library.python,
            keeps_repeats=True,
        ),
        CorpusInfo(
            "pydoc",
            "English documentation of Python: language reference, docstrings by module",
            "en",
            "PSF-2.0",
            standard_library.pydoc,
        ),
    ]
    for language, names in _MAN_PACKAGES.items():
        corpora.append(
            CorpusInfo(
                f"manpages-{language}",
                f"manual pages in {_LANGUAGES[language]}",
                language,
                _MAN_LICENCES.get(language, "GPL-3.0-or-later, some pages with terms of their own"),
                functools.partial(packages.man_pages, language=language),
                names,
            )
        )
    for language, (suffix, folder) in _OFFICE.items():
        corpora.append(
            CorpusInfo(
                f"libreoffice-help-{language}",
                f"LibreOffice's help in {_LANGUAGES[language]}, the same topics in each language",
                language,
                "MPL-2.0 mainly",
                functools.partial(packages.office_help, language=language, folder=folder),
                (f"libreoffice-help-{suffix}",),
            )
        )
    corpora.append(
        CorpusInfo(
            "long-prose",
            "An Anarchist FAQ: long English prose (a political tract), up to 438 KB a document",
            "en",
            "GPL-2.0",
            packages.long_prose,
            ("anarchism",),
        )
    )
    for language, folder in _HANDBOOK.items():
        corpora.append(
            CorpusInfo(
                f"handbook-{language}",
                f"The Debian Administrator's Handbook in {_LANGUAGES[language]}",
                language,
                "GPL-2.0-or-later or CC-BY-SA-3.0",
                functools.partial(packages.handbook, language=language, folder=folder),
                ("debian-handbook",),
            )
        )
    corpora.append(
        CorpusInfo(
            "metamath",
            "set.mm: formal mathematics with proofs, one document a section",
            "maths",
            "CC0-1.0",
            packages.metamath,
            ("metamath-databases",),
            keeps_repeats=True,
        )
    )
    return {corpus.name: corpus for corpus in corpora}


def available() -> dict[str, CorpusInfo]:
    """All corpora by name, whether or not this machine can have them (see `is_available`)."""
    return dict(_registry())


def get(name: str) -> CorpusInfo:
    """The corpus named `name`; a ValueError names the nearest if there is none."""
    registry = _registry()
    if name not in registry:
        near = difflib.get_close_matches(name, registry, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown corpus {name!r}{hint} (there are {', '.join(registry)})")
    return registry[name]


def why_not(name: str) -> str | None:
    """Why a corpus cannot be had on this machine, in one line; None if nothing is in the way.

    Fast: looks for the tools and, in apt's lists, for the packages; downloads nothing.
    """
    corpus = get(name)
    if not corpus.needs_apt:
        return None
    reason = apt.why_not()
    if reason:
        return reason
    known = apt.candidate_versions(corpus.packages)
    missing = [package for package in corpus.packages if package not in known]
    if missing and not apt.can_update():
        return f"apt does not know {', '.join(missing)}; run `sudo apt-get update`"
    return None


def is_available(name: str) -> bool:
    """Whether `prepare` can be expected to make the corpus here."""
    return why_not(name) is None
