from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from benchmarks.profile_operators import by_part
from fdconv_deploy.export import export_module
from fdconv_deploy.nn import FDConv2d, FDTokenConv
from fdconv_deploy.profiling.layer_names import layer_names
from fdconv_deploy.profiling.onnx_profile import (
    PARTS,
    attribute,
    by_layer,
    optimise,
    profile,
)

LAYERS = 3


class Small(nn.Module):
    """Dynamic layers of each kind, and around them what belongs to none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.wide = FDConv2d(32, 32, 3, padding=1, kernel_num=16)
        self.strided = FDConv2d(32, 48, 3, stride=2, padding=1, kernel_num=16)
        self.pointwise = FDConv2d(48, 32, 1, kernel_num=16)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x).relu()
        y = self.wide(y) + y
        return self.pool(self.pointwise(self.strided(y).relu()))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory, images) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("attribution")
    return export_module(Small().eval(), images, folder / "b").model_path(1)


def test_every_node_belongs_somewhere(model: Path, tmp_path: Path) -> None:
    optimised = optimise(model, tmp_path)
    parts = attribute(onnx.load(str(model), load_external_data=False), optimised)
    assert len(parts) == len(optimised.graph.node)
    assert set(parts) == set(PARTS)
    operators = [node.op_type for node in optimised.graph.node]
    by_operator = list(zip(operators, parts, strict=True))
    # Each layer normalises its channel averages once, for the attention.
    norms = [part for operator, part in by_operator if operator == "LayerNormalization"]
    assert norms == ["attention"] * LAYERS
    # What is left over is the network around the layers.
    assert {o for o, part in by_operator if part == "rest"}.isdisjoint({"Conv", "MatMul", "Gather"})
    assert {o for o, part in by_operator if part == "kernel assembly"} >= {"MatMul", "Gather"}
    # One for each layer, at least, and the stem's.
    convolutions = [o for o, part in by_operator if part == "convolutions" and o.endswith("Conv")]
    assert len(convolutions) > LAYERS


def test_products_over_tokens_are_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(FDTokenConv(32, 48, kernel_num=16), nn.GELU()).eval()
    path = export_module(network, torch.randn(1, 200, 32), tmp_path / "b").model_path(1)
    optimised = optimise(path, tmp_path)
    parts = attribute(onnx.load(str(path), load_external_data=False), optimised)
    products = [
        part
        for node, part in zip(optimised.graph.node, parts, strict=True)
        if any(name.startswith("0.product") for name in node.output)
    ]
    assert products == ["convolutions"]


def test_profile(model: Path, images, tmp_path: Path) -> None:
    feeds = {"input": images.numpy()}
    costs = profile(model, feeds, tmp_path, threads=1, runs=3)
    found = by_part(costs)
    assert found["nodes"] == len(costs) > 100
    assert all(spent > 0 for spent in found["parts"].values())
    for sums in (found["parts"], found["operators"]):
        assert sum(sums.values()) == pytest.approx(found["total"], abs=0.2)
    within = found["operators_by_part"]
    assert sum(within["attention"].values()) == pytest.approx(found["parts"]["attention"], abs=0.2)


def test_plain_networks_have_no_fdconv_parts(images, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    model = export_module(plain, images, tmp_path / "b").model_path(1)
    exported = onnx.load(str(model), load_external_data=False)
    assert set(attribute(exported, optimise(model, tmp_path))) == {"convolutions", "rest"}


def test_every_layer_of_the_network_is_found(model: Path, images, tmp_path: Path) -> None:
    layers = by_layer(profile(model, {"input": images.numpy()}, tmp_path, threads=1, runs=2))
    assert [layer.name for layer in layers] == ["stem", "wide", "strided", "pointwise"]
    parts = {layer.name: set(layer.milliseconds) for layer in layers}
    assert parts["stem"] <= {"convolutions", "rest"}
    for name in ("wide", "strided", "pointwise"):
        assert parts[name] >= {"convolutions", "attention", "kernel assembly"}
    assert "band modulation" in parts["wide"]
    assert "band modulation" not in parts["pointwise"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_layers_are_found_in_lower_precision(precision, images, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1), nn.ReLU()
    network = nn.Sequential(*plain, Small(), nn.Conv2d(32, 4, 1)).eval()
    how = {"calibration": [images]} if precision == "int8" else {}
    bundle = export_module(network, images, tmp_path / "b", precision=precision, **how)
    exported = onnx.load(str(bundle.model_path(1)), load_external_data=False)
    optimised = optimise(bundle.model_path(1), tmp_path)
    found = set(layer_names(exported, optimised))
    of_network = {"0", "2", "4.stem", "4.wide", "4.strided", "4.pointwise", "5"}
    assert found >= of_network
    assert len(found - of_network) <= 1, found  # where the input is converted
