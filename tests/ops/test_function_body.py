"""The builder of function bodies."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from fdconv_deploy.ops import DOMAIN, DOMAIN_VERSION, OPSET
from fdconv_deploy.ops.function_body import FunctionBody, functions_checked


def shifted_rows(shift: list[int]) -> onnx.FunctionProto:
    """Pads and reshapes as its node says, then doubles."""
    f = FunctionBody("ShiftedRows", ["x"])
    padded = f("Pad", "x", f.attribute("pads"))
    total = f("Add", f.reshape(padded, "shape"), f("Cast", f.constant(shift), to=1))
    return f.finish(total, "For this test.")


def model_of(function: onnx.FunctionProto) -> onnx.ModelProto:
    """Two nodes of one function with attributes of their own."""
    nodes = [
        helper.make_node("ShiftedRows", ["x"], ["a"], domain=DOMAIN, pads=[0, 1], shape=[2, 2]),
        helper.make_node("ShiftedRows", ["x"], ["b"], domain=DOMAIN, pads=[3, 0], shape=[3, 2]),
    ]
    float_info = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("x", [3]), ("a", [2, 2]), ("b", [3, 2]))
    ]
    graph = helper.make_graph(nodes, "test", float_info[:1], float_info[1:])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def test_each_node_gives_its_own_shapes():
    model = model_of(shifted_rows([10, 20]))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    a, b = session.run(["a", "b"], {"x": np.array([1, 2, 3], np.float32)})
    assert a.tolist() == [[11, 22], [13, 20]]
    assert b.tolist() == [[10, 20], [10, 21], [12, 23]]


def test_a_function_is_kept_once():
    functions = [shifted_rows([1, 2]), shifted_rows([1, 2])]
    assert [f.name for f in functions_checked(functions)] == ["ShiftedRows"]


def test_two_functions_of_one_name_are_noticed():
    with pytest.raises(AssertionError, match="ShiftedRows"):
        functions_checked([shifted_rows([1, 2]), shifted_rows([1, 3])])
