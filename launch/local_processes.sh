#!/usr/bin/env bash
# Runs the training program as N processes on this machine; restarts all of them if one fails.
#
#   launch/local_processes.sh N [FLAGS] -- ARGS OF tarflow_jax.main
#
#   --platform=cpu|gpu  cpu (default): each process has --devices devices; gpu: process i has GPU i
#   --devices=K         devices of each process on cpu (1)
#   --port=P            port of the coordinator (by default a new free port at every start)
#   --logs=DIR          write output to DIR/process_I.log; that of process 0 also appears here (logs)
#   --grace=S           seconds from SIGTERM to SIGKILL after another process has failed (30)
#   --once              do not restart
#   --max_restarts=M --min_uptime=S --wait=S  as in supervise.sh
#   --dry_run           print the commands and run nothing
#
# Exit code: 0 if all finished, 75 after SIGTERM, otherwise that of the first process that failed.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

platform=cpu devices=1 port='' logs=logs grace=30 once='' max_restarts=20 min_uptime=600 wait=5
parse_flags 'platform= devices= port= logs= grace= once max_restarts= min_uptime= wait=' "$@"
((${#words[@]})) || refuse 'N, the number of processes, is missing'
((${#words[@]} == 1)) || refuse "${words[1]} is not a flag"
count=${words[0]}
[[ $count =~ ^[1-9][0-9]{0,3}$ ]] || refuse "$count is not a number of processes"
whole_numbers devices grace max_restarts min_uptime wait
[[ ! $port ]] || whole_numbers port
[[ $platform == cpu || $platform == gpu ]] || refuse "--platform=$platform is neither cpu nor gpu"

if [[ ! $once && ! $dry_run ]]; then
  again=("$(dirname "${BASH_SOURCE[0]}")/local_processes.sh" "$count" --once "--platform=$platform"
    "--devices=$devices" "--logs=$logs" "--grace=$grace")
  [[ ! $port ]] || again+=("--port=$port")
  exec "$(dirname "${BASH_SOURCE[0]}")/supervise.sh" "--max_restarts=$max_restarts" \
    "--min_uptime=$min_uptime" "--wait=$wait" -- "${again[@]}" -- ${rest[@]+"${rest[@]}"}
fi

# Choose a port below those of outgoing connections.
while [[ ! $port ]]; do
  port=$((20000 + RANDOM % 12000))
  if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then port=''; fi
done

IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
# Sets `command` to the command of process $1.
command_of() {
  command=(${with_me[@]+"${with_me[@]}"} env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$count"
    "JAX_PROCESS_ID=$1")
  if [[ $platform == cpu ]]; then
    local flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    command+=(JAX_PLATFORMS=cpu "XLA_FLAGS=$flags")
  else
    command+=("CUDA_VISIBLE_DEVICES=${gpus[$1]:-$1}")
  fi
  command+=(python -m tarflow_jax.main ${rest[@]+"${rest[@]}"})
}

if [[ $dry_run ]]; then
  for ((i = 0; i < count; i++)); do
    command_of "$i"
    execute "${command[@]}"
  done
  exit
fi

pids=() failed='' terminated_at=''
signal_all() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill -s "$1" -- "$pid" 2>/dev/null || true; done
}
# Each process leads a process group with all its children.
kill_groups() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do kill -KILL -- "-$pid" 2>/dev/null || true; done
}
forward() {
  stopping=$1
  signal_all "$1"
}
trap kill_groups EXIT
trap 'forward TERM' TERM HUP
trap 'forward INT' INT

mkdir -p "$logs"
# Descriptor 9 is fixed because bash before 4.1 cannot choose a free one.
exec 9> >(exec tee -ia "$logs/process_0.log")
tee=$!
for ((i = 0; i < count; i++)); do
  command_of "$i"
  set -m
  if ((i == 0)); then
    "${command[@]}" </dev/null >&9 2>&1 9>&- &
  else
    "${command[@]}" </dev/null >>"$logs/process_$i.log" 2>&1 9>&- &
  fi
  set +m
  pids[i]=$!
done
exec 9>&-
log "$count processes, coordinator 127.0.0.1:$port, output in $logs"
if [[ $stopping ]]; then signal_all "$stopping"; fi  # it arrived during the start

running=("${!pids[@]}")
while ((${#running[@]})); do
  # Poll, because `wait -n` of older versions of bash misses processes that ended before the call.
  left=()
  for i in "${running[@]}"; do
    if kill -0 "${pids[i]}" 2>/dev/null; then
      left+=("$i")
      continue
    fi
    code=0
    wait "${pids[i]}" 2>/dev/null || code=$?
    ((code == 0)) || log "process $i ended with exit code $code"
    # If several fail together, prefer an exit code that a restart cannot fix.
    if ((code)) && { [[ ! $failed ]] || { [[ ! $terminated_at ]] && is_final "$code"; }; }; then
      failed=$code
    fi
  done
  running=(${left[@]+"${left[@]}"})
  if [[ $failed && ! $terminated_at ]]; then
    # Processes that received a signal are already saving.
    [[ $stopping ]] || signal_all TERM
    terminated_at=$SECONDS
  fi
  if [[ $terminated_at ]] && ((SECONDS - terminated_at >= grace)); then signal_all KILL; fi
  if ((${#running[@]})); then pause 0.2; fi
done
kill_groups
pids=()
wait "$tee" 2>/dev/null || true
if [[ $failed && $stopping == TERM ]] && ! is_final "$failed"; then failed=75; fi
exit "${failed:-0}"
