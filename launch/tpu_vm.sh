#!/usr/bin/env bash
# Run jlrm on TPU VMs of Google Cloud: one slice or several, all hosts, with restarts after preemption.
#
#   bash launch/tpu_vm.sh ACTION --name NAME --zone ZONE --type TYPE [flags] [-- COMMAND...]
#   bash launch/tpu_vm.sh up --name judge --zone us-east5-b --type v6e-16 --spot -- \
#       python -m jlrm.train --config configs/judgelrm_7b.yaml run.dir=gs://BUCKET/judge
#
# Actions (give each the same --name, --zone, --type and --slices):
#   create   ask for the slice (a queued resource; with --gce a group of VMs), and return
#   setup    copy this checkout to ~/jlrm on all hosts and install it there; may be repeated
#   run      start COMMAND on all hosts, detached; the same command again changes nothing
#   attach   wait until it ends, and exit with its exit code
#   logs     the end of the log (--host SLICE/WORKER, --follow)
#   status   the slice's state and, for each host, the job's
#   stop     SIGTERM on all hosts (jlrm saves and exits 143), then SIGKILL
#   delete   stop paying
#   down     the same, and delete every node that bears NAME and is left; says when nothing is (no --type)
#   up       look whether the command can run (checkout, config, bucket), create, wait, setup, run, attach, save the logs (runs/launch/NAME), delete. A preempted or
#            lost slice is made again, and the command is run again: jlrm goes on by itself from
#            run.dir, which must be on gs:// for that.
#
# TYPE           chips                      hosts               runtime version
#   v5litepod-N  N: 1 4 8 16 32 64 128 256  1 up to 8, then N/4  v2-alpha-tpuv5-lite  (or v5e-N)
#   v6e-N        N: 1 4 8 16 32 64 128 256  1 up to 8, then N/4  v2-alpha-tpuv6e
#   v5p-N        N/2: N counts TensorCores  N/8                  v2-alpha-tpuv5
#   v4-N         N/2: N counts TensorCores  N/8                  tpu-ubuntu2204-base
# With --gce:
#   v6e-N        N: 1 4 8 16 32 64 128 256  1 up to 4, then N/4  ct6e-standard-1t, ct6e-standard-4t
#   v5p-N        N/2: 8 16 32 64 ... 1024   N/8                  ct5p-hightpu-4t
#   tpu7x-N      N/2: 8 16 32 64 ... 1024   N/8                  tpu7x-standard-4t: two devices a chip
#
#   --gce                  Compute Engine's VMs, which Google advises, in place of the Cloud TPU API, which gets
#                          no new TPUs (give it to each action, with --project). One slice; it waits for
#                          capacity in a group (MIG). Needs gcloud 567 or newer (gcloud components update).
#
#   --project P            gcloud's own setting otherwise
#   --slices N             several slices (multislice), named NAME-0, NAME-1, ...
#   --spot | --reserved | --flex DURATION (flex-start, such as 4h, gcloud alpha; v5e and v6e; any with --gce); on demand
#                          otherwise
#   --valid-until DURATION give up waiting for capacity after that, such as 6h
#   --runtime VERSION      in place of the table's; with --gce a family of images
#   --create-flag=FLAG     one more flag for `queued-resources create` (`instance-templates create`), such as
#                          --create-flag=--network=x
#   --ssh-flag=FLAG        one more flag for `tpu-vm ssh` (`compute ssh`), such as --ssh-flag=--internal-ip
#   --git URL --commit SHA clone that in place of copying this checkout (what git sees of it: tracked
#                          and new files, not ignored ones)
#   --extras LIST          pip extras (tpu,gcs)
#   --env NAME             pass this variable too (HF_TOKEN and WANDB_API_KEY are passed where set).
#                          Values go over ssh's stdin into a file of mode 0600: never into argv or a log.
#   --max-restarts N       of `up`, for whatever reason (20)
#   --poll SECONDS         between looks at the slice and its hosts (30)
#   --keep                 `up` does not delete the slice at its end
#   --lifetime DURATION    the slice is deleted that long after its first command began, by its first
#                          host if nobody watches (7d; 0: never), which the VM's service account must be
#                          allowed to. With --gce Google deletes each VM, that long after it began.
#                          What was not saved by then is lost.
#   --dry-run              print every gcloud command, run none
#
# Exit codes of attach and up: 0 done; 2 wrong input, never retried; 1 or another for a command that
# failed. 143, other signals, a lost host and preemption are retried by `up`.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck disable=SC1091
source "$ROOT/launch/lib.sh"

