# shellcheck shell=bash
# shellcheck disable=SC2034,SC2153,SC2154 # its variables are those of launch/tpu_vm.sh, which sources it for --gce
#
# A slice of Compute Engine: a managed instance group (MIG) of as many VMs as it has hosts, made all at
# once (bulk), by an instance template. A workload policy with the slice's topology joins the chips of
# several VMs; a single VM needs none. What gcloud is asked here replaces what tpu_vm.sh asks of the
# Cloud TPU API; all else is the same. All three things bear the slice's name. Flags as in
# docs.cloud.google.com/compute/docs/tpus and gcloud 578.
DISK=200GB # the images' own 10 GB don't hold an installation
LABEL="jlrm=$NAME"
REGION=(--region="${ZONE%-*}" --quiet --project="$PROJECT")
IN_REGION="projects/$PROJECT/regions/${ZONE%-*}"
MADE=()

# read_type: check TYPE and set MACHINE, TOPOLOGY, NUM_HOSTS and the family of images (RUNTIME).
read_type() {
  local size="${TYPE##*-}" chips=4 image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
  case "$TYPE" in
    v5e-* | v5litepod-* | v4-*) wrong "--type=$TYPE is not offered by Compute Engine; leave --gce out, or use GKE." ;;
  esac
  check --type "$TYPE" '^(v6e|v5p|tpu7x)-[1-9][0-9]*$' "one of v6e-N, v5p-N, tpu7x-N, which Compute Engine offers"
  case "$TYPE" in
    v6e-*)
      case "$size" in
        1) TOPOLOGY=1x1 ;; 4) TOPOLOGY=2x2 ;; 8) TOPOLOGY=2x4 ;; 16) TOPOLOGY=4x4 ;; 32) TOPOLOGY=4x8 ;;
        64) TOPOLOGY=8x8 ;; 128) TOPOLOGY=8x16 ;; 256) TOPOLOGY=16x16 ;;
        *) wrong "--type=$TYPE is not a slice: chips are 1, 4, 8, 16, 32, 64, 128 or 256." ;;
      esac
      if ((size == 1)); then chips=1; fi
      MACHINE="ct6e-standard-${chips}t"
      ;;
    *)
      case "$size" in
        8) TOPOLOGY=2x2x1 ;; 16) TOPOLOGY=2x2x2 ;; 32) TOPOLOGY=2x2x4 ;; 64) TOPOLOGY=2x4x4 ;;
        128) TOPOLOGY=4x4x4 ;; 256) TOPOLOGY=4x4x8 ;; 512) TOPOLOGY=4x8x8 ;; 1024) TOPOLOGY=8x8x8 ;;
        *) wrong "--type=$TYPE: N counts TensorCores, 2 a chip: 8, 16, 32, 64, 128, 256, 512 or 1024." ;;
      esac
      MACHINE=ct5p-hightpu-4t
      if [[ "$TYPE" == tpu7x-* ]]; then MACHINE=tpu7x-standard-4t image=ubuntu-accel-2404-amd64-tpu-tpu7x; fi
      ;;
  esac
  NUM_HOSTS=$((${TOPOLOGY//x/*} / chips))
  RUNTIME="${RUNTIME:-$image}"
}

# check_choices: what the Cloud TPU API has and a group has not.
check_choices() {
  [ -n "$PROJECT" ] || wrong "--gce needs --project P, which stands in the names of what it makes."
  [ "$SLICES" = 1 ] || wrong "--slices=$SLICES: --gce makes one slice; use GKE, or the Cloud TPU API, for several."
  [ -z "$VALID_UNTIL" ] || wrong "--valid-until: a group waits for capacity until it is deleted (tpu_vm.sh --gce down)."
  [ "$TIER" != reserved ] || wrong "--reserved: with --gce the reservation has a name: --create-flag=--reservation=NAME" \
    "--create-flag=--reservation-affinity=specific --create-flag=--provisioning-model=RESERVATION_BOUND"
}

# list_hosts: names are Google's, and known once the group has VMs.
list_hosts() {
  local index
  for ((index = 0; index < NUM_HOSTS; index++)); do
    NODES+=("$NAME-HOST$index")
    WORKERS+=("$index")
  done
}
host() { printf '%s' "${NODES[$1]}"; }
find_hosts() {
  if [ -n "$DRY_RUN" ]; then return; fi
  get_state
  [ "$STATE" != UNKNOWN ] || explain "$SCRATCH/error"
  [ "$STATE" = ACTIVE ] || ((${#NODES[@]})) || fail "$NAME is $STATE and has no hosts."
}

remote() {
  execute gcloud compute ssh "${NODES[$1]}" "${WHERE[@]}" "${SSH_FLAGS[@]}" --command="$2"
}

# create: what costs nothing first, and the group last; where it is refused, nothing is left.
create() {
  local life="${FLEX:-$LIFETIME}" template=() group=()
  case "$TIER" in
    spot) template=(--provisioning-model=SPOT) ;;
    flex) template=(--provisioning-model=FLEX_START --reservation-affinity=none) ;;
  esac
  if [ "$life" != 0 ]; then template+=(--max-run-duration="$life"); fi
  if [ "$life" != 0 ] || [ "$TIER" = spot ]; then template+=(--instance-termination-action=DELETE); fi
  MADE=()
  if ((NUM_HOSTS > 1)); then
    make policy compute resource-policies create workload-policy "$NAME" "${REGION[@]}" --type=HIGH_THROUGHPUT \
      --accelerator-topology="$TOPOLOGY" --accelerator-topology-mode=AUTO_CONNECT
    group=(--workload-policy="$IN_REGION/resourcePolicies/$NAME")
  fi
  make template compute instance-templates create "$NAME" --instance-template-region="${ZONE%-*}" "${WHERE[@]:1}" \
    --machine-type="$MACHINE" --image-family="$RUNTIME" --image-project=ubuntu-os-accelerator-images \
    --boot-disk-size="$DISK" --scopes=cloud-platform --maintenance-policy=TERMINATE --labels="$LABEL" \
    "${template[@]}" "${CREATE_FLAGS[@]}"
  # A group repairs lost VMs by itself unless told not to: new ones, on which nothing runs.
  make group compute instance-groups managed create "$NAME" "${WHERE[@]}" \
    --template="$IN_REGION/instanceTemplates/$NAME" --size="$NUM_HOSTS" --target-size-policy-mode=bulk \
    --default-action-on-vm-failure=do-nothing "${group[@]}"
  say "asked for $TYPE ($TOPOLOGY, $NUM_HOSTS x $MACHINE, $TIER) in $ZONE as $NAME"
}

what_exists() {
  printf 'Where it exists: gcloud compute machine-types list --filter=name=%s; the Compute Engine API' "$MACHINE"
}

# make WHAT WORDS...: note what was made; where gcloud refuses, take that away again and say why.
make() {
  local what="$1" error="$SCRATCH/refused"
  shift
  if interruptible "$error" execute gcloud "$@"; then
    MADE=("$what" "${MADE[@]}")
    return
  fi
  LEFT_BEHIND=""
  for what in "${MADE[@]}"; do "drop_$what" || true; done
  explain "$error"
}

# remove WORDS...: delete it, or find it gone.
remove() {
  if interruptible "$SCRATCH/error" execute gcloud "$@"; then return; fi
  if grep -qiE 'not.?found' "$SCRATCH/error"; then return; fi
  cat "$SCRATCH/error" >&2
  return 1
}
drop_group() { remove compute instance-groups managed delete "$NAME" "${WHERE[@]}"; }
drop_template() { remove compute instance-templates delete "$NAME" "${REGION[@]}"; }
drop_policy() { remove compute resource-policies delete "$NAME" "${REGION[@]}"; }

delete() {
  drop_group || return
  LEFT_BEHIND=""
  drop_template || say "warning: the instance template $NAME is left; it costs nothing."
  drop_policy || say "warning: the workload policy $NAME is left; it costs nothing."
}

# down: delete the group and what was made for it, and VMs of its label that have left the group.
down() {
  local node nodes
  delete || fail "$NAME could not be deleted."
  if [ -n "$DRY_RUN" ]; then return; fi
  nodes="$(gcloud compute instances list --project="$PROJECT" --zones="$ZONE" --filter="labels.$LABEL" \
    --format='value(name)' 2> "$SCRATCH/error")" || explain "$SCRATCH/error"
  for node in $nodes; do
    say "VM $node is left"
    gcloud compute instances delete "$node" "${WHERE[@]}" || fail "VM $node could not be deleted."
  done
  say "nothing named $NAME is left of Compute Engine in $ZONE"
}

# get_state: set STATE to ACTIVE, WAITING, LOST (the group is at rest, and not all its VMs run), ABSENT
# or UNKNOWN (gcloud did not answer), and NODES to the VMs that the group has.
get_state() {
  local name status running=0
  if ! interruptible "$SCRATCH/error" gcloud compute instance-groups managed list-instances "$NAME" "${WHERE[@]}" \
    --format='csv[no-heading](instance.basename(),instanceStatus)' > "$SCRATCH/instances"; then
    STATE=UNKNOWN
    if grep -qiE 'not.?found' "$SCRATCH/error"; then STATE=ABSENT NODES=(); fi
    return 0
  fi
  NODES=() WORKERS=()
  while IFS=, read -r name status; do
    [ -n "$name" ] || continue
    WORKERS+=("${#NODES[@]}")
    NODES+=("$name")
    if [ "$status" = RUNNING ]; then running=$((running + 1)); fi
  done < <(sort "$SCRATCH/instances")
  STATE=ACTIVE
  if ((running == NUM_HOSTS)); then return 0; fi
  STATE=UNKNOWN
  interruptible "$SCRATCH/error" gcloud compute instance-groups managed describe "$NAME" "${WHERE[@]}" \
    --format='value(status.isStable)' > "$SCRATCH/stable" || return 0
  case "$(cat "$SCRATCH/stable")" in
    True) STATE=LOST ;;
    False) STATE=WAITING ;;
  esac
}

# tell_reason: a group that has no capacity or quota waits without a word; its last error says why.
tell_reason() {
  local reason
  if [ "$STATE" != WAITING ]; then return 0; fi
  reason="$(gcloud compute instance-groups managed list-errors "$NAME" "${WHERE[@]}" --limit=1 \
    --format='value(error.code,error.message)' 2> /dev/null)" || return 0
  if [ -n "$reason" ] && [ "$reason" != "$REASON" ]; then say "Google says: $reason"; fi
  REASON="$reason"
}
print_state() { execute gcloud compute instance-groups managed describe "$NAME" "${WHERE[@]}" --format='yaml(status)'; }

limit_life() { :; } # --max-run-duration of the template does it
