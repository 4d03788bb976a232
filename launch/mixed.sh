#!/usr/bin/env bash
# Mixed precision from a configuration to a quantized model: launch/mixed.sh CONFIG BUDGET [--set KEY=VALUE ...]
#
#   RANKS=16 launch/mixed.sh configs/smollm2-mixed.yaml 3.25
#
# BUDGET: stored bits a weight, scales included. One quantization for each width of sensitivity.gram.bits comes first, as
# `isobath allocate` must see what the solver makes of each (docs/method.md, Mixed precision). All results lie in the run
# directory of the configuration: statistics/, 3-bit/ …, scores/, and for each budget bits-3.25.yaml and mixed-3.25/. Called
# again, it does what is left: of another budget the last step.
#
# RANKS            of every step; 2
# LAUNCHER         what starts that many ranks; "mpirun --quiet -n RANKS"
# ISOBATH_PROGRAM  build/cpu/bin/isobath
# SCORE_LENGTH     tokens of each calibration sequence that are scored; 256: many short sequences say more than few long ones
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if (($# < 2)); then
  sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
source "$here/launch/setup.sh"
isobath_environment
config=$1 budget=$2
shift 2
program=${ISOBATH_PROGRAM:-$here/build/cpu/bin/isobath}
read -ra launcher <<<"${LAUNCHER:-mpirun --quiet -n ${RANKS:-2}}"

value_of() { isobath_value_of "$program" "$1" "$config" --ranks "${RANKS:-2}" "${settings[@]}"; }
step() {
  local what=$1 output=$2
  shift 2
  echo "mixed: $what in $output"
  "${launcher[@]}" "$program" "$what" "$config" "${settings[@]}" --set "output=$output" "$@" --resume-or-start
}

settings=("$@")
output=$(value_of output)
length=$(value_of calibration.length | awk '{ print $1 }')
read -ra widths <<<"$(value_of sensitivity.gram.bits | grep -oE '\[[^]]*\]' | tr -d '[]' | tr ',' ' ')"
if ((${#widths[@]} < 2)); then
  echo "mixed: $config: expected two widths or more in sensitivity.gram.bits, found ${#widths[@]}" >&2
  exit 2
fi

step measure "$output/statistics" --set 'sensitivity.gram.bits=[]'
reuse=(--set "sensitivity.reuse=$output/statistics/measure")
checkpoints=""
for bits in "${widths[@]}"; do
  # Without correction for the prefix: it answers errors of one width, and those before it may get another.
  step quantize "$output/$bits-bit" --set "quantization.bits=$bits" --set quantization.asymmetric.correction=none "${reuse[@]}"
  checkpoints+="${checkpoints:+, }$output/$bits-bit/model"
done
score_length=${SCORE_LENGTH:-256}
scored=(--set "calibration.length=$((score_length < length ? score_length : length))")
step measure "$output/scores" "${scored[@]}" --set "sensitivity.gram.checkpoints=[$checkpoints]"
"$program" allocate "$config" "${settings[@]}" "${scored[@]}" --set "output=$output/scores" --budget "$budget" --output "$output/bits-$budget.yaml"
step run "$output/mixed-$budget" "${reuse[@]}" --set "quantization.allocation=$output/bits-$budget.yaml"