ACTION="" NAME="" ZONE="" TYPE="" PROJECT="" RUNTIME="" SLICES=1 TIER=demand FLEX="" VALID_UNTIL=""
LIFETIME=7d LEFT_BEHIND="" GCE="" SELF=tpu_vm.sh REASON=""
GIT_URL="" COMMIT="" EXTRAS=tpu,gcs MAX_RESTARTS=20 POLL=30 KEEP="" HOST=0/0 FOLLOW=""
SECRETS=(HF_TOKEN WANDB_API_KEY) CREATE_FLAGS=() SSH_FLAGS=() COMMAND=()
RETRY=200   # our own code for: start again
PARALLEL=16 # ssh sessions at a time
PATIENCE=4  # polls for which a host may be out of reach

parse() {
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) usage "${BASH_SOURCE[0]}" && exit ;;
      --name) NAME="$(value "$1" "$@")"; shift 2 ;;
      --zone) ZONE="$(value "$1" "$@")"; shift 2 ;;
      --type) TYPE="$(value "$1" "$@")"; shift 2 ;;
      --project) PROJECT="$(value "$1" "$@")"; shift 2 ;;
      --slices) SLICES="$(value "$1" "$@")"; shift 2 ;;
      --spot | --reserved) set_tier "${1#--}"; shift ;;
      --flex) FLEX="$(value "$1" "$@")"; set_tier flex; shift 2 ;;
      --valid-until) VALID_UNTIL="$(value "$1" "$@")"; shift 2 ;;
      --runtime) RUNTIME="$(value "$1" "$@")"; shift 2 ;;
      --create-flag=*) CREATE_FLAGS+=("${1#*=}") && shift ;;
      --ssh-flag=*) SSH_FLAGS+=("${1#*=}") && shift ;;
      --git) GIT_URL="$(value "$1" "$@")"; shift 2 ;;
      --commit) COMMIT="$(value "$1" "$@")"; shift 2 ;;
      --extras) EXTRAS="$(value "$1" "$@")"; shift 2 ;;
      --env) SECRETS+=("$(value "$1" "$@")"); shift 2 ;;
      --max-restarts) MAX_RESTARTS="$(value "$1" "$@")"; shift 2 ;;
      --poll) POLL="$(value "$1" "$@")"; shift 2 ;;
      --lifetime) LIFETIME="$(value "$1" "$@")"; shift 2 ;;
      --host) HOST="$(value "$1" "$@")"; shift 2 ;;
      --gce) GCE=1 SELF="tpu_vm.sh --gce" && shift ;;
      --keep) KEEP=1 && shift ;;
      --follow) FOLLOW=1 && shift ;;
      --dry-run) DRY_RUN=1 && shift ;;
      --) shift && COMMAND=("$@") && return ;;
      -*) wrong "no such flag: $(quote "$1"). See --help." ;;
      *)
        [ -z "$ACTION" ] || wrong "got $(quote "$1") after $ACTION; the command stands after --. See --help."
        ACTION="$1" && shift
        ;;
    esac
  done
}

set_tier() {
  [ "$TIER" = demand ] || wrong "--$TIER and --$1 exclude each other."
  TIER="$1"
}

# read_type: check TYPE and set RUNTIME, NUM_HOSTS (of a slice).
read_type() {
  local size="${TYPE##*-}" runtime
  case "$TYPE" in
    tpu7x*) wrong "--type=$TYPE is not offered by the Cloud TPU API; take --gce, launch/gke_jobset.sh or launch/gke_xpk.sh." ;;
    v5e-*) TYPE="v5litepod-$size" ;;
  esac
  check --type "$TYPE" '^(v5litepod|v6e|v5p|v4)-[1-9][0-9]*$' "one of v5litepod-N (v5e-N), v6e-N, v5p-N, v4-N"
  case "$TYPE" in
    v5litepod-* | v6e-*)
      check --type "$TYPE" '-(1|4|8|16|32|64|128|256)$' "a slice: chips are 1, 4, 8, 16, 32, 64, 128 or 256"
      NUM_HOSTS=$((size <= 8 ? 1 : size / 4))
      ;;
    *)
      ((size % 8 == 0)) || wrong "--type=$TYPE: N counts TensorCores, 2 a chip, 8 a host; $size is no multiple of 8."
      NUM_HOSTS=$((size / 8))
      ;;
  esac
  case "$TYPE" in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v4-*) runtime=tpu-ubuntu2204-base ;;
  esac
  RUNTIME="${RUNTIME:-$runtime}"
}

