"""BatchNormalization folded in a graph: where it may be, and where it may not."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from fdconv_deploy.export.passes import fold_batch_norms
from fdconv_deploy.export.torch_export import PLACEHOLDER, PLACEHOLDER_DOMAIN

RNG = np.random.default_rng(0)
SHAPE = (2, 6, 8, 9)


def constant(name: str, *shape: int, positive: bool = False) -> gs.Constant:
    values = RNG.normal(size=shape).astype(np.float32)
    return gs.Constant(name, np.abs(values) + 0.1 if positive else values)


def variable(name: str, shape: tuple[int, ...] = SHAPE) -> gs.Variable:
    return gs.Variable(name, np.float32, shape)


def norm(x: gs.Tensor, y: gs.Tensor, name: str, epsilon: float | None = 1e-3) -> gs.Node:
    parameters = [constant(f"{name}.{p}", 6) for p in ("weight", "bias", "mean")]
    parameters.append(constant(f"{name}.variance", 6, positive=True))
    attributes = {} if epsilon is None else {"epsilon": epsilon}
    return gs.Node("BatchNormalization", name, attributes, [x, *parameters], [y])


def conv(x: gs.Tensor, y: gs.Tensor, *, bias: bool = False, groups: int = 1) -> gs.Node:
    weight = constant(f"{y.name}.w", 6, 6 // groups, 3, 3)
    inputs = [x, weight, *([constant(f"{y.name}.b", 6)] if bias else [])]
    return gs.Node("Conv", y.name, {"pads": [1] * 4, "group": groups}, inputs, [y])


def graph(nodes: list[gs.Node], inputs: list[gs.Variable], outputs: list[gs.Variable]) -> gs.Graph:
    return gs.Graph(nodes=nodes, inputs=inputs, outputs=outputs, opset=18)


def answers(g: gs.Graph, x: np.ndarray, **others: np.ndarray) -> list[np.ndarray]:
    model = gs.export_onnx(g)
    model.ir_version = 10
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x} | others)


def assert_unchanged_answers(g: gs.Graph, **others: np.ndarray) -> list[str]:
    """Run before and after the pass; the operators left."""
    x = RNG.normal(size=SHAPE).astype(np.float32)
    before = answers(g, x, **others)
    assert fold_batch_norms(g) == {}
    for a, b in zip(before, answers(g, x, **others), strict=True):
        assert np.abs(a - b).max() <= 2e-6 * np.abs(a).max()
    return sorted(n.op for n in g.nodes)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("epsilon", [1e-3, None])
def test_folds_into_a_convolution(bias, groups, epsilon):
    x, a, y = variable("x"), variable("a"), variable("y")
    g = graph([conv(x, a, bias=bias, groups=groups), norm(a, y, "n", epsilon)], [x], [y])
    assert assert_unchanged_answers(g) == ["Conv"]
    assert g.outputs[0].name == "y"


def test_a_weight_two_convolutions_share_is_not_overwritten():
    x, a, b, y, z = (variable(n) for n in "xabyz")
    first, second = conv(x, a), conv(x, b)
    second.inputs[1] = first.inputs[1]
    g = graph([first, second, norm(a, y, "n"), norm(b, z, "m")], [x], [y, z])
    assert assert_unchanged_answers(g) == ["Conv", "Conv"]


def test_stays_where_somebody_else_reads():
    x, a, y, z = (variable(n) for n in "xayz")
    relu = gs.Node("Relu", "relu", inputs=[a], outputs=[z])
    g = graph([conv(x, a), norm(a, y, "n"), relu], [x], [y, z])
    assert assert_unchanged_answers(g) == ["BatchNormalization", "Conv", "Relu"]


def test_stays_where_the_convolution_is_an_answer_itself():
    x, a, y = variable("x"), variable("a"), variable("y")
    g = graph([conv(x, a), norm(a, y, "n")], [x], [a, y])
    assert assert_unchanged_answers(g) == ["BatchNormalization", "Conv"]


def test_stays_where_weights_are_not_constant():
    x, a, y, w = variable("x"), variable("a"), variable("y"), variable("w", (6, 6, 3, 3))
    node = conv(x, a)
    node.inputs[1] = w
    g = graph([node, norm(a, y, "n")], [x, w], [y])
    weight = RNG.normal(size=(6, 6, 3, 3)).astype(np.float32)
    assert assert_unchanged_answers(g, w=weight) == ["BatchNormalization", "Conv"]


def placeholder(x: gs.Tensor, y: gs.Tensor) -> gs.Node:
    attributes = {"layer": y.name, "shape": list(y.shape[1:])}
    return gs.Node(PLACEHOLDER, y.name, attributes, [x], [y], domain=PLACEHOLDER_DOMAIN)


def test_a_placeholder_hands_the_normalisation_on():
    x, a, y = variable("x"), variable("a"), variable("y")
    after = norm(a, y, "n")
    weight, bias, mean, variance = (t.values.astype(np.float64) for t in after.inputs[1:])
    g = graph([placeholder(x, a), after], [x], [y])
    affines = fold_batch_norms(g)
    assert [n.op for n in g.nodes] == [PLACEHOLDER]
    assert g.nodes[0].outputs[0] is g.outputs[0]
    value = RNG.normal(size=6)
    expected = (value - mean) / np.sqrt(variance + 1e-3) * weight + bias
    scale, shift = affines["y"]
    np.testing.assert_allclose(value * scale + shift, expected, rtol=1e-12)


def test_a_placeholder_somebody_else_reads_keeps_its_own_answer():
    x, a, y, z = (variable(n) for n in "xayz")
    relu = gs.Node("Relu", "relu", inputs=[a], outputs=[z])
    g = graph([placeholder(x, a), norm(a, y, "n"), relu], [x], [y, z])
    assert fold_batch_norms(g) == {}
    assert len(g.nodes) == 3


def test_a_placeholder_over_tokens_keeps_a_norm_of_its_tokens():
    x, a, y = (variable(n, (2, 6, 9)) for n in "xay")
    assert fold_batch_norms(graph([placeholder(x, a), norm(a, y, "n")], [x], [y])) == {}
