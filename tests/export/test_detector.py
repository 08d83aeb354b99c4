"""A detector's bundle: its answers, its static shapes, its manifest, what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from examples.streets.scenes import draw_scene
from fdconv_deploy.checkpoints import save_checkpoint
from fdconv_deploy.config import PUBLISHED_SCALE, FDConvConfig, Preprocessing
from fdconv_deploy.errors import ExportError
from fdconv_deploy.export import ExportOptions, torch_export
from fdconv_deploy.export.api import export_checkpoint, export_network, network_to_export
from fdconv_deploy.export.validation.comparison import Comparison, compare_detections
from fdconv_deploy.export.validation.verify import verify_bundle
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.runtime import open_session
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.sample_images import sample_detector_batch, sample_feeds
from tests.reference.networks import small_detector, small_segmentor

SIZE = (96, 128)


@pytest.fixture(scope="module")
def detector() -> Detector:
    return small_detector()


@pytest.fixture(scope="module")
def bundle(detector, tmp_path_factory) -> Bundle:
    """By way of a file, whose names tell that it is a detector's."""
    folder = tmp_path_factory.mktemp("detector")
    save_checkpoint(folder / "mask.pth", detector, detector.architecture)
    return export_checkpoint(folder / "mask.pth", folder / "bundle", size=SIZE, batches=(1, 3))