validate() {
  local name
  check_name --name "$NAME"
  check_zone --zone "$ZONE"
  [ -z "$PROJECT" ] || check_project --project "$PROJECT"
  if [ -n "$GCE" ]; then
    # shellcheck source=SCRIPTDIR/gce.sh
    source "$ROOT/launch/gce.sh"
    check_choices
  fi
  check_positive --slices "$SLICES"
  check_number --max-restarts "$MAX_RESTARTS"
  check --poll "$POLL" '^[0-9]+(\.[0-9]+)?$' "a number of seconds"
  check --lifetime "$LIFETIME" '^(0|[1-9][0-9]*[smhd])$' "a duration such as 12h, or 0"
  if [ "$ACTION" = down ]; then TYPE="${TYPE:-v6e-1}"; fi # of any type
  read_type
  check --runtime "$RUNTIME" '^[a-z0-9][a-z0-9.-]*$' "a runtime version"
  check --extras "$EXTRAS" '^[a-z0-9]+(,[a-z0-9]+)*$' "a comma-separated list such as tpu,gcs"
  [ -z "$FLEX" ] || check --flex "$FLEX" '^[1-9][0-9]*[smhd]$' "a duration such as 4h"
  [ -z "$VALID_UNTIL" ] || check --valid-until "$VALID_UNTIL" '^[1-9][0-9]*[smhd]$' "a duration such as 6h"
  if [ "$TIER" = flex ] && [ -z "$GCE" ] && [[ "$TYPE" != v5litepod-* && "$TYPE" != v6e-* ]]; then
    wrong "--flex is offered for v5e and v6e, not for $TYPE."
  fi
  for name in "${SECRETS[@]}"; do
    check --env "$name" '^[A-Za-z_][A-Za-z0-9_]*$' "the name of a variable (its value is taken from the environment)"
  done
  if [ -n "$GIT_URL$COMMIT" ]; then
    check --commit "$COMMIT" '^[0-9a-f]{7,40}$' "a commit (7 to 40 hex digits), which --git needs"
    check --git "$GIT_URL" '^[A-Za-z]' "a url"
    [[ ! "$GIT_URL" =~ ^https?://[^/]*@ ]] || wrong "--git must not hold a token: it would stand in process lists."
  fi
  check --host "$HOST" '^[0-9]+/[0-9]+$' "SLICE/WORKER such as 0/3"
  WHERE=(--zone="$ZONE" --quiet)
  [ -z "$PROJECT" ] || WHERE+=(--project="$PROJECT")
}

# list_hosts: NODES[i] and WORKERS[i] are the TPU's name and the worker's number of host i.
list_hosts() {
  local slice worker node
  for ((slice = 0; slice < SLICES; slice++)); do
    node="$NAME"
    if ((SLICES > 1)); then node="$NAME-$slice"; fi
    for ((worker = 0; worker < NUM_HOSTS; worker++)); do
      NODES+=("$node")
      WORKERS+=("$worker")
    done
  done
}
host() { printf '%s, worker %s' "${NODES[$1]}" "${WORKERS[$1]}"; }
find_hosts() { :; } # the names are ours

# check_gcloud: nothing works without it.
check_gcloud() {
  [ -n "$DRY_RUN" ] || command -v gcloud > /dev/null ||
    wrong "gcloud is not installed here. See https://cloud.google.com/sdk/docs/install, then: gcloud auth login."
}

# check_source: find before anything is paid for what would end the command on every host.
check_source() {
  local config
  if [ -n "$GIT_URL" ]; then return; fi
  git -C "$ROOT" rev-parse --git-dir > /dev/null 2>&1 ||
    wrong "$ROOT is not a git checkout; use --git URL --commit SHA."
  config="$(config_of "${COMMAND[@]}")"
  if [ -n "$config" ] && [[ "$config" != /* ]] &&
    [ -z "$(git -C "$ROOT" ls-files --cached --others --exclude-standard -- "$config")" ]; then
    wrong "--config $(quote "$config") is not in $ROOT, or git ignores it: no host would have it."
  fi
}

# check_bucket RUN_DIR: a bucket that is not there would end the command after minutes of set-up.
check_bucket() {
  local bucket="${1#gs://}"
  bucket="gs://${bucket%%/*}"
  if [ -n "$DRY_RUN" ] || gcloud storage ls "$bucket" "${WHERE[@]:1}" > /dev/null 2> "$SCRATCH/error"; then return; fi
  if grep -qiE '404|not found' "$SCRATCH/error"; then
    wrong "run.dir=$1: there is no bucket $bucket. Make it: gcloud storage buckets create $bucket --location=${ZONE%-*}"
  fi
  say "warning: $bucket can't be looked at from here: $(tail -n 1 "$SCRATCH/error")"
}

check_run_dir() {
  local run_dir
  run_dir="$(setting run.dir "${COMMAND[@]}")"
  HAS_BUCKET=""
  if [[ "$run_dir" == gs://* ]]; then
    HAS_BUCKET=1
    check_bucket "$run_dir"
  elif [ "$TIER" = spot ] || ((${#NODES[@]} > 1)); then
    say "warning: run.dir=${run_dir:-(not given)} is local to each host: what a preempted or deleted slice" \
      "had saved is lost, and hosts can't share a checkpoint. Use run.dir=gs://BUCKET/NAME."
  fi
}

# --- one host, all hosts -------------------------------------------------------------------------

# remote INDEX WORDS: run a shell command on one host; its stdin is ours.
remote() {
  execute gcloud compute tpus tpu-vm ssh "${NODES[$1]}" --worker="${WORKERS[$1]}" "${WHERE[@]}" \
    "${SSH_FLAGS[@]}" --command="$2"
}

# attempt INDEX WORDS STDIN TRIES: leave output and exit code in $SCRATCH; 255 is ssh's own failure.
attempt() {
  local try code=255
  for ((try = 1; try <= $4 && code == 255; try++)); do
    ((try == 1)) || sleep "$POLL"
    code=0
    remote "$1" "$2" < "$3" > "$SCRATCH/$1.out" 2> "$SCRATCH/$1.err" || code=$?
  done
  echo "$code" > "$SCRATCH/$1.code"
}

# everywhere WORDS [STDIN] [TRIES]: on all hosts at once; CODES[i] are the exit codes.
everywhere() {
  local index
  for index in "${!NODES[@]}"; do
    if [ -n "$DRY_RUN" ]; then
      remote "$index" "$1"
      CODES[index]=0
      continue
    fi
    attempt "$index" "$1" "${2:-/dev/null}" "${3:-3}" &
    (((index + 1) % PARALLEL)) || wait
  done
  wait
  if [ -n "$DRY_RUN" ]; then return; fi
  for index in "${!NODES[@]}"; do CODES[index]="$(cat "$SCRATCH/$index.code")"; done
}

# reach: wait for ssh. One gcloud alone makes the ssh key here: sixteen at once would all try to.
reach() {
  if [ -z "$DRY_RUN" ]; then attempt 0 true /dev/null 3; fi
}

# blame WHAT: name the hosts on which the last `everywhere` failed; true if there are none.
blame() {
  local index blamed=""
  for index in "${!NODES[@]}"; do
    if ((CODES[index] == 0)); then continue; fi
    blamed=1
    say "$1 failed on host $(host "$index") (exit code ${CODES[index]}):"
    tail -n 8 "$SCRATCH/$index.out" "$SCRATCH/$index.err" 2> /dev/null | grep -v '^$' | grep -v '^==>' >&2 || true
  done
  [ -z "$blamed" ]
}
is_out_of_reach() {
  local code
  for code in "${CODES[@]}"; do
    if ((code == 255)); then return 0; fi
  done
  return 1
}

# --- the slice -----------------------------------------------------------------------------------

create() {
  local track=(gcloud) node=(--node-id="$NAME") tier=()
  if ((SLICES > 1)); then node=(--node-count="$SLICES" --node-prefix="$NAME"); fi
  case "$TIER" in
    spot | reserved) tier=(--"$TIER") ;;
    flex) track=(gcloud alpha) tier=(--provisioning-model=flex-start --max-run-duration="$FLEX") ;;
  esac
  if [ -n "$VALID_UNTIL" ]; then tier+=(--valid-until-duration="$VALID_UNTIL"); fi
  interruptible "$SCRATCH/error" execute "${track[@]}" compute tpus queued-resources create "$NAME" "${WHERE[@]}" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${node[@]}" "${tier[@]}" "${CREATE_FLAGS[@]}" || {
    LEFT_BEHIND=""
    explain "$SCRATCH/error"
  }
  say "asked for $TYPE x $SLICES ($TIER) in $ZONE as $NAME"
}

what_exists() {
  printf 'What exists: gcloud compute tpus locations list, %s; the TPU API' \
    "gcloud compute tpus accelerator-types list --zone=$ZONE"
}

# explain FILE: what gcloud said and what may be done about it; the script ends.
explain() {
  local about="$TYPE ($TIER) in zone $ZONE"
  cat "$1" >&2
  if grep -qiE 'quota|EXHAUSTED' "$1"; then
    fail "no quota or capacity for $about. Spot, reserved and on-demand chips have quotas of their own, each per zone:" \
      "look at IAM & Admin > Quotas, try another tier or zone, or ask for more."
  elif grep -qiE 'ALREADY_?EXISTS|already exists' "$1"; then
    fail "$NAME exists in $ZONE. See: $SELF status; or: $SELF down."
  elif grep -qiE 'unrecognized arguments|Invalid choice' "$1"; then
    fail "this gcloud does not know that flag. Bring it up to date: gcloud components update."
  elif grep -qiE 'PERMISSION_DENIED|NOT_FOUND|INVALID_ARGUMENT|location|zone|accelerator' "$1"; then
    fail "$about was refused. $(what_exists) must be on in this project."
  fi
  fail "gcloud refused $about."
}

# get_state: set STATE to the queued resource's, ABSENT, or UNKNOWN (gcloud did not answer).
get_state() {
  STATE=UNKNOWN
  if interruptible "$SCRATCH/error" gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
    --format='value(state.state)' > "$SCRATCH/state"; then
    STATE="$(cat "$SCRATCH/state")"
  elif grep -qiE 'NOT_FOUND|was not found' "$SCRATCH/error"; then
    STATE=ABSENT
  fi
}
is_gone() { [[ "$STATE" =~ ^(SUSPENDING|SUSPENDED|FAILED|ABSENT|LOST)$ ]]; }
tell_reason() { :; } # the state does
print_state() {
  execute gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format="${1:-yaml(state)}"
}

delete() {
  interruptible "" execute gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force || return
  LEFT_BEHIND=""
}

# down: delete the queued resource, wait until it is gone, and delete what nodes of its are left.
down() {
  local node nodes
  if [ -n "$DRY_RUN" ]; then
    delete
    return
  fi
  get_state
  [ "$STATE" != UNKNOWN ] || explain "$SCRATCH/error"
  if [ "$STATE" != ABSENT ]; then delete || fail "$NAME could not be deleted; it is $STATE."; fi
  while [ "$STATE" != ABSENT ]; do
    sleep "$POLL"
    get_state
    [ "$STATE" != UNKNOWN ] || explain "$SCRATCH/error"
  done
  nodes="$(gcloud compute tpus tpu-vm list "${WHERE[@]}" --format='value(name)' 2> "$SCRATCH/error")" ||
    explain "$SCRATCH/error"
  for node in $nodes; do
    node="${node##*/}"
    if [ "$node" = "$NAME" ] || [[ "$node" =~ ^"$NAME"-[0-9]+$ ]]; then
      say "node $node is left"
      gcloud compute tpus tpu-vm delete "$node" "${WHERE[@]}" || fail "node $node could not be deleted."
    fi
  done
  say "nothing named $NAME is left in $ZONE of the Cloud TPU API (of Compute Engine: tpu_vm.sh --gce down)"
}

# settle: poll while the slice is on its way, until ACTIVE, SUSPENDED, FAILED or ABSENT.
settle() {
  local before="" silent=0
  while :; do
    get_state
    if [ "$STATE" != "$before" ]; then say "$NAME is $STATE"; fi
    before="$STATE"
    case "$STATE" in
      ACTIVE | SUSPENDED | FAILED | ABSENT | LOST) return ;;
      UNKNOWN) ((++silent <= PATIENCE)) || explain "$SCRATCH/error" ;;
      *) silent=0 ;;
    esac
    tell_reason
    sleep "$POLL"
  done
}

