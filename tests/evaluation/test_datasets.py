"""Images and masks as they are on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdconv_deploy.demo import held_out
from fdconv_deploy.evaluation.class_mapping import LabelRule
from fdconv_deploy.evaluation.datasets import DatasetError, Samples, find_pairs, layout_of
from fdconv_deploy.runtime import read_image
from tests.evaluation import layouts

CLASSES = 11


def samples(images: Path, masks: Path, **rule: object) -> Samples:
    return Samples(find_pairs(images, masks), LabelRule(CLASSES, **rule))


def same_as_packaged(found: Samples, order: list[int]) -> None:
    truths = layouts.truths()
    assert len(found) == len(truths) == 16
    for sample, index in zip(found, order, strict=True):
        np.testing.assert_array_equal(sample.image, read_image(held_out()[index][0]))
        np.testing.assert_array_equal(sample.truth, truths[index])


def test_ade20k(tmp_path):
    images, masks = layout_of(layouts.ade20k(tmp_path))
    same_as_packaged(samples(images, masks, reduce_zero_label=True), list(range(16)))


@pytest.mark.parametrize("kind", ["labelTrainIds", "labelIds"])
def test_cityscapes(tmp_path, kind):
    images, masks = layout_of(layouts.cityscapes(tmp_path, kind))
    by_city = sorted(range(16), key=lambda index: (index % 3, index))
    same_as_packaged(samples(images, masks), by_city)


def test_train_ids_come_before_label_ids(tmp_path):
    layouts.cityscapes(tmp_path, "labelIds")
    images, masks = layout_of(layouts.cityscapes(tmp_path, "labelTrainIds"))
    pairs = find_pairs(images, masks)
    assert not any(pair.city_ids for pair in pairs)
    assert all(pair.mask.name.endswith("_gtFine_labelTrainIds.png") for pair in pairs)


def test_label_ids_are_those_of_cityscapes_images(tmp_path):
    """A mask of the image's own name holds classes, whatever the two are called."""
    name = "ulm_000000_000019_gtFine_labelIds.png"
    layouts.save(tmp_path / "masks" / name, np.full((4, 4), 7))
    layouts.save(tmp_path / "images" / name, np.zeros((4, 4)))
    (pair,) = find_pairs(tmp_path / "images", tmp_path / "masks")
    assert not pair.city_ids


def test_a_label_map_is_of_the_numbers_in_the_file(tmp_path):
    images, masks = layout_of(layouts.cityscapes(tmp_path, "labelIds"))
    turned = {int(label): CLASSES - 1 - train for train, label in enumerate(layouts.LABEL_IDS)}
    straight = next(iter(samples(images, masks)))
    mapped = next(iter(samples(images, masks, label_map=turned)))
    np.testing.assert_array_equal(mapped.truth, CLASSES - 1 - straight.truth)


def test_masks_beside_their_images():
    folder = held_out()[0][0].parent
    same_as_packaged(samples(folder, folder), list(range(16)))


def test_jpegs_with_masks_of_the_same_name(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((6, 8, 3), 90, np.uint8)).save(tmp_path / "images" / "a.JPG")
    layouts.save(tmp_path / "masks" / "a.png", np.full((6, 8), 2))
    (sample,) = samples(tmp_path / "images", tmp_path / "masks")
    assert sample.name == "a.JPG"
    assert sample.image.shape == (6, 8, 3)
    assert (sample.truth == 2).all()


def test_masks_of_16_bits_and_of_a_palette(tmp_path):
    labels = np.arange(6).reshape(2, 3)
    for name, made in {
        "deep": Image.fromarray((labels * 50).astype(np.uint16)),
        "palette": Image.fromarray(labels.astype(np.uint8), "L").convert("P"),
    }.items():
        (tmp_path / name).mkdir()
        Image.new("RGB", (3, 2)).save(tmp_path / name / "a.png")
        made.save(tmp_path / name / "a_labels.png")
    (deep,) = Samples(find_pairs(tmp_path / "deep", tmp_path / "deep"), LabelRule(300))
    np.testing.assert_array_equal(deep.truth, [[0, 50, 100], [150, 200, 250]])
    (indexed,) = samples(tmp_path / "palette", tmp_path / "palette")
    np.testing.assert_array_equal(indexed.truth, labels)


