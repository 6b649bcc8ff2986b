#!/usr/bin/env bash
# Installs lcl with its tools into .venv and runs every test: lint and types are tests too. Where a
# Python >= 3.12 is found beside an older python3, the smoke tests also run there, with the newest
# JAX, in .venv-next.
#
#   ./launch/test.sh                     everything
#   ./launch/test.sh tests/data -k mix   what follows goes to pytest; then the smoke part is left out
#
# PYTHON and PYTHON_NEXT choose the interpreters; PYTHON_NEXT=none leaves the second one out.
# WORKERS says how many files are tested at a time (default: one a core, 8 at most).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"

python="$(find_python 3.11)" || die "no Python >= 3.11 found: install one (Debian 12, Ubuntu 24.04 \
and later: apt-get install python3 python3-venv), or name it: PYTHON=/path/to/python3.12 $0"
install .venv "$python" dev
version="$(version_of "$python")"

# A compiled step is kept between runs of the tests; a step's temporaries come from huge pages.
# A file's tests stay together, since they share what they build; WORKERS=0 runs all in one process.
cores="$(nproc 2>/dev/null || echo 2)"
workers="${WORKERS:-$((cores < 8 ? cores : 8))}"
say "running the tests with Python $version, $workers files at a time"
.venv/bin/python -m pytest -n "$workers" --dist loadfile "${@:-tests}"
ran="Python $version: $([[ $# -eq 0 ]] && echo all || echo the chosen) tests passed"

next=""
if [[ $# -eq 0 && "${PYTHON_NEXT:-}" != none ]] && ! at_least "$version" 3.12; then
  next="$(PYTHON="${PYTHON_NEXT:-}" find_python 3.12)" || next=""
fi
if [[ -n "$next" ]]; then
  install .venv-next "$next" runtime pytest hypothesis
  say "running the smoke tests with Python $(version_of "$next")"
  .venv-next/bin/python -m pytest -m smoke tests
  ran+="; Python $(version_of "$next"): smoke tests passed"
fi
say "$ran"
