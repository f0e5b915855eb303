#!/usr/bin/env bash
# Trains on TPU slices of Google Kubernetes Engine, as a JobSet whose jobs restart together.
#
#   launch/gke.sh --name=NAME --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=16x16 \
#       [FLAGS] -- ARGS OF tarflow_jax.main, such as --workdir=gs://B/FOLDER
#
#   --accelerator=A      node label cloud.google.com/gke-tpu-accelerator
#   --topology=AxB[xC]   chips per slice; with --chips_per_node it determines the number of hosts
#   --chips_per_node=N   TPU chips per node (4)
#   --slices=N           number of slices (1)
#   --spot               use Spot nodes
#   --namespace=NS       Kubernetes namespace (default: that of kubectl)
#   --claim=PVC          PersistentVolumeClaim to mount at /workdir, if no bucket is used
#   --service_account=A  Kubernetes service account, which needs access to the bucket
#   --max_restarts=N     restarts of the JobSet, including preemptions (100)
#   --action=ACTION      apply (default), logs (of every worker), delete, or pools. Run pools first: it
#                        creates a node pool for each slice, and needs --cluster=C and --location=L
#                        (the cluster's region or zone)
#   --dry_run            print the command and the manifest, and run nothing
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name='' image='' accelerator='' topology='' chips_per_node=4 slices=1 spot='' namespace='' claim=''
service_account='' max_restarts=100 action=apply cluster='' location=''
parse_flags 'name= image= accelerator= topology= chips_per_node= slices= spot namespace= claim=
  service_account= max_restarts= action= cluster= location= ' "$@"
((${#words[@]} == 0)) || refuse "${words[0]} is not a flag"
require name
dns_name='^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$'
[[ $name =~ $dns_name ]] || refuse "--name=$name is not a short DNS name"
kubectl=(kubectl)
[[ ! $namespace ]] || kubectl+=("--namespace=$namespace")

case $action in
  logs)
    execute "${kubectl[@]}" logs "--selector=jobset.sigs.k8s.io/jobset-name=$name" \
      --container=trainer --prefix --tail=-1 --max-log-requests=10000
    exit ;;
  delete)
    execute "${kubectl[@]}" delete jobset "$name"
    exit ;;
  apply) require image ;;
  pools) require cluster location ;;
  *) refuse "--action=$action must be one of apply, logs, delete and pools" ;;
esac

require accelerator topology
whole_numbers chips_per_node slices max_restarts
((slices > 0 && chips_per_node > 0)) || refuse '--slices and --chips_per_node must be at least 1'
grid='^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$'
[[ $topology =~ $grid ]] ||
  refuse "--topology=$topology does not look like 16x16 or 4x4x8"
