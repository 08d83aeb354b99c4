"""Bundles in OpenVINO: the same answers as in ONNX Runtime. Skipped where it is not installed."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from fastapi.testclient import TestClient
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from fdconv_deploy.cli.app import app
from fdconv_deploy.environment import installed_version
from fdconv_deploy.errors import BackendError
from fdconv_deploy.export import export_module
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.ops import native
from fdconv_deploy.ops.native import BuildError, build_openvino, compiler
from fdconv_deploy.runtime import BundleWriter, open_session
from fdconv_deploy.runtime.backends.openvino import import_openvino
from fdconv_deploy.serve.app import create_app
from fdconv_deploy.serve.settings import Settings
from tests.reference.lively import enliven, lively_input
from tests.runtime import toy, toy_detector
from tests.runtime.test_bundle import relist
from tests.serve.conftest import wait_until_ready
from tests.serve.test_segment_request import decode

SHAPE = (2, 18, 8, 8)


def test_not_installed(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        BackendError, match=r"openvino is not installed here.*pip install.*'onnxruntime-cpu'"
    ):
        open_session(toy_bundle, "openvino")


def test_does_not_load(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openvino.py").write_text("raise RuntimeError('protobuf 5 is too old')")
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendError, match=r"does not load \(protobuf 5 is too old\)"):
        open_session(toy_bundle, "openvino")


@pytest.fixture(scope="module")
def openvino():
    if find_spec("openvino") is None:
        pytest.skip("extra [openvino] is not installed")
    return import_openvino()


@pytest.fixture(params=["openvino", "openvino-bf16"])
def backend(request, openvino) -> str:
    capable = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if request.param == "openvino-bf16" and "BF16" not in capable:
        pytest.skip("this processor has no bfloat16 instructions")
    return request.param


def bundle_of(folder: Path, *layers: FDConv2d) -> Path:
    network = torch.nn.Sequential(*map(enliven, layers or [FDConv2d(18, 20, 3, kernel_num=5)]))
    export_module(network.eval(), lively_input(SHAPE), folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of two FDConv layers, of two images."""
    layers = [FDConv2d(18, 20, 3, padding=1, kernel_num=5), FDConv2d(20, 18, 1, kernel_num=3)]
    return bundle_of(tmp_path_factory.mktemp("bundle"), *layers)


