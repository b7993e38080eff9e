# shellcheck shell=bash
# Sourced by the launchers: messages, quoting, validation. Exit codes are the commands' own:
# 0 done, 1 failed, 2 wrong input.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  echo "error: bash $BASH_VERSION is too old, 5.1 or newer is needed." >&2
  exit 2
fi

DRY_RUN="${DRY_RUN:-}"

# say WORD...: print what happens, with the time; under --dry-run print warnings only.
say() { [[ -n "$DRY_RUN" && "$1" != warning* ]] || printf '%(%H:%M:%S)T %s\n' -1 "$*" >&2; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}
wrong() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# usage FILE: the comment at its head is its help.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); if (!/^SBATCH/) print }' "$1"; }

# quote WORD...: one line that a shell reads back as exactly these words.
quote() {
  local words
  printf -v words '%q ' "$@"
  printf '%s' "${words% }"
}

# execute COMMAND...: run it, or print it under --dry-run.
execute() {
  if [ -n "$DRY_RUN" ]; then
    printf '%s\n' "$(quote "$@")"
  else
    "$@"
  fi
}

# interruptible ERROR COMMAND...: what it says goes to the file ERROR, if not "". A signal ends `wait` at once, and
# a command in the foreground only when it is over. (Redirected here, since a trap writes where its line does.)
interruptible() {
  local error="$1"
  shift
  if [ -n "$error" ]; then "$@" <&0 2> "$error" & else "$@" <&0 & fi
  wait "$!"
}

# check WHAT VALUE REGEX WANTED: end with exit code 2 unless the value matches.
check() {
  [[ "$2" =~ $3 ]] || wrong "$1=$(quote "$2") is not $4."
}
check_name() {
  check "$1" "$2" '^[a-z][a-z0-9-]*$' "a name of lower-case letters, digits and '-' that begins with a letter"
  [[ "$2" != *- && ${#2} -le 40 ]] || wrong "$1=$2 ends in '-' or has more than 40 characters."
}
check_number() { check "$1" "$2" '^(0|[1-9][0-9]{0,5})$' "a whole number"; }
check_positive() { check "$1" "$2" '^[1-9][0-9]{0,5}$' "a whole number of at least 1"; }
check_zone() { check "$1" "$2" '^[a-z]+-[a-z]+[0-9]+-[a-z][a-z0-9]*$' "a zone such as us-east5-b"; }
check_project() { check "$1" "$2" '^[a-z][a-z0-9.:-]*$' "a project id such as my-project-123"; }

# value FLAG "$@": what follows the flag. Don't call it before `&&`: there its failure would not end
# the script.
value() {
  [ $# -ge 3 ] || wrong "$1 needs a value. See --help."
  printf '%s' "$3"
}

# config_of "$@": the FILE of a command's --config (the last one counts).
config_of() {
  local word config="" previous=""
  for word in "$@"; do
    if [[ "$word" == --config=* ]]; then config="${word#*=}"; fi
    if [ "$previous" = --config ]; then config="$word"; fi
    previous="$word"
  done
  printf '%s' "$config"
}

# setting KEY "$@": the value of KEY=VALUE among a command's words (the last one counts), or of
# run.dir in its --config file.
setting() {
  local key="$1" word value_given="" config
  shift
  for word in "$@"; do
    if [[ "$word" == "$key="* ]]; then value_given="${word#*=}"; fi
  done
  config="$(config_of "$@")"
  if [ -z "$value_given" ] && [ -f "$config" ]; then
    value_given="$(awk -v section="${key%%.*}:" -v name="${key##*.}:" '
      /^[^ #]/ { inside = ($1 == section) } inside && $1 == name { print $2; exit }' "$config")"
  fi
  printf '%s' "$value_given"
}