[[ $claim || " ${rest[*]-} " == *=gs://* || $action == pools ]] ||
  refuse 'pass --workdir=gs://BUCKET/FOLDER or --claim; the workdir must outlive the pods'
chips=$((${topology//x/*}))
if ((chips < chips_per_node)); then chips_per_node=$chips; fi
((chips % chips_per_node == 0)) ||
  refuse "--topology=$topology has $chips chips, not a multiple of --chips_per_node=$chips_per_node"
hosts=$((chips / chips_per_node))

# A node pool is a slice. --tpu-topology sets its topology; for TPU7x a workload policy does.
if [[ $action == pools ]]; then
  ((${#rest[@]} == 0)) || refuse '--action=pools takes no arguments of tarflow_jax.main'
  case $accelerator in
    tpu-v5-lite-podslice) machine=ct5lp-hightpu ;;
    tpu-v5p-slice) machine=ct5p-hightpu ;;
    tpu-v6e-slice) machine=ct6e-standard ;;
    tpu7x) machine=tpu7x-standard ;;
    *) refuse "--accelerator=$accelerator has no known machine type; create its pools with gcloud" ;;
  esac
  placement=("--tpu-topology=$topology")
  if [[ $accelerator == tpu7x ]]; then
    placement=("--placement-policy=$name-$topology")
    if ((hosts > 1)); then
      execute gcloud compute resource-policies create workload-policy "$name-$topology" \
        --type=HIGH_THROUGHPUT "--accelerator-topology=$topology" "--region=${location%-[a-z]}"
    fi
  fi
  ((hosts > 1)) || placement=()
  for ((i = 0; i < slices; i++)); do
    execute gcloud container node-pools create "$name-$i" "--cluster=$cluster" \
      "--location=$location" "--machine-type=$machine-${chips_per_node}t" "--num-nodes=$hosts" \
      ${placement[@]+"${placement[@]}"} ${spot:+--spot}
  done
  exit
fi

# Prints a JSON string, which is also a YAML string.
json() {
  local s=${1//\\/\\\\} code character escape
  s=${s//'"'/'\"'}
  s=${s//$'\n'/\\n}
  s=${s//$'\t'/\\t}
  s=${s//$'\r'/\\r}
  # YAML does not allow the other control characters of ASCII and the C1 range of Unicode.
  for code in {0..1}{{0..9},{a..f}} 7f {8..9}{{0..9},{a..f}}; do
    case $code in
      00 | 09 | 0a | 0d) continue ;;
      [89]*) printf -v character %b "\\xc2\\x$code" ;;
      *) printf -v character %b "\\x$code" ;;
    esac
    escape="\\u00$code"
    s=${s//"$character"/"$escape"}
  done
  printf '"%s"' "$s"
}

manifest() {
  local arg
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
YAML
  # Each slice is one node pool, so that no job spans two slices.
  if ((slices > 1)); then cat <<YAML; fi
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
YAML
  cat <<YAML
spec:
  failurePolicy:
    maxRestarts: $max_restarts
    rules:
    # Only the podFailurePolicy below has this reason, for exit codes that a restart cannot fix.
    - action: FailJobSet
      onJobFailureReasons:
      - PodFailurePolicy
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        # A lost worker ends the job, and the whole JobSet restarts.
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: trainer
              operator: In
              values: [2, 76, 130]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
YAML
  if [[ $service_account ]]; then printf '            serviceAccountName: %s\n' "$(json "$service_account")"; fi
  cat <<YAML
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(json "$accelerator")
              cloud.google.com/gke-tpu-topology: $(json "$topology")
YAML
  if [[ $spot ]]; then cat <<YAML; fi
              cloud.google.com/gke-spot: "true"
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: "true"
              effect: NoSchedule
YAML
  cat <<YAML
            containers:
            - name: trainer
              image: $(json "$image")
              command: ["python", "-m", "tarflow_jax.main"]
              args:
YAML
  # With single-host slices, the environment would not tell that there are several processes.
  if ((slices > 1)); then echo '              - "--distributed=on"'; fi
  # Kubernetes reads $(NAME) as a variable and $$ as a dollar sign.
  # shellcheck disable=SC2016
  local dollar='$' dollars='$$'
  for arg in "${rest[@]}"; do printf '              - %s\n' "$(json "${arg//$dollar/$dollars}")"; done
  cat <<YAML
              ports:
              - containerPort: 8471
              - containerPort: 8080
              resources:
                limits:
                  google.com/tpu: $chips_per_node
YAML
  cat <<YAML
              volumeMounts:
              - name: shared-memory
                mountPath: /dev/shm
YAML
  if [[ $claim ]]; then cat <<YAML; fi
              - name: workdir
                mountPath: /workdir
YAML
  cat <<YAML
            volumes:
            # The processes of data.workers pass batches through it; Kubernetes provides only 64 MiB.
            - name: shared-memory
              emptyDir:
                medium: Memory
YAML
  if [[ $claim ]]; then cat <<YAML; fi
            - name: workdir
              persistentVolumeClaim:
                claimName: $(json "$claim")
YAML
}

((${#rest[@]})) || refuse 'the arguments of tarflow_jax.main are missing; write them after --'
if [[ $dry_run ]]; then
  echo "$(quoted "${kubectl[@]}" apply -f -) <<'MANIFEST'"
  manifest
  echo MANIFEST
else
  manifest | "${kubectl[@]}" apply -f -
fi