@pytest.fixture(scope="module")
def extension(openvino, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native operators' extension of OpenVINO, in a folder by itself."""
    if compiler("CXX", ("c++", "g++", "clang++")) is None:
        pytest.skip("no C++ compiler for OpenVINO's extension (c++, g++, clang++ or $CXX)")
    folder = tmp_path_factory.mktemp("extension")
    return build_openvino(folder, Path(openvino.__file__).parent, installed_version("openvino"))


@pytest.fixture
def built(extension: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the package looks for it."""
    monkeypatch.setattr(native, "FOLDER", extension.parent)
    monkeypatch.delenv(native.SWITCH, raising=False)
    return extension


def answer(bundle: Path, backend: str, **options) -> np.ndarray:
    with open_session(bundle, backend, **options) as session:
        ((name,),) = (
            [spec.name for spec in specs] for specs in session.bundle.manifest.inputs.values()
        )
        (output,) = session.run_raw({name: lively_input(SHAPE).numpy()}).values()
        return output


def images(count: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 32, 48)).astype(np.float32)


def test_fdconv_layers(bundle: Path, backend: str) -> None:
    expected = answer(bundle, "onnxruntime-cpu", native=False)
    error = np.abs(answer(bundle, backend, native=False) - expected).max() / np.abs(expected).max()
    assert error <= (5e-2 if backend == "openvino-bf16" else 2e-6)
    if backend == "openvino-bf16":
        assert error > 1e-4, "bfloat16 was asked for"


def test_the_error_of_bfloat16_is_said(bundle: Path, openvino, caplog) -> None:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(BackendError, match="no bfloat16 instructions"):
            open_session(bundle, "openvino-bf16")
        return
    with open_session(bundle, "openvino-bf16") as session:
        session.warm_up()
        assert "bfloat16 differs from float32" in session.operators
        figure = float(session.operators.rpartition(" ")[2])
    assert 1e-4 < figure < 5e-2
    assert "bfloat16 differs from float32" in caplog.text


def test_every_batch_and_any_number_of_images(toy_bundle: Path, openvino) -> None:
    with open_session(toy_bundle, "openvino", threads=2) as session:
        assert (session.backend, session.choice) == ("openvino", "openvino was asked for.")
        session.warm_up()
        for count in (1, 3, 4, 6):
            expected = toy.reference_logits(images(count))
            assert np.abs(session.run(images(count)) - expected).max() < 1e-4


def test_outputs_that_are_equal(tmp_path: Path, openvino) -> None:
    """OpenVINO drops what changes nothing, and then gives a tensor both names."""
    bundle = toy.make_bundle(tmp_path / "bundle", batches=(1,)).path
    path = bundle / "model.b1.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.node[-1].output[0] = "a.sum"
    model.graph.node.append(helper.make_node("Identity", ["a.sum"], ["logits"]))
    onnx.save(model, path)
    relist(bundle, path.name)
    feeds = {"images": images(1)}
    with open_session(bundle, "openvino") as session:
        found = session.run_raw(feeds)
    assert list(found) == ["logits"]
    assert np.allclose(found["logits"], toy.reference_logits(feeds["images"]), atol=1e-4)


def test_several_threads_at_once_and_answers_of_ones_own(toy_bundle: Path, openvino) -> None:
    with open_session(toy_bundle, "openvino", threads=1) as session, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: session.run(images(1, seed)), range(64)))
    for seed, logits in enumerate(found):
        assert np.abs(logits - toy.reference_logits(images(1, seed))).max() < 1e-4


def test_detector(detector_bundle: Path, openvino) -> None:
    picture = toy_detector.picture()
    with (
        open_session(detector_bundle, "onnxruntime-cpu") as known,
        open_session(detector_bundle, "openvino") as session,
    ):
        expected, found = known.detect(picture), session.detect(picture)
    assert len(found.scores) == len(expected.scores) > 0
    assert np.array_equal(found.labels, expected.labels)
    assert np.abs(found.boxes - expected.boxes).max() < 1e-3


def test_what_was_hashed_is_what_runs(tmp_path: Path, openvino) -> None:
    made = toy.make_bundle(tmp_path / "bundle").path
    with open_session(made, "openvino") as session:
        shutil.rmtree(made)
        assert np.abs(session.run(images(1)) - toy.reference_logits(images(1))).max() < 1e-4


def test_a_graph_it_cannot_load(bundle_copy: Path, openvino) -> None:
    path = bundle_copy / "model.b1.onnx"
    model = onnx.load(str(path), load_external_data=False)
    model.graph.node[0].op_type = "Nonsense"
    onnx.save(model, str(path))
    relist(bundle_copy, "model.b1.onnx")
    with open_session(bundle_copy, "openvino") as session:
        with pytest.raises(BackendError, match=r"OpenVINO cannot load 'model.b1.onnx'") as caught:
            session.warm_up([1])
        assert "Nonsense" in str(caught.value)
        assert "\n" not in str(caught.value)


class Resized(torch.nn.Module):
    """An FDConv layer and a resize, given as `interpolate` takes it."""

    def __init__(self, **how) -> None:
        super().__init__()
        self.layer, self.how = enliven(FDConv2d(18, 20, 3, padding=1, kernel_num=5)), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(self.layer(x), **self.how)


@pytest.mark.parametrize(
    ("how", "ignored"),
    [
        ({"scale_factor": (3.0, 1.09), "mode": "bicubic"}, "the scale of a length that stays"),
        ({"size": (4, 4), "mode": "bilinear", "antialias": True}, "antialias"),
        ({"scale_factor": (3.0, 1.0), "mode": "bicubic"}, None),
        ({"size": (8, 12), "mode": "bilinear"}, None),
    ],
)
def test_resize_is_right_or_refused(tmp_path: Path, openvino, how, ignored) -> None:
    """OpenVINO 2026.4.1 runs the first two, and errs by a third and a tenth of the largest."""
    bundle = tmp_path / "bundle"
    export_module(Resized(**how).eval(), lively_input(SHAPE), bundle)
    expected = answer(bundle, "onnxruntime-cpu", native=False)
    if ignored is None:
        found = answer(bundle, "openvino")
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
        return
    with pytest.raises(BackendError, match=f"ignores {ignored}.*Choose backend 'onnxruntime-cpu'"):
        answer(bundle, "openvino")
    listed = CliRunner().invoke(app, ["doctor", str(bundle)])
    assert f"openvino refuses the bundle: OpenVINO 2026.4.1 ignores {ignored}" in listed.stdout
    found = json.loads(CliRunner().invoke(app, ["doctor", str(bundle), "--json"]).stdout)
    assert "Choose backend 'onnxruntime-cpu'" in found["refused"]["openvino"]
    assert "openvino" not in {timing["backend"] for timing in found["timings"]}


def test_a_run_that_fails(toy_bundle: Path, openvino) -> None:
    with open_session(toy_bundle, "openvino") as session:
        graph = session.runner._graphs.get(1)
        with pytest.raises(BackendError, match="failed while running") as caught:
            graph.run({"images": np.zeros((1, 3, 8, 8), np.float32)})
    assert "\n" not in str(caught.value)


def test_providers_are_not_its_own(toy_bundle: Path, openvino) -> None:
    with pytest.raises(BackendError, match="OpenVINO takes none"):
        open_session(toy_bundle, "openvino", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_signed_activations_are_warned_of(tmp_path: Path, openvino, caplog, kind) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["coarse"]),
        helper.make_node("Conv", ["coarse", "weight"], ["logits"], strides=[4, 4]),
    ]
    constants = {"scale": np.float32(0.05), "zero": kind(1), "weight": toy.weight(5)}
    graph = helper.make_graph(
        nodes,
        "quantized",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, 32, 48))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 5, 8, 12))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with BundleWriter(tmp_path / "bundle") as writer:
        onnx.save(model, str(writer.path / "model.b1.onnx"))
        manifest = toy.manifest(32, 48, (1,), toy.architecture())
        made = writer.commit(manifest.model_copy(update={"weights": None}))
    with open_session(made, "openvino") as session:
        session.warm_up()
    assert ("signed 8-bit activations" in caplog.text) == (kind is np.int8)


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_served(toy_bundle: Path, openvino, isolation: str) -> None:
    settings = Settings(threads=1, isolation=isolation, backend="openvino")
    with TestClient(create_app([toy_bundle], settings)) as client:
        wait_until_ready(client)
        card = client.get("/v1/models").json()["models"][0]
        assert "openvino" in card["backend"]
        headers = {"Content-Type": "image/png", "Accept": "application/json"}
        picture = toy_detector.picture()
        _, png = cv2.imencode(".png", picture[..., ::-1])
        answer = client.post("/v1/segment", content=png.tobytes(), headers=headers).json()
    with open_session(toy_bundle, "onnxruntime-cpu") as session:
        assert np.array_equal(decode(answer["mask"]), session.segment(picture).labels)


class TestNativeOperators:
    """Those in C, inside OpenVINO."""

    def test_used_where_they_are_built(self, built: Path, bundle: Path) -> None:
        with open_session(bundle, "openvino") as session:
            assert session.operators == "native operators, since they are built here"
        chosen, portable = answer(bundle, "openvino"), answer(bundle, "openvino", native=False)
        assert not np.array_equal(chosen, portable)
        assert np.abs(chosen - portable).max() <= 2e-6 * np.abs(portable).max()
        assert np.array_equal(answer(bundle, "openvino", threads=3), chosen)

    def test_their_error_in_either_precision(self, built: Path, backend: str, tmp_path) -> None:
        expected = answer(bundle_of(tmp_path), "onnxruntime-cpu", native=False)
        found = answer(tmp_path / "bundle", backend, native=True)
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error <= (2e-2 if backend == "openvino-bf16" else 2e-6)

    def test_every_kind_of_layer(self, built: Path, tmp_path: Path) -> None:
        """Bands of channels in whole vectors of 16 or 8, and of others; in groups, by softmax."""
        grouped = {"k_list": [2, 4], "spatial_group": 2, "act": "softmax"}
        bundle = bundle_of(
            tmp_path,
            FDConv2d(18, 20, 3, padding=1, kernel_num=5),
            FDConv2d(20, 24, 1, kernel_num=3),
            FDConv2d(24, 18, 5, padding=2, kernel_num=4, param_ratio=2, bias=True),
            FDConv2d(18, 18, 3, padding=1, kernel_num=4, fbm_cfg={"k_list": [2, 4]}),
            FDConv2d(18, 32, 3, padding=1, stride=2, kernel_num=4, fbm_cfg=grouped),
            FDConv2d(32, 24, 3, padding=1, kernel_num=4),
            FDConv2d(24, 16, 3, padding=1, kernel_num=4, fbm_cfg=grouped),
            FDConv2d(16, 18, 3, padding=1, kernel_num=4, fbm_cfg=grouped | {"act": "sigmoid"}),
        )
        expected = answer(bundle, "onnxruntime-cpu", native=False)
        found = answer(bundle, "openvino", native=True)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()

    def test_absent_and_of_another_version(
        self, openvino, bundle: Path, tmp_path: Path, monkeypatch, caplog
    ) -> None:
        monkeypatch.setattr(native, "FOLDER", tmp_path)
        with open_session(bundle, "openvino") as session:
            assert session.operators.startswith("portable operators, inlined, since native ones")
        with pytest.raises(BackendError, match="Native operators are required"):
            open_session(bundle, "openvino", native=True)
        (tmp_path / "fdconv_openvino2026.3.0_0123456789ab_linux_x86_64.so").touch()
        with open_session(bundle, "openvino") as session:
            assert "another version of their source, or of OpenVINO" in session.operators

    def test_broken(self, openvino, bundle: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(native, "FOLDER", tmp_path)
        version = installed_version("openvino")
        (tmp_path / native.library_name(version)).write_bytes(b"no library")
        with pytest.raises(BackendError, match="cannot load the native operators") as raised:
            open_session(bundle, "openvino")
        assert "FDCONV_NATIVE=0" in str(raised.value)
        assert "\n" not in str(raised.value)

    def test_building_without_the_headers(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match="lacks the headers"):
            build_openvino(tmp_path, tmp_path, "2026.4.1")
        assert not list(tmp_path.iterdir())
