"""Corpora: text comes out of roff and HTML clean, packages are read without being installed."""

from __future__ import annotations

import ast
import gzip
import os
import shutil
import stat
import subprocess
import textwrap

import pytest

from lcl.data import corpora, prepare
from lcl.data.corpora import apt, builder, packages, standard_library
from lcl.data.corpora.corpus import (
    MAX_REPEATS,
    CorpusInfo,
    check_language,
    without_boilerplate,
)
from lcl.data.corpora.html_text import html_to_text
from lcl.data.corpora.languages import language_bytes, line_language
from lcl.data.corpora.roff import roff_to_text
from lcl.data.corpora.standard_library import describe, source_files
from lcl.data.sources import Document, Ledger
from lcl.data.store import Data

# ---- roff


def roff(source: str) -> str:
    return roff_to_text(textwrap.dedent(source).strip("\n"))


def test_a_page_of_the_man_macros():
    page = r"""
        .\" A comment
        '\" t
        .TH FOLD 1 "2022" "coreutils"
        .SH NAME
        fold \- wrap each input line to fit in specified width
        .SH SYNOPSIS
        \fBfold\fP [\fI\,OPTION\/\fP]...
        .SH "EXIT STATUS"
        Filled text
        is joined,
        .I word
        by word; see
        .BR wc (1),
        .BR "two words" "\fR(2)\fP."
        .TP
        \fB\-b\fR, \fB\-\-bytes\fR
        count bytes
        rather than columns
        .IP \(bu 2
        a bullet
        .nf
        int main(void)
        {
            return 0;  \" why not
        }
        .fi
        After.
    """
    assert roff(page) == (
        "NAME\n\nfold - wrap each input line to fit in specified width\n\n"
        "SYNOPSIS\n\nfold [OPTION]...\n\n"
        "EXIT STATUS\n\nFilled text is joined, word by word; see wc(1), two words(2).\n\n"
        "-b, --bytes\ncount bytes rather than columns\n\n"
        "• a bullet\nint main(void)\n{\n    return 0;\n}\nAfter."
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (r"\(lqquoted\(rq \[em] \(aqx\(aq \e\& 3\~km", "“quoted” — 'x' \\ 3 km"),
        (r"caf\('e \['e]t\[u00E9] \[char233] \N'233'", "café été é é"),
        (r"\f[B]bold\f[] \f(CWcode\fP \s-2small\s0 \s+(12x", "bold code small x"),
        (r"a\h'2m'b\v'-1'c\w'xyz'd\m[red]e\m[]f", "abcdef"),
        ("one\\c\ntwo", "onetwo"),
        ("日本語の\n文です。", "日本語の文です。"),
        ("日本語と\nEnglish", "日本語と English"),
        (".ds Pr Program\nThe \\*(Pr \\*[Pr].", "The Program Program."),
        (".de XX\nhidden \\$1\n..\n.XX shown\nbody", "shown body"),
        (".ig\nhidden\n..\nshown", "shown"),
        (".if t \\{\\\nhidden\n.\\}\n.if n shown", "shown"),
        (".ie t hidden\n.el shown", "shown"),
        (".ie \\n(.g \\{\\\nshown\n.\\}\n.el \\{\\\nhidden\n.\\}\nend", "shown end"),
        (".UR https://x.org\nthe site\n.UE .\nNext", "the site<https://x.org>. Next"),
        (".SY tool\n.OP \\-a file\n.YS", "tool [-a file]"),
        (".so man3/other.3\n", ""),
        (".B", ""),
        ('.BI "a""b" c', 'a"bc'),
        (".\nx\n.\\}\ny", "x y"),
    ],
)
def test_roff_details(source, text):
    want = text.replace("the site<", "the site <")
    assert roff_to_text(source) == want


def test_tables_give_one_line_a_row():
    page = r"""
        .TS
        allbox tab(:);
        lb lb
        l l.
        Interface:Value
        _
        T{
        .BR csqrt (),
        csqrtf()
        T}:MT-Safe
        one:two
        .TE
        After
    """
    assert roff(page) == "Interface  Value\ncsqrt(), csqrtf()  MT-Safe\none  two\n\nAfter"


def test_a_page_of_the_mdoc_macros():
    page = r"""
        .Dd March 1, 2020
        .Dt CAT 1
        .Os
        .Sh NAME
        .Nm cat
        .Nd concatenate files
        .Sh SYNOPSIS
        .Nm
        .Op Fl benst
        .Op Ar
        .Sh DESCRIPTION
        The
        .Nm
        utility reads
        .Ar file ,
        see
        .Xr head 1
        and
        .Dq the manual .
        .Bl -tag
        .It Fl b Ar n
        Number the lines.
        .El
    """
    assert roff(page) == (
        "NAME\n\ncat - concatenate files\n\nSYNOPSIS\n\ncat [-benst] []\n\n"
        "DESCRIPTION\n\nThe cat utility reads file, see head(1) and “the manual”.\n\n"
        "-b n\nNumber the lines."
    )


