"""The packaged detector: a file like a user's, trained, and the same after export."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from examples.instances.measure import SIDES, measure, packaged_set, sheet, summary
from examples.streets.instances import CLASSES, COLOURS, coco_annotations, draw_instances
from fdconv_deploy.checkpoints import load_checkpoint, read_checkpoint
from fdconv_deploy.coco_rle import decode
from fdconv_deploy.demo import (
    HELD_OUT_SEEDS,
    assets_folder,
    held_out,
    held_out_instances,
    packaged_detector,
)
from fdconv_deploy.export import export_checkpoint
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.runtime import open_session, read_image

MIB = 2**20
SIZE = (192, 256)


@pytest.fixture(scope="module")
def record():
    return json.loads((assets_folder() / "instances_training.json").read_text())


@pytest.fixture(scope="module")
def network():
    return load_checkpoint(packaged_detector())


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector") / "bundle"
    export_checkpoint(packaged_detector(), folder, size=SIZE, batches=(1,))
    with open_session(folder) as session:
        yield session


@pytest.fixture(scope="module")
def result(session):
    return measure(session, packaged_set())


def test_it_is_a_file_as_mmdetection_saves_one(network):
    assert packaged_detector().stat().st_size <= 6 * MIB
    stored = read_checkpoint(packaged_detector())
    assert stored.format.startswith("mmcv")
    assert {"config", "CLASSES", "PALETTE"} <= stored.meta.keys()
    assert all(t.dtype in (torch.float32, torch.int64) for t in stored.state_dict.values())
    assert isinstance(network, Detector)
    assert network.architecture.classes == CLASSES
    assert network.architecture.palette == COLOURS


def test_every_branch_is_alive(network, record):
    layers = [m for m in network.modules() if isinstance(m, FDConv2d) and m.is_dynamic]
    assert len(layers) == record["dynamic_layers"] == 30
    for layer in layers:
        assert layer.kernel_num >= 8
        assert layer.KSM_Local is not None
        assert (layer.FBM is not None) == (layer.kernel_size == (3, 3))
    for kind, spread in record["attention_spread"].items():
        # Of a gate at rest: 1, and of the kernel's attentions 1 in kernel_num.
        rest = 1 / layers[0].kernel_num if kind == "kernel" else 1
        assert spread["mean"] > 4e-3 * rest, kind


def test_training_never_saw_the_held_out_scenes(record):
    seen = set(range(*record["seeds"]["training"]))
    for name in ("evaluation", "held_out"):
        assert not seen & set(range(*record["seeds"][name]))
    assert record["seeds"]["held_out"] == [HELD_OUT_SEEDS.start, HELD_OUT_SEEDS.stop]


def test_annotations_are_of_the_drawn_scenes():
    assert held_out_instances().stat().st_size <= MIB / 4
    stored = json.loads(held_out_instances().read_text())
    names = [image.name for image, _ in held_out()]
    drawn = [draw_instances(seed)[1] for seed in HELD_OUT_SEEDS]
    fresh = coco_annotations(zip(names, drawn, strict=True))
    assert stored["images"] == fresh["images"]
    assert stored["categories"] == fresh["categories"]
    kinds = [[a["category_id"] for a in x["annotations"]] for x in (stored, fresh)]
    assert kinds[0] == kinds[1]
    for first, second in zip(stored["annotations"], fresh["annotations"], strict=True):
        # Another OpenCV or another CPU may round an edge's pixel otherwise.
        off = decode(first["segmentation"]) != decode(second["segmentation"])
        assert off.sum() <= 0.02 * first["area"]


def test_the_bundle_finds_what_the_network_finds(session, network):
    """Issue 7: the same detections, scores within 1e-4, masks within 1e-3."""
    compared = 0
    for path, _ in held_out():
        prepared = session.detection.prepare(read_image(path))
        inputs = {name: value[None] for name, value in prepared.inputs.items()}
        with torch.no_grad():
            outputs = network(*(torch.from_numpy(inputs[name]) for name in ("images", "sizes")))
        expected = dict(zip(network.output_names, (t.numpy() for t in outputs), strict=True))
        found = session.run_batches(inputs)
        np.testing.assert_array_equal(found["count"], expected["count"])
        np.testing.assert_array_equal(found["labels"], expected["labels"])
        np.testing.assert_allclose(found["scores"], expected["scores"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(found["boxes"], expected["boxes"], rtol=0, atol=1e-2)
        np.testing.assert_allclose(found["masks"], expected["masks"], rtol=0, atol=1e-3)
        compared += int(found["count"].sum())
    assert compared > 100


def test_average_precision_is_the_same_after_export(result):
    before, after = result.results
    for kind in ("boxes", "masks"):
        first, second = getattr(before.score, kind), getattr(after.score, kind)
        assert second.ap == pytest.approx(first.ap, abs=1e-4)
        assert second.classes == pytest.approx(first.classes, abs=1e-4)
    assert after.agreement == 1.0


def test_it_is_trained_and_reaches_its_recorded_scores(result, record):
    found = summary(result)
    for side in SIDES:
        for kind in ("box", "mask"):
            assert found[side][kind] == pytest.approx(record["held_out"][side][kind], abs=0.01)
        assert record["evaluation"][side]["box"]["ap50"] > 0.5
        assert min(c["box_ap"] for c in found[side]["classes"].values()) > 0.1
    assert found["objects"] == record["held_out"]["objects"]
    assert math.isfinite(record["training_seconds"])


def test_the_picture_shows_what_is_there_and_what_is_found(session):
    picture = sheet(session, (0,))
    height, width = SIZE
    assert picture.shape == (height + 4, 3 * (width + 4), 3)
    cells = np.split(picture, 3, axis=1)
    assert all((cells[0] != cell).any(-1).mean() > 0.02 for cell in cells[1:])