# acquire: see to it that there is an active slice; a preempted one is made again. Ends the script if
# it is refused.
acquire() {
  if [ -n "$DRY_RUN" ]; then
    create
    print_state 'value(state.state)'
    return
  fi
  settle
  case "$STATE" in
    ACTIVE)
      LEFT_BEHIND=1
      return
      ;;
    SUSPENDED | FAILED | LOST) delete || fail "$NAME ($STATE) could not be deleted." ;;
  esac
  LEFT_BEHIND=1 # before it is there: a signal may come while it is made
  create
  settle
  case "$STATE" in
    ACTIVE) ;;
    SUSPENDED | LOST) return "$RETRY" ;;
    *)
      print_state > "$SCRATCH/error" 2>&1 || true
      explain "$SCRATCH/error"
      ;;
  esac
}

# --- the job -------------------------------------------------------------------------------------

setup() {
  local code=0 install archive="$SCRATCH/source.tgz"
  reach
  install="bash jlrm/launch/host.sh setup $EXTRAS"
  if [ -n "$GIT_URL" ]; then
    everywhere "{ test -d jlrm/.git || git clone --no-checkout $(quote "$GIT_URL") jlrm; } && \
git -C jlrm fetch origin && git -C jlrm checkout --force --detach $COMMIT && $install"
  else
    if [ -n "$DRY_RUN" ]; then
      echo "# on stdin: a .tgz of $(quote "$ROOT"), as git sees it"
    else
      git -C "$ROOT" ls-files -z --cached --others --exclude-standard |
        tar -C "$ROOT" --null --files-from=- --ignore-failed-read -czf "$archive" 2> /dev/null ||
        fail "$ROOT could not be packed."
    fi
    everywhere "mkdir -p jlrm && tar -xzf - -C jlrm && $install" "$archive"
  fi
  blame setup || code=1
  if ((code)) && is_out_of_reach; then code=$RETRY; fi
  return "$code"
}

