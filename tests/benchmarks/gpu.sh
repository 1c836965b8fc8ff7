#!/usr/bin/env bash
# All that waits for a CUDA device: checks, then times, in parts of at most nine minutes.
#
#     tests/benchmarks/gpu.sh download DIR   # where there is a network: the wheels of gpu-wheels.txt
#     WHEELS=DIR tests/benchmarks/gpu.sh PART...   # on the GPU; without PART: all parts, in their order
#
# It needs Python 3.11 or 3.12 and torch 2.11 or newer; the rest comes from the wheels in WHEELS, or is
# installed already. Nothing is installed into Python itself: wheels go to .gpu-site. Tables go to
# tests/benchmarks/results, outcomes of checks to results/gpu-checks-N.txt, line by line as they come.
# PYTHON names the interpreter, DEVICE=cpu tries the parts at a tiny size without a GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} device=${DEVICE:-cuda} results=tests/benchmarks/results
parts=(checks-1 checks-2 checks-3 step-1 step-2 step-3 step-4 step-5 profile memory sampling)
platforms=()
for tag in manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done

if [ "${1:-}" = download ]; then
  exec "$python" -m pip download --no-deps --only-binary=:all: --implementation cp --python-version "${FOR:-3.12}" \
    "${platforms[@]}" --dest "$2" --requirement tests/benchmarks/gpu-wheels.txt
fi

if [ -n "${WHEELS:-}" ] && [ ! -d .gpu-site ]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target .gpu-site.part "$WHEELS"/*.whl
  mv .gpu-site.part .gpu-site
fi
export PYTHONPATH="$PWD:$PWD/.gpu-site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

checks() { # checks NUMBER ARGUMENTS...: those of a GPU; with DEVICE=cpu the same ones there
  local log="$results/gpu-checks-$1.txt" chosen=(-m gpu)
  shift
  [ "$device" = cuda ] || chosen=(-m "not gpu")
  "$python" -m pytest -v -n 0 -p no:cacheprovider "${chosen[@]}" "$@" 2>&1 | tee "$log"
}

steps() { # steps NAME SHAPE ARGUMENTS...
  local name=$1 shape=$2
  shift 2
  [ "$device" = cuda ] || shape=tiny
  "$python" tests/benchmarks/train_step.py --name "$name" --shapes "$shape" "$@"
}

part() {
  case $1 in
    checks-1) checks 1 tests/gpu/test_steps.py tests/gpu/test_kernels.py ;;
    checks-2) checks 2 tests/gpu/test_little_memory.py tests/gpu/test_runs.py -k "not quickstart and not killed" ;;
    checks-3) checks 3 tests/gpu/test_runs.py -k "quickstart or killed" ;;
    step-1) steps gpu_step_qwen2.5-0.5b qwen2.5-0.5b --ways tbpo tbpo-cached trl trl-defaults ;;
    step-2) steps gpu_step_llama-3.2-1b llama-3.2-1b --ways tbpo tbpo-cached trl trl-defaults ;;
    step-3) steps gpu_step_llama-3.2-1b_all llama-3.2-1b --trained all --ways tbpo trl ;;
    step-4) steps gpu_step_llama-3-8b llama-3-8b --ways tbpo tbpo-cached trl --losses dpo tbpo_a ;;
    step-5) steps gpu_step_mistral-7b mistral-7b --ways tbpo tbpo-cached trl --losses dpo tbpo_a ;;
    profile)
      local shapes=(qwen2.5-0.5b llama-3.2-1b mistral-7b llama-3-8b)
      [ "$device" = cuda ] || shapes=(tiny)
      "$python" tests/benchmarks/profile_step.py --name gpu_profile --shapes "${shapes[@]}" ;;
    memory)
      local sizes=(--gpu)
      [ "$device" = cuda ] || sizes=(--cases 0)
      "$python" tests/benchmarks/memory.py --name gpu_memory "${sizes[@]}" ;;
    sampling)
      local model=(--shape llama-3.2-1b)
      [ "$device" = cuda ] || model=(--shape tiny --sizes 64)
      "$python" tests/benchmarks/sample.py --name gpu_sampling "${model[@]}" ;;
    *) echo "no part $1; there are: ${parts[*]}" >&2; return 2 ;;
  esac
}

[ $# -gt 0 ] || set -- "${parts[@]}"
failed=()
for name in "$@"; do
  [[ " ${parts[*]} " == *" $name "* ]] || { part "$name"; }
  began=$SECONDS
  # Ended after nine minutes, a part leaves what it has measured until then.
  export -f part steps checks
  export python device results
  timeout --signal=INT --kill-after=20 540 bash -euo pipefail -c "parts=(); part $name" || failed+=("$name")
  echo "$name: $((SECONDS - began)) s"
done
[ ${#failed[@]} -eq 0 ] || { echo "not done whole: ${failed[*]}" >&2; exit 1; }
