"""torch's exporter with the FDConv layers left out, and a detector's operators in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn

from fdconv_deploy.config import RoIConfig, RPNHeadConfig, RPNTestConfig
from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.torch_export import PLACEHOLDER, PLACEHOLDER_DOMAIN, capture
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.nn.detection.box_ops import (
    BestScores,
    NonMaxSuppression,
    RoIAlign,
    RoIExtractor,
    set_apart,
)
from fdconv_deploy.nn.detection.detector import RPNHead
from tests.reference import detection as reference
from tests.reference.networks import Wired, dynamic


class Wrapped(nn.Module):
    """A module asked in a way of ours."""

    def __init__(self, module: nn.Module, ask: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.module, self.ask = module, ask

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs) if self.ask is None else self.ask(self.module, *inputs)


def in_onnx(module: nn.Module, *inputs: Tensor, outputs: int = 1) -> list[np.ndarray]:
    """What stock ONNX Runtime makes of a captured module."""
    names = [f"x{i}" for i in range(len(inputs))]
    answers = [f"y{i}" for i in range(outputs)]
    model = capture(module.eval(), inputs, input_names=names, output_names=answers)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return session.run(answers, feed)


@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align(ratio):
    """Inside, across each border, beyond them, thin, and empty."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(2, 3, 9, 11)).astype(np.float32)
    boxes = np.float32(
        [
            [[3, 5, 20, 17], [-9, -7, 6, 30], [30, 20, 70, 60], [0, 0, 44, 36]],
            [[60, 60, 80, 90], [5, 5, 5, 5], [7, 3, 7.5, 33], [-3.5, -3, -2, -2]],
        ]
    )
    module = Wrapped(RoIAlign(3, 0.25, ratio))
    (found,) = in_onnx(module, *map(torch.from_numpy, (features, boxes)))
    expected = [
        reference.roi_align(features[image].astype(np.float64), box, 3, 0.25, ratio)
        for image in range(2)
        for box in boxes[image].astype(np.float64)
    ]
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-5)


@pytest.mark.parametrize("ratio", [0, 2])
def test_regions_come_from_their_levels(ratio):
    config = RoIConfig(featmap_strides=(4, 8), output_size=2, finest_scale=8, sampling_ratio=ratio)
    levels = [torch.randn(1, 2, 64 // s, 64 // s) for s in (4, 8)]
    boxes = torch.tensor([[[3.0, 4, 14, 11], [5, 6, 60, 33], [0, 0, 64, 64], [0, 0, 0, 0]]])
    module = Wrapped(RoIExtractor(config), lambda m, a, b, boxes: m([a, b], boxes))
    (found,) = in_onnx(module, *levels, boxes)
    for region, box in zip(found[:3], boxes[0, :3].double().numpy(), strict=True):
        level = reference.level(box, finest=8, levels=2)
        feature = levels[level][0].double().numpy()
        expected = reference.roi_align(feature, box, 2, 1 / 4 / 2**level, ratio)
        np.testing.assert_allclose(region, expected, atol=1e-5)


@pytest.mark.parametrize("limit", [4, 100])
def test_suppression(limit):
    """Many equal scores, equal boxes and IoUs of exactly the threshold; groups set apart."""
    generator = np.random.default_rng(1)
    corners = generator.integers(0, 9, size=(2, 2, 80, 2)).astype(np.float32)
    boxes = np.concatenate([corners.min(0), corners.max(0)], axis=-1)
    scores = generator.integers(-4, 5, size=(2, 80)).astype(np.float32) / 4
    scores[scores < 0] = -1
    groups = torch.from_numpy(generator.integers(0, 3, size=80))

    def ask(m: nn.Module, boxes: Tensor, scores: Tensor) -> Tensor:
        return m(set_apart(boxes, groups, scores), scores)

    module = Wrapped(NonMaxSuppression(0.5, limit), ask)
    tensors = torch.from_numpy(boxes), torch.from_numpy(scores)
    (found,) = in_onnx(module, *tensors)
    np.testing.assert_array_equal(found, module(*tensors).numpy())
    for image in range(2):
        there = np.flatnonzero(scores[image] >= 0)
        kept = reference.suppress(
            boxes[image, there], scores[image, there], groups.numpy()[there], 0.5
        )
        expected = np.zeros(80, bool)
        expected[there[kept[:limit]]] = True
        np.testing.assert_array_equal(found[image], expected)


def test_best_scores():
    scores = torch.randint(0, 9, (2, 3000)) / 8.0
    values, indices = in_onnx(Wrapped(BestScores(1000)), scores, outputs=2)
    expected = BestScores(1000)(scores)
    np.testing.assert_array_equal(values, expected[0].numpy())
    np.testing.assert_array_equal(indices, expected[1].numpy())


@torch.no_grad()
def test_the_likeliest_anchors_keep_their_order():
    """Near 1, where a float32 sigmoid has few values left and the runtime's own is not monotone."""
    torch.manual_seed(0)
    test = RPNTestConfig(nms_pre=300, max_per_img=200)
    head = RPNHead(8, RPNHeadConfig(feat_channels=8, strides=(4, 8)), test)
    head.rpn_cls.weight.mul_(4)
    head.rpn_cls.bias.fill_(9)
    features = torch.randn(1, 8, 24, 32), torch.randn(1, 8, 12, 16)
    module = Wrapped(head, lambda m, a, b, sizes: m.propose([a, b], sizes))
    inputs = *features, torch.tensor([[96.0, 128.0]])
    boxes, valid = in_onnx(module, *inputs, outputs=2)
    expected = module(*inputs)
    np.testing.assert_array_equal(valid, expected[1].numpy())
    np.testing.assert_allclose(boxes, expected[0].numpy(), atol=1e-3)


def test_a_graph_holds_no_anchors():
    """Of a larger image it would hold megabytes."""
    head = RPNHead(8, RPNHeadConfig(feat_channels=8, strides=(4,)), RPNTestConfig(nms_pre=100))
    module = Wrapped(head, lambda m, x, sizes: m.propose([x], sizes))

    def held(height: int, width: int) -> int:
        inputs = torch.zeros(1, 8, height, width), torch.tensor([[64.0, 64.0]])
        model = capture(module.eval(), inputs, input_names=["x", "s"], output_names=["y", "v"])
        return sum(len(tensor.raw_data) for tensor in model.graph.initializer)

    assert held(16, 24) == held(32, 48)


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


@torch.no_grad()
def test_the_exporter_does_not_chatter(caplog):
    """onnxscript warns of each constant operator of several outputs that it leaves."""
    parts = Wired(lambda s, x: sum(s.a(p) for p in s.w.split(4)) + x, a=nn.Identity())
    parts.w = nn.Parameter(torch.ones(8, 5))
    capture(parts.eval(), torch.ones(4, 5), input_names=["x"], output_names=["y"])
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.filterwarnings("ignore")
def test_what_torch_cannot_export_is_a_sentence():
    branching = Wired(lambda s, x: s.a(x) if x.sum() > 0 else x, a=dynamic()).eval()
    with pytest.raises(ExportError, match="torch's ONNX exporter does not take this network"):
        capture(branching, torch.ones(1, 18, 9, 9), input_names=["x"], output_names=["y"])
