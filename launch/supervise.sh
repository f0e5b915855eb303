#!/usr/bin/env bash
# Runs a command and starts it again when it was preempted or crashed.
#
#   launch/supervise.sh [FLAGS] -- COMMAND...
#
#   --max_restarts=N     crashes in a row before it gives up (20)
#   --min_uptime=S       a run of at least S seconds makes the count start again (600)
#   --wait=S             seconds before a restart, doubled with every crash up to 300 (5)
#   --watch_maintenance  on Google Compute Engine: send SIGTERM to the command on notice that the
#                        machine will go away, so that it saves a checkpoint
#   --poll=S             seconds between looks for such a notice (5)
#   --exit_file=FILE     leave the exit code in FILE at the end
#   --dry_run            print the command and run nothing
#
# Exit codes of the command: 0, 2, 76 and 130 end; 75 restarts and does not count; any other is a
# crash. SIGTERM and SIGINT go on to the command, whose exit code is then the one returned.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

max_restarts=20 min_uptime=600 wait=5 poll=5 watch_maintenance='' exit_file=''
parse_flags 'max_restarts= min_uptime= wait= poll= exit_file= watch_maintenance' "$@"
whole_numbers max_restarts min_uptime wait
((${#rest[@]})) || refuse 'the command is missing; it stands after --'
((${#words[@]} == 0)) || refuse "${words[0]} is not a flag; the command stands after --"
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

# The notice that this machine will go away, or nothing. Live migration is not one.
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

# Tells the process $1 once. Ends with this script even if that is killed.
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

# Sets `code` to the command's. Job control gives the command a process group of its own: Ctrl-C
# reaches it once, through us, and what it leaves behind can be found and ended.
run_once() {
  set -m
  "${command[@]}" </dev/null &
  child=$!
  if [[ $watch_maintenance ]]; then
    watch "$child" &
    watcher=$!
  fi
  set +m
  # A signal that came before there was a child to send it to.
  if [[ $stopping ]]; then kill -s "$stopping" "$child" 2>/dev/null || true; fi
  while :; do
    signalled='' code=0
    wait "$child" 2>/dev/null || code=$?
    # A signal to us ends `wait` early; then the code is not yet the command's.
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
    # Started now, the command would only be stopped again.
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
# Told to stop while nothing ran.
if [[ $stopping == INT ]]; then finish 130; else finish 75; fi
