#!/usr/bin/env bash
# Trains on Cloud TPU VMs (queued resources) and restarts after preemptions.
#
#   launch/tpu_vm.sh ACTION --name=NAME --zone=ZONE [FLAGS] [-- ARGS OF tarflow_jax.main]
#
#   up    request the TPU and wait until it is ready
#   run   up, install, start on all workers and monitor them; if the TPU is preempted, start over. If
#         the workers are already running, only monitor them. Ends with the run; Ctrl-C ends only the
#         monitoring
#   logs  copy the log of each worker to DIR/worker_I.log (DIR/slice_S_worker_I.log)
#   stop  make the program save a checkpoint and stop; `run` resumes it
#   down  delete the TPU
#
#   --project=P      Google Cloud project (default: that of gcloud)
#   --type=TYPE      accelerator type, such as v5litepod-256; for up and run
#   --version=V      runtime version (default: depends on the type)
#   --slices=N       number of slices (1)
#   --spot           use a Spot TPU, which is cheaper but may be preempted
#   --source=DIR     checkout to install (.)
#   --setup=COMMAND  shell command to run on each worker before the installation
#   --logs=DIR       folder for logs (logs); with run, copy them there at the end
#   --max_restarts=N --min_uptime=S --wait=S  as in supervise.sh, on the workers
#   --poll=S         seconds between checks (30)
#   --dry_run        print the commands of an uninterrupted run, and run nothing
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name='' zone='' project='' type='' version='' slices=1 spot='' source=. setup='' logs=''
poll=30 max_restarts=20 min_uptime=600 wait=5
parse_flags 'name= zone= project= type= version= slices= spot source= setup= logs= poll=
  max_restarts= min_uptime= wait= ' "$@"
action=${words[0]:-}
case $action in
  up | run | logs | stop | down) ;;
  '') refuse 'the action is missing: up, run, logs, stop or down' ;;
  *) refuse "$action is not an action: up, run, logs, stop or down" ;;
esac
((${#words[@]} == 1)) || refuse "${words[1]} is not a flag"
require name zone
whole_numbers slices max_restarts min_uptime wait
((slices > 0)) || refuse '--slices=0 must be at least 1'
case $action in up | run) require type ;; esac
case $type in
  v5litepod-*) : "${version:=v2-alpha-tpuv5-lite}" ;;
  v6e-*) : "${version:=v2-alpha-tpuv6e}" ;;
  v5p-*) : "${version:=v2-alpha-tpuv5}" ;;
  '' | v[234]-*) : "${version:=tpu-ubuntu2204-base}" ;;
  *) [[ $version ]] || refuse "--version is missing, and --type=$type has no default" ;;
esac

where=("--zone=$zone")
[[ $name =~ ^[a-z0-9][a-z0-9._-]*$ ]] || refuse "--name=$name is not a valid name"
[[ ! $project ]] || where+=("--project=$project")
nodes=("$name")
if ((slices > 1)); then
  nodes=()
  for ((slice = 0; slice < slices; slice++)); do nodes+=("$name-$slice"); done
fi

queued() { execute gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
# on_workers COMMAND: runs it on all workers of all slices, and fails if one fails.
on_workers() {
  local node failed=0
  for node in "${nodes[@]}"; do
    execute gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --quiet --worker=all \
      "--command=$1" || failed=1
  done
  return "$failed"
}

# Sets `state` to Google's name for it, to ABSENT, or to UNKNOWN if the query failed.
state='' answered=0
look() {
  if [[ $dry_run ]]; then
    queued describe '--format=value(state.state)'
    state=ABSENT
    if ((answered++)); then state=ACTIVE; fi
    return
  fi
  if state=$(queued describe '--format=value(state.state)' 2>&1); then
    state=${state##*$'\n'}
  elif [[ $state == *NOT_FOUND* ]]; then
    state=ABSENT
  else
    log "cannot get the state: $state"
    state=UNKNOWN
  fi
}

nap() { if [[ ! $dry_run ]]; then pause "$poll"; fi; }

create() {
  local shape=("--node-id=$name") extra=()
  if ((slices > 1)); then shape=("--node-count=$slices" "--node-prefix=$name"); fi
  [[ ! $spot ]] || extra=(--spot)
  log "requesting $type"
  queued create "${shape[@]}" "--accelerator-type=$type" "--runtime-version=$version" \
    ${extra[@]+"${extra[@]}"}
}

remove() { queued delete --force --quiet; }

created='' was_active=''
up() {
  local failures=0 before=''
  while :; do
    look
    [[ $state == "$before" ]] || log "$name: $state"
    before=$state
    case $state in
      ACTIVE)
        was_active=1
        return ;;
      ABSENT)
        # A request that was never granted may be invalid; one that was granted before is valid.
        if create; then created=1
        elif [[ $was_active ]]; then log 'the request failed; trying again'
        else exit 1; fi ;;
      # Both stay in the list and keep the name until they are deleted.
      FAILED | SUSPENDED)
        if [[ $state == FAILED ]] && ((++failures > 3)); then
          log 'the request failed 4 times; see: gcloud compute tpus queued-resources describe'
          exit 1
        fi
        remove || log 'could not delete; trying again' ;;
    esac
    nap
  done
}

