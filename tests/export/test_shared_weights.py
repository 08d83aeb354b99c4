"""One weights file for the graphs of all batch sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fdconv_deploy.export.exporter import ALIGNMENT, INLINE_BYTES, SharedWeights

RNG = np.random.default_rng(0)


def model(batch: int, **weights: np.ndarray) -> ModelProto:
    """``y = x + sum of weights``, for one batch size."""
    nodes, last = [], "x"
    for name in weights:
        nodes.append(helper.make_node("Add", [last, name], [f"{name}.sum"]))
        last = f"{name}.sum"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    width = next(iter(weights.values())).shape[-1]
    ends = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, width])] for n in ("x", "y")
    ]
    tensors = [numpy_helper.from_array(v, n) for n, v in weights.items()]
    graph = helper.make_graph(nodes, "test", *ends, tensors)
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def random(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def places(m: ModelProto) -> dict[str, dict[str, str]]:
    return {
        t.name: {e.key: e.value for e in t.external_data}
        for t in m.graph.initializer
        if t.data_location == TensorProto.EXTERNAL
    }


def answer(path: Path, batch: int, width: int) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.zeros((batch, width), np.float32)})[0]


def test_graphs_share_each_tensor_once(tmp_path):
    wide, other, small = random(1, 401), random(1, 401), random(1, 1)
    first = model(1, w=wide, v=other, s=small)
    second = model(3, renamed=wide, u=random(3, 401), again=wide)
    extra = numpy_helper.to_array(second.graph.initializer[1])
    with (tmp_path / "weights.bin").open("wb") as file:
        weights = SharedWeights(file)
        for batch, m in ((1, first), (3, second)):
            weights.take(m)
            onnx.save(m, str(tmp_path / f"b{batch}.onnx"))
    one, three = places(first), places(second)
    assert set(one) == {"w", "v"}
    assert one["w"] == three["renamed"] == three["again"]
    offsets = [int(p["offset"]) for p in (*one.values(), *three.values())]
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert all(p["location"] == "weights.bin" for p in (*one.values(), *three.values()))
    # Four tensors, of which one is in the graph, and less than a line of padding each.
    stored = (tmp_path / "weights.bin").stat().st_size
    assert 0 <= stored - 4 * (401 + 401 + 3 * 401) < 2 * ALIGNMENT
    np.testing.assert_array_equal(answer(tmp_path / "b1.onnx", 1, 401), wide + other + small)
    expected = np.zeros((3, 401), np.float32) + wide + extra + wide
    np.testing.assert_array_equal(answer(tmp_path / "b3.onnx", 3, 401), expected)


def test_small_tensors_stay_in_the_graph(tmp_path):
    edge = INLINE_BYTES // 4
    m = model(1, inside=random(1, edge))
    n = model(1, outside=random(1, edge + 1))
    with (tmp_path / "weights.bin").open("wb") as file:
        weights = SharedWeights(file)
        weights.take(m)
        weights.take(n)
    assert places(m) == {}
    assert set(places(n)) == {"outside"}


def test_tensors_not_stored_as_bytes(tmp_path):
    """onnx also has lists of numbers."""
    values = random(1, 500)
    m = model(1, w=values)
    typed = helper.make_tensor("w", TensorProto.FLOAT, values.shape, values.reshape(-1).tolist())
    m.graph.initializer[0].CopyFrom(typed)
    with (tmp_path / "weights.bin").open("wb") as file:
        weights = SharedWeights(file)
        weights.take(m)
    onnx.save(m, str(tmp_path / "m.onnx"))
    assert set(places(m)) == {"w"}
    np.testing.assert_array_equal(answer(tmp_path / "m.onnx", 1, 500), values)
