"""``fdconv evaluate`` on masks whose numbers are not what a network's classes are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdconv_deploy.runtime import Session
from tests.evaluation import layouts
from tests.evaluation.test_class_mapping import ADE, CITY_NAMES
from tests.runtime import toy
from tests.test_cli import fdconv


def bundle(tmp_path: Path, *classes: str) -> Path:
    arch = toy.architecture(len(classes)).model_copy(update={"classes": classes})
    return toy.make_bundle(tmp_path / "toy", batches=(1,), arch=arch).path


def folders(tmp_path: Path, *masks: np.ndarray) -> list[object]:
    """Noise with masks of the numbers given, and evaluate's options for them."""
    (tmp_path / "images").mkdir()
    for index, mask in enumerate(masks):
        noise = np.random.default_rng(index).integers(0, 256, (*mask.shape, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{index}.png")
        layouts.save(tmp_path / "masks" / f"{index}.png", mask)
    return ["--images", tmp_path / "images", "--masks", tmp_path / "masks"]


def checkers(first: int, second: int) -> np.ndarray:
    return np.where(np.indices((12, 16)).sum(0) % 2, first, second)


def scored(monkeypatch, capfd, *arguments: object) -> dict:
    code, out, err = fdconv(monkeypatch, capfd, "evaluate", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(monkeypatch, capfd, *arguments: object) -> str:
    """What is said in the end, and that no image was run before."""

    def run(*_: object, **__: object) -> None:
        raise AssertionError("an image was run")

    monkeypatch.setattr(Session, "segment", run)
    code, _, err = fdconv(monkeypatch, capfd, "evaluate", *arguments)
    assert code == 1
    assert "Traceback" not in err
    return err


def test_black_and_white_masks_are_two_classes(tmp_path, monkeypatch, capfd) -> None:
    network = bundle(tmp_path, "ground", "crack")
    black_and_white = folders(tmp_path, checkers(0, 255), np.zeros((9, 9), int))
    report = scored(monkeypatch, capfd, network, *black_and_white)
    assert "taken for the classes 'ground' and 'crack'" in report["notes"][0]
    other = tmp_path / "other"
    other.mkdir()
    indices = folders(other, checkers(0, 1), np.zeros((9, 9), int))
    expected = scored(monkeypatch, capfd, network, *indices)
    assert expected["notes"] == []
    assert expected["pixels"] == report["pixels"] == 12 * 16 + 81
    for key in ("classes", "mean_iou", "pixel_accuracy"):
        assert report["sides"][0][key] == expected["sides"][0][key]
    code, _, err = fdconv(monkeypatch, capfd, "evaluate", network, *black_and_white)
    assert code == 0
    assert "The masks hold 0 and 255 alone, black and white" in err


def test_white_masks_are_of_the_second_class(tmp_path, monkeypatch, capfd) -> None:
    masks = folders(tmp_path, np.full((9, 9), 255))
    report = scored(monkeypatch, capfd, bundle(tmp_path, "ground", "crack"), *masks)
    assert "taken for the classes 'ground' and 'crack'" in report["notes"][0]
    assert [one["pixels"] for one in report["sides"][0]["classes"]] == [0, 81]


@pytest.mark.parametrize("option", [["--ignore-index", 255], ["--label-map", "map"]])
def test_255_is_what_it_is_said_to_be(tmp_path, monkeypatch, capfd, option) -> None:
    (tmp_path / "map").write_text('{"0": 0}')
    option = [tmp_path / "map" if value == "map" else value for value in option]
    masks = folders(tmp_path, checkers(0, 255))
    report = scored(monkeypatch, capfd, bundle(tmp_path, "ground", "crack"), *masks, *option)
    assert report["notes"] == []
    assert report["pixels"] == 12 * 16 // 2


@pytest.mark.parametrize(("second", "classes"), [(1, ("a", "b")), (255, ("a", "b", "c"))])
def test_other_masks_ignore_255(tmp_path, monkeypatch, capfd, second, classes) -> None:
    masks = folders(tmp_path, checkers(0, 255), checkers(0, second))
    report = scored(monkeypatch, capfd, bundle(tmp_path, *classes), *masks)
    assert report["notes"] == []
    assert report["pixels"] == 12 * 16 // 2 * (3 if second == 1 else 2)


def test_numbers_that_are_no_class_are_all_named_before_anything_is_run(
    tmp_path, monkeypatch, capfd
) -> None:
    masks = folders(tmp_path, checkers(0, 1), checkers(128, 255), checkers(128, 7))
    said = refused(monkeypatch, capfd, bundle(tmp_path, "a", "b"), *masks)
    assert "7 (96 pixels in 1 of 3 masks, such as" in said
    assert "128 (192 pixels in 2 of 3 masks, such as" in said
    assert f"{tmp_path / 'masks' / '1.png'})" in said
    assert "the network has classes 0 to 1, and 255 stands for pixels that are not counted" in said


def test_masks_of_nothing_that_counts_are_refused_before_anything_is_run(
    tmp_path, monkeypatch, capfd
) -> None:
    masks = folders(tmp_path, np.full((6, 7), 255), np.full((6, 7), 255))
    said = refused(monkeypatch, capfd, bundle(tmp_path, "a", "b", "c"), *masks)
    assert "Of 2 masks no pixel counts: they hold nothing but labels to ignore." in said


def test_many_wrong_numbers_are_counted(tmp_path, monkeypatch, capfd) -> None:
    masks = folders(tmp_path, np.arange(192).reshape(12, 16))
    said = refused(monkeypatch, capfd, bundle(tmp_path, "a", "b"), *masks)
    assert "and 182 more; the network has" in said


def test_a_mask_of_another_size_is_found_before_anything_is_run(
    tmp_path, monkeypatch, capfd
) -> None:
    masks = folders(tmp_path, checkers(0, 1), checkers(0, 1))
    layouts.save(tmp_path / "masks" / "1.png", np.zeros((5, 6)))
    said = refused(monkeypatch, capfd, bundle(tmp_path, "a", "b"), *masks)
    assert "1.png is 5x6 (height x width), its image" in said


def city(root: Path, kind: str, mask: np.ndarray) -> Path:
    image = root / "leftImg8bit" / "val" / "ulm" / "ulm_000000_000019_leftImg8bit.png"
    image.parent.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (*mask.shape, 3), np.uint8)
    Image.fromarray(noise).save(image)
    layouts.save(root / "gtFine" / "val" / "ulm" / f"ulm_000000_000019_gtFine_{kind}.png", mask)
    return root


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes_classes_are_matched_by_name(tmp_path, monkeypatch, capfd, kind) -> None:
    mask = checkers(7, 33) if kind == "labelIds" else checkers(0, 18)
    data = city(tmp_path, kind, mask)
    for names, notes in ((CITY_NAMES, 0), (CITY_NAMES[::-1], 1)):
        report = scored(monkeypatch, capfd, bundle(tmp_path / names[0], *names), "--data", data)
        assert len(report["notes"]) == notes
        pixels = {row["name"]: row["pixels"] for row in report["sides"][0]["classes"]}
        assert (pixels["road"], pixels["bicycle"]) == (96, 96)
    assert "in another order: they are matched by name" in report["notes"][0]


def test_cityscapes_label_ids_need_its_classes(tmp_path, monkeypatch, capfd) -> None:
    data = city(tmp_path, "labelIds", checkers(7, 33))
    names = ("tree", *CITY_NAMES[1:])
    network = bundle(tmp_path, *names)
    said = refused(monkeypatch, capfd, network, "--data", data)
    assert "only the network has 'tree' and only Cityscapes has 'road'." in said
    assert "say by a --label-map what they stand for" in said
    # Also where the folders are given apart.
    folder = [
        "--images", data / "leftImg8bit" / "val", "--masks", data / "gtFine" / "val",
    ]  # fmt: skip
    assert "only Cityscapes has 'road'" in refused(monkeypatch, capfd, network, *folder)


def test_label_ids_that_are_none_are_named(tmp_path, monkeypatch, capfd) -> None:
    data = city(tmp_path, "labelIds", checkers(7, 40))
    said = refused(monkeypatch, capfd, bundle(tmp_path, *CITY_NAMES), "--data", data)
    assert "40 (96 pixels in 1 of 1 masks" in said
    assert "Cityscapes' label ids go from 0 to 33" in said


def test_ade20k_classes_are_matched_by_its_own_table(tmp_path, monkeypatch, capfd) -> None:
    for part, made in (("images", (12, 16, 3)), ("annotations", None)):
        folder = tmp_path / part / "validation"
        array = np.zeros(made) if made else checkers(1, 3)
        layouts.save(folder / "ADE_val_00000001.png", array)
    options = ["--data", tmp_path, "--reduce-zero-label"]
    network = bundle(tmp_path, "blind", "bed ", "television receiver")
    assert scored(monkeypatch, capfd, network, *options)["notes"] == []
    (tmp_path / "objectInfo150.txt").write_text(ADE)
    report = scored(monkeypatch, capfd, network, *options)
    assert "The network has ADE20K's classes in another order" in report["notes"][0]
    pixels = [row["pixels"] for row in report["sides"][0]["classes"]]
    assert pixels == [96, 96, 0]  # blind and bed, which the masks have as 3 and 1
