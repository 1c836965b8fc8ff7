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

for name in "$@"; do
  [[ " ${parts[*]} " == *" $name "* ]] || { echo "no part $name; there are: ${parts[*]}" >&2; exit 2; }
done
case $device in
  cpu) ;;
  cuda) "$python" - <<'EOF' || exit 2 ;;
import sys

fix = "DEVICE=cpu tries the parts at a tiny size without a GPU, PYTHON names another interpreter"
try:
    import torch

    torch.cuda.init()
    torch.cuda.get_device_name()
except Exception as error:
    sys.exit(f"no CUDA device can be used: {str(error).splitlines()[0]}; {fix}")
EOF
  *) echo "DEVICE is cuda or cpu, and not $device" >&2; exit 2 ;;
esac

# Of a folder with another name, dill (of datasets) would pickle pyarrow whole, which fails.
site=.gpu-site/site-packages
if [ -n "${WHEELS:-}" ] && [ ! -d "$site" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target .gpu-site.part "$WHEELS"/*.whl
  mkdir -p .gpu-site
  mv .gpu-site.part "$site"
fi
export PYTHONPATH="$PWD:$PWD/$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

checks() { # checks NUMBER ARGUMENTS...: those of a GPU; with DEVICE=cpu the same ones there
  local log="$results/gpu-checks-$1.txt" chosen=(-m gpu)
  shift
  [ "$device" = cuda ] || chosen=(-m "not gpu")
  "$python" -m pytest -v -n 0 -p no:cacheprovider "${chosen[@]}" "$@" 2>&1 | tee "$log"
  grep -qE "[0-9]+ passed" "$log" || { echo "no check of part $name has run" >&2; return 1; }
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
  esac
}

[ $# -gt 0 ] || set -- "${parts[@]}"
failed=()
signal=0
export -f part steps checks
export python device results
for name in "$@"; do
  began=$SECONDS
  # Ended after nine minutes, a part leaves what it has measured until then. It has a process group
  # of its own (set -m: one that does not ignore SIGINT), to which `timeout` passes signals on.
  set -m
  timeout --signal=INT --kill-after=20 540 bash -euo pipefail -c "name=$name; part $name" &
  running=$!
  set +m
  for number in 1 2 15; do
    trap "signal=$number; kill -$number $running || true" "$number"
  done
  status=0
  wait "$running" || status=$?
  while kill -0 "$running" 2>/dev/null; do # a signal ended the first wait
    wait "$running" || true
  done
  trap - 1 2 15
  echo "$name: $((SECONDS - began)) s"
  [ "$signal" -eq 0 ] || { echo "$name was interrupted, and what comes after it is not begun" >&2; exit $((128 + signal)); }
  [ "$status" -eq 0 ] || failed+=("$name")
done
[ ${#failed[@]} -eq 0 ] || { echo "not done whole: ${failed[*]}" >&2; exit 1; }