def test_footers_about_the_translation_go():
    assert packages.without_footer("NOM\n\nls\n\nTRADUCTION\n\nCette page ...") == "NOM\n\nls"
    assert packages.without_footer("TRADUCTION\n\nles\n\noutils\n\nde\n\ntraduction") != ""


def test_encodings_are_guessed_and_counted():
    ledger = Ledger()
    for data, language in (
        ("日本語".encode(), "ja"),
        ("日本語".encode("euc-jp"), "ja"),
        ("café".encode("latin-1"), "fr"),
        (b"'\\\" -*- coding: koi8-r -*-\n" + "да".encode("koi8-r"), "ru"),
    ):
        assert packages.decode(data, ledger, language=language).rpartition("\n")[2] in (
            "日本語",
            "café",
            "да",
        )
    assert dict(ledger.notes) == {
        "decoded as utf-8": 1,
        "decoded as euc-jp": 1,
        "decoded as latin-1": 1,
        "decoded as koi8-r": 1,
    }


# ---- HTML


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("<h1>A</h1><p>b <b>c</b>\n d</p><p>e</p>", "A\n\nb c d\n\ne"),
        ("<head><title>x</title></head><nav>y<nav>z</nav></nav><p>a</p><footer>f</footer>", "a"),
        ("<script>if (a < b) { '<p>' }</script><style>p{}</style>a<!-- <p>no</p> -->b", "ab"),
        ("<ul><li><p>one</p></li><li>two</li></ul>", "• one\n\n• two"),
        ("<table><tr><td>a</td><td><p>b</p><p>c</p></td></tr><tr><td>d</td></table>", "a  b c\nd"),
        ("<pre>x  y\n  z</pre><p>a</p>", "x  y\n  z\n\na"),
        ("&lt;p&gt; &amp; &eacute; &#233; 1 < 2", "<p> & é é 1 < 2"),
        ("<p>日本\n  語</p>", "日本語"),
        ('<span hidden="true" class="MAC">no</span><span hidden="true">yes</span>', "yes"),
        ('<p class="a skipme">x<p>y</p></p><p title="a>b">z</p>', "z"),
        ('<p>go <a><div class="url">→ x</div></a> on</p>', "go → x on"),
    ],
)  # fmt: skip
def test_html_details(source, text):
    assert html_to_text(source, skip=("skipme",), inline=("url",)) == text


# ---- languages


@pytest.mark.parametrize(
    ("language", "line", "found"),
    [
        ("fr", "Le programme lit les lignes qui sont dans le fichier donné en argument.", "fr"),
        ("de", "Die Datei wird nicht gelesen, wenn sie mit einem Punkt beginnt.", "de"),
        ("es", "El programa lee las líneas del archivo que se pasa como argumento.", "es"),
        ("ja", "このプログラムは file を読み込みます。", "ja"),
        ("zh", "这个程序读取文件的每一行内容。", "zh"),
        ("ru", "Программа читает строки из файла.", "ru"),
        ("fr", "int main(int argc, char **argv) { return 0; }", None),
        ("ja", "#include <stdio.h>", None),
    ],
)
def test_line_language(language, line, found):
    assert line_language(line, language) == found
    english = "This program reads the lines of the file that is given to it."
    assert line_language(english, language) == "en"
    want = (len(line.encode()) if found else 0, len(english))
    assert language_bytes(f"{line}\n{english}", language) == want


def test_untranslated_documents_are_dropped_and_counted():
    french = "Le programme lit les lignes qui sont dans le fichier donné.\n"
    english = "This program reads the lines of the file that is given to it.\n"
    ledger = Ledger()
    kept = check_language(Document("a", french * 3 + english, "s"), "fr", ledger)
    assert kept is not None and 0.7 < kept.extras["language_share"] < 0.8
    assert check_language(Document("b", french + english * 3, "s"), "fr", ledger) is None
    assert dict(ledger.dropped) == {"mostly untranslated": 1}
    assert ledger.notes["bytes of untranslated lines"] == len(english) - 1


def test_paragraphs_of_many_documents_are_left_out():
    notice = "This is free software: you are free to change and redistribute it, says the page."
    pages = [Document(f"{i}", f"Own {i}\n\n{notice}\n\nMore", "s") for i in range(MAX_REPEATS + 1)]
    ledger = Ledger()
    assert [d.text for d in without_boilerplate(pages[1:], ledger)] == [d.text for d in pages[1:]]
    assert {d.text[5:] for d in without_boilerplate(pages, ledger)} >= {"\n\nMore"}
    assert ledger.notes["boilerplate paragraphs left out"] == len(pages)


