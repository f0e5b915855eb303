#!/usr/bin/env bash
# Trains on a Slurm cluster, one task per GPU, through time limits and preemptions.
#
#   sbatch [SBATCH FLAGS] launch/slurm.sh [FLAGS] -- ARGS OF tarflow_jax.main
#
# from the top of the checkout; or the same without sbatch, inside an allocation. The defaults below
# ask for a node of 8 GPUs: for four, sbatch --nodes=4; for nodes of 4 GPUs, also --gpus-per-node=4
# --ntasks-per-node=4.
#
#   --logs=DIR        output of task T goes to DIR/slurm_JOB_task_T.log (logs)
#   --max_restarts=N  crashes in a row before it gives up (20)
#   --min_uptime=S    a run of at least S seconds makes the count start again (600)
#   --wait=S          seconds before a restart after a crash (10)
#   --no_requeue      exit with 75 where the job would put itself back into the queue
#   --dry_run         print the commands and run nothing
#
# 120 seconds before the time limit the program is told to save; the job then queues again.

#SBATCH --job-name=tarflow
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm_%j.log

set -euo pipefail
# sbatch runs a copy of this file from a folder of its own.
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

# JAX gives each task the GPU of its number on the node, so each must see all of the node's.
steps=(srun --kill-on-bad-exit=1 --gpu-bind=none "--output=$logs/slurm_%j_task_%t.log"
  --open-mode=append python -m tarflow_jax.main ${rest[@]+"${rest[@]}"})

signalled='' step=''
# srun would end the tasks itself on SIGTERM, and soon kill them. scancel only passes the signal on,
# to the tasks and not to this script.
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
  # A signal that came before there was a step to send it to.
  [[ ! $stopping ]] || forward "$stopping"
  while :; do
    signalled='' code=0
    wait "$step" || code=$?
    # A signal to us ends `wait` early; then the code is not yet srun's.
    [[ $signalled ]] || break
  done
  step=''
  log "exit code $code"
  # srun returns the highest code, and the first task to end makes it kill slower ones.
  if [[ $stopping == TERM ]] && ! is_final "$code"; then code=75; fi
  if is_final "$code" || [[ $stopping == INT ]]; then exit "$code"; fi
  if ((code == 75)); then
    [[ ! $no_requeue ]] || exit 75
    log 'back into the queue'
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
