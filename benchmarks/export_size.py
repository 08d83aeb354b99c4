"""What exporting a full-size network takes: ``python -m benchmarks.export_size``.

By default UPerNet-R50 with FDConv, 150 classes, at 512×512, from a checkpoint file to a proved
bundle: seconds and peak memory of a fresh process, the bundle's size beside the checkpoint's
inference weights, the error against the PyTorch network, the graph's size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.cases import Case, add_case_arguments, named_case
from benchmarks.options import keep, script
from fdconv_deploy.checkpoints import save_checkpoint
from fdconv_deploy.latency import machine
from fdconv_deploy.nn import Segmentor

# Parity has tests of its own; here a random network's rounding must not stop the clock.
TOLERANCE = 1e-2


def measure(
    case: Case, network: nn.Module, bundle: Path, *, dynamic: bool = True
) -> dict[str, Any]:
    """Export ``network``, which is ``case``'s, to ``bundle`` in a fresh process.

    FDConv segmentors start from a checkpoint file, as a user's do.
    """
    state = network.state_dict()
    weights = sum(v.numel() * v.element_size() for v in state.values())
    with tempfile.TemporaryDirectory(prefix="fdconv-bench-") as folder:
        file = Path(folder) / "network.pth"
        if dynamic and isinstance(network, Segmentor):
            save_checkpoint(file, state, network.architecture)
        else:
            save_file(state, file)
        request = json.dumps({"case": case.as_dict(), "dynamic": dynamic})
        started = time.perf_counter()
        command = [sys.executable, "-m", "benchmarks.export_size", "--child", request]
        finished = subprocess.run(
            [*command, str(file), str(bundle)],
            stdout=subprocess.PIPE, text=True, check=True, cwd=machine.ROOT,
        )  # fmt: skip
        wall = time.perf_counter() - started
    measured = json.loads(finished.stdout.splitlines()[-1])
    manifest = json.loads((bundle / "manifest.json").read_text())
    size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    parity = manifest["parity"]["batches"][str(case.batch)]
    return {
        "process_seconds": round(wall, 1),
        "export_seconds": round(measured["seconds"], 1),
        "peak_mb": round(measured["peak_mb"]),
        "inference_weights_mb": round(weights / 1e6, 1),
        "bundle_mb": round(size / 1e6, 1),
        "bundle_over_weights": round(size / weights, 4),
        "nodes": manifest["graph"][f"nodes.b{case.batch}"],
        "max_rel_error": max(output["max_rel"] for output in parity),
        "argmax_agreement": parity[0]["argmax_agreement"],
    }


def _child(request: str, file: Path, bundle: Path) -> None:
    """The fresh process: only what an export needs."""
    from fdconv_deploy.export import export_checkpoint, export_module

    spec = json.loads(request)
    case, dynamic = Case(**spec["case"]), spec["dynamic"]
    if dynamic and case.network == "upernet":
        start = time.perf_counter()
        size = case.height, case.width
        export_checkpoint(file, bundle, size=size, batches=[case.batch], tolerance=TOLERANCE)
    else:
        network, images = case.empty(dynamic=dynamic), case.images()
        network.load_state_dict(load_file(file))
        start = time.perf_counter()
        export_module(network, images, bundle, tolerance=TOLERANCE)
    seconds = time.perf_counter() - start
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    peak = max(resource.getrusage(one).ru_maxrss for one in who) / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


def main() -> None:
    parser = script(__doc__, threads=False)
    add_case_arguments(parser, network="upernet")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        request, file, bundle = options.child
        _child(request, Path(file), Path(bundle))
        return
    machine.warn_if_busy()
    case = named_case(options)
    where = machine.describe(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(case, case.make(), Path(folder) / "bundle")
    print(f"{case.title}, kernel_num {case.kernel_num}")
    for key, value in measured.items():
        print(f"{key:22} {value}")
    keep(options, "export", where, {"title": case.title, "case": case.as_dict(), **measured})


if __name__ == "__main__":
    main()
