"""Global averages in exported graphs, against float64, over map sizes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import nn

from fdconv_deploy.export.api import export_module
from fdconv_deploy.export.passes import split_means
from tests.export.graphs import run_file
from tests.reference.networks import Wired

SIZES = [(7, 7), (13, 17), (16, 16), (48, 64), (65, 97), (101, 127), (200, 336), (256, 512)]
# A running sum over 256×512 flat pixels errs by 1e-4.
LARGEST = 1e-6
LEVELS = list(onnxruntime.GraphOptimizationLevel.__members__.values())


def maps(size: tuple[int, int], offset: float | None) -> np.ndarray:
    """Flat maps where ``offset`` is None, else noise around it."""
    generator = np.random.default_rng(sum(size))
    if offset is None:
        values = generator.normal(size=(2, 6, 1, 1)) + 0.3
        return np.broadcast_to(values, (2, 6, *size)).astype(np.float32)
    return (generator.normal(size=(2, 6, *size)) + offset).astype(np.float32)


def error(actual: np.ndarray, x: np.ndarray) -> float:
    """Of means, as a share of the largest magnitude that was averaged over."""
    exact = x.astype(np.float64).mean((2, 3))
    scale = max(np.abs(exact).max(), np.abs(x).mean())
    return float(np.abs(actual.reshape(exact.shape) - exact).max() / scale)


def graph_of(op: str, shape: tuple[int, ...], **attributes) -> onnx.ModelProto:
    axes = [helper.make_tensor("axes", TensorProto.INT64, [2], [-1, -2])]
    reduces = op.startswith("Reduce")
    node = helper.make_node(op, ["x", "axes"] if reduces else ["x"], ["y"], op, **attributes)
    value = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("x", shape), ("y", None))
    ]
    graph = helper.make_graph([node], "means", value[:1], value[1:], axes if reduces else [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray, level=LEVELS[-1]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def split(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = gs.import_onnx(model)
    split_means(graph)
    return gs.export_onnx(graph)


@pytest.mark.parametrize("offset", [None, 0, 1, 30, 1000])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", ["ReduceMean", "GlobalAveragePool", "AveragePool"])
def test_means_are_as_good_as_float32(op, size, offset):
    x = maps(size, offset)
    attributes = {"kernel_shape": list(size)} if op == "AveragePool" else {}
    model = split(graph_of(op, x.shape, **attributes))
    assert error(run(model, x), x) <= LARGEST


def test_a_running_sum_would_fail():
    """What the pass is for; where ONNX Runtime mends it, the pass may go."""
    x = maps((256, 512), None)
    assert error(run(graph_of("ReduceMean", x.shape), x), x) > 10 * LARGEST


@pytest.mark.parametrize("level", LEVELS)
def test_no_optimiser_joins_them_again(level):
    x = maps((256, 512), None)
    assert error(run(split(graph_of("ReduceMean", x.shape)), x, level), x) <= LARGEST


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum"])
def test_shapes_stay(op, keep):
    x = maps((17, 260), 1)
    before = graph_of(op, x.shape, keepdims=keep)
    after = split(before)
    assert len(after.graph.node) > 1
    assert run(after, x).shape == run(before, x).shape
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-5)


def test_other_poolings_stay():
    local = graph_of("AveragePool", (1, 2, 8, 8), kernel_shape=[2, 2], strides=[2, 2])
    padded = graph_of("AveragePool", (1, 2, 8, 8), kernel_shape=[8, 8], pads=[1, 1, 1, 1])
    for model in (local, padded):
        assert [node.op_type for node in split(model).graph.node] == ["AveragePool"]


MEANS = {
    "mean": lambda s, x: x.mean((2, 3)),
    "adaptive": lambda s, x: F.adaptive_avg_pool2d(x, 1),
    "module": lambda s, x: s.pool(x),
    "window": lambda s, x: F.avg_pool2d(x, x.shape[2:]),
    "flattened": lambda s, x: x.flatten(2).mean(-1),
    "sum": lambda s, x: x.sum((2, 3)) / x[0, 0].numel(),
}


@pytest.mark.parametrize("kind", MEANS)
def test_users_means_are_as_good_as_float32(kind, tmp_path):
    network = Wired(MEANS[kind], pool=nn.AdaptiveAvgPool2d(1)).eval()
    x = maps((100, 260), None)
    made = export_module(network, torch.from_numpy(x), tmp_path / "bundle")
    assert error(run_file(made.model_path(2), x)[0], x) <= LARGEST


@pytest.mark.parametrize("size", SIZES)
def test_pyramid_pooling_is_as_good_as_float32(size, tmp_path):
    """Of flat maps, all bins are their value."""
    network = Wired(
        lambda s, x: tuple(pool(x) for pool in s.pools),
        pools=nn.ModuleList(nn.AdaptiveAvgPool2d(bins) for bins in (1, 2, 3, 6)),
    ).eval()
    x = maps(size, None)
    made = export_module(network, torch.from_numpy(x), tmp_path / "bundle")
    for bins, pooled in zip((1, 2, 3, 6), run_file(made.model_path(2), x), strict=True):
        assert pooled.shape == (2, 6, bins, bins)
        assert np.abs(pooled - x[:, :, :1, :1]).max() <= LARGEST * np.abs(x).max(), bins
