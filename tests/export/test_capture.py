"""torch's exporter with the FDConv layers left out."""

from __future__ import annotations

import pytest
import torch
from fdconv_deploy.export.torch_export import PLACEHOLDER, PLACEHOLDER_DOMAIN, capture
from onnx import ModelProto
from torch import nn

from fdconv_deploy.errors import ExportError
from fdconv_deploy.nn import FDConv2d
from tests.reference.networks import Wired, dynamic

X = torch.zeros(2, 18, 17, 23)


@pytest.fixture(scope="module")
def network() -> Wired:
    """One layer of each geometry, each an answer of its own; then a plain head."""

    def layer(*arguments, **options) -> FDConv2d:
        options |= dict(use_fdconv_if_k_in=[1, 2, 3])
        return FDConv2d(18, 20, *arguments, kernel_num=1, param_ratio=2, **options)

    layers = [
        layer(1),
        layer(3, 2, 1),
        layer(3, (2, 1), (2, 1), (1, 3)),
        layer((1, 3), 2, (0, 1)),
        layer(2, padding="same", dilation=3),
        layer(3, padding="valid", dilation=2),
    ]
    return Wired(
        lambda s, x: (*(a(x) for a in s.layers), s.pool(s.plain(x))),
        layers=nn.ModuleList(layers),
        plain=FDConv2d(18, 8, 3),
        pool=nn.AdaptiveAvgPool2d((2, 3)),
    ).eval()


@pytest.fixture(scope="module")
def model(network) -> ModelProto:
    names = [f"y{i}" for i in range(7)]
    return capture(network, X, input_names=["x"], output_names=names)


def test_each_dynamic_layer_is_one_placeholder(model, network):
    nodes = [n for n in model.graph.node if n.domain == PLACEHOLDER_DOMAIN]
    assert {n.op_type for n in nodes} == {PLACEHOLDER}
    layers = [a.s.decode() for n in nodes for a in n.attribute if a.name == "layer"]
    assert sorted(layers) == [f"layers.{i}" for i in range(6)]
    assert all(isinstance(layer, FDConv2d) for layer in network.layers)  # left as it was


@torch.no_grad()
def test_shapes_go_on_after_a_placeholder(model, network):
    shapes = [tuple(d.dim_value for d in o.type.tensor_type.shape.dim) for o in model.graph.output]
    assert shapes == [tuple(y.shape) for y in network(X)]


def test_the_rest_is_plain_onnx(model):
    operators = {n.op_type for n in model.graph.node}
    assert operators >= {"Conv", "MatMul"}
    # Pooling windows of unequal size are two products, not gathers.
    assert not operators & {"DFT", "STFT", "Gather", "GatherND", "AveragePool"}
    assert not any(n.metadata_props for n in model.graph.node)


@pytest.mark.filterwarnings("ignore")
def test_what_torch_cannot_export_is_a_sentence():
    branching = Wired(lambda s, x: s.a(x) if x.sum() > 0 else x, a=dynamic()).eval()
    with pytest.raises(ExportError, match="torch's ONNX exporter does not take this network"):
        capture(branching, torch.ones(1, 18, 9, 9), input_names=["x"], output_names=["y"])
