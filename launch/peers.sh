#!/usr/bin/env bash
# Make the Pythons of the libraries that jlrm is measured beside, once: some minutes, 2 GiB and more.
#
#   bash launch/peers.sh DIR [torch|jax]
#   bash launch/peers.sh .peers && python -m jlrm.bench --against hf,trl,tunix
#
# DIR/torch gets torch, transformers and trl, DIR/jax gets tunix, in the versions that stand below; a
# second word makes that one alone. If one can't be installed, the other is made all the same and the
# exit code is 1; the benchmark leaves out what is missing. PYTHON names the interpreter (3.11 to 3.13).
#
#   --dry-run  print the commands and run none
set -euo pipefail
# shellcheck disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# torch is installed before the rest, so that nothing else decides its version.
TORCH="torch==2.13.0"
declare -A PACKAGES=(
  [torch]="transformers==5.24.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0"
  [jax]="google-tunix==0.1.7 jax==0.10.2 flax==0.12.8 optax==0.2.8 transformers==5.12.1"
)

words=()
for word in "$@"; do
  case "$word" in
    -h | --help) usage "${BASH_SOURCE[0]}" && exit ;;
    --dry-run) DRY_RUN=1 ;;
    *) words+=("$word") ;;
  esac
done
[ ${#words[@]} -ge 1 ] || wrong "no DIR for the Pythons. See --help."
[ ${#words[@]} -le 2 ] || wrong "got $(quote "${words[@]:2}") after DIR and torch or jax. See --help."
check DIR "${words[0]}" '^[^-]' "the name of a folder; a flag is not known"
check LIBRARIES "${words[1]:-torch}" '^(torch|jax)$' "torch or jax"

# make NAME: a virtual environment with the packages of that name.
make() {
  local folder="${words[0]}/$1" packages
  say "making $folder"
  execute "${PYTHON:-python3}" -m venv "$folder" || return 1
  if [ "$1" = torch ]; then execute "$folder/bin/python" -m pip install --quiet "$TORCH" || return 1; fi
  read -r -a packages <<< "${PACKAGES[$1]}"
  execute "$folder/bin/python" -m pip install --quiet "${packages[@]}" || return 1
}

code=0
for name in ${words[1]:-torch jax}; do
  make "$name" || { say "warning: ${words[0]}/$name could not be made"; code=1; }
done
exit "$code"