# ask_jobs [TRIES]: JOBS[i] is running, exited CODE, lost, none or unreachable; LAST[i] the log's
# last line.
ask_jobs() {
  local index line
  everywhere "test ! -f jlrm/launch/host.sh && echo none || bash jlrm/launch/host.sh status" /dev/null "${1:-1}"
  for index in "${!NODES[@]}"; do
    JOBS[index]=unreachable LAST[index]=""
    if ((CODES[index] == 0)); then
      line="$(head -n 1 "$SCRATCH/$index.out")"
      JOBS[index]="${line%% |*}"
      if [[ "$line" == *" | "* ]]; then LAST[index]="${line#* | }"; fi
    fi
  done
}
count_jobs() { # count_jobs REGEX
  local job count=0
  for job in "${JOBS[@]}"; do
    if [[ "$job" =~ $1 ]]; then ((++count)); fi
  done
  echo "$count"
}

stop() { everywhere "test ! -f jlrm/launch/host.sh || bash jlrm/launch/host.sh stop ${1:-60}" /dev/null 1; }

# run: start the command everywhere, or find it running.
run() {
  local code=0 name environment="$SCRATCH/env" names=()
  for name in "${SECRETS[@]}"; do
    if [ -n "${!name:-}" ]; then
      names+=("$name")
      [ -n "$DRY_RUN" ] || printf 'export %s=%q\n' "$name" "${!name}" >> "$environment.new"
    fi
  done
  if [ -n "$DRY_RUN" ]; then
    echo "# on stdin: ${names[*]:-nothing}"
  else
    touch "$environment.new"
    mv "$environment.new" "$environment"
  fi
  everywhere "bash jlrm/launch/host.sh start -- $(quote "${COMMAND[@]}")" "$environment"
  rm -f "$environment"
  if [[ " ${CODES[*]} " == *" 3 "* ]]; then
    blame start || true
    fail "another command is running: $SELF stop ends it."
  fi
  if ! blame start; then
    if is_out_of_reach; then code=$RETRY; else code=1; fi
    say "stopping the other hosts"
    stop
    return "$code"
  fi
  say "started on ${#NODES[@]} hosts: $(quote "${COMMAND[@]}")"
  limit_life
}

