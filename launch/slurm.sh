#!/usr/bin/env bash
# Trains on a Slurm cluster, one task per GPU, through time limits and preemptions.
#
#   sbatch [SBATCH FLAGS] launch/slurm.sh [FLAGS] -- ARGS OF tarflow_jax.main
#
# Run it from the top of the checkout, or without sbatch inside an allocation. The defaults below
# request one node with 8 GPUs. For four nodes, use sbatch --nodes=4; for nodes with 4 GPUs, add
# --gpus-per-node=4 --ntasks-per-node=4.
#
#   --logs=DIR        write output of task T to DIR/slurm_JOB_task_T.log (logs)
#   --max_restarts=N  consecutive crashes before it gives up (20)
#   --min_uptime=S    a run of at least S seconds resets the count of crashes (600)
#   --wait=S          seconds before a restart after a crash (10)
#   --no_requeue      exit with 75 instead of requeueing the job
#   --dry_run         print the commands and run nothing
#
# 120 seconds before the time limit, the program saves a checkpoint and the job requeues itself.

#SBATCH --job-name=tarflow
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm_%j.log

set -euo pipefail
# sbatch runs a copy of this file from another folder.
here=$(dirname "${BASH_SOURCE[0]}")
[[ -f $here/common.sh ]] || here=${SLURM_SUBMIT_DIR:-.}/launch
# shellcheck source=common.sh
source "$here/common.sh"

logs=logs max_restarts=20 min_uptime=600 wait=10 no_requeue=''
parse_flags 'logs= max_restarts= min_uptime= wait= no_requeue' "$@"
((${#words[@]} == 0)) || refuse "${words[0]} is not a flag"
whole_numbers max_restarts min_uptime wait
job=${SLURM_JOB_ID:-}
if [[ ! $job ]]; then
  [[ $dry_run ]] || refuse 'there is no Slurm job here; start this by sbatch or inside salloc'
  job=JOB
fi

# JAX assigns each task the GPU with its index on the node, so each task must see all GPUs.
steps=(srun --kill-on-bad-exit=1 --gpu-bind=none "--output=$logs/slurm_%j_task_%t.log"
  --open-mode=append python -m tarflow_jax.main ${rest[@]+"${rest[@]}"})

signalled='' step=''
# On SIGTERM, srun would stop the tasks itself and soon kill them. scancel only forwards the signal,
# to the tasks but not to this script.
forward() {
  stopping=$1 signalled=1
  log "SIG$1"
  [[ $step ]] || return 0
  scancel "--signal=$1" "$job" || kill -s "$1" "$step" 2>/dev/null || true
}
trap 'forward TERM' TERM
trap 'forward INT' INT

execute mkdir -p "$logs"
crashes=0
while :; do
  if [[ $dry_run ]]; then
    execute "${steps[@]}"
    exit
  fi
  log "start: $(quoted "${steps[@]}")"
  began=$SECONDS
  "${steps[@]}" &
  step=$!
  # A signal may have arrived before the step existed.
  [[ ! $stopping ]] || forward "$stopping"
  while :; do
    signalled='' code=0
    wait "$step" || code=$?
    # A signal to this script ends `wait` early; the code is then not that of srun.
    [[ $signalled ]] || break
  done
  step=''
  log "exit code $code"
  # srun returns the highest code, and kills slower tasks when the first one ends.
  if [[ $stopping == TERM ]] && ! is_final "$code"; then code=75; fi
  if is_final "$code" || [[ $stopping == INT ]]; then exit "$code"; fi
  if ((code == 75)); then
    [[ ! $no_requeue ]] || exit 75
    log 'requeueing the job'
    scontrol requeue "$job"
    exit 75
  fi
  if ((SECONDS - began >= min_uptime)); then crashes=0; fi
  crashes=$((crashes + 1))
  if ((crashes > max_restarts)); then
    log "crashed $crashes times in a row; giving up"
    exit "$code"
  fi
  log "crash $crashes of at most $max_restarts; restart in $wait s"
  pause "$wait"
  if [[ $stopping ]]; then code=75; [[ $no_requeue ]] || scontrol requeue "$job"; exit "$code"; fi
done
