#!/usr/bin/env bash
# Everything the GPU path claims, in one call of less than eight minutes: environment, correctness
# of every kernel, times beside the memory floor, networks beside their baselines, the plugins' own
# code under the driver. Needs torch, triton and numpy; uses cuda-bindings where it is, and ONNX
# Runtime's CUDA provider after `pip install '.[export,gpu]'`; downloads nothing.
#
#     benchmarks/gpu.sh [--seconds 450] [--output FOLDER] [--dry-run]
#
# Writes DATE-gpu-NAME-TIME.json to $OUT, or to benchmarks/results, anew after every part: GPU, driver,
# clocks, each time and error, what was not run and why. `--dry-run` runs a toy network in Triton's
# interpreter, on a machine with no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu.run "$@"
