#!/usr/bin/env bash
# Run jlrm on a GKE cluster that has the JobSet API and a TPU node pool: fills launch/jobset.yaml and applies it.
#
#   bash launch/gke_jobset.sh --name judge --type v6e --topology 4x4 --image IMAGE [flags] -- COMMAND...
#   bash launch/gke_jobset.sh --name judge --type v6e --topology 4x4 --image us-docker.pkg.dev/p/r/jlrm:1 -- \
#       python -m jlrm.train --config configs/judgelrm_7b.yaml run.dir=gs://BUCKET/judge
#
# IMAGE holds jlrm and its configs, for example:
#   FROM python:3.12-slim
#   COPY . /jlrm
#   WORKDIR /jlrm
#   RUN pip install -e '.[tpu,gcs]'
#
#   --type v5e|v5p|v6e|tpu7x  --topology  2x4 or 4x4 (v5e, v6e); 2x2x1, 2x2x2, 2x2x4, 2x4x4 or multiples of
#                          four such as 4x4x8 (v5p, tpu7x)
#   --chips-per-host N     4; all of a v5e or v6e topology of up to 8 chips
#   --slices N             1
#   --spot                 on spot nodes
#   --secret NAME          a Kubernetes secret with the keys HF_TOKEN and WANDB_API_KEY, or one of them
#                          (jlrm-secrets). Make it from files, which keeps values out of process lists:
#                          kubectl create secret generic jlrm-secrets --from-file=HF_TOKEN=FILE
#   --queue NAME           a Kueue local queue
#   --service-account NAME of Kubernetes, with access to the bucket (default)
#   --namespace NAME       default
#   --max-restarts N       after preemption, SIGTERM or a lost host (50). Exit codes 1 and 2 end the job.
#   --grace SECONDS        from SIGTERM to SIGKILL (300)
#   --replace              end a job of this name that still runs; one that has ended is replaced without it
#   --dry-run              print the manifest and the kubectl command, run none
#
# A VM of tpu7x has 4 chips, which JAX counts as 8 devices: mesh settings count devices, and 2x2x2 has 16. Its pools
# of several hosts are made with a workload policy in place of --tpu-topology (GKE 1.34 or newer):
#   gcloud compute resource-policies create workload-policy POLICY --region=REGION --type=HIGH_THROUGHPUT \
#     --accelerator-topology=2x2x2
#   gcloud container node-pools create POOL --cluster=CLUSTER --location=LOCATION --node-locations=ZONE \
#     --machine-type=tpu7x-standard-4t --placement-policy=POLICY --num-nodes=2
#
# Then: kubectl get jobset NAME; kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME; kubectl delete jobset NAME
set -euo pipefail
LAUNCH="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck disable=SC1091
source "$LAUNCH/lib.sh"

name="" type="" topology="" image="" slices=1 chips_per_host="" spot="" secret=jlrm-secrets queue=""
service_account=default namespace=default max_restarts=50 grace=300 replace=""
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage "${BASH_SOURCE[0]}" && exit ;;
    --dry-run) DRY_RUN=1 && shift ;;
    --replace) replace=1 && shift ;;
    --spot) spot='cloud.google.com/gke-spot: "true"' && shift ;;
    --name) name="$(value "$1" "$@")"; shift 2 ;;
    --type) type="$(value "$1" "$@")"; shift 2 ;;
    --topology) topology="$(value "$1" "$@")"; shift 2 ;;
    --image) image="$(value "$1" "$@")"; shift 2 ;;
    --slices) slices="$(value "$1" "$@")"; shift 2 ;;
    --chips-per-host) chips_per_host="$(value "$1" "$@")"; shift 2 ;;
    --secret) secret="$(value "$1" "$@")"; shift 2 ;;
    --queue) queue="$(value "$1" "$@")"; shift 2 ;;
    --service-account) service_account="$(value "$1" "$@")"; shift 2 ;;
    --namespace) namespace="$(value "$1" "$@")"; shift 2 ;;
    --max-restarts) max_restarts="$(value "$1" "$@")"; shift 2 ;;
    --grace) grace="$(value "$1" "$@")"; shift 2 ;;
    --) shift && break ;;
    *) wrong "got $(quote "$1"); the command stands after --. See --help." ;;
  esac
done
check_name --name "$name"
check_name --namespace "$namespace"
check_name --secret "$secret"
check_name --service-account "$service_account"
[ -z "$queue" ] || check_name --queue "$queue"
check --image "$image" '^[a-z0-9][a-zA-Z0-9._/:@-]*$' "an image such as us-docker.pkg.dev/PROJECT/REPOSITORY/jlrm:1"
check_positive --slices "$slices"
check_number --max-restarts "$max_restarts"
check_positive --grace "$grace"
case "$type" in
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  tpu7x) accelerator=tpu7x ;;
  *) wrong "--type=$(quote "$type") is not one of v5e, v5p, v6e, tpu7x." ;;
