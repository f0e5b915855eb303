#!/usr/bin/env bash
# Runs a command and restarts it after a preemption or a crash.
#
#   launch/supervise.sh [FLAGS] -- COMMAND...
#
#   --max_restarts=N     consecutive crashes before it gives up (20)
#   --min_uptime=S       a run of at least S seconds resets the count of crashes (600)
#   --wait=S             seconds before a restart, doubled with every crash up to 300 (5)
#   --watch_maintenance  on Google Compute Engine: send SIGTERM to the command on notice that the
#                        machine will be shut down, so that it saves a checkpoint
#   --poll=S             seconds between checks for such a notice (5)
#   --exit_file=FILE     write the exit code to FILE at the end
#   --dry_run            print the command and run nothing
#
# Exit codes of the command: 0, 2, 76 and 130 are final; 75 restarts without counting; any other is
# a crash. SIGTERM and SIGINT are forwarded to the command; its exit code is then returned.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

max_restarts=20 min_uptime=600 wait=5 poll=5 watch_maintenance='' exit_file=''
parse_flags 'max_restarts= min_uptime= wait= poll= exit_file= watch_maintenance' "$@"
whole_numbers max_restarts min_uptime wait
((${#rest[@]})) || refuse 'the command is missing; write it after --'
((${#words[@]} == 0)) || refuse "${words[0]} is not a flag; write the command after --"
command=(${with_me[@]+"${with_me[@]}"} "${rest[@]}")
if [[ $dry_run ]]; then
  execute "${command[@]}"
  exit
fi

child='' watcher='' signalled='' code=0

forward() {
  stopping=$1 signalled=1
  log "SIG$1"
  if [[ $child ]]; then kill -s "$1" "$child" 2>/dev/null || true; fi
}
trap 'forward TERM' TERM HUP
trap 'forward INT' INT

finish() {
  if [[ $exit_file ]]; then echo "$1" >"$exit_file"; fi
  exit "$1"
}

# Prints a notice that this machine will be shut down, if there is one. Live migration is not one.
notice() {
  local key value
  for key in maintenance-event preempted; do
    value=$(curl -fsS -m 5 -H 'Metadata-Flavor: Google' \
      "http://metadata.google.internal/computeMetadata/v1/instance/$key" 2>/dev/null) || continue
    case $value in
      '' | NONE | FALSE | MIGRATE_*) ;;
      *) echo "$key=$value"; return ;;
    esac
  done
}

# Sends SIGTERM to process $1 once, on notice. Ends with this script, even if that is killed.
watch() {
  local found
  trap - TERM INT HUP
  while kill -0 $$ 2>/dev/null; do
    found=$(notice)
    if [[ $found ]]; then
      log "$found: SIGTERM to the command"
      kill -TERM "$1" 2>/dev/null || true
      return
    fi
    sleep "$poll"
  done
}

# Sets `code` to the exit code of the command. Job control gives the command its own process group:
# Ctrl-C reaches it once, through this script, and leftover processes can be found and killed.
run_once() {
  set -m
  "${command[@]}" </dev/null &
  child=$!
  if [[ $watch_maintenance ]]; then
    watch "$child" &
    watcher=$!
  fi
  set +m
  # A signal may have arrived before the child existed.
  if [[ $stopping ]]; then kill -s "$stopping" "$child" 2>/dev/null || true; fi
  while :; do
    signalled='' code=0
    wait "$child" 2>/dev/null || code=$?
    # A signal to this script ends `wait` early; the code is then not that of the command.
    [[ $signalled ]] || break
  done
  # A worker left behind by a crash would hold the accelerator.
  kill -KILL -- "-$child" 2>/dev/null || true
  child=''
  if [[ $watcher ]]; then
    kill -KILL -- "-$watcher" 2>/dev/null || true
    wait "$watcher" 2>/dev/null || true
    watcher=''
  fi
}

crashes=0
while :; do
  if [[ $watch_maintenance ]]; then
    # Do not start the command now; it would be stopped again.
    while [[ ! $stopping ]] && found=$(notice) && [[ $found ]]; do
      log "$found: waiting until it is over"
      pause "$poll"
    done
  fi
  [[ ! $stopping ]] || break
  log "start: $(quoted "${rest[@]}")"
  began=$SECONDS
  run_once
  log "exit code $code"
  if [[ $stopping ]] || is_final "$code"; then finish "$code"; fi
  delay=$wait
  if ((code != 75)); then
    if ((SECONDS - began >= min_uptime)); then crashes=0; fi
    crashes=$((crashes + 1))
    if ((crashes > max_restarts)); then
      log "crashed $crashes times in a row; giving up"
      finish "$code"
    fi
    delay=$((wait << (crashes < 10 ? crashes - 1 : 9)))
    delay=$((delay < 300 || wait > 300 ? delay : 300))
    log "crash $crashes of at most $max_restarts; restart in $delay s"
  fi
  pause "$delay"
done
# A signal arrived while nothing was running.
if [[ $stopping == INT ]]; then finish 130; else finish 75; fi
