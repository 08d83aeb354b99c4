"""The finished graph: what a stranger's runtime finds in the file."""

from __future__ import annotations

import getpass
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import nn

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.graph import build_graph, check_model
from fdconv_deploy.export.torch_export import capture
from fdconv_deploy.folding.network import input_sizes
from fdconv_deploy.nn.fdconv import dynamic_layers
from tests.reference.networks import dynamic


@pytest.fixture(scope="module", params=[1, 5])
def model(bundle, request) -> onnx.ModelProto:
    return onnx.load(bundle.model_path(request.param), load_external_data=False)


def test_nothing_but_onnx_and_fdconv(model, segmentor):
    domains = [n.domain for n in model.graph.node]
    assert set(domains) == {"", "fdconv"}
    # Every layer has an assembly, and a band modulation where its kernel is 3×3.
    kinds = [n.op_type.split("_")[0] for n in model.graph.node if n.domain]
    layers = dynamic_layers(segmentor)
    assert kinds.count("FrequencyAssembly") == len(layers) > 3
    assert kinds.count("FrequencyBandModulation") == len(layers)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18), ("fdconv", 1)]


def test_functions_are_of_standard_operators_and_all_used(model):
    for function in model.functions:
        assert function.domain == "fdconv"
        assert {n.domain for n in function.node} == {""}
        operators = {n.op_type for n in function.node}
        assert not operators & {"DFT", "STFT", "ScatterND", "ScatterElements", "Loop", "If"}
    names = [f.name for f in model.functions]
    assert len(set(names)) == len(names)
    assert set(names) == {n.op_type for n in model.graph.node if n.domain}


def test_every_shape_is_static(model):
    for value in (*model.graph.input, *model.graph.output):
        assert all(d.dim_value > 0 for d in value.type.tensor_type.shape.dim), value.name
    tensors = {t.name for t in model.graph.initializer}
    assert not tensors & {v.name for v in model.graph.input}


def test_names_are_the_networks_own(model, segmentor):
    nodes = {n.name for n in model.graph.node}
    assert len(nodes) == len(model.graph.node)
    for name in dynamic_layers(segmentor):
        assert {f"{name}.assembly", f"{name}.bands"} <= nodes
        # In one piece, or by kernel rows.
        assert {f"{name}.convolution", f"{name}.row1.convolution"} & nodes


def test_batch_norms_are_gone(model):
    assert "BatchNormalization" not in {n.op_type for n in model.graph.node}


@pytest.mark.parametrize("batch", [1, 5])
def test_tells_nothing_of_the_machine(bundle, batch):
    content = bundle.model_path(batch).read_bytes()
    for secret in (str(Path(__file__).parents[2]), str(Path.cwd()), getpass.getuser() + "/", ".py"):
        assert secret.encode() not in content, secret


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_passes_the_full_check(bundle, batch):
    check_model(str(bundle.model_path(batch)))


def test_loads_without_optimisation_too(bundle):
    """Some runtimes inline functions and do nothing else."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = str(bundle.model_path(1))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("damage", ["operator", "shape"])
def test_an_invalid_file_is_a_sentence(bundle, tmp_path, damage):
    model = onnx.load(bundle.model_path(1))
    if damage == "operator":
        next(n for n in model.graph.node if n.op_type == "Relu").op_type = "Rellu"
    else:
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value += 1
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(ExportError, match="not valid ONNX"):
        check_model(str(tmp_path / "damaged.onnx"))


def test_a_strangers_operator_is_refused():
    network = nn.Sequential(dynamic(), nn.Tanh()).eval()
    x = torch.zeros(1, 18, 9, 9)
    captured = capture(network, x, input_names=["x"], output_names=["y"])
    captured.opset_import.append(helper.make_opsetid("com.acme", 1))
    next(n for n in captured.graph.node if n.op_type == "Tanh").domain = "com.acme"
    with pytest.raises(ExportError, match=r"outside ONNX and 'fdconv': \['com\.acme'\]"):
        build_graph(captured, network, input_sizes(network, x), 1)
