from __future__ import annotations

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.errors import BundleError, ImageError
from fdconv_deploy.runtime import Detection, Session, open_session
from tests.reference.masks import pasted_probabilities
from tests.runtime import toy, toy_detector
from tests.runtime.toy_detector import picture

MEAN = np.array([123.675, 116.28, 103.53])
STD = np.array([58.395, 57.12, 57.375])


def published_input(image: np.ndarray, budget: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """mmdetection's pipeline before padding, written from its description; and scale_factor."""
    height, width = image.shape[:2]
    factor = min(max(budget) / max(height, width), min(budget) / min(height, width))
    new = int(width * factor + 0.5), int(height * factor + 0.5)
    resized = cv2.resize(image, new, interpolation=cv2.INTER_LINEAR)
    scale = np.array([new[0] / width, new[1] / height] * 2, np.float32)
    return ((resized - MEAN) / STD).transpose(2, 0, 1), scale


@pytest.mark.parametrize("size", [(50, 70), (64, 96), (200, 150), (31, 97), (640, 960), (7, 300)])
def test_the_published_way(detector: Session, size: tuple[int, int]) -> None:
    image = picture(*size)
    found = detector.detect(image)
    tensor, scale = published_input(image, (96, 64))
    if tensor.shape[1] > 64:  # upright: smaller than published, to fit
        tensor, scale = published_input(image, (64, 64))
    padded = np.zeros((1, 3, 64, 96), np.float32)
    padded[0, :, : tensor.shape[1], : tensor.shape[2]] = tensor
    expected = toy_detector.reference(padded, np.array([tensor.shape[1:]], np.float32))
    count = int(expected["count"][0])
    assert len(found) == count
    assert np.allclose(found.boxes, expected["boxes"][0, :count] / scale, rtol=1e-5, atol=1e-4)
    assert np.allclose(found.scores, expected["scores"][0, :count], atol=1e-5)
    assert np.array_equal(found.labels, expected["labels"][0, :count])
    assert found.masks is not None
    assert found.masks.shape == (count, *size)
    assert found.resized_to == tensor.shape[1:]
    assert found.image_size == size
    assert (found.classes, len(found.palette)) == (toy_detector.CLASSES, 3)
    assert set(found.timings) == {"preprocess", "inference", "postprocess"}


class TestFit:
    @pytest.mark.parametrize(
        ("image", "fit", "resized"),
        [
            ((64, 96), "resized", (64, 96)),
            ((200, 300), "resized", (64, 96)),
            ((100, 140), "resized", (64, 90)),  # padded to 64 x 96, as published
            ((64, 60), "letterboxed", (64, 60)),  # published: 64 x 64
            ((300, 200), "letterboxed", (64, 43)),  # published: 96 x 64, which does not fit
        ],
    )
    def test_what_the_answer_says(self, detector: Session, image, fit, resized) -> None:
        found = detector.detect(picture(*image))
        assert (found.fit, found.resized_to) == (fit, resized)

    def test_without_a_published_size_it_fills_the_input(self, tmp_path: Path) -> None:
        arch = toy_detector.architecture(preprocessing=Preprocessing())
        toy_detector.make_bundle(tmp_path / "b", arch=arch, batches=(1,))
        with open_session(tmp_path / "b", threads=1) as session:
            assert session.detect(picture(20, 20)).resized_to == (64, 64)

    def test_a_published_size_below_the_input_is_kept(self, tmp_path: Path) -> None:
        arch = toy_detector.architecture(preprocessing=Preprocessing(scale=(48, 32)))
        toy_detector.make_bundle(tmp_path / "b", arch=arch, batches=(1,))
        with open_session(tmp_path / "b", threads=1) as session:
            found = session.detect(picture(64, 96))
        assert (found.resized_to, found.fit) == ((32, 48), "letterboxed")


def test_boxes_stay_within_the_image(detector: Session) -> None:
    for size in ((50, 70), (479, 641), (33, 1000)):
        boxes = detector.detect(picture(*size)).boxes
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= size[1]).all()
        assert (boxes[:, 3] <= size[0]).all()


class TestBatches:
    @pytest.mark.parametrize("count", [1, 2, 4, 5, 9])
    def test_any_number_of_images(self, detector: Session, count: int) -> None:
        images = np.random.default_rng(0).normal(size=(count, 3, 64, 96)).astype(np.float32)
        sizes = np.array([(64 - i, 90 + i % 6) for i in range(count)], np.float32)
        found = detector.run_batches({"images": images, "sizes": sizes})
        expected = toy_detector.reference(images, sizes)
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert len(found[name]) == count
            assert np.allclose(found[name], value, atol=1e-5), name

    def test_images_prepared_alone_may_be_run_together(self, detector: Session) -> None:
        prepared = [detector.detection.prepare(picture(seed=seed)) for seed in range(3)]
        for seed, together in enumerate(detector.finish_all(prepared)):
            alone = detector.detect(picture(seed=seed))
            assert np.array_equal(together.boxes, alone.boxes)
            assert np.array_equal(together.scores, alone.scores)
            assert np.array_equal(together.masks, alone.masks)


