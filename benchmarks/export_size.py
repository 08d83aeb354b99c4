"""What exporting a full-size network takes: ``python -m benchmarks.export_size``.

UPerNet-R50 with FDConv, 150 classes, at 512×512, from a checkpoint file to a proved bundle:
seconds and peak memory of a fresh process, the bundle's size beside the checkpoint's
inference weights, the error against the PyTorch network, the graph's size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from benchmarks.networks import build, upernet
from fdconv_deploy.checkpoints import save_checkpoint

EXPORT = """
import json, resource, sys, time
from export import export_checkpoint
start = time.perf_counter()
bundle = export_checkpoint(sys.argv[1], sys.argv[2], size=(512, 512))
peak = max(
    resource.getrusage(who).ru_maxrss
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
)
print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": peak / 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()
    architecture = upernet(options.depth)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder) / "upernet.pth", Path(folder) / "bundle"
        network = build(architecture)
        state = network.state_dict()
        save_checkpoint(checkpoint, state, architecture)
        weights = sum(v.numel() * v.element_size() for v in state.values())
        del network, state
        started = time.perf_counter()
        finished = subprocess.run(
            [sys.executable, "-c", EXPORT, checkpoint, bundle],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        measured = json.loads(finished.stdout.splitlines()[-1])
        wall = time.perf_counter() - started
        manifest = json.loads((bundle / "manifest.json").read_text())
        size = sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file())
    parity = manifest["parity"]["batches"]["1"][0]
    result = {
        "network": f"UPerNet-R{options.depth}, FDConv kernel_num 64, 150 classes, 512x512",
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": manifest["versions"],
        "process_seconds": round(wall, 1),
        "export_seconds": round(measured["seconds"], 1),
        "peak_mb": round(measured["peak_mb"]),
        "inference_weights_mb": round(weights / 1e6, 1),
        "bundle_mb": round(size / 1e6, 1),
        "bundle_over_weights": round(size / weights, 4),
        "nodes": manifest["graph"]["nodes.b1"],
        "max_rel_error": parity["max_rel"],
        "argmax_agreement": parity["argmax_agreement"],
    }
    for key, value in result.items():
        print(f"{key:22} {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
