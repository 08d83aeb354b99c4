#!/bin/bash
# onnxruntime 1.32.0 quantize_static, unsigned activations, extra option CalibTensorRangeSymmetric=True: each Relu is
# removed, as if the quantization of its output cut negative numbers off, which a zero point of 0 does. But the
# symmetric range makes that zero point 128, so negative numbers pass and the network has no activations left: no
# warning, an error as large as the answer itself. Without the option the zero point is 0 and removal is right.
# Seen: "relu kept: False, its zero point: 128, error 1" (without the option: False, 0, 0.016). Expected with the
# option: the Relu kept, or a zero point of 0. Exits with another status than 0 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
    onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" - <<'EOF'
import logging

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

logging.disable(logging.CRITICAL)
rng = np.random.default_rng(0)
w1 = (rng.standard_normal((8, 3, 3, 3)) * 0.2).astype(np.float32)
w2 = (rng.standard_normal((4, 8, 3, 3)) * 0.2).astype(np.float32)
graph = helper.make_graph(
    [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="conv1", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "w2"], ["y"], name="conv2", pads=[1] * 4),
    ],
    "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 16, 16])],
    [numpy_helper.from_array(w1, "w1"), numpy_helper.from_array(w2, "w2")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.save(model, "m.onnx")
images = [rng.standard_normal((1, 3, 16, 16)).astype(np.float32) for _ in range(8)]


class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = iter([{"x": i} for i in images])

    def get_next(self):
        return next(self.left, None)


def run(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": images[0]})[0]


reference, found = run("m.onnx"), {}
for symmetric in (False, True):
    quantize_static("m.onnx", "q.onnx", Reader(), quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                    extra_options={"CalibTensorRangeSymmetric": symmetric})
    quantized = onnx.load("q.onnx")
    kept = "Relu" in [node.op_type for node in quantized.graph.node]
    (zero,) = [int(numpy_helper.to_array(value)) for value in quantized.graph.initializer
               if value.name == "b_zero_point"]
    error = float(abs(run("q.onnx") - reference).max() / abs(reference).max())
    print(f"onnxruntime {onnxruntime.__version__}, CalibTensorRangeSymmetric={symmetric}: "
          f"relu kept: {kept}, its zero point: {zero}, error {error:.2g}")
    found[symmetric] = (kept, zero, error > 0.5)
assert found == {False: (False, 0, False), True: (False, 128, True)}, found
EOF
