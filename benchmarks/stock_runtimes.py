"""One .onnx file in stock runtimes: ``python -m benchmarks.stock_runtimes``.

Exports full-size UPerNet-R50 (or ``--depth 18``) with FDConv, then runs the same file in
fresh virtual environments that hold numpy and one of onnxruntime, onnxruntime-gpu (without a
GPU: it says so and falls back to the CPU) and, with ``--tensorrt-rtx``, NVIDIA's TensorRT-RTX,
which parses and builds an engine on the CPU but cannot run it. No operator library is
registered anywhere. Prints the error against PyTorch for each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.networks import build, upernet
from benchmarks.options import script
from benchmarks.records import write_json
from fdconv_deploy.export.api import export_network
from fdconv_deploy.export.validation.sample_inputs import sample_tensor

RUN = """
import json, sys
import numpy as np, onnxruntime as ort
request = np.load(sys.argv[2])
options = ort.SessionOptions()
options.log_severity_level = 4
session = ort.InferenceSession(sys.argv[1], options, providers=ort.get_available_providers())
actual = session.run(None, {"images": request["images"]})[0]
expected = request["logits"]
print(json.dumps({
    "version": ort.__version__,
    "available": ort.get_available_providers(),
    "used": session.get_providers(),
    "max_rel_error": float(np.abs(actual - expected).max() / np.abs(expected).max()),
    "same_class": float((actual.argmax(1) == expected.argmax(1)).mean()),
}))
"""

PARSE = """
import ctypes, glob, json, os, sys
import tensorrt_rtx_libs
for library in sorted(glob.glob(os.path.join(tensorrt_rtx_libs.__path__[0], "*.so*"))):
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
import tensorrt_rtx_bindings as trt
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
parsed = parser.parse_from_file(sys.argv[1])
errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
engine = None
if parsed:
    engine = builder.build_serialized_network(network, builder.create_builder_config())
print(json.dumps({
    "version": trt.__version__,
    "parsed": parsed,
    "layers": network.num_layers,
    "errors": errors,
    "engine_mb": None if engine is None else round(engine.nbytes / 1e6, 1),
}))
"""


def fresh(folder: Path, packages: list[str], program: str, *arguments: Path) -> dict:
    """Run a program where nothing but ``packages`` is installed."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "numpy", *packages], check=True)
    finished = subprocess.run(
        [python, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    if finished.returncode:
        sys.exit(f"{packages}: {finished.stderr[-2000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    parser = script(__doc__, threads=False)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--tensorrt-rtx", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network = build(upernet(options.depth))
        size = (options.size, options.size)
        bundle = export_network(network, folder / "bundle", size=size)
        model, request = bundle.model_path(1), folder / "request.npz"
        images = sample_tensor(1, size, seed=1)
        with torch.no_grad():
            np.savez(request, images=images.numpy(), logits=network(images).numpy())
        results = {
            package: fresh(folder / package, [package], RUN, model, request)
            for package in ("onnxruntime", "onnxruntime-gpu")
        }
        if options.tensorrt_rtx:
            wheels = ["tensorrt-rtx-cu13-libs==1.7.1.116", "tensorrt-rtx-cu13-bindings==1.7.1.116"]
            results["tensorrt-rtx"] = fresh(folder / "rtx", wheels, PARSE, model)
    print(json.dumps(results, indent=2))
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
