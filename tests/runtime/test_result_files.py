from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdconv_deploy.coco_rle import decode
from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime import Session
from fdconv_deploy.runtime.input_files import Source, sources_at
from fdconv_deploy.runtime.result_files import ResultOptions, segment_files
from tests.runtime.toy_detector import picture
from tests.test_cli import fdconv


@pytest.fixture
def scenes(tmp_path: Path) -> list[Source]:
    paths = [tmp_path / "in" / name for name in ("one.png", "two.png")]
    paths[0].parent.mkdir()
    for seed, path in enumerate(paths):
        Image.fromarray(picture(seed=seed)).save(path)
    return sources_at(paths, tmp_path / "out")


def test_what_is_written(detector: Session, scenes: list[Source], tmp_path: Path) -> None:
    results = list(segment_files(detector, scenes, tmp_path / "out"))
    assert len(results) == 2
    for result, path in zip(results, scenes, strict=True):
        told = json.loads(result.places["objects"].read_text())
        assert told == json.loads(json.dumps(result.record))
        assert told["image"] == str(path.path)
        assert (told["height"], told["width"]) == (50, 70)
        assert told["instances"]
        assert all(entry["score"] >= 0.3 for entry in told["instances"])
        numbers = np.asarray(Image.open(result.places["mask"]))
        first = decode(told["instances"][0]["mask"])
        assert np.array_equal(numbers == 1, first)
        assert Image.open(result.places["overlay"]).size == (70, 50)
        assert str(result.places["objects"]) in result.line


def test_boxes_alone(boxes_only: Session, scenes: list[Source], tmp_path: Path) -> None:
    (result,) = segment_files(boxes_only, scenes[:1], tmp_path / "out")
    assert result.record["mask"] is None
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["one.json", "one_overlay.png"]


def test_min_score(detector: Session, scenes: list[Source], tmp_path: Path) -> None:
    (none,) = segment_files(detector, scenes[:1], tmp_path / "out", ResultOptions(min_score=1.0))
    assert none.record["instances"] == []
    assert "nothing" in none.line


def test_two_of_one_name(detector: Session, scenes: list[Source], tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"would both be written to one_overlay\.png"):
        list(segment_files(detector, [scenes[0], scenes[0]], tmp_path / "out"))


class TestCommand:
    def test_json(self, detector_bundle, scenes, tmp_path, monkeypatch, capfd) -> None:
        arguments = (
            "segment",
            detector_bundle,
            *(s.path for s in scenes),
            "-o",
            tmp_path / "out",
            "--json",
        )
        code, out, err = fdconv(monkeypatch, capfd, *arguments, "--min-score", "0.5")
        assert code == 0, err
        told = [json.loads(line) for line in out.splitlines()]
        assert [Path(entry["image"]).name for entry in told] == ["one.png", "two.png"]
        assert all(o["score"] >= 0.5 for entry in told for o in entry["instances"])
        assert len(list((tmp_path / "out").iterdir())) == 6

    def test_options_of_the_other_kind(
        self, detector_bundle, toy_bundle, scenes, tmp_path, monkeypatch, capfd
    ) -> None:
        for bundle, option in (
            (detector_bundle, ("--fit", "pad")),
            (toy_bundle, ("--min-score", 1)),
        ):
            code, _, err = fdconv(
                monkeypatch, capfd, "segment", bundle, scenes[0].path, "-o", tmp_path, *option
            )
            assert code == 2
            assert option[0] in err