# limit_life: let the first host delete the slice when its time is over, once, whoever watches.
limit_life() {
  local end
  if [ "$LIFETIME" = 0 ]; then return; fi
  end="sleep $LIFETIME; gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --quiet --force --async"
  remote 0 "test -e .jlrm/lifetime || { mkdir -p .jlrm; touch .jlrm/lifetime; \
nohup setsid sh -c $(quote "$end") > .jlrm/lifetime 2>&1 < /dev/null & }" < /dev/null ||
    say "warning: the first host could not be told to delete the slice after $LIFETIME."
}

# judge_jobs: from JOBS, set VERDICT (go_on, done, retry, wrong, failed, unreachable) and CULPRIT (a host).
judge_jobs() {
  local index code
  VERDICT="done" CULPRIT=0
  for index in "${!NODES[@]}"; do
    case "${JOBS[index]}" in
      "exited 0") ;;
      running) prefer go_on "$index" ;;
      unreachable) prefer unreachable "$index" ;;
      "exited "*)
        code="${JOBS[index]#exited }"
        if ((code == 2)); then
          prefer wrong "$index"
        elif ((code >= 128 && code != 130)); then
          prefer retry "$index"
        else
          prefer failed "$index"
        fi
        ;;
      *) prefer retry "$index" ;;
    esac
  done
}
# prefer VERDICT INDEX: a lost or killed host makes its peers fail, so it counts for more than they do.
prefer() {
  local -A rank=([done]=0 [go_on]=1 [failed]=2 [unreachable]=3 [retry]=4 [wrong]=5)
  if ((rank[$1] > rank[$VERDICT])); then VERDICT="$1" CULPRIT="$2"; fi
}

