# shellcheck shell=bash
# Sourced by the scripts of this folder: flags, quoting, waiting and the log.

program=$(basename "$0")
words=()      # arguments that are not flags
rest=()       # arguments after --
dry_run=''

# The comment at the top of a script is its usage text.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

log() { printf '%s %s: %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$program" "$*" >&2; }

refuse() {
  printf '%s: %s; --help lists the flags.\n' "$program" "$*" >&2
  exit 2
}

# Quotes words as one line of shell.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# Runs a command, or with --dry_run prints it.
execute() {
  if [[ $dry_run ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# parse_flags 'NAME= SWITCH ...' "$@" sets the variable of each given flag (1 for a switch).
parse_flags() {
  # The underscores keep them from hiding the variable of a flag.
  local _known=" ${1//[[:space:]]/ } dry_run " _arg _flag
  shift
  while (($#)); do
    _arg=$1
    shift
    _flag=${_arg#--}
    _flag=${_flag%%=*}
    case $_arg in
      --) rest=("$@"); return ;;
      --help) usage; exit 0 ;;
      --*=*)
        [[ $_known == *" $_flag= "* ]] || refuse "--$_flag=... is not a flag"
        printf -v "$_flag" %s "${_arg#*=}" ;;
      --*)
        [[ $_known != *" $_flag= "* ]] || refuse "--$_flag needs a value, as in --$_flag=VALUE"
        [[ $_known == *" $_flag "* ]] || refuse "$_arg is not a flag"
        printf -v "$_flag" 1 ;;
      -*) refuse "$_arg is not a flag" ;;
      *) words+=("$_arg") ;;
    esac
  done
}

# Checks that these variables are set.
require() {
  local _flag
  for _flag; do [[ ${!_flag} ]] || refuse "--$_flag is missing"; done
}

# Checks that these variables are whole numbers, with few digits so that arithmetic cannot overflow.
whole_numbers() {
  # A variable, because early versions of bash 3.2 do not parse a pattern with brackets.
  local _flag _whole='^(0|[1-9][0-9]{0,8})$'
  for _flag; do
    [[ ${!_flag} =~ $_whole ]] || refuse "--$_flag=${!_flag} is not a whole number"
  done
}

# Sleeps one second at a time. Traps run in between; setting `stopping` ends the pause.
stopping=''
pause() {
  local i
  for ((i = 0; i < ${1%%.*}; i++)); do
    [[ ! $stopping ]] || return 0
    sleep 1
  done
  if [[ $1 == *.* ]]; then sleep "0.${1#*.}"; fi
}

# Exit codes of the training program after which a restart would not help.
is_final() { [[ $1 == 0 || $1 == 2 || $1 == 76 || $1 == 130 ]]; }

# A prefix for commands that must end with this script, even if it is killed.
# shellcheck disable=SC2034  # the scripts use it
with_me=()
# shellcheck disable=SC2034
if command -v setpriv >/dev/null; then with_me=(setpriv --pdeathsig=TERM); fi
