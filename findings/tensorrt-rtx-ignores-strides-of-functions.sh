#!/bin/bash
# TensorRT-RTX 1.7.1.116 (NVIDIA's ONNX parser): in the body of a model's function, a convolution's or a pool's strides
# and dilations that refer to an attribute of the function (ref_attr_name) are ignored, and nothing is said: the network
# has strides and dilations of 1. A kernel_shape that refers to one is refused with a sentence about the kernel's shape.
# Pads, group, auto_pad and ceil_mode, and attributes of Transpose, Flatten and DepthToSpace, are honoured.
# Seen: sizes of the answer to (1, 4, 8, 8) as the parser imports them, beside those of the same model inlined by onnx.
# Expected: the same. A way out: let strides, dilations and kernel shapes stand in the function's body as numbers (one
# function for each), or inline functions before the model is parsed. No report of it was found.
# Exits with another status than 0 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
    onnx==1.23.2 tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116
"$folder/env/bin/python" - <<'EOF'
import ctypes
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import tensorrt_rtx_libs
from onnx import TensorProto, helper, numpy_helper

for library in sorted(Path(tensorrt_rtx_libs.__path__[0]).glob("*.so*")):
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
import tensorrt_rtx_bindings as trt

logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
imports = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]


def imported(model):
    """The answer's size in the network that the parser makes, or None where it refuses."""
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        return None
    return tuple(network.get_output(0).shape)


def sizes(operator, name, value, **given):
    """Inlined, and as a function of which the operator's attribute ``name`` is given by reference."""
    constants = []
    if operator == "Conv":
        constants = [numpy_helper.from_array(np.zeros((6, 4, 3, 3), np.float32), "w")]
    inputs = ["x", *(tensor.name for tensor in constants)]
    node = helper.make_node(operator, inputs, ["y"], **given)
    kind = onnx.AttributeProto.INTS
    node.attribute.append(helper.make_attribute_ref(name, kind))
    function = helper.make_function("mine", "F", inputs, ["y"], [node], imports[:1], [name])
    call = helper.make_node("F", inputs, ["y"], domain="mine", **{name: value})
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph([call], "g", [x], [y], constants)
    model = helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return imported(onnx.inliner.inline_local_functions(model)), imported(model)


seen = {
    "Conv, strides": sizes("Conv", "strides", [2, 2]),
    "Conv, dilations": sizes("Conv", "dilations", [2, 2]),
    "Conv, kernel_shape": sizes("Conv", "kernel_shape", [3, 3]),
    "Conv, pads": sizes("Conv", "pads", [1, 1, 1, 1]),
    "MaxPool, strides": sizes("MaxPool", "strides", [2, 2], kernel_shape=[2, 2]),
}
for what, (inlined, function) in seen.items():
    print(f"{what}: inlined {inlined}, as a function {function or 'refused'}")
wrong = [what for what, (inlined, function) in seen.items() if inlined != function]
if wrong != ["Conv, strides", "Conv, dilations", "Conv, kernel_shape", "MaxPool, strides"]:
    raise SystemExit("other attributes are honoured: this finding is over")
EOF
