#!/usr/bin/env bash
# From a clone to a forgetting report: installs lcl into .venv, prepares three real corpora, trains a
# small model on one after the other, once without and once with 25% replay, and shows what each
# run learned and forgot. Run it again at any time: what is done is not done twice, and what was cut
# short goes on where it was.
#
#   ./launch/quickstart.sh
#
# PYTHON=/path/to/python3.12 chooses the interpreter.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"

python="$(find_python 3.11)" || die "no Python >= 3.11 found: install one (Debian 12, Ubuntu 24.04 \
and later: apt-get install python3 python3-venv), or name it: PYTHON=/path/to/python3.12 $0"
install .venv "$python" runtime
lcl=.venv/bin/lcl
begin=$SECONDS

# Two CPU cores train such a small model half as fast again as two devices than as two threads of
# one. The run is the same on any mesh, so this changes nothing but the time.
if [[ -z "${XLA_FLAGS:-}" && "$(nproc)" -ge 2 && ! -e /dev/accel0 && ! -e /dev/vfio/0 ]]; then
  export XLA_FLAGS=--xla_force_host_platform_device_count=2
fi

# English, then code, then French, from the distribution's packages where apt can be had; otherwise
# the corpora that lie in every Python: English documentation, then code.
corpora=(manpages-en python manpages-fr)
run=(--gin_file=configs/runs/quickstart.gin)
say "preparing ${corpora[*]} in data/byte"
if ! "$lcl" prepare "${corpora[@]}" --root data/byte; then
  corpora=(pydoc python)
  run+=(--gin_file=configs/data/always_there.gin)
  say "packages cannot be had here (see above): using the corpora that are always there, ${corpora[*]}"
  "$lcl" prepare "${corpora[@]}" --root data/byte
fi

say "training without replay: runs/quickstart"
"$lcl" train "${run[@]}" --run_dir=runs/quickstart
say "training with 25% replay: runs/quickstart_replay"
"$lcl" train "${run[@]}" --gin_file=configs/methods/replay.gin --run_dir=runs/quickstart_replay

say "what was learned and what was forgotten"
"$lcl" report runs/quickstart runs/quickstart_replay
say "quickstart done in $((SECONDS - begin)) s after the installation"
