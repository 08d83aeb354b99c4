"""The plugin variant of a graph means the same as the graph, to a runtime without the plugins."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.quantization.fp16 import to_half_precision
from fdconv_deploy.export.tensorrt.plugin_pass import ask_for_plugins
from fdconv_deploy.folding.layer import fold_layer
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.ops import DOMAIN
from tests.export.graphs import relative
from tests.ops.gpu.cases import BANDS, LAYERS, Case
from tests.ops.single import layer_model
from tests.reference.lively import lively_input

CASES = {n: c for n, c in {**LAYERS, **BANDS}.items() if not n.startswith("layer of R50")}


def answers(model: ModelProto, x: NDArray, name: str) -> list[NDArray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {name: x})


def checked(model: ModelProto) -> ModelProto:
    """The variant, valid, each FDConv node asking for a plugin that there is."""
    graph = ask_for_plugins(model)
    onnx.checker.check_model(graph.model, full_check=True)
    asking = [n for n in graph.model.graph.node if n.domain == DOMAIN]
    functions = {f.name for f in graph.model.functions}
    for node in asking:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes["plugin_namespace"], attributes["aot"]) == (b"fdconv", 1)
        assert node.op_type in functions
    assert sum(graph.plugins.values()) == len(asking) == len(graph.launches) > 0
    return graph.model


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer(name):
    case: Case = CASES[name]
    with torch.no_grad():
        folded = case.folded(case.layer())
    x = case.input().numpy()
    ways = (False, True) if folded.kernel_size[0] > 1 else (False,)
    for by_rows in ways:
        model = layer_model(replace(folded, by_rows=by_rows), case.batch)
        del model.graph.output[1:]
        (expected,) = answers(model, x, "x")
        (actual,) = answers(checked(model), x, "x")
        assert relative(actual, expected) < 3e-6


def load(bundle, batch) -> ModelProto:
    return onnx.load(str(bundle.model_path(batch)))


def test_whole_networks(bundle, exported_module, proved):
    nodes = 0
    for exported, batch in ((bundle, 1), (bundle, 5), (exported_module.bundle, 5)):
        (spec,) = exported.manifest.inputs[batch]
        x = lively_input(spec.shape).numpy()
        model = load(exported, batch)
        before = model.SerializeToString()
        variant = checked(model)
        assert model.SerializeToString() == before
        pairs = zip(answers(variant, x, spec.name), answers(model, x, spec.name), strict=True)
        for actual, expected in pairs:
            assert relative(actual, expected) < 2e-5
        nodes += sum(n.domain == DOMAIN for n in variant.graph.node)
    proved(f"{nodes} nodes ask for plugins, in 3 graphs that ONNX Runtime runs as before")


def test_half_precision(bundle, segmentor):
    model = load(bundle, 1)
    to_half_precision(model, list(dynamic_layers(segmentor)))
    variant = checked(model)
    names = [n.op_type for n in variant.graph.node if n.domain == DOMAIN]
    columns = [n for n in names if n.startswith("FrequencyAssemblyColumns")]
    assert columns
    assert all(n.endswith("_Half") for n in columns), "kernels are written as float16 at once"
    combinations = [n for n in names if n.startswith("FrequencyBandCombination")]
    assert combinations
    assert all(n.endswith("_Half") for n in combinations)
    (spec,) = bundle.manifest.inputs[1]
    x = lively_input(spec.shape).numpy()
    (expected,), (actual,) = answers(model, x, spec.name), answers(variant, x, spec.name)
    assert actual.dtype == np.float32
    assert relative(actual, expected) < 2e-2


@pytest.mark.parametrize("name", ["tokens", "linear"])
def test_half_precision_over_tokens(name):
    case = CASES[name]
    with torch.no_grad():
        model = layer_model(case.folded(case.layer()), case.batch)
    del model.graph.output[1:]
    x = case.input().numpy()
    (expected,) = answers(model, x, "x")
    to_half_precision(model, ["layer"])
    (actual,) = answers(model, x, "x")
    assert relative(actual, expected) < 5e-3
    variant = checked(model)
    (half,) = answers(variant, x, "x")
    assert relative(half, expected) < 5e-3
    columns = [n.op_type for n in variant.graph.node if "Columns" in n.op_type]
    assert [n.endswith("_Half") for n in columns] == [True]


def test_a_convolution_stays_one_node(bundle):
    """By rows is for CPUs: a GPU convolves with whole kernels."""
    variant = checked(load(bundle, 1))
    names = [n.name for n in variant.graph.node]
    assert not any(".row0." in name for name in names)


def test_unknown_operators_are_refused():
    case = CASES["pointwise"]
    with torch.no_grad():
        model = layer_model(fold_layer(case.layer(), case.size, name="layer"), 1)
    for node in model.graph.node:
        if node.domain == DOMAIN:
            node.op_type = "FrequencySomething"
    with pytest.raises(ExportError, match=r"does not know.*--plugins off"):
        ask_for_plugins(model)
