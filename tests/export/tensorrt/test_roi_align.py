"""RoiAlign in standard operators means what ONNX's operator means."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fdconv_deploy.errors import BackendError, ExportError
from fdconv_deploy.export.tensorrt.builder import BuildOptions, build_plan
from fdconv_deploy.export.tensorrt.plugin_pass import ask_for_plugins
from fdconv_deploy.export.tensorrt.roi_align import without_roi_align
from fdconv_deploy.runtime.backends import BackendOptions
from fdconv_deploy.runtime.backends.tensorrt import Cuda, TensorRTBackend
from tests.runtime.fake_tensorrt import FakeCuda, FakeTensorRT

BATCH, CHANNELS, HEIGHT, WIDTH, REGIONS, BINS = 2, 3, 9, 14, 12, 7


def model(ratio: int, scale: float, images: np.ndarray) -> onnx.ModelProto:
    node = helper.make_node(
        "RoiAlign", ["features", "boxes", "images"], ["regions"], "align", mode="avg",
        coordinate_transformation_mode="half_pixel", output_height=BINS, output_width=BINS,
        sampling_ratio=ratio, spatial_scale=scale,
    )  # fmt: skip
    shapes = {
        "features": (BATCH, CHANNELS, HEIGHT, WIDTH), "boxes": (REGIONS, 4),
        "regions": (REGIONS, CHANNELS, BINS, BINS),
    }  # fmt: skip
    x, boxes, y = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items()
    )
    graph = helper.make_graph(
        [node], "g", [x, boxes], [y], [numpy_helper.from_array(images, "images")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def regions(scale: float) -> np.ndarray:
    """Boxes of every size, within the map and at its edges, empty, and far outside."""
    random = np.random.default_rng(0)
    corners = np.sort(random.random((REGIONS, 2, 2)), axis=1) * (WIDTH, HEIGHT)
    boxes = corners.reshape(REGIONS, 4).astype(np.float32)
    boxes[0] = 0, 0, WIDTH, HEIGHT
    boxes[1] = -1000
    boxes[2] = 3, 2, 3, 5  # no width
    boxes[3] = 0, 0, WIDTH, 0.5
    return boxes / np.float32(scale)


def run(given: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    onnx.checker.check_model(given)
    session = onnxruntime.InferenceSession(given.SerializeToString())
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_regions_are_those_of_the_operator(ratio, scale):
    images = np.repeat(np.arange(BATCH), REGIONS // BATCH)
    given = model(ratio, scale, images)
    shape = BATCH, CHANNELS, HEIGHT, WIDTH
    features = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    feeds = {"features": features, "boxes": regions(scale)}
    changed = without_roi_align(given)
    assert [(n.domain, n.op_type) for n in changed.graph.node] == [("fdconv", "RoiAlignProducts")]
    expected, actual = run(given, feeds), run(changed, feeds)
    assert np.abs(expected).max() > 0.5
    assert np.abs(actual - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("there", [True, False])
def test_a_build_asks_for_tensorrts_plugin_and_does_without_it(there, tmp_path):
    path = tmp_path / "graph.onnx"
    onnx.save(model(2, 1.0, np.repeat(np.arange(BATCH), REGIONS // BATCH)), path)
    trt = FakeTensorRT(FakeCuda())
    parsed: list[str] = []
    trt.OnnxParser = lambda network, logger: SimpleNamespace(
        parse_from_file=lambda file: parsed.extend(n.op_type for n in onnx.load(file).graph.node),
        num_errors=0,
    )
    if not there:
        trt.available.clear()
    with pytest.raises(BackendError):  # such a parser takes nothing
        build_plan(trt, path, BuildOptions())
    assert parsed == ["RoiAlign" if there else "RoiAlignProducts"]


def test_running_an_engine_asks_for_tensorrts_plugins():
    trt, cuda = FakeTensorRT(FakeCuda()), FakeCuda()
    TensorRTBackend(BackendOptions(), trt, Cuda(cuda))
    assert trt.plugins == {"ROIAlign_TRT"}


PARSE = """
import ctypes, glob, os, sys
import tensorrt_rtx_libs
for library in sorted(glob.glob(os.path.join(tensorrt_rtx_libs.__path__[0], "*.so*"))):
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
import tensorrt_rtx_bindings as trt
logger = trt.Logger(trt.Logger.ERROR)
for graph in sys.argv[1:]:
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    taken = parser.parse_from_file(graph)
    print("GRAPH", "taken" if taken else parser.get_error(0).desc())  # its logger prints, too
"""


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT-RTX is not installed",
)
def test_nvidias_parser_takes_a_detector(tmp_path, proved):
    """Its builder has no NonMaxSuppression on a CPU."""
    from fdconv_deploy.demo import packaged_detector
    from fdconv_deploy.export import export_checkpoint

    exported = export_checkpoint(packaged_detector(), tmp_path / "bundle", size=(96, 128))
    whole = onnx.load(str(exported.model_path(1)))
    # CUDA's provider has no Pad of integers: it would stop the GPU for the CPU.
    assert "Pad" not in {node.op_type for node in whole.graph.node}
    graphs = [exported.model_path(1)]
    for name, given in (("plain", whole), ("plugins", ask_for_plugins(whole).model)):
        graphs.append(tmp_path / f"{name}.onnx")
        onnx.save(without_roi_align(given), graphs[-1])
    finished = subprocess.run(
        [sys.executable, "-c", PARSE, *map(str, graphs)], capture_output=True, text=True, check=True
    )
    lines = [line for line in finished.stdout.splitlines() if line.startswith("GRAPH ")]
    first, *others = (line.removeprefix("GRAPH ") for line in lines)
    assert "ROIAlign plugin was not found" in first
    assert others == ["taken", "taken"]
    proved("TensorRT-RTX's parser took a detector and its plugin variant")


def test_regions_in_another_order_are_refused():
    with pytest.raises(ExportError, match="'align' is not as this package writes it"):
        without_roi_align(model(2, 1.0, np.arange(REGIONS) % BATCH))
