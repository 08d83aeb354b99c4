"""``fdconv::KernelAttention``, the function, against float64: every form, also over long axes."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fdconv_deploy.export.layers import pieces_of
from fdconv_deploy.ops import DOMAIN, DOMAIN_VERSION, OPSET
from fdconv_deploy.ops.attention.function import NORMS, AttentionForm, attention_function
from tests.ops.native.test_kernel_attention import by_reference, given, layer_of
from tests.reference.lively import lively_input

CHANNELS, SIZES = 20, (5, 8, 9, 20)


def run(form: AttentionForm, x: np.ndarray, pieces: list[int]) -> list[np.ndarray]:
    """All outputs of one node of a form, as `layer_of` has the weights."""
    heads = SIZES[: form.softmax] if form.softmax else SIZES
    m, local = layer_of(CHANNELS, 16, heads, NORMS.index(form.norm), form.softmax > 0)
    object.__setattr__(m, "squared", form.squared)
    constants, attributes = given(m, local if form.local else None)
    attributes["layer"] = "layer"
    if form.in_pieces:
        shape = [*pieces, CHANNELS] if form.tokens else [0, *pieces]
        attributes["pieces_shape"] = [0, *shape]
    function = attention_function(form)
    assert set(attributes) == set(function.attribute)
    names = [f"c{place}" for place in range(len(constants))]
    node = helper.make_node(form.name, ["x", *names], function.output, domain=DOMAIN, **attributes)
    given_x = helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", n]) for n in node.output]
    tensors = [numpy_helper.from_array(c, n) for c, n in zip(constants, names, strict=True)]
    graph = helper.make_graph([node], "attention", [given_x], outputs, tensors)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    features = np.moveaxis(x, -1, 1) if form.tokens else x
    expected = by_reference(features.reshape(*features.shape[:2], -1), m, local)
    found = session.run(None, {"x": x})
    assert len(found) == 1 + form.local
    for mine, theirs in zip(found, expected, strict=False):
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs).max() <= 1e-6 * max(np.abs(theirs).max(), 1)
    return found


@pytest.mark.parametrize("size", [(7, 13), (130, 5), (5, 131), (144, 160)])
@pytest.mark.parametrize("tokens", [False, True])
def test_every_form(tokens: bool, size: tuple[int, int]) -> None:
    lengths = [size[0] * size[1]] if tokens else list(size)
    pieces = [piece for length in lengths for piece in pieces_of(length)]
    x = lively_input((2, CHANNELS, *size)).numpy()
    if tokens:
        x = np.ascontiguousarray(x.reshape(2, CHANNELS, -1).transpose(0, 2, 1))
    parts = product(NORMS, [False, True], [0, 1, 4], [False, True])
    for norm, squared, softmax, local in parts:
        run(AttentionForm(tokens, len(pieces), norm, squared, softmax, local), x, pieces)


def test_forms_have_names_of_their_own() -> None:
    parts = product(
        [False, True], [1, 2, 3, 4], NORMS, [False, True], [0, 1, 2, 3, 4], [False, True]
    )
    forms = [AttentionForm(*each) for each in parts if each[0] or each[1] > 1]
    assert len({form.name for form in forms}) == len(forms)
