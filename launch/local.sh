#!/usr/bin/env bash
# Run one command as several processes on this machine, as if each were a host of a slice.
#
#   bash launch/local.sh NUM_PROCESSES [DEVICES_PER_PROCESS] [flags] -- COMMAND...
#   bash launch/local.sh 2 4 -- python -m jlrm.train --config configs/quickstart.yaml run.dir=runs/two
#
# Every process sees JLRM_COORDINATOR=127.0.0.1:PORT, JLRM_NUM_PROCESSES, JLRM_PROCESS_ID,
# JAX_NUM_CPU_DEVICES (1) and JAX_PLATFORMS (cpu, unless set already). Lines are prefixed by [PROCESS].
# When one fails the others are ended, and the exit code is that of the first to fail. Ctrl-C and
# SIGTERM go to all of them; a second Ctrl-C kills.
#
#   --port PORT      of the coordinator (any that is free)
#   --grace SECONDS  from SIGTERM to SIGKILL once one has failed (3); after Ctrl-C or SIGTERM 20 times as long
#   --dry-run        print the commands and run none
set -euo pipefail
# shellcheck disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

count="" devices="" port="" grace=3
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage "${BASH_SOURCE[0]}" && exit ;;
    --dry-run) DRY_RUN=1 && shift ;;
    --port) port="$(value "$1" "$@")"; shift 2 ;;
    --grace) grace="$(value "$1" "$@")"; shift 2 ;;
    --) shift && break ;;
    *)
      if [ -z "$count" ]; then
        count="$1"
      elif [ -z "$devices" ]; then
        devices="$1"
      else
        wrong "got $(quote "$1"); a command stands after --. See --help."
      fi
      shift
      ;;
  esac
done
devices="${devices:-1}"
check_positive NUM_PROCESSES "$count"
check_positive DEVICES_PER_PROCESS "$devices"
check_number --grace "$grace"
[ $# -gt 0 ] || wrong "no command. Give one after --, such as: -- python -m jlrm.train --config FILE"

is_taken() { (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; }
if [ -z "$port" ]; then
  port=$((20000 + RANDOM % 12000))
  while is_taken "$port"; do port=$((20000 + RANDOM % 12000)); done
fi
check_positive --port "$port"

prefix() {
  local line
  while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$1" "$line"; done
}

# Each process has a supervisor, which says in $scratch/ended how it ended: in the right order, and without
# the races of bash's own `wait -n`.
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
readers=() supervisors=() code=0 signal=0 killer=""

signal_all() {
  local file pid
  for file in "$scratch"/*.pid; do
    if pid="$(cat "$file" 2> /dev/null)" && [ -n "$pid" ]; then kill "-$1" -- "-$pid" 2> /dev/null || true; fi
  done
}
# end_all SIGNAL SECONDS: send it now, and SIGKILL after SECONDS to whatever is left.
end_all() {
  signal_all "$1"
  if [ -n "$killer" ]; then return; fi
  (
    sleep "$2"
    signal_all KILL
  ) < /dev/null > /dev/null 2>&1 3>&- &
  killer=$!
}
# shellcheck disable=SC2329  # called by traps
interrupted() {
  if ((signal)); then signal_all KILL; fi
  if ((code == 0)); then code=$((128 + $2)); fi
  signal="$2"
  end_all "$1" $((grace * 20))
}
# shellcheck disable=SC2016  # for the shell that becomes the command
supervise() {
  local status=0
  # A session of its own: a terminal's Ctrl-C comes to this script alone, which passes it on.
  setsid bash -c 'echo "$$" > "$0"; exec "$@"' "$scratch/$1.pid" "${@:2}" > "$scratch/$1" 2>&1 < /dev/null 3>&- ||
    status=$?
  echo "$1 $status" >&3
}

if [ -z "$DRY_RUN" ]; then
  mkfifo "$scratch/ended"
  exec 3<> "$scratch/ended"
  trap 'interrupted INT 2' INT
  trap 'interrupted TERM 15' TERM
fi
for ((index = 0; index < count; index++)); do
  # A shell without job control starts its children with Ctrl-C ignored.
  command=(env --default-signal=INT "JLRM_COORDINATOR=127.0.0.1:$port" "JLRM_NUM_PROCESSES=$count"
    "JLRM_PROCESS_ID=$index" "JAX_NUM_CPU_DEVICES=$devices" "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" "$@")
  if [ -n "$DRY_RUN" ]; then
    execute "${command[@]}"
    continue
  fi
  mkfifo "$scratch/$index"
  (
    trap '' INT TERM
    prefix "$index"
  ) < "$scratch/$index" 3>&- &
  readers+=($!)
  supervise "$index" "${command[@]}" 2> /dev/null & # bash would say Terminated
  supervisors+=($!)
done
if [ -n "$DRY_RUN" ]; then exit; fi

running="$count"
while ((running)); do
  # The time limit lets a trap run while no process ends.
  read -r -t 0.5 index status <&3 || continue
  ((--running)) || true
  if ((status && code == 0)); then
    code=$status
    say "process $index ended with exit code $status; ending the others"
    end_all TERM "$grace"
  fi
done
signal_all KILL # what a process left behind in its group
[ -z "$killer" ] || kill "$killer" 2> /dev/null || true
wait "${supervisors[@]}" "${readers[@]}" || true
exit "$code"
