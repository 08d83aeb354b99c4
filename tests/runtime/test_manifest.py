"""What a detector's bundle must hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from fdconv_deploy.errors import BundleError
from fdconv_deploy.runtime import Bundle, Manifest
from tests.runtime import toy_detector
from tests.runtime.test_bundle import edit, refusal


def test_comes_back_as_written(detector_bundle: Path, box_bundle: Path) -> None:
    for path, outputs in ((detector_bundle, 5), (box_bundle, 4)):
        manifest = Bundle.open(path).manifest
        assert manifest.kind == "detector"
        assert manifest.detector is not None
        assert manifest.architecture is None
        assert len(manifest.outputs[1]) == outputs
        assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def _output(number: int, **changes: object):
    return lambda m: m["outputs"]["1"][number].update(changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(detector=None), "'detector' and 'input'"),
        (lambda m: m.update(input=None), "'detector' and 'input'"),
        (lambda m: m["detector"].update(classes=["one"]), "3 classes but there are 1 class names"),
        (lambda m: m["detector"].update(palette=[[0, 0, 0]]), "palette"),
        (lambda m: m["detector"].update(surprise=1), "surprise"),
        (
            lambda m: m["inputs"]["1"].pop(),
            "images (1, 3, 64, 96) float32, sizes (1, 2)",
        ),
        (lambda m: m["inputs"]["1"].reverse(), "must take images"),
        (lambda m: m["outputs"]["1"].pop(), "must give boxes"),
        (_output(0, shape=[1, 8, 4]), "boxes (1, 7, 4)"),
        (_output(2, dtype="int32"), "labels (1, 7) int64"),
        (_output(3, shape=[1, 1]), "count (1,) int64"),
        (_output(4, shape=[1, 7, 14, 14]), "masks (1, 7, 28, 28)"),
        (lambda m: m["detector"].update(mask_head=None), "must give boxes"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change, says: str) -> None:
    path = toy_detector.make_bundle(tmp_path / "b").path
    edit(path, change)
    assert says in refusal(path)


def test_is_not_written_either(tmp_path: Path) -> None:
    with pytest.raises((BundleError, ValueError), match="must give boxes"):
        toy_detector.make_bundle(
            tmp_path / "b", outputs={b: toy_detector.outputs(b, masks=False) for b in (1, 4)}
        )
