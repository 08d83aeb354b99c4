#!/usr/bin/env bash
# Everything the GPU path claims, in one call of less than eight minutes: environment, the
# plugins' own code under the driver, correctness of every kernel, times beside the memory floor,
# networks beside their baselines. Needs torch, triton and numpy; uses cuda-bindings and ONNX
# Runtime's CUDA provider where they are; downloads nothing.
#
#     benchmarks/gpu.sh [--seconds 450] [--output FOLDER] [--dry-run]
#
# Writes DATE-gpu-NAME.json to $OUT, or to benchmarks/results, anew after every part. `--dry-run`
# runs a toy network in Triton's interpreter, on a machine with no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu.run "$@"
