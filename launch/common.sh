# What quickstart.sh and test.sh share: find a Python, make an environment, install lcl into it once.
# Sourced, not run; the caller has set -euo pipefail.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Transparent huge pages for malloc: 10-14% of a training step on a CPU, as a step's temporaries are
# fresh pages otherwise. Read by glibc (2.35 and later) when a process starts; others ignore it.
if [[ -z "${GLIBC_TUNABLES:-}" && ! -e /dev/accel0 && ! -e /dev/vfio/0 ]]; then
  export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
fi
# TensorFlow (through TFDS and SeqIO) greets at length otherwise.
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"

say() { printf '==> %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# version_of PYTHON: "3.11", or nothing where it does not run (a shim without a Python behind it).
version_of() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# at_least VERSION MINIMUM: both "3.x".
at_least() { [[ "${1%%.*}" -eq 3 && "${1#*.}" -ge "${2#*.}" ]]; }

# find_python MINIMUM: prints the first Python of at least that version; fails without a word.
# $PYTHON wins; python3 comes before the named ones; pyenv's are looked at last.
find_python() {
  local minimum="$1" candidate version
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13 python3.14 \
    "$HOME"/.pyenv/versions/3.12*/bin/python "$HOME"/.pyenv/versions/3.11*/bin/python; do
    version="$(version_of "$candidate")"
    if [[ -n "$version" ]] && at_least "$version" "$minimum"; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

# constraints_for VERSION: the exact package set tested for it; 3.12's is the one for all later.
constraints_for() {
  if [[ "$1" == 3.11 ]]; then echo launch/constraints-py311.txt; else echo launch/constraints-py312.txt; fi
}

# stamp VENV PYTHON_VERSION KIND: what an installation depends on, as one hash.
stamp() {
  cat "$ROOT/setup.py" "$ROOT/$(constraints_for "$2")" <(echo "$ROOT $2 $3") | sha256sum | cut -d' ' -f1
}

# make_venv VENV PYTHON: an empty environment, mending Debian's missing python3-venv where we may.
make_venv() {
  local venv="$1" python="$2" version
  version="$(version_of "$python")"
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [[ "$(id -u)" -eq 0 ]] && command -v apt-get >/dev/null; then
      say "python$version has no venv module: installing the package python$version-venv"
      apt-get update -qq && apt-get install -y -qq "python$version-venv" >/dev/null
    else
      die "python$version has no venv module; on Debian/Ubuntu: sudo apt-get install python$version-venv"
    fi
  fi
  rm -rf "$venv"
  "$python" -m venv "$venv"
}

# install VENV PYTHON KIND [PACKAGE...]: lcl (KIND runtime, or an extra such as dev) and PACKAGEs at
# their tested versions into VENV, unless that has been done. Idempotent.
install() {
  local venv="$ROOT/$1" python="$2" kind="$3" version constraints target begin
  shift 3
  version="$(version_of "$python")"
  constraints="$ROOT/$(constraints_for "$version")"
  local wanted="$venv/.lcl-$kind"
  if [[ -x "$venv/bin/python" ]] && "$venv/bin/python" -c '' 2>/dev/null; then
    if [[ -f "$wanted" && "$(cat "$wanted")" == "$(stamp "$venv" "$version" "$kind")" ]]; then
      say "${venv#"$ROOT"/} is up to date (Python $version)"
      return
    fi
  fi
  begin=$SECONDS
  if [[ ! -f "$venv/.lcl-root" || "$(cat "$venv/.lcl-root")" != "$ROOT $version" ]]; then
    say "making ${venv#"$ROOT"/} with $python (Python $version)"
    make_venv "$venv" "$python"
    echo "$ROOT $version" >"$venv/.lcl-root"
  fi
  rm -f "$wanted"
  target="$ROOT"
  if [[ "$kind" != runtime ]]; then target="$ROOT[$kind]"; fi
  say "installing lcl ($kind) at the versions of ${constraints#"$ROOT"/}; a few minutes at worst"
  local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -c "$constraints")
  # torch is for the tests' comparisons alone. It goes through pip, which knows where this machine
  # keeps its CPU build, if it keeps one; uv would fetch the CUDA build.
  if [[ "$kind" == dev ]]; then
    "${pip[@]}" torch
  fi
  # uv installs the same set several times as fast as pip; where it cannot, pip does.
  if ! { "${pip[@]}" uv &&
    VIRTUAL_ENV="$venv" "$venv/bin/uv" pip install --quiet -c "$constraints" -e "$target" "$@"; }; then
    say "uv could not; installing with pip"
    "${pip[@]}" -e "$target" "$@"
  fi
  stamp "$venv" "$version" "$kind" >"$wanted"
  # Who has the tools for development has all that running needs.
  if [[ "$kind" == dev ]]; then stamp "$venv" "$version" runtime >"$venv/.lcl-runtime"; fi
  say "installed in $((SECONDS - begin)) s"
}
