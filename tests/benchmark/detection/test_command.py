"""``fdconv evaluate`` on a detector."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fdconv_deploy.demo import held_out
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
    assert "is of a segmentor, not of a detector" in err


def test_without_pycocotools(detector: Path, street_set: Path, monkeypatch, capfd) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "pycocotools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    code, _, err = fdconv(monkeypatch, capfd, "evaluate", detector, "--data", street_set)
    assert code == 1
    assert "needs pycocotools, which is not installed: pip install" in err


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
        "from fdconv_deploy.cli import main\n"
        f"for arguments in {lists!r}:\n"
        "    sys.argv = ['fdconv', *arguments]\n"
        "    main()\n"
        "sys.exit('torch was loaded' if 'torch' in sys.modules else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "out" / "000000000000.json").is_file()
