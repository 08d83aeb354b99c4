from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime import Detection, Session
from tests.reference.masks import pasted_probabilities
from tests.runtime.detection.conftest import picture


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
