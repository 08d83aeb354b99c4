"""What each layer and part takes, in ONNX Runtime and by the clock around PyTorch's layers."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from fdconv_deploy.export import export_module
from fdconv_deploy.nn import FDConv2d, FDTokenConv
from fdconv_deploy.profiling import PARTS, WARM_UP
from fdconv_deploy.profiling.profile import (
    BEFORE,
    ProfiledGraph,
    ProfiledNetwork,
    attribute,
    optimise,
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


def parts_of(model: Path, optimised: onnx.ModelProto) -> list[str]:
    exported = onnx.load(str(model), load_external_data=False)
    return [part for _, part in attribute(exported, optimised)]


def profiled_graph(model: Path, images: torch.Tensor, folder: Path, runs: int) -> ProfiledGraph:
    graph = ProfiledGraph(model, folder, threads=1)
    for _ in range(runs + WARM_UP):
        graph.run({"input": images.numpy()})
    return graph


def test_every_node_belongs_somewhere(model: Path, tmp_path: Path) -> None:
    optimised = optimise(model, tmp_path)
    parts = parts_of(model, optimised)
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
    parts = parts_of(path, optimised)
    products = [
        part
        for node, part in zip(optimised.graph.node, parts, strict=True)
        if any(name.startswith("0.product") for name in node.output)
    ]
    assert products == ["convolutions"]


def test_plain_networks_have_no_fdconv_parts(images, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    model = export_module(plain, images, tmp_path / "b").model_path(1)
    assert set(parts_of(model, optimise(model, tmp_path))) == {"convolutions", "rest"}


def test_every_layer_of_the_network_is_found(model: Path, images, tmp_path: Path) -> None:
    layers = profiled_graph(model, images, tmp_path, runs=2).layers()
    assert [layer.name for layer in layers] == ["stem", "wide", "strided", "pointwise"]
    parts = {layer.name: set(layer.ms) for layer in layers}
    assert parts["stem"] <= {"convolutions", "rest"}
    for name in ("wide", "strided", "pointwise"):
        assert parts[name] >= {"convolutions", "attention", "kernel assembly"}
    assert "band modulation" in parts["wide"]
    assert "band modulation" not in parts["pointwise"]
    assert sum(sum(layer.ms.values()) for layer in layers) > 0


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_layers_are_found_in_lower_precision(precision, images, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1), nn.ReLU()
    network = nn.Sequential(*plain, Small(), nn.Conv2d(32, 4, 1)).eval()
    how = {"calibration": [images]} if precision == "int8" else {}
    bundle = export_module(network, images, tmp_path / "b", precision=precision, **how)
    exported = onnx.load(str(bundle.model_path(1)), load_external_data=False)
    optimised = optimise(bundle.model_path(1), tmp_path)
    found = {layer for layer, _ in attribute(exported, optimised)}
    of_network = {"0", "2", "4.stem", "4.wide", "4.strided", "4.pointwise", "5"}
    assert found >= of_network
    assert len(found - of_network) <= 1, found  # where the input is converted


class Slow(nn.Module):
    """Takes seconds of a clock that nothing else turns."""

    now = 0.0

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Slow.now += self.seconds
        return x


class SlowAttention(FDConv2d):
    def attention(self, *inputs):
        return super().attention(*map(Slow(5), inputs))


def profiled_network(network: nn.Module, x: torch.Tensor) -> dict[str, dict[str, float]]:
    profiled = ProfiledNetwork(network.eval(), clock=lambda: Slow.now)
    for _ in range(3 + WARM_UP):
        profiled.run((x,))
    return {layer.name: layer.ms for layer in profiled.layers()}


def test_time_goes_to_the_layer_and_part_that_runs() -> None:
    torch.manual_seed(0)
    dynamic = SlowAttention(32, 32, 3, padding=1, kernel_num=16)
    original = dynamic.FBM.forward
    dynamic.FBM.forward = lambda x: Slow(20)(original(x))
    network = nn.Sequential(
        Slow(30), nn.Conv2d(3, 32, 3), Slow(10), dynamic, nn.Conv2d(32, 8, 1), Slow(40)
    )
    layers = profiled_network(network, torch.randn(1, 3, 20, 20))
    assert list(layers) == [BEFORE, "1", "3", "4"]
    spent = {name: {k: v / 1e3 for k, v in parts.items() if v} for name, parts in layers.items()}
    assert spent == {
        BEFORE: {"rest": 30},
        "1": {"rest": 10},
        "3": {"attention": 5, "band modulation": 20},
        "4": {"rest": 40},
    }
    assert set(layers["3"]) == {
        "attention", "band modulation", "kernel assembly", "convolutions", "rest"
    }  # fmt: skip


def test_the_parts_are_the_whole() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3), Slow(7), FDConv2d(32, 32, 3, padding=1, kernel_num=16), Slow(50)
    )
    layers = profiled_network(network, torch.randn(1, 3, 16, 16))
    assert sum(sum(parts.values()) for parts in layers.values()) == 57e3


def test_setting_the_clocks_up_is_no_layers_time() -> None:
    class Searched(nn.Sequential):
        def named_modules(self, *arguments, **named):
            Slow.now += 100
            return super().named_modules(*arguments, **named)

    layers = profiled_network(Searched(Slow(7), nn.Conv2d(3, 8, 3)), torch.randn(1, 3, 16, 16))
    assert layers[BEFORE] == {"rest": 7e3}


def test_profiling_leaves_the_network_as_it_was() -> None:
    network = nn.Sequential(FDConv2d(32, 32, 3, padding=1, kernel_num=16)).eval()
    x = torch.randn(1, 32, 8, 8)
    before = dict(network[0].__dict__)
    with torch.inference_mode():
        expected = network(x)
        ProfiledNetwork(network).run((x,))
        assert torch.equal(network(x), expected)
    assert set(network[0].__dict__) == set(before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