class TestRefusals:
    def test_not_an_image(self, detector: Session) -> None:
        with pytest.raises(ImageError, match="uint8"):
            detector.detect(np.zeros((4, 4), np.uint8))

    def test_images_are_not_stretched(self, detector: Session) -> None:
        with pytest.raises(ImageError, match="are padded"):
            detector.detection.prepare(picture(), fit="stretch")

    @pytest.mark.parametrize(
        ("images", "sizes", "said"),
        [
            (
                np.zeros((1, 3, 64, 95), np.float32),
                np.zeros((1, 2), np.float32),
                "images .N, 3, 64",
            ),
            (np.zeros((1, 3, 64, 96)), np.zeros((1, 2), np.float32), "float64"),
            (np.zeros((1, 3, 64, 96), np.float32), np.zeros((1, 3), np.float32), "sizes .N, 2"),
            (
                np.zeros((2, 3, 64, 96), np.float32),
                np.zeros((1, 2), np.float32),
                "found images .2, .* sizes .1, 2.",
            ),
        ],
    )
    def test_other_tensors(self, detector: Session, images, sizes, said: str) -> None:
        with pytest.raises(ImageError, match=said):
            detector.run_batches({"images": images, "sizes": sizes})

    def test_inputs_of_other_names(self, detector: Session) -> None:
        with pytest.raises(ImageError, match="found images"):
            detector.run_batches({"images": np.zeros((1, 3, 64, 96), np.float32)})

    def test_a_detector_gives_no_logits(self, detector: Session) -> None:
        with pytest.raises(BundleError, match="does not segment images"):
            detector.run(np.zeros((1, 3, 64, 96), np.float32))

    def test_a_detector_does_not_segment(self, detector: Session) -> None:
        with pytest.raises(BundleError, match=r"does not segment images. Use detect\(image\)"):
            detector.segment(picture())

    def test_a_segmentor_does_not_detect(self, tmp_path: Path) -> None:
        toy.make_bundle(tmp_path / "s", batches=(1,))
        with open_session(tmp_path / "s") as session:
            with pytest.raises(BundleError, match=r"does not detect objects. Use segment\(image\)"):
                session.detect(picture())
            assert not session.detects


def test_warm_up_and_names(detector: Session, boxes_only: Session) -> None:
    for session in (detector, boxes_only):
        session.warm_up()
        assert session.runner.loaded_batch_sizes == (1, 4)
        assert session.detects
        assert session.classes == toy_detector.CLASSES
        assert len(session.palette) == 3
        assert (0, 0, 0) not in session.palette
    assert boxes_only.detect(picture()).masks is None


@pytest.fixture
def found(detector: Session) -> Detection:
    return detector.detect(picture())


def made(count: int, size: tuple[int, int] = (40, 60), *, name: str = "thing") -> Detection:
    """Objects in a row, each of 4 x 4 pixels and full."""
    x = np.arange(count, dtype=np.float32) * 2
    return Detection(
        np.stack([x, x, x + 4, x + 4], axis=1),
        np.linspace(1, 0.1, count, dtype=np.float32),
        np.zeros(count, np.int64),
        np.ones((count, 28, 28), np.float32),
        0.5,
        size,
        size,
        (name,),
        ((200, 30, 30),),
        "resized",
        {},
    )


def test_masks(found: Detection) -> None:
    masks, probabilities = found.masks, found.mask_probabilities
    assert masks is not None
    assert probabilities is not None
    for mask, small, box in zip(masks, probabilities, found.boxes, strict=True):
        exact = pasted_probabilities(small, tuple(box.tolist()), (50, 70))
        clear = np.abs(exact - 0.5) > 1e-4
        assert np.array_equal(mask[clear], (exact >= 0.5)[clear])
    assert np.array_equal(found.areas(), masks.sum(axis=(1, 2)))


def test_run_lengths_are_cocos(found: Detection) -> None:
    assert len(found.rle()) == len(found) > 2
    masks = found.masks
    assert masks is not None
    for rle, mask in zip(found.rle(), masks, strict=True):
        assert np.array_equal(coco.decode(rle).astype(bool), mask)


