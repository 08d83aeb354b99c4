"""Plugin nodes computed by their functions and by their kernels, from the same inputs.

    TRITON_INTERPRET=1 python -m tests.ops.plugin_kernels NAME…

Prints one JSON object: for each case and each of its plugin nodes the kernel's error against the
function, as a share of the largest value. What TensorRT hands a plugin is what is handed here.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto, NodeProto

from fdconv_deploy.export.quantization.fp16 import to_half_precision
from fdconv_deploy.export.tensorrt.plugin_pass import ask_for_plugins
from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.ops import launch as kernel_launch
from fdconv_deploy.ops.frequency_assembly.launch import AssemblySizes
from fdconv_deploy.ops.launch import KernelLaunch, kernel_function
from fdconv_deploy.ops.tensorrt_plugins import launch_of
from tests.ops.gpu.cases import BANDS, LAYERS
from tests.ops.single import layer_model

TYPES = {"*" + short: getattr(torch, name) for name, short in kernel_launch.TYPES.items()}


def values_of(model: ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    """Every tensor that a plugin node touches."""
    exposed = ModelProto()
    exposed.CopyFrom(model)
    inferred = {v.name: v for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    nodes = [n for n in model.graph.node if n.domain == DOMAIN]
    names = {name for n in nodes for name in (*n.input, *n.output)} & inferred.keys()
    del exposed.graph.output[:]
    exposed.graph.output.extend(inferred[name] for name in sorted(names))
    session = onnxruntime.InferenceSession(
        exposed.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = dict(zip(sorted(names), session.run(sorted(names), {"x": x}), strict=True))
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    return {**constants, "x": x, **found}


def by_kernel(launch: KernelLaunch, batch: int, inputs: list[np.ndarray], like: np.ndarray):
    """Run a kernel as TensorRT would: pointers to the inputs, then to the output."""
    tensors = [torch.tensor(a) for a in inputs]
    tensors.append(torch.zeros(like.shape, dtype=TYPES[launch.arguments[-1][1]]))
    # A pointer says nothing of what it points to: a byte's points into an int32 tensor.
    given = [
        t.view(TYPES[kind]) if t.dtype != TYPES[kind] else t
        for t, (_, kind) in zip(tensors, launch.arguments, strict=True)
    ]
    kernel_function(launch.kernel)[launch.grid(batch)](
        *given, launch.specialised(), num_warps=launch.warps, num_stages=1
    )
    return tensors[-1].numpy()


def node_error(node: NodeProto, values: dict[str, np.ndarray]) -> float:
    sizes = next(list(a.ints) for a in node.attribute if a.name == "sizes")
    expected = values[node.output[0]].astype(np.float64)
    inputs = [values[name] for name in node.input]
    launch = launch_of(node.op_type, sizes)
    actual = by_kernel(launch, sizes[-1], inputs, expected).astype(np.float64)
    if node.op_type.startswith("FrequencyAssemblyRows"):
        # Past the last row and the last column the memory is nobody's.
        layer = AssemblySizes.of(sizes[:-1])
        rows = np.arange(expected.shape[1] * expected.shape[4]).reshape(
            1, expected.shape[1], 1, 1, expected.shape[4]
        )
        columns = np.arange(expected.shape[3]).reshape(1, 1, 1, -1, 1)
        theirs = (rows < layer.rows) & (columns <= layer.columns // 2)
        actual, expected = np.where(theirs, actual, 0), np.where(theirs, expected, 0)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def errors(name: str, half: bool) -> dict[str, float]:
    case = {**LAYERS, **BANDS}[name]
    with torch.no_grad():
        folded = replace(case.folded(case.layer()), by_rows=False)
    model = layer_model(folded, case.batch)
    del model.graph.output[1:]
    if half:
        to_half_precision(model, ["layer"])
    variant = ask_for_plugins(model).model
    values = values_of(variant, case.input().numpy())
    nodes = [n for n in variant.graph.node if n.domain == DOMAIN]
    return {n.op_type: node_error(n, values) for n in nodes}


def main() -> None:
    found = {}
    for name in sys.argv[1:]:
        plain, _, kind = name.partition("|")
        found[name] = errors(plain, kind == "half")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