# watch: wait for the job's end. Returns its exit code, or RETRY (DELETE=1 if the slice must go first).
watch() {
  local silent=0 line="" code
  DELETE=""
  while :; do
    get_state
    if is_gone; then
      say "$NAME is $STATE: preempted or deleted"
      return "$RETRY"
    fi
    ask_jobs
    judge_jobs
    if [ -n "${LAST[0]}" ] && [ "${LAST[0]}" != "$line" ]; then
      line="${LAST[0]}"
      say "$(host 0): $line"
    fi
    case "$VERDICT" in
      "done")
        say "done on all hosts"
        return 0
        ;;
      go_on) silent=0 ;;
      unreachable)
        say "host $(host "$CULPRIT") can't be reached ($((++silent)) of $PATIENCE; the slice is $STATE)"
        if ((silent >= PATIENCE)); then
          [ "$STATE" != UNKNOWN ] || fail "no contact with Google Cloud; the job may go on. Later: $SELF up or attach."
          stop 5
          DELETE=1
          return "$RETRY"
        fi
        ;;
      *)
        say "host $(host "$CULPRIT"): ${JOBS[CULPRIT]}; stopping the others"
        code="${JOBS[CULPRIT]#exited }"
        remote "$CULPRIT" "bash jlrm/launch/host.sh log 20" < /dev/null >&2 || true
        stop
        if [ "$VERDICT" = retry ]; then return "$RETRY"; fi
        get_state
        if [ "$VERDICT" = failed ] && is_gone; then return "$RETRY"; fi
        return "$code"
        ;;
    esac
    sleep "$POLL"
  done
}

