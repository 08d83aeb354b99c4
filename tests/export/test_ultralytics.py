"""`export_ultralytics` on networks built as Ultralytics' are, without Ultralytics.

That the files open in Ultralytics itself is shown by tests/real_packages/ultralytics/check.py.
"""

from __future__ import annotations

import ast
import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.errors import ExportError
from fdconv_deploy.export import export_ultralytics
from fdconv_deploy.export.targets import ultralytics as exporter
from fdconv_deploy.export.validation.sample_inputs import sample_tensor
from fdconv_deploy.nn import FDConv2d
from tests.export.graphs import relative, run_file
from tests.reference.lively import enliven
from tests.reference.networks import batch_norm
from tests.reference.published import FDConv


class Block(nn.Module):
    def __init__(self, convolution: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv, self.bn, self.act = convolution, batch_norm(channels), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Head(nn.Module):
    """Two levels, decoded; anchors are kept for the last shape, as Ultralytics' Detect does."""

    export, format, dynamic, shape = False, None, False, None

    def __init__(self, classes: int, extra: int = 0) -> None:
        super().__init__()
        self.nc = classes
        self.branches = nn.ModuleList(nn.Conv2d(20, 4 + classes + extra, 1) for _ in range(2))
        self.anchors = torch.empty(0)

    def forward(self, x: list[Tensor]) -> Any:
        raw = [b(t).flatten(2) for b, t in zip(self.branches, x, strict=True)]
        if self.dynamic or self.shape != x[0].shape:
            self.shape = x[0].shape
            self.anchors = torch.cat([torch.arange(t.shape[2], dtype=t.dtype) * 4 for t in raw])
        both = torch.cat(raw, 2)
        boxes, scores, rest = both.split([4, self.nc, both.shape[1] - 4 - self.nc], 1)
        y = torch.cat([boxes.exp() + self.anchors, scores.sigmoid(), rest], 1)
        return self.answer(y, {"boxes": boxes, "scores": scores, "feats": x})

    def answer(self, y: Tensor, raw: dict[str, Any]) -> Any:
        return y if self.export else (y, raw)


class SegmentHead(Head):
    def answer(self, y: Tensor, raw: dict[str, Any]) -> Any:
        proto = raw["feats"][0].tanh()
        return (y, proto) if self.export else ((y, proto), raw)


class ClassifyHead(nn.Module):
    export = False

    def forward(self, x: list[Tensor]) -> Any:
        raw = x[1].mean((2, 3))[:, :3]
        return raw.softmax(1) if self.export else (raw.softmax(1), raw)


class Network(nn.Module):
    """What Ultralytics' BaseModel has, as far as an export is concerned."""

    def __init__(self, head: nn.Module | None = None, task: str = "detect", **attributes) -> None:
        super().__init__()
        torch.manual_seed(0)
        dynamic = attributes.pop("dynamic", None) or enliven(
            FDConv2d(20, 20, 3, padding=1, bias=False, kernel_num=3)
        )
        self.model = nn.Sequential(
            Block(nn.Conv2d(3, 20, 3, 2, 1, bias=False), 20),
            Block(dynamic, 20),
            Block(nn.Conv2d(20, 20, 3, 2, 1, bias=False), 20),
            head or Head(3),
        )
        self.stride = torch.tensor([2.0, 4.0])
        self.names = {0: "red", 1: "blue", 2: 'it\'s "green"'}
        self.task, self.yaml = task, {"yaml_file": "yolo11n.yaml", "channels": 3}
        for name, value in attributes.items():
            setattr(self, name, value)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        first = self.model[1](self.model[0](x))
        return self.model[3]([first, self.model[2](first)])

    def fuse(self, verbose: bool = True) -> nn.Module:
        raise AttributeError("'NoneType' object has no attribute 'dtype'")


class Yolo(nn.Module):
    """Ultralytics' YOLO: a module around a network."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.model = network


def opened(path: Path) -> tuple[onnxruntime.InferenceSession, dict[str, str]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session, session.get_modelmeta().custom_metadata_map


def pixels(batch: int, size: tuple[int, int]) -> Tensor:
    return sample_tensor(batch, size, Preprocessing(mean=(0.0,) * 3, std=(255.0,) * 3), seed=5)


@torch.no_grad()
def test_a_detector_is_one_file_that_gives_what_the_network_gives(tmp_path):
    network = Network()
    before = copy.deepcopy(network.state_dict())
    path = export_ultralytics(Yolo(network), tmp_path / "new" / "model.onnx", imgsz=(24, 32))
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    x = pixels(1, (24, 32))
    (found,) = run_file(path, x.numpy())
    expected = network(x)[0].numpy()
    assert relative(found[:, :4], expected[:, :4]) <= 5e-6
    assert relative(found[:, 4:], expected[:, 4:]) <= 5e-6
    # The network is as it was, also in what it answers.
    assert isinstance(network(x), tuple)
    assert network.model[3].export is False
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())


def test_the_metadata_are_what_auto_backend_reads(tmp_path):
    path = export_ultralytics(Network(), tmp_path / "model.onnx", imgsz=(24, 32), batch=2)
    session, found = opened(path)
    assert [entry.name for entry in session.get_inputs()] == ["images"]
    assert session.get_inputs()[0].shape == [2, 3, 24, 32]
    assert [entry.name for entry in session.get_outputs()] == ["output0"]
    assert (found["task"], found["stride"], found["batch"]) == ("detect", "4", "2")
    assert (found["channels"], found["end2end"]) == ("3", "False")
    assert ast.literal_eval(found["imgsz"]) == [24, 32]
    assert ast.literal_eval(found["names"]) == Network().names
    assert ast.literal_eval(found["args"]) == {"batch": 2, "dynamic": False, "nms": False}
    assert found["description"].startswith("yolo11n model")


def test_plain_normalisations_are_folded_though_fuse_would_fail(tmp_path):
    path = export_ultralytics(Network(), tmp_path / "model.onnx", imgsz=24)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert "BatchNormalization" not in operators
    assert operators.count("Conv") >= 4


@torch.no_grad()
@pytest.mark.parametrize(
    ("task", "head", "names"),
    [
        ("segment", lambda: SegmentHead(3, extra=5), ["output0", "output1"]),
        ("pose", lambda: Head(3, extra=6), ["output0"]),
        ("obb", lambda: Head(3, extra=1), ["output0"]),
        ("classify", ClassifyHead, ["output0"]),
    ],
)
def test_other_tasks(tmp_path, task, head, names):
    made = head()
    made.kpt_shape = (2, 3)
    network = Network(made, task, kpt_names={0: ["a", "b"]})
    path = export_ultralytics(network, tmp_path / "model.onnx", imgsz=24)
    session, metadata = opened(path)
    assert [entry.name for entry in session.get_outputs()] == names
    assert metadata["task"] == task
    assert ("kpt_shape" in metadata) == (task == "pose")
    if task == "pose":
        assert ast.literal_eval(metadata["kpt_shape"]) == [2, 3]
        assert ast.literal_eval(metadata["kpt_names"]) == {0: ["a", "b"]}
    x = pixels(1, (24, 24))
    first = network(x)[0]
    expected = first if isinstance(first, tuple) else (first,)
    for found, theirs in zip(run_file(path, x.numpy()), expected, strict=True):
        assert relative(found, theirs.numpy()) <= 5e-6


@torch.no_grad()
def test_a_copy_of_the_published_class(tmp_path):
    network = Network(dynamic=FDConv(20, 20, 3, padding=1, bias=False, kernel_num=3))
    path = export_ultralytics(network, tmp_path / "model.onnx", imgsz=24)
    x = pixels(1, (24, 24))
    assert relative(run_file(path, x.numpy())[0], network(x)[0].numpy()) <= 5e-6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(None, (640, 640)), ({"imgsz": 32}, (32, 32)), ({"imgsz": [24, 32]}, (24, 32))],
)
def test_the_size_is_what_the_network_was_trained_at(arguments, expected):
    network = Network() if arguments is None else Network(args=arguments)
    assert exporter._size(network, None) == expected


@torch.no_grad()
def test_the_users_pictures_and_a_network_of_half_precision(tmp_path):
    """Ultralytics saves checkpoints in float16."""
    network = Network().half()
    pictures = [np.random.default_rng(1).integers(0, 256, (50, 40, 3), dtype=np.uint8)]
    path = export_ultralytics(network, tmp_path / "model.onnx", imgsz=24, pictures=pictures)
    x = pixels(1, (24, 24))
    expected = copy.deepcopy(network).float()(x)[0].numpy()
    assert relative(run_file(path, x.numpy())[0], expected) <= 5e-6


def test_a_head_that_can_do_without_suppression_is_exported_with_it(tmp_path):
    """As Ultralytics exports and predicts by default."""

    class EndToEnd(Network):
        @property
        def end2end(self) -> bool:
            return self.chosen

        @end2end.setter
        def end2end(self, value: bool) -> None:
            self.chosen = value

    network = EndToEnd(chosen=True)
    path = export_ultralytics(network, tmp_path / "model.onnx", imgsz=24)
    assert opened(path)[1]["end2end"] == "False"
    assert network.end2end is True


def test_a_wrong_score_is_not_kept(tmp_path, monkeypatch):
    """An error that is small beside boxes in pixels, in the score of one class."""
    prove = exporter._prove

    def planted(data, example, expected, tolerance, axis):
        wrong = {name: array.copy() for name, array in expected.items()}
        wrong["output0"][0, 5, 3] += 3e-4
        prove(data, example, wrong, tolerance, axis)

    monkeypatch.setattr(exporter, "_prove", planted)
    with pytest.raises(ExportError, match=r"channel 5 of 'output0' differs by 3\.0e-04"):
        export_ultralytics(Network(), tmp_path / "model.onnx", imgsz=24)
    assert list(tmp_path.iterdir()) == []


REFUSED = [
    (lambda n: nn.Sequential(n), {}, r"Sequential is no network.*has no .*stride"),
    (lambda n: b"nothing", {}, "bytes is no network of Ultralytics'. Give YOLO"),
    (lambda n: Yolo("model.onnx"), {}, "Yolo is no network"),
    (
        lambda n: n,
        {"imgsz": 30},
        r"multiples of the network's stride, 4, and is 30x30.*Near it: 32",
    ),
    (lambda n: n, {"imgsz": (24, 0)}, "1 to 16384"),
    (lambda n: n, {"batch": 0}, "batch"),
]


@pytest.mark.parametrize(("change", "options", "says"), REFUSED)
def test_refusals(tmp_path, change, options, says):
    with pytest.raises(ExportError, match=says):
        export_ultralytics(change(Network()), tmp_path / "model.onnx", **{"imgsz": 24, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_file_needs_ultralytics_itself(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(ExportError, match="pip install ultralytics"):
        export_ultralytics(tmp_path / "best.pt", tmp_path / "model.onnx")


def test_outputs_that_are_in_the_way_are_kept(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(ExportError, match=r"exists already.*overwrite=True"):
        export_ultralytics(Network(), path, imgsz=24)
    with pytest.raises(ExportError, match=r"called \*\.onnx, not 'model'"):
        export_ultralytics(Network(), tmp_path / "model", imgsz=24)
    assert path.read_text() == "mine"
    export_ultralytics(Network(), path, imgsz=24, overwrite=True)
    assert opened(path)[1]["task"] == "detect"
