"""Where an exported FDConv backbone's time goes, by operator: ONNX Runtime's own profile.

``python -m benchmarks.profile_operators`` prints milliseconds per run of each operator type in
the R50 backbone at 512×512, FDConv beside its plain twin, both profiled in one process.
Profiling itself adds a few percent.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import onnxruntime as ort

from benchmarks.speed import make
from export.inputs import made_up_images
from export.pipeline import export_module

RUNS = 10


def profile(kernel_num: int | None, folder: Path, depth: int, threads: int) -> dict[str, float]:
    """Milliseconds per run by operator type."""
    x = made_up_images(1, (512, 512), seed=1)
    bundle = export_module(make("backbone", depth, kernel_num), x, folder, tolerance=1e-2)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    path = str(bundle.model_path(1))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for _ in range(RUNS + 2):
        session.run(None, {"input": x.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e for e in events if e["name"].endswith("_kernel_time")]
    kernels = kernels[2 * len(kernels) // (RUNS + 2) :]  # without the two that warm up
    times: Counter[str] = Counter()
    for event in kernels:
        times[event["args"]["op_name"]] += event["dur"] / RUNS / 1e3
    return dict(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--kernel-num", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        arguments = (options.depth, options.threads)
        dynamic = profile(options.kernel_num, Path(name) / "fdconv", *arguments)
        plain = profile(None, Path(name) / "plain", *arguments)
    print(f"{'operator':24} {'FDConv ms':>10} {'plain ms':>10}")
    for operator in sorted(dynamic | plain, key=lambda o: -dynamic.get(o, 0)):
        print(f"{operator:24} {dynamic.get(operator, 0):10.2f} {plain.get(operator, 0):10.2f}")
    print(f"{'sum':24} {sum(dynamic.values()):10.2f} {sum(plain.values()):10.2f}")


if __name__ == "__main__":
    main()