# Commands for workers. $HOME/tarflow has the source, the venv, train.log, pid, exit_code and stopped.
# The images of some TPUs have a Python that is too old; uv installs another.
install="if [ -e tarflow/pid ]; then kill -TERM \$(cat tarflow/pid) 2>/dev/null || true
for wait in \$(seq 120); do kill -0 \$(cat tarflow/pid) 2>/dev/null || break; sleep 1; done
kill -KILL \$(cat tarflow/pid) 2>/dev/null || true; fi
rm -rf tarflow/source && mkdir -p tarflow/source
tar -xzf tarflow_source.tar.gz -C tarflow/source
if [ ! -x tarflow/venv/bin/python ]; then
if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then python3 -m venv tarflow/venv
else python3 -m pip install --quiet --user uv && python3 -m uv venv --seed --python 3.12 tarflow/venv; fi; fi
tarflow/venv/bin/python -m pip install --quiet './tarflow/source[tpu,gcs]'"
train=$(quoted launch/supervise.sh --watch_maintenance "--max_restarts=$max_restarts" \
  "--min_uptime=$min_uptime" "--wait=$wait")
train+=" --exit_file=\"\$HOME/tarflow/exit_code\" -- "
train+=$(quoted python -m tarflow_jax.main --distributed=on ${rest[@]+"${rest[@]}"})
start="set -e
cd tarflow && rm -f exit_code stopped && cd source && export PATH=\"\$HOME/tarflow/venv/bin:\$PATH\"
nohup setsid $train </dev/null >>../train.log 2>&1 & echo \$! >\$HOME/tarflow/pid"
look_at_worker="cd tarflow 2>/dev/null || { echo tarflow lost; exit 0; }
if [ -e exit_code ] && [ ! -e stopped ]; then echo tarflow \$(cat exit_code)
elif [ ! -e exit_code ] && [ -e pid ] && kill -0 \$(cat pid) 2>/dev/null; then echo tarflow running
elif [ -e stopped ]; then echo tarflow stopped; else echo tarflow lost; fi"
stop="cd tarflow && touch stopped && kill -TERM \$(cat pid) 2>/dev/null || true"

deploy() {
  local archive=${TMPDIR:-/tmp}/$name-source.tar.gz node
  execute tar -czf "$archive" --exclude=./.git --exclude=./.venv --exclude=./runs -C "$source" . ||
    return
  for node in "${nodes[@]}"; do
    execute gcloud compute tpus tpu-vm scp "$archive" "$node:tarflow_source.tar.gz" "${where[@]}" \
      --quiet --worker=all || return
  done
  on_workers "set -e
${setup:+$setup
}$install" || return
  on_workers "$start"
}

# Sets `workers` to one word per worker: running, stopped, lost, or an exit code.
look_at_workers() {
  local answer line
  workers=()
  if [[ $dry_run ]]; then
    on_workers "$look_at_worker"
    workers=(0)
    return
  fi
  answer=$(on_workers "$look_at_worker") || return
  while read -r line; do workers+=("$line"); done < <(sed -n 's/^tarflow //p' <<<"$answer")
  ((${#workers[@]}))
}

# Prints the exit code of the run, nothing while it is running, or `lost`.
verdict() {
  local worker code=0 running='' lost='' stopped=''
  for worker in "${workers[@]}"; do
    case $worker in
      0) ;;
      running) running=1 ;;
      stopped) stopped=1 ;;
      # It was not stopped by the user, so its machine is shutting down or was restarted.
      75 | lost) lost=1 ;;
      *) code=$worker ;;
    esac
  done
  if ((code)); then echo "$code"
  elif [[ $stopped ]]; then [[ $running ]] || echo 75
  elif [[ $lost ]]; then echo lost
  elif [[ ! $running ]]; then echo 0; fi
}

all_running() {
  local worker
  look_at_workers || return
  for worker in "${workers[@]}"; do [[ $worker == running ]] || return; done
}

run() {
  local lost=0 result='' start_again=1
  up
  if [[ ! $created ]] && all_running; then
    log 'already running; monitoring it'
    start_again=''
  fi
  while :; do
    if [[ $start_again ]]; then
      up
      deploy || { log 'could not start on all workers; trying again'; nap; continue; }
      log 'started on all workers'
      start_again='' lost=0
    fi
    nap
    look
    case $state in
      ACTIVE) ;;
      SUSPENDING | SUSPENDED | FAILED | ABSENT | DELETING)
        log "$name: $state; restarting from the newest checkpoint"
        start_again=1
        continue ;;
      *) continue ;;
    esac
    look_at_workers || continue
    result=$(verdict)
    case $result in
      '') lost=0 ;;
      # The machine may be shutting down; check three times if the state changes.
      lost) if ((++lost >= 3)); then start_again=1; fi ;;
      *) break ;;
    esac
  done
  log "exit code $result; the TPU still exists, \`down\` deletes it"
  if ((result)) && ! on_workers "$stop"; then log 'some workers could not be stopped'; fi
  [[ ! $logs ]] || fetch_logs
  exit "$result"
}

fetch_logs() {
  local node count worker prefix slice=0
  execute mkdir -p "$logs"
  for node in "${nodes[@]}"; do
    prefix=$logs/
    ((slices == 1)) || prefix=$logs/slice_$((slice++))_
    local ask=(gcloud compute tpus tpu-vm describe "$node" "${where[@]}"
      '--format=value(networkEndpoints.len())')
    if [[ $dry_run ]]; then
      execute "${ask[@]}"
      count=1
    else
      count=$("${ask[@]}")
    fi
    for ((worker = 0; worker < count; worker++)); do
      execute gcloud compute tpus tpu-vm scp "$node:tarflow/train.log" \
        "${prefix}worker_$worker.log" "${where[@]}" --quiet "--worker=$worker"
    done
  done
}

case $action in
  up) up ;;
  run) run ;;
  logs)
    : "${logs:=logs}"
    fetch_logs ;;
  stop) on_workers "$stop" ;;
  down) remove ;;
esac
