"""Bundles that answer with panoptic segments and instances, from the network to files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdconv_deploy.config import PanopticConfig
from fdconv_deploy.errors import BundleError
from fdconv_deploy.export.api import network_to_export
from fdconv_deploy.export.exporter import write_bundle
from fdconv_deploy.export.options import ExportOptions
from fdconv_deploy.runtime import open_session
from fdconv_deploy.runtime.input_files import Source
from fdconv_deploy.runtime.panoptic import PanopticSegmentation
from fdconv_deploy.runtime.result_files import ResultOptions, segment_files
from tests.nn.query_heads import case_tensors, load_detectron2, load_openmmlab

FAMILY = "mask2former_panoptic"


@pytest.fixture(scope="module")
def bundle(oracle: Path, tmp_path_factory) -> Path:
    network = load_openmmlab(oracle, FAMILY, "fdconv")
    options = ExportOptions(size=(96, 128))
    folder = tmp_path_factory.mktemp("panoptic") / "bundle"
    write_bundle(network_to_export(network, options), folder, options)
    return folder


@pytest.fixture(scope="module")
def tensors(oracle: Path):
    return case_tensors(oracle, FAMILY, "fdconv", "a")


def picture(tensors) -> np.ndarray:
    return np.ascontiguousarray(tensors["image_bgr_u8"].numpy()[..., ::-1])


def test_bundle_answers_as_mmdetection(bundle, tensors, proved):
    with open_session(bundle) as session:
        found = session.segment(picture(tensors))
        with pytest.raises(BundleError, match="does not give a logit"):
            session.run(tensors["input"].numpy())
    assert isinstance(found, PanopticSegmentation)
    values, things = [10], 0
    for segment in found.segments:
        things += segment.is_thing
        values.append(segment.label + 1000 * things * segment.is_thing)
    differing = np.array(values)[found.ids] != tensors["panoptic"].numpy()
    assert differing.mean() < 2e-4  # near-ties alone
    assert found.classes[-1] == "void"
    assert np.array_equal(found.labels == 10, found.ids == 0)
    assert len(found.instances) == len(tensors["ins_labels"])
    scores = np.sort(tensors["ins_scores"].numpy())[::-1]
    np.testing.assert_allclose(found.instances.scores, scores, atol=1e-4)
    proved("panoptic bundles equal to the frameworks", 1)


def test_instances_of_maskdino_have_its_own_boxes(oracle, tmp_path, proved):
    network = load_detectron2(oracle, "maskdino_swin")
    rule = PanopticConfig(rule="detectron2", thing_classes=(0, 1, 2, 3, 4), instance_on=True)
    network.architecture = network.architecture.model_copy(update={"panoptic": rule})
    tensors = case_tensors(oracle, "maskdino_swin", None, "64x96")
    options = ExportOptions(size=(64, 96))
    write_bundle(network_to_export(network, options), tmp_path / "bundle", options)
    with open_session(tmp_path / "bundle") as session:
        outputs = session.run_raw({"images": tensors["input"].numpy()})
        found = session.segment(np.zeros((128, 192, 3), np.uint8)).instances
    np.testing.assert_allclose(outputs["boxes"], tensors["pred_boxes"].numpy(), atol=2e-5)
    around = [(p.left, p.top, p.left + p.pixels.shape[1], p.top + p.pixels.shape[0])
              for p in found.pasted]  # fmt: skip
    assert found.boxes.shape == (len(found), 4)
    assert not np.allclose(found.boxes, around, atol=1)
    proved("panoptic bundles equal to the frameworks", 1)


def test_segment_writes_coco_panoptic_files(bundle, tensors, tmp_path):
    path = tmp_path / "street.png"
    Image.fromarray(picture(tensors)).save(path)
    with open_session(bundle) as session:
        answer = session.segment(path)
        options = ResultOptions(min_score=0.4)
        (result,) = segment_files(session, [Source(path, "street")], tmp_path / "out", options)
    told = json.loads((tmp_path / "out" / "street.json").read_text())
    colours = np.asarray(Image.open(tmp_path / "out" / told["file_name"])).astype(np.int64)
    ids = colours @ [1, 256, 65536]
    assert np.array_equal(ids, answer.ids)
    assert told["image_id"] == "street"
    assert [(s["id"], s["category_id"], s["area"]) for s in told["segments_info"]] == [
        (s.id, s.label, s.area) for s in answer.segments
    ]
    assert [s["isthing"] for s in told["segments_info"]] == [True]
    assert told["instances"]
    assert min(one["score"] for one in told["instances"]) >= 0.4
    labels = np.asarray(Image.open(io.BytesIO(result.places["mask"].read_bytes())))
    assert np.array_equal(labels, answer.labels)
    legend = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert legend[-1]["name"] == "void"
