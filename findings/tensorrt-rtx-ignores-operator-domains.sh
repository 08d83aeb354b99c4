#!/bin/bash
# TensorRT-RTX 1.7.1.116 (NVIDIA's ONNX parser): a node of a domain of its own that calls a function of the model is
# imported as the standard operator of the same name. ONNX says that an operator is named by domain and type together,
# and that a model's function gives the meaning of its nodes; onnxruntime and onnx.reference follow it. Nothing is said.
# Seen: a call of the function mine::Relu, whose body is Neg, becomes an activation layer (max(x, 0)), and the engine
# would be wrong; the same function named mine::Turn becomes the negation. Expected: both the negation.
# No report of it was found. Exits with another status than 0 if that changes.
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
import tensorrt_rtx_libs
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

for library in sorted(Path(tensorrt_rtx_libs.__path__[0]).glob("*.so*")):
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
import tensorrt_rtx_bindings as trt

imports = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
found = {}
for name in ("Turn", "Relu"):
    body = [helper.make_node("Neg", ["a"], ["b"])]
    function = helper.make_function("mine", name, ["a"], ["b"], body, imports[:1])
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    node = helper.make_node(name, ["x"], ["y"], domain="mine")
    graph = helper.make_graph([node], "g", [x], [y])
    model = helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    (meant,) = ReferenceEvaluator(model).run(None, {"x": np.array([-1, 2], np.float32)})
    logger = trt.Logger(trt.Logger.WARNING)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), parser.get_error(0).desc()
    kinds = [network.get_layer(i).type.name for i in range(network.num_layers)]
    found[name] = "ACTIVATION" in kinds
    print(f"mine::{name}: ONNX's reference gives {meant.tolist()}; TensorRT-RTX imports {kinds}")
if found != {"Turn": False, "Relu": True}:
    raise SystemExit("the function is imported in both cases: this finding is over")
EOF
