# shellcheck shell=bash
# Sourced by the other scripts: makes .venv once, installs the project into it, and activates it.
# Usage: source launch/setup.sh EXTRAS      comma-separated; "" for none (without it, bash would pass on
# the caller's own arguments). Example: `source launch/setup.sh test,wandb`
# PYTHON names the interpreter (3.11 to 3.13). JLRM_PACKAGES lists more packages to install, such as
# torch==2.13.0; those in JLRM_PACKAGES_ALONE are installed without their dependencies.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.12 python3.13 python3.11 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: there is no Python 3.11, 3.12 or 3.13 here. Install one, or set PYTHON to its path." >&2
  return 1
}

install_project() {
  local extras="$1" stamp wanted python
  stamp="$ROOT/.venv/.installed"
  wanted="$(cksum < "$ROOT/setup.py") extras=$extras packages=${JLRM_PACKAGES:-} alone=${JLRM_PACKAGES_ALONE:-}"
  if [ -f "$stamp" ] && grep -qxF "$wanted" "$stamp"; then
    return
  fi
  if [ ! -x "$ROOT/.venv/bin/python" ]; then
    python="$(find_python)" || return 1
    echo "Creating $ROOT/.venv with $("$python" --version)" >&2
    "$python" -m venv "$ROOT/.venv" || return 1
  fi
  echo "Installing jlrm${extras:+[$extras]} (some minutes, once)" >&2
  "$ROOT/.venv/bin/python" -m pip install --quiet --upgrade pip || return 1
  if [ -n "${JLRM_PACKAGES:-}" ]; then
    # Before the rest, so that nothing else decides their version.
    read -r -a packages <<< "$JLRM_PACKAGES"
    "$ROOT/.venv/bin/python" -m pip install --quiet "${packages[@]}" || return 1
  fi
  "$ROOT/.venv/bin/python" -m pip install --quiet -e "$ROOT${extras:+[$extras]}" || return 1
  if [ -n "${JLRM_PACKAGES_ALONE:-}" ]; then
    read -r -a packages <<< "$JLRM_PACKAGES_ALONE"
    "$ROOT/.venv/bin/python" -m pip install --quiet --no-deps "${packages[@]}" || return 1
  fi
  echo "$wanted" >> "$stamp"
}

install_project "$1" || exit 1
# shellcheck disable=SC1091
source "$ROOT/.venv/bin/activate"

# Say how to go on: the scripts activate .venv in a shell of their own.
advise() {
  echo "To run jlrm's commands in this shell: source $(printf '%q' "$ROOT/.venv/bin/activate")" >&2
}

# run_then_advise COMMAND...: run it, pass SIGTERM on to it, say how to go on, and exit with its code.
run_then_advise() {
  local child code=0 signalled=""
  env --default-signal=INT "$@" & # Ctrl-C reaches it too: it stays in the terminal's process group
  child=$!
  trap 'signalled=1; kill -TERM "$child" 2> /dev/null || true' TERM
  trap 'signalled=1' INT
  wait "$child" || code=$?
  while [ -n "$signalled" ]; do # a signal ends `wait`, not the command
    signalled=""
    code=0
    wait "$child" || code=$?
  done
  advise
  exit "$code"
}
