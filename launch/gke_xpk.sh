#!/usr/bin/env bash
# Run jlrm on a GKE cluster made by XPK (tried against 1.16): `xpk workload create`, made safe for jlrm.
#
#   bash launch/gke_xpk.sh --cluster C --workload NAME --project P --zone Z --type v6e-16 --image IMAGE [flags] -- COMMAND...
#   bash launch/gke_xpk.sh --cluster c --workload judge --project p --zone us-east5-b --type v6e-16 --image IMAGE -- \
#       python -m jlrm.train --config configs/judgelrm_7b.yaml run.dir=gs://BUCKET/judge
#
# IMAGE holds jlrm and its configs (see gke_jobset.sh --help). TYPE is XPK's: v5litepod-16, v6e-16, v5p-16,
# tpu7x-16 (TensorCores, 2 a chip, for v5p and tpu7x) or tpu7x-2x2x2. A VM of tpu7x has 4 chips, for which XPK
# starts two containers, so two processes of jlrm; JAX counts a chip as two devices.
#
#   --slices N         1
#   --spot | --flex | --on-demand | --reservation NAME
#   --max-restarts N   (50). XPK retries exit codes 42 and 127 to 255, so 143 (SIGTERM, saved) and a
#                      killed process; 1 (failed) and 2 (wrong input) end the workload at once.
#   --grace SECONDS    from SIGTERM to SIGKILL (300)
#   --priority LEVEL   very-low, low, medium, high or very-high
#   --secret NAME      a Kubernetes secret of the cluster whose keys become variables (how to make it:
#                      gke_jobset.sh --help). XPK has no flag for that, and writes what its --env
#                      gets into the JobSet in clear text. So XPK writes its manifest without
#                      applying it, a reference to the secret is put in, and kubectl applies it.
#   --dry-run          print the commands, run none
set -euo pipefail
# shellcheck disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

cluster="" workload="" project="" zone="" type="" image="" slices=1 max_restarts=50 grace=300 secret=""
capacity=() priority=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage "${BASH_SOURCE[0]}" && exit ;;
    --dry-run) DRY_RUN=1 && shift ;;
    --cluster) cluster="$(value "$1" "$@")"; shift 2 ;;
    --workload) workload="$(value "$1" "$@")"; shift 2 ;;
    --project) project="$(value "$1" "$@")"; shift 2 ;;
    --zone) zone="$(value "$1" "$@")"; shift 2 ;;
    --type) type="$(value "$1" "$@")"; shift 2 ;;
    --image) image="$(value "$1" "$@")"; shift 2 ;;
    --slices) slices="$(value "$1" "$@")"; shift 2 ;;
    --max-restarts) max_restarts="$(value "$1" "$@")"; shift 2 ;;
    --grace) grace="$(value "$1" "$@")"; shift 2 ;;
    --secret) secret="$(value "$1" "$@")"; shift 2 ;;
    --spot | --flex | --on-demand) capacity+=("$1") && shift ;;
    --reservation) capacity+=("--reservation=$(value "$1" "$@")"); shift 2 ;;
    --priority) priority=("--priority=$(value "$1" "$@")"); shift 2 ;;
    --) shift && break ;;
    *) wrong "got $(quote "$1"); the command stands after --. See --help." ;;
  esac
done
check_name --cluster "$cluster"
check_name --workload "$workload"
check_project --project "$project"
check_zone --zone "$zone"
check --type "$type" '^(v5litepod-[1-9][0-9]*|v5p-[1-9][0-9]*|v6e-[1-9][0-9]*|tpu7x-[1-9][0-9]*(x[1-9][0-9]*x[1-9][0-9]*)?)$' \
  "one of v5litepod-N, v5p-N, v6e-N, tpu7x-N, tpu7x-AxBxC"
check --image "$image" '^[a-z0-9][a-zA-Z0-9._/:@-]*$' "an image such as us-docker.pkg.dev/PROJECT/REPOSITORY/jlrm:1"
check_positive --slices "$slices"
check_number --max-restarts "$max_restarts"
check_positive --grace "$grace"
[ -z "$secret" ] || check_name --secret "$secret"
((${#capacity[@]} <= 1)) || wrong "${capacity[*]} exclude each other."
[ $# -gt 0 ] || wrong "no command. Give one after --, such as: -- python -m jlrm.train --config FILE"
for word in "$@"; do
  [[ ! "$word" =~ [[:cntrl:]] ]] || wrong "$(quote "$word") holds a control character."
done
run_dir="$(setting run.dir "$@")"
[[ "$run_dir" == gs://* ]] || say "warning: run.dir=${run_dir:-(not given)} is lost with its pod. Use run.dir=gs://BUCKET/NAME."

# A simple command: XPK passes SIGTERM to the process that it starts, and to no other. With a compound
# command that is a shell, and the program would never receive it.
create=(xpk workload create --cluster="$cluster" --workload="$workload" --project="$project" --zone="$zone"
  --tpu-type="$type" --num-slices="$slices" --docker-image="$image" --max-restarts="$max_restarts"
  --termination-grace-period-seconds="$grace" "${capacity[@]}" "${priority[@]}" --command="$(quote "$@")")
if [ -z "$secret" ]; then
  execute "${create[@]}"
  exit
fi

umask 077
scratch=.
if [ -z "$DRY_RUN" ]; then
  scratch="$(mktemp -d)"
  trap 'rm -rf "$scratch"' EXIT
fi
# XPK writes the manifest under its own --dry-run too.
execute "${create[@]}" --output-manifest-file="$scratch/jobset.yaml" --dry-run
execute gcloud container clusters get-credentials "$cluster" --location="$zone" --project="$project" || {
  say "trying the region: XPK's clusters are regional"
  execute gcloud container clusters get-credentials "$cluster" --location="${zone%-*}" --project="$project"
}
if [ -n "$DRY_RUN" ]; then
  echo "# ./with_secret.yaml is ./jobset.yaml with a reference to the secret $secret in it"
else
  [ -s "$scratch/jobset.yaml" ] || fail "xpk wrote no manifest."
  # The reference follows the image of each container that runs ours; XPK's own `env` stays as it is.
  awk -v image="$image" -v secret="$secret" '
    { print }
    $1 == "image:" && $2 == image {
      match($0, /^ +/)
      printf "%senvFrom: [{secretRef: {name: %s}}]\n", substr($0, 1, RLENGTH), secret
      count++
    }
    END { if (!count) exit 3 }' "$scratch/jobset.yaml" > "$scratch/with_secret.yaml" ||
    fail "xpk's manifest has no container with the image $image; use launch/gke_jobset.sh."
fi
execute kubectl apply --filename="$scratch/with_secret.yaml"
