#!/usr/bin/env bash
# What runs on every worker of a TPU slice; launch/tpu.py calls it over ssh, a GKE container directly.
#
#   worker.sh setup                  installs lcl for TPUs into .venv (again: nothing to do)
#   worker.sh run ARGS...            lcl train ARGS, started again whenever it leaves with code 75
#   worker.sh start NAME ARGS...     the same, detached from the ssh session; NAME goes on if it runs
#   worker.sh wait NAME              shows its log from here on; exits with its code when it has ended
#   worker.sh stop NAME              asks it to save and leave, and waits until it has
#
# Code 75 says "told to leave, and the state is saved" (EX_TEMPFAIL). On a pod all processes agree on
# the step at which they leave, so they also come back together. A SIGTERM to this script, which is
# how a machine that is taken away says so, is passed on, and nothing is started again.
#
# LCL=/path/to/lcl     which lcl (default: .venv/bin/lcl of this checkout, else the one on PATH)
# LCL_MAX_RESTARTS=N   how often `run` starts it again (default 100)
# LCL_STATE=DIR        logs and exit codes of `start` (default ~/.lcl-launch)
# LIBTPU_INIT_ARGS     goes to libtpu as it is; none are set here: `lcl compile` reports what the
#                      compiler's defaults give
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PREEMPTED=75
STATE="${LCL_STATE:-$HOME/.lcl-launch}"

# Without a TPU JAX would go on, quietly, on the CPU: let that be an error.
export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
# A TPU VM knows its neighbours from its metadata, not from variables; this tells lcl to ask.
# Several slices (MEGASCALE_*) are found the same way, by the runtime.
export LCL_POD="${LCL_POD:-1}"

lcl_program() {
  if [[ -n "${LCL:-}" ]]; then echo "$LCL"; return; fi
  if [[ -x "$ROOT/.venv/bin/lcl" ]]; then echo "$ROOT/.venv/bin/lcl"; return; fi
  command -v lcl || die "lcl is not installed on $(hostname): run $0 setup first"
}

setup() {
  local python
  python="$(find_python 3.11)" || die "no Python >= 3.11 on $(hostname): sudo apt-get install python3 python3-venv"
  install .venv "$python" tpu
  # Start and stop of the TPU runtime are minutes faster with huge pages (v5e and later).
  local pages=/sys/kernel/mm/transparent_hugepage/enabled
  if [[ -e /dev/accel0 || -e /dev/vfio/0 ]] && [[ -e $pages ]] && ! grep -q '\[always\]' $pages; then
    echo always | sudo tee $pages >/dev/null || say "could not turn on transparent huge pages"
  fi
}

# train ARGS...: one `lcl train`, over and over while it says 75; its last exit code.
train() {
  local program child code leaving=0 restarts=0
  program="$(lcl_program)"
  cd "$ROOT"
  while true; do
    "$program" train "$@" &
    child=$!
    trap 'leaving=1; kill -TERM "$child" 2>/dev/null || true' TERM INT
    # `wait` returns early when a signal comes; the child is still saving then.
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
      code=0
      wait "$child" || code=$?
    done
    if [[ $code -ne $PREEMPTED || $leaving -eq 1 ]]; then return "$code"; fi
    if [[ $restarts -ge ${LCL_MAX_RESTARTS:-100} ]]; then
      say "started again $restarts times already: leaving (LCL_MAX_RESTARTS)"
      return "$code"
    fi
    restarts=$((restarts + 1))
    say "saved and left with code $code: starting again ($restarts)"
  done
}

running() { [[ -f "$STATE/$1/pid" ]] && kill -0 "$(cat "$STATE/$1/pid")" 2>/dev/null; }

start() {
  local name="$1" folder="$STATE/$1"
  shift
  if running "$name"; then say "$name runs already on $(hostname)"; return; fi
  mkdir -p "$folder"
  rm -f "$folder/code" "$folder/pid"
  # A session of its own, so that the end of the ssh connection is not its end. It writes its pid
  # itself, from within that session: before it has, this connection must not end.
  setsid nohup "$0" _detached "$name" "$@" >>"$folder/log" 2>&1 </dev/null &
  for ((tries = 0; tries < 200; tries++)); do
    if [[ -f "$folder/pid" ]]; then break; fi
    sleep 0.05
  done
  [[ -f "$folder/pid" ]] || die "$name did not start on $(hostname); log: $folder/log"
  say "$name started on $(hostname); log: $folder/log"
}

detached() {
  local name="$1" code=0
  shift
  echo $$ >"$STATE/$name/pid.new"
  mv "$STATE/$name/pid.new" "$STATE/$name/pid"
  train "$@" || code=$?
  echo "$code" >"$STATE/$name/code"
  return "$code"
}

wait_for() {
  local folder="$STATE/$1" code tail_pid
  [[ -d "$folder" ]] || die "nothing called $1 was started on $(hostname)"
  tail -n 20 -F "$folder/log" 2>/dev/null &
  tail_pid=$!
  trap 'kill "$tail_pid" 2>/dev/null || true' EXIT
  while running "$1"; do sleep "${LCL_POLL:-5}"; done
  # No code was written: the process was killed, or the machine came up again without it.
  code=255
  if [[ -f "$folder/code" ]]; then code="$(cat "$folder/code")"; fi
  sleep 1 # the log's last lines
  say "$1 ended on $(hostname) with code $code"
  exit "$code"
}

stop() {
  if running "$1"; then
    kill -TERM "$(cat "$STATE/$1/pid")"
    say "asked $1 on $(hostname) to save and leave"
    while running "$1"; do sleep 1; done
  fi
  say "$1 does not run on $(hostname)"
}

command="${1:-}"
[[ $# -gt 0 ]] && shift
case "$command" in
  start | wait | stop) [[ "${1:-}" =~ ^[A-Za-z0-9_.-]+$ ]] || die "worker.sh $command needs a name of letters, digits, . _ - and got '${1:-}'" ;;
esac
case "$command" in
  setup) setup ;;
  run) train "$@" ;;
  start) start "$@" ;;
  _detached) detached "$@" ;;
  wait) wait_for "$1" ;;
  stop) stop "$1" ;;
  *) sed -n '2,20p' "$0" | sed 's/^# \{0,1\}//'; die "worker.sh needs one of setup, run, start, wait, stop; got '$command'" ;;
esac
