"""What TF32 would do to fp32 bundles, emulated: why it is off unless asked for."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper
from onnx.inliner import inline_local_functions

from fdconv_deploy.sample_images import sample_feeds

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Veltkamp's splitting: x·(2^13 + 1) − (x·(2^13 + 1) − x) is x with 24 − 13 significant bits.
SPLIT = 2.0**13 + 1


def with_tf32(model: ModelProto) -> ModelProto:
    """Each factor of a product rounded to TF32's 11 significant bits, as tensor cores read it."""
    model = inline_local_functions(model)
    split = numpy_helper.from_array(np.array(SPLIT, np.float32), "split")
    nodes: list[onnx.NodeProto] = []
    rounded: dict[str, str] = {}
    for node in model.graph.node:
        for place in range(2 if node.op_type in PRODUCTS else 0):
            name = node.input[place]
            if name not in rounded:
                rounded[name] = f"{name}:tf32"
                scaled, rest = f"{name}:scaled", f"{name}:rest"
                nodes += [
                    helper.make_node("Mul", [name, "split"], [scaled]),
                    helper.make_node("Sub", [scaled, name], [rest]),
                    helper.make_node("Sub", [scaled, rest], [rounded[name]]),
                ]
            node.input[place] = rounded[name]
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(split)
    return model


def run(model: ModelProto, feeds: dict[str, NDArray]) -> NDArray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


def test_the_rounding_is_that_of_tf32():
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    made = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "eye"], ["y"])], "g",
            [helper.make_tensor_value_info("x", 1, x.shape)],
            [helper.make_tensor_value_info("y", 1, x.shape)],
            [numpy_helper.from_array(np.eye(64, dtype=np.float32), "eye")],
        ),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=10,
    )  # fmt: skip
    bits = x.view(np.uint32).astype(np.uint64)
    expected = ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(run(with_tf32(made), {"x": x}), expected)


def test_tf32_costs_more_than_fp32_promises(bundle, proved):
    model = onnx.load(str(bundle.model_path(1)))
    feeds = sample_feeds(bundle.manifest.inputs[1], bundle.manifest.architecture.preprocessing)
    exact, found = run(inline_local_functions(model), feeds), run(with_tf32(model), feeds)
    error = float(np.abs(found - exact).max() / np.abs(exact).max())
    assert 1e-4 < error < 5e-3
    proved(f"TF32, emulated, moves a small segmentor's scores by {error:.1e} of the largest")