def sample_inputs(
    batch: int, size: tuple[int, int], *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    images, sizes = sample_detector_batch(batch, size, Preprocessing(), seed=seed)
    return torch.from_numpy(images), torch.from_numpy(sizes)


def ask(bundle: Bundle, images: torch.Tensor, sizes: torch.Tensor) -> dict[str, np.ndarray]:
    path = bundle.model_path(len(images))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    feed = {"images": images.numpy(), "sizes": sizes.numpy()}
    return dict(zip(names, session.run(names, feed), strict=True))


@torch.no_grad()
def answer(network: Detector, images: torch.Tensor, sizes: torch.Tensor) -> dict[str, np.ndarray]:
    outputs = network(images, sizes)
    return {n: o.numpy() for n, o in zip(network.output_names, outputs, strict=True)}


@pytest.mark.parametrize("batch", [1, 3])
def test_graph_equals_network(bundle, detector, batch):
    """On images the export did not check it with."""
    for seed in (3, 4):
        inputs = sample_inputs(batch, SIZE, seed=seed)
        expected = answer(detector, *inputs)
        assert expected["count"].min() > 5
        found = compare_detections(ask(bundle, *inputs), expected, 0.05)
        errors = {output.name: output for output in found}
        assert errors["labels"].argmax_agreement == 1
        assert errors["boxes"].max_rel <= 1e-5
        assert errors["scores"].max_abs <= 1e-4
        assert errors["masks"].max_abs <= 1e-3


def test_shapes_are_static_and_operators_standard(bundle):
    model = onnx.load(bundle.model_path(3))
    for value in model.graph.output:
        assert all(d.dim_value > 0 for d in value.type.tensor_type.shape.dim)
    used = {(node.domain, node.op_type) for node in model.graph.node}
    assert {domain for domain, _ in used} <= {"", "fdconv"}
    assert {("", "NonMaxSuppression"), ("", "RoiAlign"), ("", "TopK")} <= used
    aligned = [n for n in model.graph.node if n.op_type == "RoiAlign"]
    assert len(aligned) == 8  # box and mask, four levels
    for node in aligned:
        modes = {a.name: a.s for a in node.attribute if a.s}
        assert modes["coordinate_transformation_mode"] == b"half_pixel"


def test_manifest(bundle, detector):
    manifest = bundle.manifest
    assert manifest.kind == "detector"
    assert manifest.detector == detector.architecture
    assert (manifest.input.height, manifest.input.width) == SIZE
    assert [(t.name, t.shape, t.dtype) for t in manifest.inputs[3]] == [
        ("images", (3, 3, *SIZE), "float32"),
        ("sizes", (3, 2), "float32"),
    ]
    assert [(t.name, t.shape, t.dtype) for t in manifest.outputs[3]] == [
        ("boxes", (3, 20, 4), "float32"),
        ("scores", (3, 20), "float32"),
        ("labels", (3, 20), "int64"),
        ("count", (3,), "int64"),
        ("masks", (3, 20, 28, 28), "float32"),
    ]
    assert manifest.checkpoint.name == "mask.pth"
    assert set(manifest.graph["assumed"]) <= {
        "backbone.conv.fbm_cfg.max_size",
        "backbone.conv.fbm_cfg.masks",
        "classes",
        "frequency_order",
        "palette",
    }
    assert set(manifest.group_maps) == set(dynamic_layers(detector))
    for outputs in manifest.parity.batches.values():
        errors = {output.name: output for output in outputs}
        assert errors["labels"].argmax_agreement == 1
        assert 0 < errors["boxes"].max_rel <= 1e-5


def test_an_engine_of_it_is_compared_on_streets_object_by_object(bundle):
    feeds = sample_feeds(bundle.manifest.inputs[3], Preprocessing(), vary_sizes=True)
    specs = [(t.name, t.shape, t.dtype) for t in bundle.manifest.inputs[3]]
    assert [(n, x.shape, str(x.dtype)) for n, x in feeds.items()] == specs
    assert len({tuple(size) for size in feeds["sizes"]}) == 3
    assert Comparison.of(bundle.manifest.detector) == Comparison("detections", 0.05)


def test_the_runtime_takes_it(bundle):
    picture = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    with open_session(bundle.path) as session:
        found = session.detect(picture)
    assert (found.boxes[:, 2:] <= [90, 60]).all()
    assert len(found.boxes) == len(found.scores) == len(found.labels)


def test_verify(bundle, detector):
    picture = np.asarray(draw_scene(7, 120, 100)[0])
    with open_session(bundle.path) as session:
        made_up = verify_bundle(session, detector)
        given = verify_bundle(session, detector, [("street", picture)])
        whole = [finding for verdict in made_up for finding in verdict.whole]
        assert [(f.batch, f.part) for f in whole] == [
            (batch, name) for batch in (1, 3) for name in detector.output_names
        ]
        assert all(verdict.equal and verdict.conclusive for verdict in [*made_up, *given])
        assert {f.source for f in given[0].whole} == {"street"}
        assert {f.part for f in given[0].whole if f.allowed > 1e-4} == {"masks"}
        # The weights of another seed: other objects, and other layers.
        verdict = verify_bundle(session, small_detector(seed=1))[0]
        assert not verdict.equal
        assert verdict.wrong.error > 1e-2
        with pytest.raises(ExportError, match=r"another network.*differ in backbone, neck"):
            verify_bundle(session, small_detector(8, conv=None, masks=False))
        with pytest.raises(ExportError, match="one of the bundle and the checkpoint"):
            verify_bundle(session, small_segmentor(18, 8, stages=2, conv=None))


def test_a_plain_faster_rcnn_that_finds_nothing(tmp_path):
    """No box at all passes through suppression and cutting, in the export's own check too."""
    network = small_detector(16, masks=False, conv=None)
    with torch.no_grad():
        network.roi_head.bbox_head.fc_cls.bias[-1] += 100
    said: list[str] = []
    made = export_network(network, tmp_path / "bundle", size=(64, 64), progress=said.append)
    assert any("no FDConv layer" in line for line in said)
    found = ask(made, *sample_inputs(1, (64, 64)))
    assert list(found) == ["boxes", "scores", "labels", "count"]
    assert found["count"].tolist() == [0]
    assert not any(values.any() for values in found.values())


def test_refusals(detector, tmp_path):
    with pytest.raises(ExportError, match=r"multiples of 32.*got 100x128. Give 128x128"):
        export_network(detector, tmp_path / "b", size=(100, 128))
    with pytest.raises(ExportError, match=r"float32 only.*not in fp16"):
        export_network(detector, tmp_path / "b", size=SIZE, precision="fp16")
    with pytest.raises(ExportError, match="training mode"):
        export_network(small_detector(8, conv=None).train(), tmp_path / "b", size=SIZE)
    assert not list(tmp_path.iterdir())


def test_other_objects_are_refused(detector, tmp_path, monkeypatch):
    """A graph whose suppression is another's."""
    translate = torch_export.TRANSLATIONS[torch.ops.fdconv_deploy.suppress.default]

    def lax(boxes, scores, iou_threshold, limit):
        return translate(boxes, scores, 0.9, limit)

    monkeypatch.setitem(torch_export.TRANSLATIONS, torch.ops.fdconv_deploy.suppress.default, lax)
    with pytest.raises(ExportError, match=r"finds class.*does not\. Rounding does not explain it"):
        export_network(detector, tmp_path / "b", size=SIZE)
    assert not list(tmp_path.iterdir())


def test_the_published_size_is_the_default():
    network = small_detector(8, conv=None)
    assert network.architecture.preprocessing.scale == PUBLISHED_SCALE
    size = network_to_export(network, ExportOptions())[0].manifest["input"]
    assert (size.height, size.width) == (800, 1344)


def test_fdconv_config_reaches_the_manifest(bundle):
    assert bundle.manifest.detector.backbone.conv == FDConvConfig(kernel_num=4)