# once: one life of the slice, from the state it is in to the job's end.
once() {
  acquire || return
  if [ -n "$DRY_RUN" ]; then
    setup
    run
    return
  fi
  reach
  ask_jobs
  if (($(count_jobs '^running$') == ${#NODES[@]})); then
    run || return # changes nothing, unless another command is running
  else
    if (($(count_jobs '^running$'))); then stop; fi
    setup || return
    run || return
  fi
  watch || return
}

up() {
  local restarts=0 code
  while :; do
    code=0
    DELETE=""
    once || code=$?
    if ((code != RETRY)); then break; fi
    if ((restarts++ >= MAX_RESTARTS)); then
      say "error: given up after $MAX_RESTARTS restarts"
      code=1
      break
    fi
    say "restart $restarts of $MAX_RESTARTS"
    if [ -n "$DELETE" ]; then delete || fail "$NAME could not be deleted."; fi
    sleep "$POLL"
  done
  finish
  return "$code"
}

# finish: save the logs, and stop paying.
finish() {
  local index logs="runs/launch/$NAME"
  if [ -z "$DRY_RUN" ]; then
    everywhere "bash jlrm/launch/host.sh log 10000" /dev/null 1
    mkdir -p "$logs"
    for index in "${!NODES[@]}"; do
      if ((CODES[index] == 0)); then cp "$SCRATCH/$index.out" "$logs/${NODES[index]}-${WORKERS[index]}.log"; fi
    done
    say "logs are in $logs"
  fi
  if [ -n "$KEEP" ] || [ -z "$HAS_BUCKET" ]; then
    LEFT_BEHIND=""
    say "$NAME is kept, and paid for${KEEP:+ (--keep)}: $SELF delete ends that"
    return
  fi
  delete
  say "$NAME is deleted"
}

status() {
  local index
  if [ -n "$DRY_RUN" ]; then
    print_state 'value(state.state)'
    ask_jobs
    return
  fi
  get_state
  [ "$STATE" != UNKNOWN ] || explain "$SCRATCH/error"
  echo "$NAME: $STATE"
  [ "$STATE" = ACTIVE ] || return 0
  ask_jobs
  for index in "${!NODES[@]}"; do
    printf '%s: %s%s\n' "$(host "$index")" "${JOBS[index]}" "${LAST[index]:+ | ${LAST[index]}}"
  done
}

logs() {
  local index="$((${HOST%/*} * NUM_HOSTS + ${HOST#*/}))"
  ((${HOST#*/} < NUM_HOSTS && index < ${#NODES[@]})) ||
    wrong "--host=$HOST: there are $SLICES slices of $NUM_HOSTS hosts, counted from 0."
  remote "$index" "bash jlrm/launch/host.sh log ${FOLLOW:+follow}" < /dev/null
}

# leave: at every end of this script, by a signal too, say what is still paid for.
leave() {
  if [ -n "$LEFT_BEHIND" ]; then
    say "$NAME is there, and paid for. Look: $SELF status; go on: the same command; end it: $SELF down."
  fi
  rm -rf "$SCRATCH" 2> /dev/null || true # what still runs in the background may write there
}

main() {
  local code=0
  parse "$@"
  [[ "$ACTION" =~ ^(create|setup|run|attach|logs|status|stop|delete|down|up)$ ]] ||
    wrong "action=$(quote "$ACTION") is not one of create, setup, run, attach, logs, status, stop, delete, down, up. See --help."
  validate
  declare -ga NODES=() WORKERS=()
  list_hosts
  umask 077
  SCRATCH="$(mktemp -d)"
  trap leave EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  if [[ "$ACTION" =~ ^(run|up)$ ]]; then
    ((${#COMMAND[@]})) || wrong "$ACTION needs a command after --, such as: -- python -m jlrm.train --config FILE"
  elif ((${#COMMAND[@]})); then
    wrong "$ACTION takes no command."
  fi
  check_gcloud
  if [[ "$ACTION" =~ ^(setup|up)$ ]]; then check_source; fi
  if ((${#COMMAND[@]})); then check_run_dir; fi
  if [[ "$ACTION" =~ ^(setup|run|attach|logs|stop)$ ]]; then find_hosts; fi
  declare -ga CODES=() JOBS=() LAST=()
  case "$ACTION" in
    stop)
      stop
      blame stop || fail "not stopped everywhere"
      ;;
    attach)
      if [ -n "$DRY_RUN" ]; then
        status
      else
        watch || code=$?
      fi
      ;;
    *) "$ACTION" || code=$? ;;
  esac
  if ((code == RETRY)); then
    say "preempted, killed or out of reach: may be started again (up does so by itself)"
    code=143
  fi
  return "$code"
}
main "$@"
