"""Float16 exports: what is float16 and what is not, what it costs, what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.api import export_module, export_network
from fdconv_deploy.export.quantization.fp16 import rounding_model, tensor_types, to_half_precision
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.runtime.bundle import Bundle
from tests.export.graphs import relative, run_file
from tests.reference.lively import lively_input

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT
SIZE = (65, 97)


@pytest.fixture(scope="module")
def half(segmentor, tmp_path_factory) -> Bundle:
    path = tmp_path_factory.mktemp("half") / "bundle"
    return export_network(segmentor, path, size=SIZE, batches=(1, 2), precision="fp16")


def loaded(bundle: Bundle, batch: int = 1) -> tuple[onnx.ModelProto, dict[str, int]]:
    model = onnx.load(bundle.model_path(batch))
    return model, {name: t.element for name, t in tensor_types(model).items()}


@pytest.mark.parametrize("batch", [1, 2])
def test_every_convolution_is_float16_in_both_inputs(half, batch):
    model, types = loaded(half, batch)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) > 15
    for node in convolutions:
        assert {types[name] for name in node.input} == {HALF}, node.name
    assert [t.type.tensor_type.elem_type for t in model.graph.input] == [SINGLE]
    assert [t.type.tensor_type.elem_type for t in model.graph.output] == [SINGLE]


def test_what_makes_a_kernel_is_float32(half, segmentor):
    model, types = loaded(half)
    makers = {name: node for node in model.graph.node for name in node.output}
    cast = set()
    for node in model.graph.node:
        kernel = makers.get(node.input[1]) if node.op_type == "Conv" else None
        if kernel is None:
            continue
        assert kernel.op_type == "Cast"
        cast |= {name for name in dynamic_layers(segmentor) if node.name.startswith(f"{name}.")}
        waiting, seen = [kernel.input[0]], set()
        while waiting:
            maker = makers.get(waiting.pop())
            if maker is None or maker.output[0] in seen:
                continue
            seen.add(maker.output[0])
            floats = {types[n] for n in (*maker.input, *maker.output) if types[n] in (HALF, SINGLE)}
            assert floats <= {SINGLE}, maker.name
            if maker.op_type not in ("GlobalAveragePool", "ReduceMean"):
                waiting += maker.input
        assert len(seen) > 5  # from the kernel to the average
    assert cast == set(dynamic_layers(segmentor))


def test_one_type_per_node(half):
    """Nothing is left to a runtime to cast: what TensorRT calls strongly typed."""
    model, types = loaded(half)
    for node in model.graph.node:
        if node.op_type in ("Cast", "Resize"):
            continue
        floats = {types[n] for n in node.input if n and types[n] in (HALF, SINGLE)}
        assert len(floats) <= 1, (node.op_type, node.name)


def weights(bundle: Bundle) -> dict[str, np.ndarray]:
    model = onnx.load(bundle.model_path(1))
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def test_weights(half, bundle):
    before, after = weights(bundle), weights(half)
    plain = [n for n in before if n.startswith("decode_head") and before[n].dtype == np.float32]
    assert len(plain) > 10
    for name in plain:
        np.testing.assert_array_equal(after[f"{name}.fp16"], before[name].astype(np.float16))
    spectra = [n for n in before if n.endswith(".spectrum")]
    assert len(spectra) > 5
    for name in spectra:
        np.testing.assert_array_equal(after[name], before[name])
    report = half.manifest.graph["precision"]
    halves = [v for v in after.values() if v.dtype == np.float16]
    assert report["values"] == sum(v.size for v in halves)
    tiny = np.finfo(np.float16).smallest_normal
    assert report["subnormal"] == sum(int(((v != 0) & (np.abs(v) < tiny)).sum()) for v in halves)


@pytest.mark.parametrize("batch", [1, 2])
def test_answers_are_near_float32s(half, bundle, batch):
    x = lively_input((batch, 3, *SIZE), 5).numpy()
    (exact,) = run_file(bundle.model_path(batch), x)
    (found,) = run_file(half.model_path(batch), x)
    assert 1e-5 < relative(found, exact) < 2e-2


def test_report(half, segmentor):
    manifest = half.manifest
    assert manifest.precision == "fp16"
    report = manifest.graph["precision"]
    layers = report["layers"]
    assert set(layers) > set(dynamic_layers(segmentor))
    assert {"decode_head.conv_seg", "backbone.layer1.0 (sum)"} < set(layers)
    assert all(0 < error < 2e-2 and 0 <= turned < 1e-3 for error, turned in layers.values())
    assert layers[report["worst"][0]][0] == max(error for error, _ in layers.values())
    assert manifest.parity.max_rel < 2e-2


def test_a_kept_module_is_float32(segmentor, tmp_path):
    keep = ["decode_head.*", "backbone.layer2.1"]
    made = export_network(
        segmentor, tmp_path / "bundle", size=SIZE, precision="fp16", keep_fp32=keep
    )
    model, types = loaded(made)
    found: dict[bool, set[int]] = {True: set(), False: set()}
    for node in model.graph.node:
        if node.op_type == "Conv":
            names = (node.name, node.input[1])
            kept = any(n.startswith(("decode_head.", "backbone.layer2.1.")) for n in names)
            found[kept] |= {types[name] for name in node.input}
    assert found == {True: {SINGLE}, False: {HALF}}
    assert made.manifest.graph["precision"]["kept"] == keep


def test_past_the_tolerance_nothing_is_kept(segmentor, tmp_path):
    with pytest.raises(
        ExportError,
        match=r"in fp16, \d+ of \d+ layers.*Worst: \S+ \(.*--keep-fp32 'backbone.conv1'.*Nothing",
    ):
        export_network(segmentor, tmp_path / "bundle", size=SIZE, precision="fp16", tolerance=1e-4)
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_of_nothing(segmentor, tmp_path):
    with pytest.raises(ExportError, match=r"'neck' names no module of the exported graph.*e\.g\."):
        export_network(
            segmentor, tmp_path / "bundle", size=SIZE, precision="fp16", keep_fp32=["neck"]
        )
    assert list(tmp_path.iterdir()) == []


def test_modules_with_every_wiring(module, tmp_path):
    """Two outputs, a layer read twice, BatchNorms that cannot be folded."""
    example = lively_input((3, 4, 23, 30))
    made = export_module(module, example, tmp_path / "bundle", batches=(1, 5), precision="fp16")
    expected = module(lively_input((5, 4, 23, 30), 3))
    found = run_file(made.model_path(5), lively_input((5, 4, 23, 30), 3).numpy())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        assert relative(one, other.detach().numpy()) < 2e-2


# Small graphs written by hand.


def tensor(name: str, values: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(values, name)


def chain(first: np.ndarray, second: np.ndarray) -> onnx.ModelProto:
    """x -> 1×1 Conv -> y1 (an output too) -> Relu -> 1×1 Conv -> Resize ×2 -> y."""
    nodes = [
        helper.make_node("Conv", ["x", "one.weight"], ["y1"], name="a"),
        helper.make_node("Relu", ["y1"], ["r"], name="b"),
        helper.make_node("Conv", ["r", "two.weight"], ["z"], name="d"),
        helper.make_node("Resize", ["z", "", "scales"], ["y"], name="e", mode="nearest"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "chain",
        [value("x", SINGLE, (1, 3, 4, 5))],
        [value("y", SINGLE, (1, 2, 8, 10)), value("y1", SINGLE, (1, 6, 4, 5))],
        [
            tensor("one.weight", first),
            tensor("two.weight", second),
            tensor("scales", np.array([1, 1, 2, 2], np.float32)),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


RNG = np.random.default_rng(0)
FIRST = RNG.normal(size=(6, 3, 1, 1)).astype(np.float32)
SECOND = RNG.normal(size=(2, 6, 1, 1)).astype(np.float32)
X = RNG.normal(size=(1, 3, 4, 5)).astype(np.float32)


def h(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def test_the_measured_form_rounds_every_result(tmp_path):
    model = chain(FIRST, SECOND)
    to_half_precision(model, [])
    onnx.checker.check_model(model, full_check=True)
    onnx.save(rounding_model(model), tmp_path / "model.onnx")
    y, y1 = run_file(tmp_path / "model.onnx", X)
    inner = h(np.einsum("oi,bihw->bohw", h(FIRST)[..., 0, 0], h(X)))
    np.testing.assert_array_equal(y1, inner)
    outer = h(np.einsum("oi,bihw->bohw", h(SECOND)[..., 0, 0], np.maximum(inner, 0)))
    np.testing.assert_array_equal(y, outer.repeat(2, 2).repeat(2, 3))


def test_inputs_that_must_be_float32_are():
    model = chain(FIRST, SECOND)
    report = to_half_precision(model, [])
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert kinds == {"one.weight.fp16": HALF, "two.weight.fp16": HALF, "scales": SINGLE}
    assert report.half_nodes == 4
    assert report.casts == 3


def test_weights_beyond_float16_are_named():
    large = FIRST.copy()
    large[0, 0] = 1e5
    with pytest.raises(ExportError, match=r"'one.weight' holds 1e\+05.*--keep-fp32 'one'"):
        to_half_precision(chain(large, SECOND), [])
    report = to_half_precision(chain(large, SECOND), [], ["one"])
    assert report.values == SECOND.size


def test_weights_that_vanish_are_counted():
    small = FIRST.copy()
    small.flat[:5] = [1e-9, -1e-9, 0, 1e-6, -3e-5]
    report = to_half_precision(chain(small, SECOND), [])
    assert (report.flushed, report.subnormal) == (2, 2)


def test_graphs_that_branch_are_refused():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["t"])],
        "branch",
        [],
        [helper.make_tensor_value_info("t", SINGLE, (1,))],
    )
    node = helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch, else_branch=branch)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "g", [value("x", SINGLE, (1,)), value("c", TensorProto.BOOL, ())],
        [value("y", SINGLE, (1,))],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    with pytest.raises(ExportError, match="branches or loops"):
        to_half_precision(model, [])
