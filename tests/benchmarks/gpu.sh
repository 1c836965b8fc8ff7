#!/bin/sh
# All that waits for a CUDA device, on one of them: checks, then times, into results/. How long it takes is not known yet.
#     pip install -e ".[test,quantization]" trl && tests/benchmarks/gpu.sh
set -eu
cd "$(dirname "$0")/../.."
python -m pytest -m gpu -n 0
python tests/benchmarks/attention.py --heads 32 --key-heads 8
python tests/benchmarks/train_step.py --name train_step_gpu --shapes qwen2.5-0.5b llama-3.2-1b mistral-7b
python tests/benchmarks/memory.py --name memory_gpu