esac
case "$type" in
  v5e | v6e) check --topology "$topology" '^[1-9][0-9]?x[1-9][0-9]?$' "two sides such as 4x4" ;;
  *) # Of any other a node pool can't be made, and pods would wait for one for ever.
    check --topology "$topology" '^[1-9][0-9]?x[1-9][0-9]?x[1-9][0-9]?$' "three sides such as 2x2x2"
    IFS=x read -r -a sides <<< "$topology"
    [[ "$topology" =~ ^2x(2x[124]|4x4)$ ]] ||
      ((!(sides[0] % 4 + sides[1] % 4 + sides[2] % 4) && sides[0] <= sides[1] && sides[1] <= sides[2])) ||
      wrong "--topology=$topology is no slice of $type: 2x2x1, 2x2x2, 2x2x4, 2x4x4, or multiples of 4 in rising order."
    ;;
esac
chips=$((${topology//x/*}))
if [ -z "$chips_per_host" ]; then
  chips_per_host=4
  if [[ "$type" =~ ^(v5e|v6e)$ ]] && ((chips <= 8)); then chips_per_host=$chips; fi
fi
check --chips-per-host "$chips_per_host" '^[1248]$' "1, 2, 4 or 8"
[[ "$type" =~ ^(v5e|v6e)$ || "$chips_per_host" = 4 ]] || wrong "--chips-per-host=$chips_per_host: a VM of $type has 4."
((chips % chips_per_host == 0)) || wrong "--topology=$topology has $chips chips, no multiple of $chips_per_host a host."
((slices == 1 || chips > chips_per_host)) ||
  wrong "--slices=$slices: slices of one host each share a node pool, and JobSet gives a slice a pool of its own." \
    "Take a topology of several hosts."
[ $# -gt 0 ] || wrong "no command. Give one after --, such as: -- python -m jlrm.train --config FILE"
run_dir="$(setting run.dir "$@")"
[[ "$run_dir" == gs://* ]] || say "warning: run.dir=${run_dir:-(not given)} is lost with its pod. Use run.dir=gs://BUCKET/NAME."

# as_yaml WORD...: a flow list of double-quoted scalars; Kubernetes expands $(NAME), and $$ is a dollar.
as_yaml() {
  local word list=""
  for word in "$@"; do
    [[ ! "$word" =~ [[:cntrl:]] ]] || wrong "$(quote "$word") holds a control character."
    word="${word//\\/\\\\}"
    word="${word//\"/\\\"}"
    word="${word//\$/\$\$}"
    list+="${list:+, }\"$word\""
  done
  printf '%s' "$list"
}
words="$(as_yaml "$@")"
manifest="$(cat "$LAUNCH/jobset.yaml")"
# fill WORD VALUE: quoted, since an & would stand for the match.
fill() { manifest="${manifest//"@$1@"/"$2"}"; }
fill NAME "$name"
fill NAMESPACE "$namespace"
fill QUEUE "${queue:+"kueue.x-k8s.io/queue-name: $queue"}"
fill MAX_RESTARTS "$max_restarts"
fill SLICES "$slices"
fill HOSTS $((chips / chips_per_host))
fill GRACE "$grace"
fill SERVICE_ACCOUNT "$service_account"
fill ACCELERATOR "$accelerator"
fill TOPOLOGY "$topology"
fill SPOT "$spot"
fill IMAGE "$image"
fill SECRET "$secret"
fill CHIPS_PER_HOST "$chips_per_host"
manifest="$(grep -vE '^ *(#|$)' <<< "$manifest")"
fill COMMAND "$words" # last, so that its words are not taken for placeholders

# A JobSet can't be changed, so one of this name goes first: at once if it has ended.
of_name=(jobset "$name" --namespace="$namespace")
if [ -z "$DRY_RUN" ]; then
  state="$(kubectl get "${of_name[@]}" --ignore-not-found --output='jsonpath={.metadata.name} {.status.terminalState}')" ||
    fail "kubectl can't ask the cluster; see above."
  if [ "$state" = "$name " ] && [ -z "$replace" ]; then
    wrong "$name exists and has not ended. Look: kubectl get ${of_name[*]}; end it with --replace."
  fi
  if [ -n "$state" ]; then kubectl delete "${of_name[@]}" --wait=true --timeout="$((grace + 60))s"; fi
fi
if [ -n "$DRY_RUN" ]; then printf '%s\n---\n# on stdin of:\n# ' "$manifest"; fi
execute kubectl apply --filename=- <<< "$manifest"
