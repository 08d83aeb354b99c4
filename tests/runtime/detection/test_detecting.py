from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.errors import BundleError, ImageError
from fdconv_deploy.runtime import Session, open_session
from tests.runtime import toy, toy_detector
from tests.runtime.detection.conftest import picture

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
