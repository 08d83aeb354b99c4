"""What FDConv costs, side by side in one run: ``python -m benchmarks.speed``.

Eager PyTorch as published, the folded network in PyTorch, the exported graph in ONNX Runtime,
and the plain twin in both, one run of each in turn so that a machine's drift hits all alike.
Medians; quote the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from benchmarks.networks import backbone, build, trained_like, upernet
from export.inputs import made_up_images
from export.pipeline import export_module
from fdconv_deploy.folding.network import fold_network
from fdconv_deploy.nn import ResNet


class LastFeature(nn.Module):
    """A backbone that gives its last feature map alone."""

    def __init__(self, network: ResNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[-1]


def make(kind: str, depth: int, kernel_num: int | None) -> nn.Module:
    if kind == "upernet":
        return build(upernet(depth, kernel_num))
    torch.manual_seed(0)
    return trained_like(LastFeature(ResNet(backbone(depth, kernel_num))))


def in_onnxruntime(network: nn.Module, x: Tensor, folder: Path, threads: int) -> Callable:
    # Parity has tests of its own; here a random network's rounding must not stop the clock.
    bundle = export_module(network, x, folder, tolerance=1e-2)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    path = str(bundle.model_path(len(x)))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"input": x.numpy()}
    return lambda: session.run(None, feed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=["backbone", "upernet"], default="backbone")
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--kernel-num", type=int, default=64)
    parser.add_argument("--size", default="512x512", help="HEIGHTxWIDTH")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    height, width = map(int, options.size.split("x"))
    x = made_up_images(options.batch, (height, width), seed=1)
    dynamic = make(options.network, options.depth, options.kernel_num)
    plain = make(options.network, options.depth, None)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        folded = fold_network(dynamic, x)
        sides: dict[str, Callable] = {
            "FDConv, PyTorch as published": lambda: dynamic(x),
            "FDConv, folded in PyTorch": lambda: folded(x),
            "FDConv, exported, ONNX Runtime": in_onnxruntime(
                dynamic, x, folder / "fdconv", options.threads
            ),
            "plain twin, PyTorch": lambda: plain(x),
            "plain twin, ONNX Runtime": in_onnxruntime(plain, x, folder / "plain", options.threads),
        }
        times: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(options.rounds + 2):
            for side, run in sides.items():
                start = time.perf_counter()
                run()
                if turn >= 2:  # the first two warm caches and thread pools
                    times[side].append(time.perf_counter() - start)
    median = {side: float(np.median(t)) * 1e3 for side, t in times.items()}
    fastest = {side: min(t) * 1e3 for side, t in times.items()}
    exported = median["FDConv, exported, ONNX Runtime"]
    result = {
        "network": f"{options.network} R{options.depth}, kernel_num {options.kernel_num}, "
        f"{options.size}, batch {options.batch}",
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {options.threads} threads",
        "versions": {"torch": torch.__version__, "onnxruntime": ort.__version__},
        "median_ms": {k: round(v, 1) for k, v in median.items()},
        "fastest_ms": {k: round(v, 1) for k, v in fastest.items()},
        "exported_over_published": round(exported / median["FDConv, PyTorch as published"], 3),
        "exported_over_plain": round(exported / median["plain twin, ONNX Runtime"], 3),
    }
    print(result["network"])
    for side in sides:
        print(f"  {side:32} {median[side]:8.1f} ms   fastest {fastest[side]:8.1f}")
    print(f"  exported / published {result['exported_over_published']}")
    print(f"  exported / plain twin {result['exported_over_plain']}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