def pair(tmp_path: Path, size: tuple[int, int] = (8, 6)) -> tuple[Path, Path]:
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    Image.new("RGB", size).save(images / "a.png")
    return images, masks


def test_a_missing_mask(tmp_path):
    images, masks = pair(tmp_path)
    with pytest.raises(DatasetError, match=r"a\.png has no mask: expected a\.png or a_labels"):
        find_pairs(images, masks)


def test_a_mask_in_another_subfolder_is_not_taken(tmp_path):
    images, masks = pair(tmp_path)
    layouts.save(masks / "elsewhere" / "a.png", np.zeros((6, 8)))
    with pytest.raises(DatasetError, match="has no mask"):
        find_pairs(images, masks)


def test_an_image_is_not_its_own_mask(tmp_path):
    images, _ = pair(tmp_path)
    with pytest.raises(DatasetError, match=r"expected a_labels\.png"):
        find_pairs(images, images)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (8, 7)), "is 7x8 .height x width., its image .* 6x8"),
        (Image.new("RGB", (8, 6)), "holds RGB pixels.*Convert its colours"),
        (Image.new("L", (8, 6), 11), "48 pixels of label 11.*--reduce-zero-label"),
        (Image.new("L", (8, 6), 200), "48 pixels of label 200.*--label-map"),
    ],
    ids=["size", "colours", "one above", "far above"],
)
def test_masks_that_do_not_fit(tmp_path, mask, message):
    images, masks = pair(tmp_path)
    mask.save(masks / "a.png")
    with pytest.raises(DatasetError, match=message):
        list(samples(images, masks))


def test_masks_of_more_than_16_bits(tmp_path):
    images, masks = pair(tmp_path)
    Image.fromarray(np.full((6, 8), 70000, np.int32)).save(masks / "a.png", "TIFF")
    with pytest.raises(DatasetError, match="70000"):
        list(Samples(find_pairs(images, masks), LabelRule(100_000)))


def test_what_an_archive_leaves_behind_is_no_image(tmp_path):
    images, masks = pair(tmp_path)
    (images / "._a.png").write_bytes(b"resource fork")
    layouts.save(masks / "a.png", np.zeros((6, 8)))
    assert [p.image.name for p in find_pairs(images, masks)] == ["a.png"]


def test_a_mask_that_cannot_be_read(tmp_path):
    images, masks = pair(tmp_path)
    (masks / "a.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"a\.png cannot be read"):
        list(samples(images, masks))


def test_folders_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"masks was expected, but .* does not exist"):
        find_pairs(tmp_path, tmp_path / "masks")
    with pytest.raises(DatasetError, match="holds no images"):
        find_pairs(tmp_path / "empty", tmp_path)
    with pytest.raises(DatasetError, match=r"no folders of a known data set .ADE20K: images/val"):
        layout_of(tmp_path)


def test_a_mask_whose_lengths_are_damaged(tmp_path):
    """A PNG's chunk that says it is of gigabytes is not believed."""
    images, masks = pair(tmp_path)
    layouts.save(masks / "a.png", np.zeros((6, 8)))
    whole = (masks / "a.png").read_bytes()
    place = whole.index(b"IDAT")
    (masks / "a.png").write_bytes(whole[: place - 4] + b"\x7f\xff\xff\xff" + whole[place:])
    (sample,) = samples(images, masks)
    assert not sample.truth.any()
    for damaged in (whole[:place] + b"IDOT" + whole[place + 4 :], whole[: place + 6], b"\x89PNG"):
        (masks / "a.png").write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"a\.png cannot be read"):
            list(samples(images, masks))
