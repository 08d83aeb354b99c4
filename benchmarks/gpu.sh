#!/usr/bin/env bash
# Everything the GPU path claims, in one call of less than ten minutes: environment, correctness
# of every kernel, times beside the memory floor, networks side by side. Needs torch, triton and
# numpy; uses ONNX Runtime's CUDA provider where there is one; downloads nothing.
#
#     benchmarks/gpu.sh [--seconds 540] [--output FOLDER] [--dry-run]
#
# Writes DATE-gpu-NAME.json to $OUT, or to benchmarks/results. `--dry-run` runs small shapes in
# Triton's interpreter, on a machine with no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu.run "$@"
