"""Where ONNX Runtime's CUDA provider runs every kind of bundle: `placement.json` and its page.

    python -m tests.real_packages.onnxruntime_gpu.make --python gpu/bin/python

The real provider, of the onnxruntime-gpu that the named interpreter has, on libraries that stand
for CUDA's (`cuda_stub.py`); needs a C compiler, and no GPU.
"""

# ruff: noqa: E501 - a page's text
from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from fdconv_deploy.runtime.backends.onnxruntime import CUDA, _cuda
from tests.real_packages.onnxruntime_gpu import cuda_stub
from tests.real_packages.onnxruntime_gpu.networks import KINDS, SIZE, node_kinds

HERE = Path(__file__).parent
RECORD = HERE / "placement.json"
PAGE = HERE.parents[2] / "docs" / "onnxruntime-cuda.md"
# Of the provider's options, those that decide what an answer is or how long it takes.
TELLING = (
    "use_tf32", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace", "prefer_nhwc",
    "fuse_conv_bias", "do_copy_in_default_stream", "arena_extend_strategy",
)  # fmt: skip


def place(python: Path, stub: Path, graph: Path, options: dict[str, str]) -> dict[str, Any]:
    """What `place.py` says of a graph, and the copies between CPU and GPU in it."""
    optimized = stub / "optimized.onnx"
    done = subprocess.run(
        [str(python), str(HERE / "place.py"), str(graph), json.dumps(options), str(optimized)],
        env={**os.environ, "LD_LIBRARY_PATH": str(stub), "PYTHONPATH": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    model = onnx.load(str(optimized), load_external_data=False)
    operators = Counter(node.op_type for node in model.graph.node)
    placed = Counter(found.pop("placed"))
    return {
        "nodes": sum(operators.values()),
        "on_cpu": {
            key.split()[1]: count
            for key, count in sorted(placed.items())
            if not key.startswith(CUDA)
        },
        "copies": sum(count for name, count in operators.items() if name.startswith("Memcpy")),
        **found,
    }


def page(record: dict[str, Any]) -> str:
    """docs/onnxruntime-cuda.md of a record."""
    rows = []
    for name, found in record["graphs"].items():
        on_cpu = ", ".join(f"{count} {operator}" for operator, count in found["on_cpu"].items())
        captured = "refused" if found["capture_refused"] else "accepted"
        rows.append(
            f"| {name} | {found['nodes']:,} | {on_cpu or 'none'} | {found['copies']} | {captured} |"
        )
    table = "\n".join(rows)
    options = "\n".join(f"| `{name}` | {record['options'][name]} |" for name in TELLING)
    return f"""# Bundles in ONNX Runtime's CUDA provider

*Written by `python -m tests.real_packages.onnxruntime_gpu.make`; a test holds it to the record.*

No GPU has run these graphs. Where their nodes go was asked of the real provider, onnxruntime-gpu
{record["onnxruntime_gpu"]}: its {len(record["cuda_functions"])} functions of CUDA are answered by generated libraries, which describe a
device of compute capability 9.0, give memory from the host and start no kernel. Making a session
places nodes, inserts copies and checks for capture, and needs no more than that. It tells nothing
of speed, and nothing of the answers.

Small networks of every kind of bundle, {SIZE[0]}×{SIZE[1]}; a node on the CPU, or a copy, costs a stop of the GPU
in the middle of every run:

| bundle | nodes run | on the CPU | copies between | CUDA graph |
|---|---:|---|---:|---|
{table}

The provider computes int8 bundles in floats, between the nodes that dequantize and quantize. Its
options as backend `onnxruntime-cuda` sets them or leaves them:

| option | value |
|---|---|
{options}

Tests export the same networks and fail on a kind of node (operator, types, attributes) that the
provider was not asked about: run the script again then, in the environment that its
[README](../tests/real_packages/onnxruntime_gpu/README.md) describes.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="has onnxruntime-gpu")
    parser.add_argument("--only", nargs="*", choices=list(KINDS), help="keep the other rows")
    options = parser.parse_args()
    say = "import onnxruntime as o; print(o.__version__, o.__path__[0])"
    version, package = subprocess.check_output(
        [str(options.python), "-c", say], text=True, env={**os.environ, "PYTHONPATH": ""}
    ).split()
    provider = Path(package) / "capi" / "libonnxruntime_providers_cuda.so"
    record: dict[str, Any] = {"graphs": {}, "node_kinds": []}
    if options.only:
        record = json.loads(RECORD.read_text())
    record["onnxruntime_gpu"] = version
    kinds: set[str] = set(record["node_kinds"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record["cuda_functions"] = cuda_stub.build(provider, folder)
        _, given = _cuda(tf32=False, captured=False)
        for kind in options.only or KINDS:
            bundle = KINDS[kind](folder / kind)
            for batch in bundle.batch_sizes:
                path = bundle.model_path(batch)
                found = place(options.python, folder, path, given)
                record["options"] = found.pop("options")
                record["graphs"][f"{kind}, batch {batch}"] = found
                kinds |= node_kinds(path)
                print(f"{kind}, batch {batch}: {found}", flush=True)
    record["node_kinds"] = sorted(kinds)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
