#!/usr/bin/env bash
# What happens on one host of a slice; launch/tpu_vm.sh calls it over ssh on every host.
#
#   bash launch/host.sh setup [EXTRAS]     Python 3.12 if need be, .venv, pip install -e '.[EXTRAS]' (tpu,gcs)
#   bash launch/host.sh start -- COMMAND   start it detached; `export NAME=VALUE` lines on stdin are its environment
#   bash launch/host.sh status             one line: none | running | exited CODE | lost, then the log's last line
#   bash launch/host.sh log [LINES]        the end of the log; `log follow` goes on
#   bash launch/host.sh stop [SECONDS]     SIGTERM, and SIGKILL after SECONDS (60)
#
# Any of these is safe to repeat. State lies in ~/.jlrm (JLRM_STATE): pid, exit, log, command, and
# `env` (mode 0600, gone as soon as the command has read it). --dry-run before the action prints it.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck disable=SC1091
source "$ROOT/launch/lib.sh"
STATE="${JLRM_STATE:-$HOME/.jlrm}"

setup() {
  local extras="${1:-tpu,gcs}" attempt
  check extras "$extras" '^[a-z0-9]+(,[a-z0-9]+)*$' "a comma-separated list such as tpu,gcs"
  # JAX on v5e and newer loads weights faster with transparent huge pages, and says so at each start.
  sudo -n sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled' 2> /dev/null || true
  if [ ! -x "$ROOT/.venv/bin/python" ] && [ -z "${PYTHON:-}" ] &&
    ! command -v python3.12 python3.13 python3.11 > /dev/null; then
    # TPU images carry Python 3.10, and those of Compute Engine perhaps no pip.
    python3 -m pip --version > /dev/null 2>&1 ||
      sudo -n sh -c 'apt-get -qq update && apt-get -qq install -y python3-pip' > /dev/null
    python3 -m pip install --quiet --user --upgrade uv
    python3 -m uv python install --quiet 3.12
    PYTHON="$(python3 -m uv python find 3.12)"
    export PYTHON
  fi
  for attempt in 1 2 3; do
    # In a shell of its own: setup.sh exits where it fails.
    if bash -c 'set -e; source "$1/launch/setup.sh" "$2"' setup "$ROOT" "$extras"; then
      return
    fi
    say "installing failed (attempt $attempt of 3)"
    sleep $((attempt * 5))
  done
  fail "jlrm could not be installed on this host."
}

# The command and what it started hold the lock (file 9), so a process id that is reused can't mislead.
# Asking takes it shared: two who ask at once don't take each other for the command.
is_running() { [ -e "$STATE/lock" ] && ! flock --shared --nonblock "$STATE/lock" true; }

start() {
  umask 077
  mkdir -p "$STATE"
  if is_running; then
    [ "$(cat "$STATE/command")" = "$(quote "$@")" ] || {
      say "another command is running: $(cat "$STATE/command")"
      exit 3
    }
    say "already running"
    cat > /dev/null
    return
  fi
  cat > "$STATE/env"
  quote "$@" > "$STATE/command"
  rm -f "$STATE/exit"
  exec 9> "$STATE/lock"
  flock 9
  nohup setsid bash "${BASH_SOURCE[0]}" _run "$@" >> "$STATE/log" 2>&1 < /dev/null &
  echo "$!" > "$STATE/pid"
}

_run() {
  local child code=0 signalled=""
  set -a
  # shellcheck disable=SC1091
  source "$STATE/env"
  set +a
  rm -f "$STATE/env"
  cd "$ROOT"
  if [ -f .venv/bin/activate ]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi
  printf -- '--- %(%F %T)T %s\n' -1 "$(quote "$@")"
  trap 'signalled=1; kill -TERM "$child" 2> /dev/null || true' TERM
  env --default-signal=INT "$@" &
  child=$!
  wait "$child" || code=$?
  while [ -n "$signalled" ]; do # a signal ends `wait`, not the command
    signalled=""
    code=0
    wait "$child" || code=$?
  done
  echo "$code" > "$STATE/exit.new"
  mv "$STATE/exit.new" "$STATE/exit"
}

status() {
  local last="" running=""
  # Asked before the exit code is looked for, which is written before the lock is let go: a command that
  # ends in between has its code, and isn't lost.
  if is_running; then running=1; fi
  if [ -f "$STATE/log" ]; then
    last="$(tail -c 2000 "$STATE/log" | tr '\r' '\n' | grep -v '^ *$' | tail -n 1 | cut -c -160 || true)"
  fi
  if [ -f "$STATE/exit" ]; then
    printf 'exited %s | %s\n' "$(cat "$STATE/exit")" "$last"
  elif [ -n "$running" ]; then
    printf 'running | %s\n' "$last"
  elif [ -f "$STATE/pid" ]; then
    printf 'lost | %s\n' "$last" # the host was restarted, or the command and its parent were killed
  else
    echo none
  fi
}

log() {
  mkdir -p "$STATE"
  touch "$STATE/log"
  if [ "${1:-}" = follow ]; then
    exec tail -n 50 -F "$STATE/log"
  fi
  tail -n "${1:-50}" "$STATE/log"
}

stop() {
  local grace="${1:-60}" pid waited=0
  is_running || return 0
  pid="$(cat "$STATE/pid")"
  kill -TERM "$pid" 2> /dev/null || true
  while is_running; do
    if ((waited++ >= grace * 5)); then
      kill -KILL -- "-$pid" 2> /dev/null || true
      echo 137 > "$STATE/exit"
      break
    fi
    sleep 0.2
  done
}

case "${1:-}" in
  -h | --help) usage "${BASH_SOURCE[0]}" && exit ;;
  --dry-run) shift && quote bash launch/host.sh "$@" && echo && exit ;;
esac
action="${1:-}"
[ $# -eq 0 ] || shift
case "$action" in
  setup | status | log | stop) "$action" "$@" ;;
  start | _run)
    if [ "${1:-}" = -- ]; then shift; fi
    [ $# -gt 0 ] || wrong "$action needs a command after --."
    "$action" "$@"
    ;;
  *) wrong "action=$(quote "$action") is not one of setup, start, status, log, stop. See --help." ;;
esac