# ---- the standard library


def test_the_standard_library_without_its_tests(monkeypatch):
    names = [name for _, name in source_files()]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [n for n in names if "site-packages" in n or n.startswith("test/")]
    few = [pair for pair in source_files() if pair[1].startswith(("arg", "json/", "encodings/cp"))]
    monkeypatch.setattr(standard_library, "source_files", lambda: iter(few))
    ledger = Ledger()
    documents = list(corpora.get("python").read([], ledger))
    text = next(d.text for d in documents if d.name == "argparse.py")
    ast.parse(text)
    assert ledger.dropped["generated table"] > 10
    pydoc = {d.name: d for d in corpora.get("pydoc").read([], Ledger())}
    assert "class ArgumentParser(" in pydoc["argparse.py"].text
    assert "topics/lambda" in pydoc
    # Code and its docstrings are on the same side of the split.
    assert pydoc["argparse.py"].group == next(d.group for d in documents if d.name == "argparse.py")


def test_docstrings_stand_under_their_signatures():
    tree = ast.parse(
        'class A(B):\n    def f(self, x: int = 1) -> str:\n        """Does\n\n        it."""\n'
        'def g(): pass\nasync def h(*a, **k): "H."'
    )
    assert describe(tree, "m") == (
        "m\n\nclass A(B)\n\n    def f(self, x: int=1) -> str\n        Does\n\n        it.\n\n"
        "async def h(*a, **k)\n    H."
    )


# ---- the registry


def test_every_corpus_says_what_it_is():
    registry = corpora.available()
    assert {"python", "pydoc", "manpages-en", "manpages-fr", "libreoffice-help-ja", "long-prose",
            "handbook-zh", "metamath"} <= set(registry)  # fmt: skip
    for name, info in registry.items():
        assert name == info.name and info.description and info.licence and info.language
        assert info.needs_apt == (name not in ("python", "pydoc"))
    assert corpora.is_available("python") and corpora.why_not("pydoc") is None
    with pytest.raises(ValueError, match="did you mean 'manpages-fr'"):
        corpora.get("manpage-fr")


