"""Convolutions by kernel rows, joined; that answers stay is held by tests of OpenVINO."""

from __future__ import annotations

import pytest
import torch

from fdconv_deploy.export import export_module
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.runtime.native_layers import fuse_layers
from fdconv_deploy.runtime.onnx_graph import attributes, read_model
from tests.reference.lively import enliven, lively_input


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Two images through a layer of stride 2, and one of a bias."""
    folder = tmp_path_factory.mktemp("rows") / "bundle"
    layers = [
        FDConv2d(18, 20, 3, padding=1, stride=2, kernel_num=5),
        FDConv2d(20, 18, 3, padding=1, kernel_num=3, bias=True),
    ]
    network = torch.nn.Sequential(*map(enliven, layers)).eval()
    export_module(network, lively_input((2, 18, 8, 8)), folder)
    (path,) = folder.glob("*.onnx")
    return path.read_bytes()


def operators(graph) -> list[str]:
    return [node.op_type for node in graph.node]


def test_one_convolution_of_the_whole_geometry(exported: bytes) -> None:
    before = operators(read_model(exported).graph)
    assert sum("_ByRows" in name for name in before) == 2
    assert before.count("Conv") == 6
    graph = fuse_layers(exported, {}).model.graph
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert not [name for name in operators(graph) if "_ByRows" in name or name == "Slice"]
    found = [attributes(node) for node in convolutions]
    assert [given["strides"] for given in found] == [[2, 2], [1, 1]]
    assert all(given["pads"] == [1, 1, 1, 1] and given["group"] == 2 for given in found)
    kernels = {node.input[1] for node in convolutions}
    assert kernels <= {node.output[0] for node in graph.node if node.domain == "fdconv"}
    # The file's shapes of them are those of kernels by rows.
    assert not kernels & {value.name for value in graph.value_info}


def test_rows_that_others_read_stay(exported: bytes) -> None:
    model = read_model(exported)
    rows = next(n for n in model.graph.node if n.op_type == "Split" and len(n.output) == 3)
    model.graph.output.add(name=rows.output[1])
    found = fuse_layers(model.SerializeToString(), {}).model.graph
    assert sum("_ByRows" in name for name in operators(found)) == 1


def test_a_sum_of_something_else_stays(exported: bytes) -> None:
    model = read_model(exported)
    graph = model.graph
    convolution = next(node for node in graph.node if node.op_type == "Conv")
    total = next(n for n in graph.node if n.op_type == "Add" and convolution.output[0] in n.input)
    total.input[list(total.input).index(convolution.output[0])] = graph.input[0].name
    found = fuse_layers(model.SerializeToString(), {}).model.graph
    assert sum("_ByRows" in name for name in operators(found)) == 1
