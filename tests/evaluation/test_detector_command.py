"""``fdconv evaluate`` on a detector."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fdconv_deploy.demo import held_out
from fdconv_deploy.runtime import Session
from tests.runtime import toy
from tests.test_cli import fdconv


def test_a_data_folder(detector: Path, street_set: Path, monkeypatch, capfd) -> None:
    code, out, err = fdconv(
        monkeypatch, capfd, "evaluate", detector, "--data", street_set, "--against", detector,
        "--limit", 2, "--threads", 1, "--json",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(out)
    assert told["images"] == 2
    assert told["annotations_from"].endswith("instances_val2017.json")
    first, second = told["sides"]
    assert first["box"] == second["box"]
    assert first["mask"] == second["mask"] is not None
    assert second["agreement"] == 1
    assert [c["name"] for c in first["classes"]] == ["person", "car", "sign"]


def test_files_as_a_table(detector: Path, street_set: Path, monkeypatch, capfd) -> None:
    code, out, err = fdconv(
        monkeypatch, capfd, "evaluate", detector,
        "--annotations", street_set / "annotations" / "instances_val2017.json",
        "--images", street_set / "val2017",
    )  # fmt: skip
    assert code == 0, err
    for word in ("box AP50", "mask AP75", "AP small", "person, box", "images/s", "3 images"):
        assert word in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "{set}", "--mode", "slide"], "--mode is of segmentors"),
        (["--data", "{set}", "--fit", "pad"], "--fit is of segmentors"),
        (["--annotations", "{set}/annotations/instances_val2017.json"], "--annotations"),
        (["--images", "{scenes}", "--masks", "{scenes}"], "is of a detector"),
    ],
)
def test_refusals(detector, street_set, monkeypatch, capfd, options, says) -> None:
    scenes = held_out()[0][0].parent
    told = [option.format(set=street_set, scenes=scenes) for option in options]
    code, _, err = fdconv(monkeypatch, capfd, "evaluate", detector, *told)
    assert code in (1, 2)
    assert says in err


def test_a_segmentor(tmp_path: Path, street_set: Path, monkeypatch, capfd) -> None:
    toy.make_bundle(tmp_path / "s", batches=(1,))
    code, _, err = fdconv(monkeypatch, capfd, "evaluate", tmp_path / "s", "--data", street_set)
    assert code == 1
    assert "is of a segmentor, which is scored on masks" in err


def test_without_pycocotools(detector: Path, street_set: Path, monkeypatch, capfd) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "pycocotools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    code, _, err = fdconv(monkeypatch, capfd, "evaluate", detector, "--data", street_set)
    assert code == 1
    assert "needs pycocotools, which is not installed: pip install" in err


@pytest.fixture
def annotated(tmp_path: Path):
    """Writes annotations of one blank image, and gives evaluate's options for them."""

    def write(*annotations: dict, **more: object) -> list[object]:
        (tmp_path / "img").mkdir(exist_ok=True)
        Image.new("RGB", (256, 192)).save(tmp_path / "img" / "0.png")
        told = {
            "images": [{"id": 1, "file_name": "0.png", "height": 192, "width": 256}],
            "categories": [
                {"id": n, "name": name} for n, name in enumerate(("person", "car", "sign"), 1)
            ],
            "annotations": annotations,
            **more,
        }
        (tmp_path / "a.json").write_text(json.dumps(told))
        return ["--annotations", tmp_path / "a.json", "--images", tmp_path / "img"]

    return write


def thing(number: int, **more: object) -> dict:
    return {
        "id": number, "image_id": 1, "category_id": 2, "bbox": [10, 20, 30, 20], "area": 600,
        "iscrowd": 0, "segmentation": [[10, 20, 40, 20, 40, 40, 10, 40]], **more,
    }  # fmt: skip


