r"""Manual pages (roff: man, mdoc, tbl) to plain text.

Not a typesetter: what remains is the prose, in paragraphs, for a language model to read.

    .SH NAME                                  NAME
    fold \- wrap each  input line
    .SH OPTIONS                        ->     fold - wrap each input line
    .TP
    \fB\-b\fP, \fB\-\-bytes\fP                   OPTIONS
    count bytes rather than
    columns                                   -b, --bytes
                                              count bytes rather than columns

Filled text is joined to one line a paragraph (Japanese and Chinese without a blank), examples keep
their lines, tables give one line a row. Comments, macro definitions, index entries and the branches
for a typesetter are dropped.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

_CHARACTERS = {
    "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "ga": "`", "aa": "´",
    "ha": "^", "ti": "~", "at": "@", "rs": "\\", "sl": "/", "bu": "•", "em": "—", "en": "–",
    "hy": "-", "mi": "−", "pl": "+", "co": "©", "rg": "®", "tm": "™", "de": "°", "sc": "§",
    "dg": "†", "dd": "‡", "ps": "¶", "ra": "→", "<-": "←", "->": "→", "la": "⟨", "ua": "↑",
    "da": "↓", "<=": "≤", ">=": "≥", "!=": "≠", "==": "≡", "~=": "≅", "+-": "±", "mu": "×",
    "mc": "µ", "di": "÷", "if": "∞", "is": "∫", "sr": "√", "pd": "∂", "bv": "|", "or": "|",
    "ba": "|", "br": "|", "ul": "_", "rn": "‾", "fm": "′", "sd": "″", "eu": "€", "Eu": "€",
    "Po": "£", "Ye": "¥", "ct": "¢", "Fo": "«", "Fc": "»", "fo": "‹", "fc": "›", "r!": "¡",
    "r?": "¿", "ss": "ß", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "o/": "ø", "O/": "Ø",
    "*W": "-", "*a": "α", "*b": "β", "*m": "μ", "*p": "π", "*l": "λ", "*S": "Σ", "**": "*",
    "12": "½", "14": "¼", "34": "¾", "OK": "✓", "sq": "□", "no": "¬", "AN": "∧", "OR": "∨",
    "eq": "=", "lB": "[", "rB": "]", "lC": "{", "rC": "}", "sh": "#", "Do": "$", "-D": "Ð",
    "Sd": "ð", "TP": "Þ", "Tp": "þ", "S1": "¹", "S2": "²", "S3": "³", "ts": "ς", "ap": "~",
    "va": "↕", "lh": "☜", "rh": "☞", "f/": "⁄", "tf": "∴", "fa": "∀", "te": "∃", "mo": "∈",
}  # fmt: skip
_ACCENTS = {
    "'": "\u0301", "`": "\u0300", "^": "\u0302", ":": "\u0308", "~": "\u0303", ",": "\u0327",
    "o": "\u030a", "v": "\u030c", "-": "\u0304",
}  # fmt: skip
_STRINGS = {
    "R": "®", "Tm": "™", "lq": "“", "rq": "”", "L'": "‘", "R'": "’", 'L"': '"', 'R"': '"',
    "C+": "C++", "C`": "", "C'": "", "--": "--", "Aq": "'", "(l": "<", "l(": "<", "r)": ">",
}  # fmt: skip

_NAME = r"(?:\[(?P<{0}l>[^\]\n]*)\]|\((?P<{0}t>..)|(?P<{0}c>.))"
_ESCAPE = re.compile(
    r"\\(?:"
    r'(?P<comment>["\#].*)'
    r"|f" + _NAME.format("f") + r"|\*" + _NAME.format("s") + r"|[nmMgFkVY]" + _NAME.format("n") +
    r"|s(?:[-+]?(?:\(..|\[[^\]]*\]|'[^']*'|[1-3]\d|\d)|\([-+]?\d\d)"
    r"|N'(?P<code>\d+)'|[oC]'(?P<over>[^']*)'"
    r"|[hvwlLDbSRXxBAZH]'[^']*'"
    r"|\((?P<two>..)|\[(?P<long>[^\]\n]*)\]"
    r"|(?P<one>.))"
)  # fmt: skip
_ONE = {
    "-": "-", "e": "\\", "E": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "t": "\t", "'": "'",
    "`": "`", ".": ".", "_": "_",
    "|": "", "^": "", "&": "", "%": "", ":": "", ",": "", "/": "", ")": "", "a": "", "d": "",
    "u": "", "r": "", "p": "", "{": "", "}": "", "z": "", "!": "", "?": "", "c": "",
}  # fmt: skip

# Bullets and numbers stay on the line of what they mark.
_SHORT_TAG = 4

_WIDE = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]")

_JOINED = frozenset("BR RB BI IB IR RI SB".split())  # Alternating fonts: no blank between.
_SPACED = frozenset("B I SM CW".split())
_PARAGRAPH = frozenset("PP P LP sp Pp HP Sp RS RE Bl El Bd Ed SY YS Rs Re bp ne".split())
_LINE_BREAK = frozenset("br ti in ce".split())
# Requests with a body that is not text: dropped up to "..".
_DEFINITION = frozenset("de de1 ami am ig dei".split())
_DROPPED = frozenset("IX TH Dd Dt Os PD ta ft ps tr nr nh hy ad na ll ss fam".split())
# Macros of mdoc: what surrounds their arguments.
_ENCLOSURES = {
    "Dq": "“”", "Do": "“”", "Sq": "‘’", "So": "‘’", "Ql": "‘’", "Qq": '""', "Qo": '""',
    "Pq": "()", "Po": "()", "Bq": "[]", "Bo": "[]", "Aq": "<>", "Ao": "<>", "Op": "[]",
    "Oo": "[]", "Brq": "{}", "Bro": "{}",
}  # fmt: skip
_CLOSERS = {
    "Dc": "”", "Sc": "’", "Qc": '"', "Pc": ")", "Bc": "]", "Ac": ">", "Oc": "]", "Brc": "}",
}  # fmt: skip
_FONTS = frozenset(
    "Ar Cm Pa Em Sy Li Ic Ev Va Vt Fa Ft Ad Er Dv Tn Ms No Sx An Lb Cd It Mt Lk St Rv Ex Me "
    "Bx Fx Nx Ox Ux At %A %B %T %R %D %N %V %J %I %O %P %U".split()
)
_SYSTEMS = {
    "Bx": "BSD", "Fx": "FreeBSD", "Nx": "NetBSD", "Ox": "OpenBSD", "Ux": "UNIX",
    "At": "AT&T UNIX",
}  # fmt: skip
_CLOSING_PUNCTUATION = frozenset([".", ",", ";", ":", ")", "]", "?", "!"])


def roff_to_text(source: str) -> str:
    r"""Returns the text of a manual page; "" for a page that only includes another (`.so`).

    Args:
        source: the page as roff source, decoded.

    >>> print(roff_to_text(".SH NAME\nfold \\- wrap\n.PP\nSee\n.BR wc (1)."))
    NAME
    <BLANKLINE>
    fold - wrap
    <BLANKLINE>
    See wc(1).
    """
    page = _Page(source)
    page.run()
    return page.text()


class _Page:
    """One page on its way to text: where we are in the source, and what has come out."""

    def __init__(self, source: str):
        self.lines: Iterator[str] = iter(source.replace("\r\n", "\n").split("\n"))
        self.mdoc = re.search(r"^\.\s*(?:Dd|Sh)\b", source, re.MULTILINE) is not None
        self.out: list[str] = []  # Finished lines; "" parts paragraphs.
        self.open = ""  # The paragraph being filled.
        self.filling = True
        self.glue = False  # \c: the next line continues this one.
        self.strings = dict(_STRINGS)
        self.defined: set[str] = set()
        self.name = ""  # mdoc's .Nm
        self.link = ""  # An open .UR or .MT
        self.tag = False  # The next line of text is a tag (.TP).
        self.condition = False  # Of the last .ie, for its .el.

    def run(self) -> None:
        for line in self.lines:
            self.line(line)
        self.end_line()

    def text(self) -> str:
        lines = [line.rstrip() for line in self.out]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")

    # ---- lines

    def line(self, line: str) -> None:
        while line.endswith("\\") and not line.endswith("\\\\"):
            line = line[:-1] + next(self.lines, "")
        match = re.match(r"[.'][ \t]*([A-Za-z%][^\s\\\"]*|[\\].*|$|\.|[^\w\s])[ \t]*(.*)", line)
        if match and (line[0] == "." or match[1] in ("br", "if", "ie", "el", "so", "de", "ds")):
            self.request(match[1], match[2])
        elif line.startswith("'\\\""):
            pass
        elif not line.strip():
            self.paragraph() if self.filling else self.out.append("")
        elif line.strip() != "\\}":
            self.words(self.unescape(line), glue=line.endswith("\\c"))

    def words(self, text: str, *, glue: bool = False) -> None:
        """Adds a line of text, after its escapes are gone."""
        text = text.rstrip()
        if not self.filling:
            if self.open and self.glue:
                self.open += text
            else:
                self.end_line()
                self.open = text
            self.glue = glue
            if not glue:
                self.end_line()
        elif text.strip():
            text = re.sub(r"[ \t]+", " ", text)
            if text[0] == " " and self.open and not self.glue:
                self.end_line()  # A leading blank breaks the line, as in roff.
            text = text.strip()
            if not self.open or self.glue or (_WIDE.match(self.open[-1]) and _WIDE.match(text)):
                self.open += text
            else:
                self.open += " " + text
            self.glue = glue
        if self.tag and not glue:
            self.tag = False
            if len(self.open) > _SHORT_TAG:
                self.end_line()

    def end_line(self) -> None:
        if self.open:
            self.out.append(self.open)
        self.open, self.glue = "", False

    def paragraph(self) -> None:
        self.end_line()
        if self.out and self.out[-1]:
            self.out.append("")

    # ---- requests and macros

    def request(self, name: str, rest: str) -> None:
        if name in ("", ".") or name[0] == "\\":
            if name.startswith("\\}"):  # "\} .el ..." closes a branch that was taken.
                self.after_branch(name[2:] + " " + rest)
            return
        if name in _DEFINITION:
            self.define(name, rest)
        elif name in ("if", "ie", "el"):
            self.branch(name, rest)
        elif name in ("ds", "as"):
            key, _, value = rest.partition(" ")
            before = self.strings.get(key, "") if name == "as" else ""
            self.strings.setdefault(key, before + self.unescape(value.removeprefix('"')))
        elif name == "TS":
            self.paragraph()
            self.table()
        elif name in ("EQ", "PS"):
            self.skip_until("." + {"EQ": "EN", "PS": "PE"}[name])
        elif name in ("nf", "EX", "Vb", "DS", "Ds"):
            self.paragraph() if name != "nf" else self.end_line()
            self.filling = False
        elif name in ("fi", "EE", "Ve", "DE", "De"):
            self.end_line()
            self.filling = True
            if name != "fi":
                self.paragraph()
        elif name in _DROPPED or name.startswith("so"):
            pass
        else:
            self.macro(name, self.arguments(rest))

    def macro(self, name: str, arguments: list[str]) -> None:
        if name in ("SH", "SS", "Sh", "Ss"):
            self.filling = True
            self.paragraph()
            heading = " ".join(arguments)
            if heading:
                self.out.append(heading)
                self.out.append("")
            else:
                self.tag = True  # The heading is the next line.
        elif name in ("TP", "TQ"):
            self.paragraph() if name == "TP" else self.end_line()
            self.tag = True
        elif name == "IP":
            self.paragraph()
            if arguments and arguments[0].strip():
                self.open = arguments[0].strip()
                if len(self.open) > _SHORT_TAG:
                    self.end_line()
        elif name in ("UR", "MT", "URL", "MTO"):
            self.link = arguments[0] if arguments else ""
            if name in ("URL", "MTO"):
                self.words(" ".join(arguments[1:2]))
                self.close_link(arguments[2:])
        elif name in ("UE", "ME"):
            self.close_link(arguments)
        elif name == "SY":
            self.paragraph()
            self.words(" ".join(arguments))
        elif name == "OP":
            self.words("[" + " ".join(arguments) + "]")
        elif name in ("Bd", "Ed") and self.mdoc:
            self.paragraph()
            self.filling = name == "Ed" or not {"-literal", "-unfilled"} & set(arguments)
        elif name in _PARAGRAPH:
            self.paragraph()
        elif name in _LINE_BREAK:
            self.end_line()
        elif self.mdoc:
            self.mdoc_macro(name, arguments)
        elif name in _JOINED or (name in _SPACED and arguments):
            self.words(("" if name in _JOINED else " ").join(arguments))
        elif name in ("B", "I", "SM", "SB"):
            pass  # The font of the next line.
        elif name in self.defined:
            self.words(" ".join(arguments))

    def close_link(self, arguments: list[str]) -> None:
        tail = "".join(arguments[:1])
        if self.open and not self.open.endswith((" ", "(")) and self.link not in self.open:
            self.words(f"<{self.link}>{tail}")
        elif self.link not in self.open:
            self.words(self.link + tail)
        elif tail:
            self.open += tail
        self.link = ""

    def mdoc_macro(self, name: str, arguments: list[str]) -> None:
        if name == "It":
            self.paragraph()
            self.words(self.mdoc_line(arguments))
            self.end_line()
        elif name == "Dl":
            self.end_line()
            self.words(self.mdoc_line(arguments))
            self.end_line()
        elif name == "Nd":
            self.words("- " + " ".join(arguments))
        elif name in ("Sm", "Xo", "Xc", "Bk", "Ek"):
            if arguments and name == "Xc":
                self.words(self.mdoc_line(arguments))
        elif name in _CLOSERS:
            self.open += _CLOSERS[name] + "".join(arguments)
        elif name in _ENCLOSURES and name[-1] == "o":
            self.words(_ENCLOSURES[name][0] + self.mdoc_line(arguments), glue=True)
        elif name == "Ns":
            self.glue = True
            self.words(self.mdoc_line(arguments))
        else:
            text = self.mdoc_line([name, *arguments])
            if text in _CLOSING_PUNCTUATION:
                self.glue = True
            self.words(text)

    def mdoc_line(self, words: list[str]) -> str:
        """Text of one mdoc line: macros among the words are called in their turn."""
        text, glue, prefix = "", True, ""
        for i, word in enumerate(words):
            following = words[i + 1 :]
            if word in _ENCLOSURES:
                tail = ""
                while following and following[-1] in _CLOSING_PUNCTUATION:
                    tail = following.pop() + tail
                pair = _ENCLOSURES[word]
                inner = pair[0] + self.mdoc_line(following)
                inner += ("" if word[-1] == "o" else pair[1]) + tail
                return text + ("" if glue else " ") + inner
            if word in _CLOSERS:
                text += _CLOSERS[word]
            elif word == "Ns":
                glue = True
            elif word == "Fl":
                prefix = "-"
                if not following or following[0] in _CLOSING_PUNCTUATION or following[0] in _FONTS:
                    text, glue, prefix = text + ("" if glue else " ") + "-", True, ""
            elif word == "Nm" and (not following or following[0] in _CLOSING_PUNCTUATION):
                text, glue = text + ("" if glue else " ") + self.name, False
            elif word == "Nm":
                self.name = self.name or following[0]
            elif word == "Xr" and len(following) > 1 and re.match(r"\d", following[1]):
                name, section = following[:2]
                done = f"{name}({section})" + self.mdoc_line(following[2:])
                return text + ("" if glue else " ") + done
            elif word == "Fn" and following:
                inner = ", ".join(a for a in following[1:] if a not in _CLOSING_PUNCTUATION)
                tail = "".join(a for a in following[1:] if a in _CLOSING_PUNCTUATION)
                return text + ("" if glue else " ") + f"{following[0]}({inner}){tail}"
            elif word == "In" and following:
                words[i + 1] = f"#include <{following[0]}>"
            elif word in _SYSTEMS:
                text, glue = text + ("" if glue else " ") + _SYSTEMS[word], False
            elif word in _FONTS:
                prefix = ""
            elif word in _CLOSING_PUNCTUATION:
                text, glue = text + word, False
            else:
                text += ("" if glue else " ") + prefix + word
                glue = word in ("(", "[")
        return text

    # ---- blocks

    def skip_until(self, end: str) -> None:
        for line in self.lines:
            if re.sub(r"^([.'])[ \t]+", r"\1", line).rstrip().split(" ")[0] == end:
                return

    def define(self, name: str, rest: str) -> None:
        words = rest.split()
        if name != "ig" and words:
            self.defined.add(words[0])
        end = "." + (words[1] if name != "ig" and len(words) > 1 else ".")
        self.skip_until(end if name != "ig" or not words else "." + words[0])

    def branch(self, name: str, rest: str) -> None:
        """.if, .ie, .el: the branches of a terminal (nroff) with groff are taken."""
        if name == "el":
            taken = not self.condition
        else:
            match = re.match(
                r"(!?)(?:([nteov])(?![\w'])|(\\n\(\.g|\\n\[\.g\])|(\S+))[ \t]*(.*)", rest
            )
            if not match:
                return
            taken = (match[2] in ("n", "o") or match[3] is not None) != bool(match[1])
            if match[4] is not None:
                taken = False  # Registers and comparisons: set by the preambles we skip.
            rest = match[5]
            if name == "ie":
                self.condition = taken
        if rest.startswith("\\{"):
            rest = rest[2:].lstrip().removeprefix("\\").lstrip()
            if not taken:
                self.skip_block(rest)
                return
        if taken and rest:
            self.line(rest)

    def skip_block(self, rest: str) -> None:
        depth = 1 + rest.count("\\{") - rest.count("\\}")
        while depth > 0:
            line = next(self.lines, None)
            if line is None:
                return
            depth += line.count("\\{") - line.count("\\}")
            if depth <= 0:
                self.after_branch(line.rpartition("\\}")[2])

    def after_branch(self, rest: str) -> None:
        if rest.strip().startswith("."):
            self.line(rest.strip())

    def table(self) -> None:
        """tbl: one line a row, cells two blanks apart; T{ blocks T} are filled."""
        separator, formats = "\t", True
        cells: list[str] = []
        block: list[str] | None = None
        for line in self.lines:
            if re.match(r"[.']\s*TE", line):
                break
            if formats:
                match = re.search(r"tab\s*\(?(.)\)?.*;", line)
                separator = match[1] if match else separator
                formats = not line.rstrip().endswith(".") or line.rstrip().endswith(";")
                continue
            if re.match(r"[.']\s*T&", line):
                formats = True
                continue
            if block is not None:
                if not line.startswith("T}"):
                    block.append(line)
                    continue
                inner = _Page("\n".join(block))
                inner.strings, inner.mdoc = self.strings, self.mdoc
                inner.run()
                cells.append(" ".join(inner.text().split()))
                block, line = None, line[2:].removeprefix(separator)
                if not line:
                    self.row(cells)
                    cells = []
                    continue
            elif re.match(r"[.'][ \t]*[A-Za-z\\]", line):
                continue
            fields = line.split(separator)
            if fields[-1].strip() == "T{":
                cells += [self.unescape(field) for field in fields[:-1]]
                block = []
            else:
                self.row(cells + [self.unescape(field) for field in fields])
                cells = []
        self.paragraph()

    def row(self, cells: list[str]) -> None:
        cells = [" ".join(cell.split()) for cell in cells]
        if not all(re.fullmatch(r"[_=\-]*", cell) for cell in cells):
            self.out.append("  ".join(cell for cell in cells if cell).strip())

    # ---- characters

    def arguments(self, rest: str) -> list[str]:
        """Splits a macro's arguments: "in quotes" is one, two quotes inside them are a quote."""
        rest = re.sub(r'(?<!\\)\\["#].*', "", rest)
        found = re.findall(r'"((?:[^"]|"")*)(?:"|$)|((?:\\ |\\.|[^\s\\]|\\$)+)', rest)
        return [
            self.unescape(quoted.replace('""', '"') if quoted else bare) for quoted, bare in found
        ]

    def unescape(self, text: str) -> str:
        return _ESCAPE.sub(self.escape, text) if "\\" in text else text

    def escape(self, match: re.Match[str]) -> str:
        group: Callable[[str], str | None] = match.groupdict().get
        one = group("one")
        if one is not None:
            return _ONE.get(one, one)
        name = next((v for v in (group("two"), group("long")) if v is not None), None)
        if name is not None:
            return _character(name)
        string = next((v for v in (group("sl"), group("st"), group("sc")) if v is not None), None)
        if string is not None:
            return self.strings.get(string.split(" ")[0], "")
        if group("over") is not None:
            return _character(group("over")) or (group("over") or "")[-1:]
        if group("code"):
            return chr(int(group("code") or 0))
        return ""


def _character(name: str | None) -> str:
    """The character of a glyph name: "co", "'e", "u00E9", "char233"; "" if unknown."""
    if not name:
        return ""
    if name in _CHARACTERS:
        return _CHARACTERS[name]
    if re.fullmatch(r"u[0-9A-F]{4,6}(_[0-9A-F]{4,6})*", name):
        return unicodedata.normalize("NFC", "".join(chr(int(c, 16)) for c in name[1:].split("_")))
    if re.fullmatch(r"char\d+", name):
        return chr(int(name[4:]))
    if len(name) == 2 and name[0] in _ACCENTS and name[1].isalpha():
        return unicodedata.normalize("NFC", name[1] + _ACCENTS[name[0]])
    return ""
