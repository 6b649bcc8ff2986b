"""The documentation is run: python blocks of the pages, and examples in docstrings.

The blocks of one page run in order, in one namespace, in a fresh process whose working directory
is empty. A block that is not to be run is fenced as `text` or `bash`.
"""

from __future__ import annotations

import json
import pathlib
import re

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *REPOSITORY.glob("*.md"),
        *(REPOSITORY / "lcl").rglob("*.md"),
        *(REPOSITORY / "configs").rglob("*.md"),
        *(REPOSITORY / "launch").rglob("*.md"),
    ]
)
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

RUN_BLOCKS = """
import json, sys, traceback
page, blocks = json.loads(sys.argv[1])
namespace = {"__name__": "__main__"}
for line, text in blocks:
    # Line numbers of the page, so that a traceback points into it.
    try:
        exec(compile("\\n" * line + text, page, "exec"), namespace)
    except BaseException:
        traceback.print_exc()
        sys.exit(f"{page}: the block at line {line} fails")
"""

# Doctests run in a process per group of modules: importing jax once is enough.
RUN_DOCTESTS = """
import doctest, importlib, json, sys
failed, run = [], 0
for name in json.loads(sys.argv[1]):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    run += result.attempted
    if result.failed:
        failed.append(name)
assert not failed, failed
print(run)
"""


def python_blocks(text: str) -> list[tuple[int, str]]:
    """(line before its first, text) of every python block of a page."""
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in FENCE.finditer(text)]


def test_blocks_are_found_with_their_lines():
    page = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny\n```\n"
    assert python_blocks(page) == [(2, "x = 1\n"), (8, "y\n")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_python_blocks_run(page, run_python):
    blocks = python_blocks(page.read_text())
    if blocks:
        run_python(RUN_BLOCKS, json.dumps([str(page.relative_to(REPOSITORY)), blocks]))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_docstring_examples_are_true(run_python):
    modules = []
    for path in sorted((REPOSITORY / "lcl").rglob("*.py")):
        if ">>> " in path.read_text():
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            modules.append(".".join(parts).removesuffix(".__init__"))
    assert int(run_python(RUN_DOCTESTS, json.dumps(modules)).split()[-1]) > 20