def test_importing_the_registry_imports_nothing_heavy(run_python):
    code = (
        "import sys, lcl.data.corpora, lcl.data.prepare, lcl.data.corpora.builder\n"
        "lcl.data.corpora.available()\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'jax', 'grain', 'seqio', 'sentencepiece'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_python(code).strip() == "[]"


# ---- packages: a made-up distribution


def make_deb(folder, name: str, files: dict[str, bytes], links: dict[str, str]) -> str:
    """A .deb as dpkg-deb builds it."""
    tree = folder / f"{name}-tree"
    for path, data in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(data)
    for path, target in links.items():
        (tree / path).symlink_to(target)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1:2.0-1\nArchitecture: all\nMaintainer: x <x@y>\n"
        "Description: x\n"
    )
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", str(tree), str(folder)],
        check=True,
        capture_output=True,
    )
    return str(folder / f"{name}_2.0-1_all.deb")


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """apt-get and apt-cache that know one package, manpages-es, with 30 pages."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb is not on this machine")
    folder = tmp_path / "archive"
    folder.mkdir()
    line = "El programa lee las líneas del archivo número {} que se pasa como argumento.\n"
    pages = {
        f"usr/share/man/es/man1/p{i}.1.gz": gzip.compress(
            f".SH NOMBRE\np{i} \\- nada\n.SH DESCRIPCIÓN\n{line.format(i) * 5}".encode()
        )
        for i in range(30)
    }
    pages["usr/share/man/es/man1/so.1.gz"] = gzip.compress(b".so man1/p1.1\n")
    pages["usr/share/man/es/man1/en.1.gz"] = gzip.compress(
        b"This page is one of those that is still in the English of the author.\n" * 5
    )
    pages["usr/share/doc/manpages-es/copyright"] = b"Licence: GPL-3+\n"
    make_deb(folder, "manpages-es", pages, {"usr/share/man/es/man1/alias.1.gz": "p1.1.gz"})
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "apt-cache": '[ "$3" = manpages-es ] && printf "Package: $3\\nVersion: 1:2.0-1\\n"',
        "apt-get": f'case "$*" in *download*) cp {folder}/*.deb "manpages-es_1%3a2.0-1_all.deb";; '
        "*) exit 100;; esac",
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\necho {name} $* >> {tmp_path}/log\n{script}\n")
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tmp_path


def test_a_corpus_from_a_package_to_the_store(distribution):
    root, cache = distribution / "data", distribution / "cache"
    lines: list[str] = []

    def go(**options):
        return prepare.prepare(
            ["manpages-es"], root=root, cache_dir=str(cache), log=lines.append, **options
        )

    train, heldout = go(heldout_fraction=0.3)
    assert train.num_documents + heldout.num_documents == 30
    ledger = train.meta["ledger"]
    assert ledger["dropped"] == {
        "includes another page (.so)": 1,
        "link to another page": 1,
        "mostly untranslated": 1,
    }
    assert ledger["read"] == 33
    assert train.meta["settings"]["packages"] == {"manpages-es": "1:2.0-1"}
    text = train.tokenizer().decode(train.document(0))
    assert text.startswith("NOMBRE\n\np") and "\n\nDESCRIPCIÓN\n\nEl programa lee" in text
    assert train.extra("language_share").tolist() == [1.0] * train.num_documents
    assert train.source_names == ["manpages-es"]
    licence = root / "manpages-es" / "licences" / "manpages-es.txt"
    assert licence.read_text() == "Licence: GPL-3+\n"
    # The second time nothing is downloaded, built or written.
    assert go(heldout_fraction=0.3)[0].fingerprint == train.fingerprint
    assert lines[-1] == "manpages-es: up to date"
    assert (distribution / "log").read_text().count("download") == 1
    # Other settings are another corpus.
    assert go(heldout_fraction=0.2)[0].fingerprint != train.fingerprint
    assert Data(str(root)).domains() == ["manpages-es"]


def test_packages_that_cannot_be_had_say_why(distribution, monkeypatch):
    cache = str(distribution / "cache")
    monkeypatch.setattr(apt, "can_update", lambda: False)
    one_line(lambda: apt.resolve(["manpages-xx"], cache), "manpages-xx", "apt-get update")
    assert "apt-get update" in (corpora.why_not("manpages-fr") or "")
    assert corpora.is_available("manpages-es")
    found = apt.resolve(["manpages-es"], cache)
    apt.fetch(found, cache, log=lambda line: None)
    assert os.listdir(cache) == ["manpages-es_1%3a2.0-1.deb"]
    with open(found[0].path, "r+b") as file:
        file.truncate(os.path.getsize(found[0].path) * 2 // 3)
    one_line(lambda: list(apt.read_files(found[0])), "damaged", "remove it")
    monkeypatch.setenv("PATH", str(distribution))
    one_line(lambda: apt.resolve(["manpages-es"], cache), "not found", "Debian")
    assert "not found" in (corpora.why_not("manpages-es") or "")
    assert not corpora.is_available("manpages-es") and corpora.is_available("python")


def test_a_failed_download_leaves_nothing(distribution):
    (distribution / "bin" / "apt-get").write_text("#!/bin/sh\necho 'E: no route' >&2; exit 100\n")
    cache = str(distribution / "cache")
    found = apt.resolve(["manpages-es"], cache)
    one_line(lambda: apt.fetch(found, cache, log=lambda line: None), "no route", "network")
    assert os.listdir(cache) == []


def test_old_downloads_are_used_when_apt_forgot_the_package(distribution):
    cache = distribution / "cache"
    cache.mkdir()
    (cache / "manpages-xx_1%3a3.deb").write_bytes(b"")
    (distribution / "bin" / "apt-get").write_text("#!/bin/sh\nexit 100\n")
    lines: list[str] = []
    (found,) = apt.resolve(["manpages-xx"], str(cache), log=lines.append)
    assert (found.version, found.name) == ("1:3", "manpages-xx")
    assert "downloaded before" in lines[-1]


def test_the_builder_writes_array_record_and_splits_even_a_small_corpus(tmp_path):
    def read(packages, ledger):
        for i in range(3):
            yield Document(f"d{i}", f"text {i} " * 40, "made up", group=f"g{i}")
        ledger.drop("no good")

    info = CorpusInfo("tiny", "three documents", "en", "CC0-1.0", read)
    built = builder.build(info, [], str(tmp_path), heldout_fraction=0.001, seed=0)
    assert sorted(len(built.splits[s]) for s in ("train", "heldout")) == [1, 2]
    assert built.ledger.read == 4 and built.ledger.dropped["no good"] == 1
    texts = {d.text for s in ("train", "heldout") for d in built.documents(s)}
    assert texts == {f"text {i} " * 40 for i in range(3)}
    files = [name for _, _, names in os.walk(tmp_path) for name in names]
    assert sum(".array_record" in name for name in files) == 2
    again = builder.build(
        CorpusInfo("tiny", "three documents", "en", "CC0-1.0", None),  # type: ignore[arg-type]
        [],
        str(tmp_path),
        heldout_fraction=0.001,
        seed=0,
    )
    assert again.ledger == built.ledger


def one_line(call, *words: str) -> None:
    with pytest.raises(apt.AptError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
