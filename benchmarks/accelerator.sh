#!/usr/bin/env bash
# Tests the GPU path on one card in at most 8 minutes. Prints a line of JSON for each result as soon
# as it is available.
#
#   benchmarks/accelerator.sh [FLAGS]                 on the machine with the card
#   benchmarks/accelerator.sh wheels --wheels=DIR     first, on a machine with a network
#
# It needs JAX (0.11 or later) with CUDA, PyTorch for the official code, and no network. `wheels`
# downloads the other packages (5 MB) into DIR, for a machine that has only these two.
#
#   --wheels=DIR      packages downloaded by `wheels`
#   --official=DIR    checkout of github.com/apple/ml-tarflow, for comparison
#   --out=FILE        write the lines to FILE too
#   --minutes=N       time limit in total (8); parts that do not finish are named
#   --only=A,B        some of attention, parity, train, sample and likelihood
#   --python=PYTHON   interpreter (python3)
#   --python_version=3.12   Python version of the machine with the card, for `wheels`
#   --tiny            run everything on a CPU, with a tiny flow
#   --dry_run         print the commands and run nothing
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../launch/common.sh
source "$here/../launch/common.sh"

wheels='' official='' out='' minutes=8 only=attention,parity,train,sample,likelihood python=python3
python_version=3.12 tiny=''
parse_flags 'wheels= official= out= minutes= only= python= python_version= tiny ' "$@"
whole_numbers minutes

# Packages that `import tarflow_jax` and the benchmarks need besides JAX and PyTorch.
packages=(
  flax msgpack PyYAML rich Pygments markdown-it-py mdurl typing_extensions optax absl-py
  safetensors tensorboardX protobuf packaging
)
if [[ ${words[*]} == wheels ]]; then
  require wheels
  platforms=()
  for libc in _2_28 _2_27 _2_24 _2_17 2014 2010 1; do
    platforms+=("--platform=manylinux${libc}_x86_64")
  done
  execute "$python" -m pip download --quiet --no-deps --only-binary=:all: "--dest=$wheels" \
    "--python-version=$python_version" --implementation=cp "${platforms[@]}" "${packages[@]}"
  exit
fi
((${#words[@]} == 0)) || refuse "${words[0]} is neither a flag nor wheels"

site=''
if [[ $wheels ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  execute "$python" -m pip install --quiet --no-index --no-deps --no-compile "--target=$site" "$wheels"/*.whl
fi
export PYTHONPATH="$here/..${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
deadline=$((SECONDS + 60 * minutes))

# part NAME SECONDS BENCHMARK.py ARGUMENTS: runs one part for at most SECONDS. If it fails or times
# out, prints a line that says so, and the next part starts.
part() {
  local name=$1 seconds=$2 left=$((deadline - SECONDS)) start=$SECONDS code=0
  shift 2
  [[ ",$only," == *",${name%% *},"* ]] || return 0
  if [[ $tiny ]] || ((left < seconds)); then seconds=$left; fi
  if ((seconds <= 0)); then
    report "{\"what\": \"$name\", \"skipped\": \"no time left\"}"
    return 0
  fi
  if [[ $dry_run ]]; then
    execute timeout "$seconds" "$python" "$here/$1" "${@:2}"
    return 0
  fi
  timeout --signal=INT --kill-after=5 "$seconds" "$python" "$here/$1" "${@:2}" | lines || code=$?
  if ((code)); then report "{\"what\": \"$name\", \"failed\": $code, \"seconds\": $((SECONDS - start))}"; fi
}
lines() { while IFS= read -r line; do report "$line"; done; }
report() {
  printf '%s\n' "$1"
  if [[ $out ]]; then printf '%s\n' "$1" >>"$out"; fi
}

device=(--device=gpu) large=(--size=imagenet64) repeats=()
if [[ $tiny ]]; then device=(--device=cpu) large=(--size=tiny) repeats=(--repeats=1); fi
theirs=()
if [[ $official ]]; then theirs=("--official=$official"); fi

# The most important parts run first, in case the time is too short for all.
part train 110 train_step.py "${device[@]}" "${large[@]}" "${repeats[@]}" --dtype=bfloat16 \
  --remat=attention --side=ours
if [[ $official ]]; then
  part 'train official' 60 train_step.py "${device[@]}" "${large[@]}" "${repeats[@]}" \
    --dtype=bfloat16 --side=official "${theirs[@]}"
fi
part attention 60 attention.py "${device[@]}" "${repeats[@]}"
part parity 90 parity.py "${device[@]}" ${tiny:+--cases=cond_gray}
part sample 120 sampling.py "${device[@]}" "${large[@]}" --repeats=1 --dtype=bfloat16 "${theirs[@]}"
part likelihood 60 likelihood.py "${device[@]}" "${large[@]}" "${repeats[@]}" "${theirs[@]}"
part 'sample in parallel' 120 sampling.py "${device[@]}" "${large[@]}" --repeats=1 \
  --dtype=bfloat16 --methods=jacobi,auto
if [[ $official ]]; then
  part 'train official compiled' 150 train_step.py "${device[@]}" "${large[@]}" "${repeats[@]}" \
    --dtype=bfloat16 --side=official --compile "${theirs[@]}"
fi
if [[ ! $tiny ]]; then
  part 'train recomputing less' 90 train_step.py "${device[@]}" "${large[@]}" --dtype=bfloat16 \
    --remat=dots --side=ours
fi
