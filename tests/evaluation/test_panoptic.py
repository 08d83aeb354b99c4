"""Panoptic quality against COCO's own code, and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fdconv_deploy.checkpoints import load_checkpoint, save_checkpoint
from fdconv_deploy.cli.app import app
from fdconv_deploy.config import ResNetConfig
from fdconv_deploy.errors import FDConvError
from fdconv_deploy.evaluation.datasets import DatasetError
from fdconv_deploy.evaluation.networks import open_targets, torch_target
from fdconv_deploy.evaluation.panoptic import PanopticSet
from fdconv_deploy.runtime import MultiScale, open_session
from tests.checkpoints.small import weights_of
from tests.runtime import toy_panoptic

FILES = Path(__file__).parents[1] / "real_packages" / "panopticapi" / "files"
CLASSES = ("person", "car", "dog", "road", "sky", "unused")


def ids_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.int64) @ [1, 256, 65536]


def test_quality_equals_cocos_own_code():
    data = PanopticSet(FILES / "truth.json", FILES / "truth", FILES / "images", CLASSES)
    found = json.loads((FILES / "found.json").read_text())["annotations"]
    score = data.score(CLASSES)
    labels = {number * 7 + 1: number for number in range(len(CLASSES))}
    assert len(data) == len(found) == 12
    for sample, answer in zip(data, found, strict=True):
        segments = {s["id"]: labels[s["category_id"]] for s in answer["segments_info"]}
        score.count(
            sample.ids, sample.segments, ids_of(FILES / "found" / answer["file_name"]), segments
        )
    expected = json.loads((FILES / "scores.json").read_text())
    for name, ours in score.summary()["panoptic"].items():
        told = {"n": ours.pop("classes"), **ours}
        assert told == pytest.approx(expected[name], abs=1e-12)
    for name, ours in zip(CLASSES, score.by_class(), strict=False):
        theirs = expected["classes"][name]
        assert [ours[key] or 0 for key in ("pq", "sq", "rq")] == pytest.approx(
            [theirs["pq"], theirs["sq"], theirs["rq"]], abs=1e-12
        )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return toy_panoptic.make_bundle(tmp_path_factory.mktemp("panoptic") / "rooms").path


@pytest.fixture
def data(bundle, tmp_path) -> Path:
    """An image whose truth is what the network finds, but for one segment that is missing."""
    image = np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for folder in ("images", "truth"):
        (tmp_path / folder).mkdir()
    Image.fromarray(image).save(tmp_path / "images" / "a.png")
    with open_session(bundle) as session:
        answer = session.segment(image)
        classes = session.classes[:-1]
    (tmp_path / "truth" / "a.png").write_bytes(answer.panoptic_png())
    file = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [
            {"image_id": 1, "file_name": "a.png", "segments_info": answer.segments_info()[1:]}
        ],
        "categories": [
            {"id": number, "name": name, "isthing": int(number < 2)}
            for number, name in enumerate(classes)
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(file))
    return tmp_path


def evaluate(bundle: Path, data: Path, *options: str):
    return CliRunner().invoke(
        app,
        ["evaluate", str(bundle), "--images", str(data / "images"), "--masks", str(data / "truth"),
         *options],
    )  # fmt: skip


def test_evaluate_scores_segments(bundle, data):
    options = ["--annotations", str(data / "truth.json")]
    result = evaluate(bundle, data, *options, "--json")
    assert result.exit_code == 0, result.output
    (side,) = json.loads(result.stdout)["sides"]
    seen = [one for one in side["classes"] if one["pq"] is not None]
    assert side["panoptic"]["all"]["sq"] == 1
    assert 0 < side["panoptic"]["all"]["pq"] < 1  # one segment is false
    assert any(one["pq"] == 1 for one in seen)
    assert side["classes"][-1] == {"name": "void", "pq": None, "sq": None, "rq": None}
    table = evaluate(bundle, data, *options)
    assert table.exit_code == 0
    assert "PQ, things" in table.stdout
    assert "void" not in table.stdout


def test_evaluate_says_what_a_panoptic_network_needs(bundle, data):
    result = evaluate(bundle, data)
    assert "give --annotations (the JSON), --masks" in str(result.exception)


def test_evaluate_scores_instances(bundle, data):
    """On COCO's instances: the truth is the two best objects, so that nothing else is right."""
    with open_session(bundle) as session:
        found = session.segment(data / "images" / "a.png").instances.kept(most=2)
        classes = session.classes[:2]
    objects = [
        {"id": number + 1, "image_id": 1, "category_id": label + 5, "iscrowd": 0,
         "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "segmentation": rle}
        for number, (label, (x1, y1, x2, y2), rle) in enumerate(
            zip(found.labels.tolist(), found.boxes.tolist(), found.rle(), strict=True)
        )
    ]  # fmt: skip
    file = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": objects,
        "categories": [{"id": number + 5, "name": name} for number, name in enumerate(classes)],
    }
    path = data / "instances.json"
    path.write_text(json.dumps(file))
    command = ["evaluate", str(bundle), "--images", str(data / "images"), "--json"]
    result = CliRunner().invoke(app, [*command, "--annotations", str(path)])
    assert result.exit_code == 0, result.output
    (side,) = json.loads(result.stdout)["sides"]
    assert side["box"]["ap"] == side["mask"]["ap"] == 1, side
    assert [one["name"] for one in side["classes"]] == list(classes)


@pytest.mark.parametrize(
    ("field", "says"), [("id", "no pixel of segment 99"), ("category_id", "no category 99")]
)
def test_annotations_of_other_segments_are_refused(bundle, data, field, says):
    path = data / "truth.json"
    file = json.loads(path.read_text())
    file["annotations"][0]["segments_info"][0][field] = 99
    path.write_text(json.dumps(file))
    assert says in str(evaluate(bundle, data, "--annotations", str(path)).exception)


def test_files_of_another_form_are_refused(data):
    path = data / "objects.json"
    path.write_text('{"images": [], "annotations": [{"id": 1}], "categories": []}')
    with pytest.raises(DatasetError, match="no panoptic file of COCO's form"):
        PanopticSet(path, data / "truth", data / "images", ("a",))
    with pytest.raises(DatasetError, match="no category 'zebra'"):
        PanopticSet(data / "truth.json", data / "truth", data / "images", ("zebra",))
    wrong = PanopticSet(data / "truth.json", data / "images", data / "truth", ("class 0",))
    Image.new("RGB", (5, 5)).save(data / "images" / "a.png")
    with pytest.raises(DatasetError, match="its image of"):
        next(iter(wrong))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    architecture = toy_panoptic.architecture().model_copy(
        update={"backbone": ResNetConfig(depth=18, base_channels=8)}
    )
    save_checkpoint(tmp_path / "rooms.pth", weights_of(architecture), architecture)
    return tmp_path / "rooms.pth"


def test_a_checkpoint_of_segments_is_not_scored_on_masks(checkpoint):
    says = "is of a segmentor of panoptic segments, which is scored on COCO's panoptic files"
    with pytest.raises(FDConvError, match=says), open_targets([checkpoint], "labels"):
        pass


def test_segments_are_not_merged_over_several_sizes(checkpoint):
    with pytest.raises(FDConvError, match=r"not merged over several sizes or mirror images\."):
        torch_target(load_checkpoint(checkpoint), checkpoint, scales=MultiScale(flip=True))