def test_json(found: Detection) -> None:
    told = json.loads(json.dumps(found.as_dicts()))
    assert [set(entry) for entry in told] == [
        {"label", "class", "score", "box", "area", "mask"}
    ] * len(found)
    assert [entry["class"] for entry in told] == [found.classes[i] for i in found.labels]
    assert np.allclose([entry["box"] for entry in told], found.boxes, atol=1e-3)
    assert [entry["mask"] for entry in told] == found.rle()
    assert "mask" not in found.as_dicts(masks=False)[0]


class TestKept:
    def test_by_score(self, found: Detection) -> None:
        least = float(found.scores[1])
        assert len(found.kept(least)) == 2
        assert found.kept(least).rle() == found.rle()[:2]

    def test_by_class_and_number(self, found: Detection) -> None:
        label = int(found.labels[2])
        some = found.kept(labels=(label,))
        assert set(some.labels.tolist()) == {label}
        assert len(some) == int((found.labels == label).sum())
        assert len(found.kept(most=1)) == 1

    def test_nothing(self, found: Detection) -> None:
        none = found.kept(2.0)
        assert (len(none), none.rle(), none.as_dicts()) == (0, [], [])
        assert none.masks is not None
        assert none.masks.shape == (0, 50, 70)
        assert not none.instance_map().any()
        assert np.array_equal(none.overlay(picture()), picture())
        assert Image.open(io.BytesIO(none.mask_png())).size == (70, 50)


class TestInstanceMask:
    def test_the_better_score_is_on_top(self) -> None:
        found = made(3).instance_map()
        assert found[:4, :4].min() == found[:4, :4].max() == 1
        assert found[4:6, 4:6].min() == found[4:6, 4:6].max() == 2
        assert set(np.unique(found)) == {0, 1, 2, 3}

    def test_png(self, found: Detection) -> None:
        opened = Image.open(io.BytesIO(found.mask_png()))
        assert opened.mode == "P"
        assert np.array_equal(np.asarray(opened), found.instance_map())
        colours = np.asarray(opened.getpalette()).reshape(-1, 3)[: len(found) + 1]
        assert len(np.unique(colours, axis=0)) == len(found) + 1
        assert colours[0].tolist() == [0, 0, 0]

    def test_above_255_objects(self) -> None:
        assert made(255).instance_map().dtype == np.uint8
        many = made(300, (700, 700))
        opened = np.asarray(Image.open(io.BytesIO(many.mask_png())))
        assert opened.max() == 300
        assert np.array_equal(opened, many.instance_map())


class TestOverlay:
    def test_opacity(self) -> None:
        image = picture(40, 60)
        found = made(1, name="x").kept()
        clear, full = found.overlay(image, 0.0), found.overlay(image, 1.0)
        assert np.array_equal(full[2, 2], (200, 30, 30)) or full[2, 2].tolist() == [255, 255, 255]
        assert np.array_equal(clear[30:, 40:], image[30:, 40:])  # untouched away from objects
        assert np.array_equal(image, picture(40, 60))  # the given image is left alone

    def test_masks_boxes_and_words_are_there(self, found: Detection) -> None:
        image = np.full((400, 600, 3), 90, np.uint8)
        one = made(1, (400, 600))
        one = Detection(**{**vars(one), "boxes": np.array([[100, 150, 300, 350]], np.float32)})
        drawn = one.overlay(image, 0.5)
        assert np.array_equal(drawn[250, 200], np.rint(0.5 * 90 + 0.5 * np.array([200, 30, 30])))
        assert np.array_equal(drawn[150, 200], (200, 30, 30))
        label = drawn[130:149, 100:160]
        assert (label == (200, 30, 30)).all(axis=2).any()
        assert label.min(axis=2).max() > 200  # white on dark red
        assert np.array_equal(drawn[380:, 400:], image[380:, 400:])

    @pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3)])
    def test_any_size(self, size: tuple[int, int]) -> None:
        found = made(2, size)
        image = picture(*size)
        assert found.overlay(image).shape == image.shape

    def test_another_size_or_opacity(self, found: Detection) -> None:
        with pytest.raises(ImageError, match="differ in size"):
            found.overlay(picture(51, 70))
        with pytest.raises(ImageError, match="from 0 to 1"):
            found.overlay(picture(), 1.5)


class TestWithoutMasks:
    def test_boxes_alone(self, boxes_only: Session) -> None:
        found = boxes_only.detect(picture())
        assert not found.has_masks
        assert found.masks is None
        assert "mask" not in found.as_dicts()[0]
        assert found.overlay(picture()).shape == (50, 70, 3)
        for use in (found.rle, found.areas, found.mask_png):
            with pytest.raises(ImageError, match="no mask"):
                use()