def test_what_is_left_out_is_named_first_and_counted_last(
    detector: Path, annotated, monkeypatch, capfd
) -> None:
    options = annotated(
        thing(1, segmentation=[[10, 20, 40, 20]]),
        thing(2, bbox=[float("nan"), 20, 30, 20]),
        thing(3, segmentation={"counts": [49152]}),
        *(thing(n, image_id=n) for n in range(4, 30)),
        thing(30, segmentation=[[5, 5, 5, 5, 5, 5]]),
    )
    code, out, err = fdconv(monkeypatch, capfd, "evaluate", detector, *options)
    assert code == 0, err
    assert err.startswith(
        "left out: Annotation 1 (0.png): the mask is a polygon of two points: [[10, 20, 40, 20]]; "
        "expected [["
    )
    assert "left out: Annotation 2 (0.png): the box is not finite: [nan, 20, 30, 20]" in err
    assert "left out: 9 more, which --json lists." in err
    assert "counted, but odd: Annotation 30 (0.png): the mask is without a pixel" in err
    closing = (
        "Left out: 26 objects (of an image that is not listed), 1 mask (a polygon of two points), "
        "1 box (not finite), 1 mask (run lengths without a size); Counted as COCO's code does it: "
        "1 mask (without a pixel)."
    )
    assert closing in out
    assert "1 images, 4 objects" in out

    code, out, err = fdconv(monkeypatch, capfd, "evaluate", detector, *options, "--json", "--quiet")
    assert code == 0, err
    assert err == ""
    told = json.loads(out)
    assert len(told["left_out"]) == 29
    assert told["left_out"][1] == {
        "annotation": "2", "image": "0.png", "part": "box", "problem": "not finite",
        "found": "[nan, 20, 30, 20]",
        "remark": "expected [x, y, width, height], four finite numbers",
    }  # fmt: skip
    assert [one["annotation"] for one in told["noted"]] == ["30"]
    assert told["sides"][0]["mask"] is not None


def test_ids_of_several_kinds(detector: Path, annotated, tmp_path, monkeypatch, capfd) -> None:
    options = annotated(
        thing(1, image_id=0), thing("x", image_id="1"),
        images=[{"id": 0, "file_name": "0.png", "height": 192, "width": 256},
                {"id": "1", "file_name": "1.png", "height": 192, "width": 256}],
    )  # fmt: skip
    Image.new("RGB", (256, 192)).save(tmp_path / "img" / "1.png")
    code, out, err = fdconv(monkeypatch, capfd, "evaluate", detector, *options, "--json")
    assert code == 0, err
    assert (json.loads(out)["images"], json.loads(out)["objects"]) == (2, 2)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"categories": [{"id": 1, "name": ["road"]}]}, "number 0 of categories has the name"),
        ({"images": [{"id": [1], "file_name": "0.png"}]}, "number 0 of images has the id [1]"),
        ({"images": [{"id": 0, "file_name": 7}]}, "number 0 of images has the file_name 7"),
        ({"annotations": [thing(1, bbox=[1], segmentation=3)]}, "no objects in 1 images"),
        ({"categories": [{"id": 2, "name": "lorry"}]}, "class 'person' is none of the categories"),
    ],
)
def test_files_that_cannot_be_scored(
    detector: Path, annotated, monkeypatch, capfd, more: dict, says: str
) -> None:
    def run(*_: object) -> None:
        raise AssertionError("an image was run")

    monkeypatch.setattr(Session, "detect", run)
    code, _, err = fdconv(monkeypatch, capfd, "evaluate", detector, *annotated(thing(1), **more))
    assert code == 1
    assert says in err
    assert "Traceback" not in err


def test_neither_finding_nor_scoring_objects_loads_torch(
    detector: Path, street_set: Path, tmp_path: Path
) -> None:
    image = street_set / "val2017" / "000000000000.png"
    lists = [
        ["segment", str(detector), str(image), "-o", str(tmp_path / "out"), "--quiet"],
        ["evaluate", str(detector), "--data", str(street_set), "--quiet"],
    ]
    program = (
        "import sys\n"
        "from fdconv_deploy.cli.app import main\n"
        f"for arguments in {lists!r}:\n"
        "    sys.argv = ['fdconv', *arguments]\n"
        "    main()\n"
        "sys.exit('torch was loaded' if 'torch' in sys.modules else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "out" / "000000000000.json").is_file()
