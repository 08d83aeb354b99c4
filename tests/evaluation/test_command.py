"""``fdconv evaluate``, from folders on disk to a report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from fdconv_deploy.demo import held_out, packaged_checkpoint
from tests.evaluation import layouts
from tests.test_cli import fdconv


@pytest.fixture
def scenes():
    return held_out()[0][0].parent


def scored(monkeypatch, capfd, *arguments: object) -> dict:
    code, out, err = fdconv(monkeypatch, capfd, "evaluate", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_every_layout_gives_the_same_scores(streets, tmp_path, scenes, monkeypatch, capfd):
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps({str(label): n for n, label in enumerate(layouts.LABEL_IDS)}))
    reports = [
        scored(monkeypatch, capfd, streets, "--images", scenes, "--masks", scenes),
        scored(
            monkeypatch, capfd, streets, "--data", layouts.ade20k(tmp_path / "ade"),
            "--reduce-zero-label",
        ),
        *(
            scored(
                monkeypatch, capfd, streets, *more,
                "--data", layouts.cityscapes(tmp_path / kind, kind),
            )
            for kind, more in (("labelTrainIds", ()), ("labelIds", ("--label-map", ids)))
        ),
    ]  # fmt: skip
    sides = [report["sides"][0] for report in reports]
    assert [len(report["notes"]) for report in reports] == [0, 0, 1, 0]
    assert "The network's classes are not those of Cityscapes" in reports[2]["notes"][0]
    assert all(" operators, since " in side["operators"] for side in sides)
    assert all(report["images"] == 16 for report in reports)
    for side in sides:
        assert side["backend"] == "onnxruntime-cpu"
        assert side["mode"] == "whole"
        assert side["images_per_second"] > 0
        for key in ("mean_iou", "pixel_accuracy", "mean_accuracy", "classes"):
            assert side[key] == sides[0][key]
    assert [row["name"] for row in sides[0]["classes"]][:2] == ["road", "lane marking"]


def test_against_a_checkpoint(streets, scenes, monkeypatch, capfd):
    report = scored(
        monkeypatch, capfd, streets, "--images", scenes, "--masks", scenes,
        "--limit", 3, "--against", packaged_checkpoint(), "--threads", 1,
    )  # fmt: skip
    bundle, eager = report["sides"]
    assert report["images"] == 3
    assert eager["backend"] == "pytorch"
    assert eager["agreement"] > 0.9999
    assert abs(bundle["mean_iou"] - eager["mean_iou"]) < 1e-4
    assert eager["size"] == bundle["size"] == [96, 128]
    assert (bundle["kind"], eager["kind"]) == ("bundle", "checkpoint")
    assert (bundle["name"], eager["name"]) == (str(streets), str(packaged_checkpoint()))


def test_multi_scale_and_flip(streets, scenes, monkeypatch, capfd):
    data = ["--images", scenes, "--masks", scenes, "--limit", 2]
    (once,) = scored(monkeypatch, capfd, packaged_checkpoint(), *data)["sides"]
    several = [*data, "--multi-scale", "0.75,1,1.25", "--flip"]
    (merged,) = scored(monkeypatch, capfd, packaged_checkpoint(), *several)["sides"]
    assert (merged["multi_scale"], merged["flip"]) == ([0.75, 1, 1.25], True)
    assert 0.9 < merged["pixel_accuracy"] != once["pixel_accuracy"]
    # A bundle has a graph of one size, which the mirror image has too.
    flipped = scored(
        monkeypatch, capfd, streets, *data, "--flip", "--against", packaged_checkpoint()
    )
    assert flipped["sides"][1]["agreement"] > 0.9999
    code, _, err = fdconv(monkeypatch, capfd, "evaluate", streets, *several)
    assert code == 1
    assert "has a graph of 96x128 (height x width)" in err
    assert "need 72x96, 120x160 too" in err
    code, _, err = fdconv(
        monkeypatch, capfd, "evaluate", streets, "--annotations", "x", "--images", scenes, "--flip"
    )
    assert code == 2
    assert "--flip is of segmentors" in err
    for wrong in ("0.5,x", "0,1"):
        code, _, err = fdconv(
            monkeypatch, capfd, "evaluate", streets, *data, "--multi-scale", wrong
        )
        assert code in (1, 2)
        assert "actors" in err


def test_multi_scale_by_graphs_of_several_sizes(scenes, tmp_path, monkeypatch, capfd):
    sizes = [part for size in ("96x128", "72x96", "120x160") for part in ("--size", size)]
    bundle = tmp_path / "bundle"
    code, _, err = fdconv(
        monkeypatch, capfd, "export", packaged_checkpoint(), "-o", bundle, *sizes, "-q"
    )
    assert code == 0, err
    data = ["--images", scenes, "--masks", scenes, "--limit", 2]
    several = ["--multi-scale", "0.75,1,1.25", "--flip", "--against", packaged_checkpoint()]
    ours, eager = scored(monkeypatch, capfd, bundle, *data, *several)["sides"]
    assert ours["multi_scale"] == eager["multi_scale"] == [0.75, 1, 1.25]
    assert eager["agreement"] > 0.9999
    assert abs(ours["mean_iou"] - eager["mean_iou"]) < 1e-4


def test_two_bundles_and_a_checkpoint(streets, scenes, monkeypatch, capfd):
    report = scored(
        monkeypatch, capfd, packaged_checkpoint(), "--images", scenes, "--masks", scenes,
        "--limit", 1, "--against", streets, "--against", streets, "--fit", "pad",
    )  # fmt: skip
    eager, *bundles = report["sides"]
    assert bundles[0]["mean_iou"] == bundles[1]["mean_iou"]
    assert eager["size"] == [96, 128]  # beside a bundle, wherever it stands
    assert bundles[0]["agreement"] > 0.9999


def test_a_checkpoint_alone_as_a_table(scenes, monkeypatch, capfd):
    code, out, err = fdconv(
        monkeypatch, capfd, "evaluate", packaged_checkpoint(),
        "--images", scenes, "--masks", scenes, "--limit", 2,
    )  # fmt: skip
    assert code == 0, err
    for word in ("lane marking", "mIoU", "pixel accuracy", "images/s", "2 images", "pytorch, fp32"):
        assert word in out


def test_slide(sliding, tmp_path, monkeypatch, capfd):
    checkpoint, bundle = sliding
    root = layouts.cityscapes(tmp_path, "labelTrainIds")
    mapping = tmp_path / "map.json"
    mapping.write_text(json.dumps({str(n): ("road", "tree", None)[n % 3] for n in range(11)}))
    report = scored(
        monkeypatch, capfd, bundle, "--data", root, "--limit", 2,
        "--label-map", mapping, "--against", checkpoint,
    )  # fmt: skip
    assert {side["mode"] for side in report["sides"]} == {"slide"}
    assert report["sides"][1]["agreement"] > 0.999
    assert report["sides"][0]["classes"][0]["pixels"] == 0  # sky is nowhere in the map


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--images", "."], 2, "give --images with --masks"),
        ([], 2, "give --images with --masks"),
        (["--data", ".", "--images", ".", "--masks", "."], 2, "or --data alone"),
        (["--data", ".", "--mode", "half"], 2, "'half' is not one of 'whole', 'slide'"),
        (["--data", "."], 1, "no folders of a known data set"),
    ],
)
def test_mistakes(streets, tmp_path, arguments, code, message, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    found, _, err = fdconv(monkeypatch, capfd, "evaluate", streets, *arguments)
    assert found == code
    # rich draws a box around it
    assert message in " ".join(err.replace("│", " ").split())


def test_mistakes_about_masks(streets, scenes, tmp_path, monkeypatch, capfd):
    shutil.copytree(scenes, tmp_path / "scenes")
    (tmp_path / "scenes" / "004_labels.png").unlink()
    folder = tmp_path / "scenes"
    arguments = ("evaluate", streets, "--images", folder, "--masks", folder)
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 1
    assert "004.png has no mask: expected 004_labels.png" in err
    code, _, err = fdconv(
        monkeypatch, capfd, "evaluate", tmp_path / "none", "--images", scenes, "--masks", scenes
    )
    assert code == 1
    assert "none does not exist. Give a bundle's folder or a checkpoint." in err


def test_a_fit_without_a_bundle_is_of_no_use(scenes, monkeypatch, capfd):
    code, _, err = fdconv(
        monkeypatch, capfd, "evaluate", packaged_checkpoint(),
        "--images", scenes, "--masks", scenes, "--fit", "pad",
    )  # fmt: skip
    assert code == 1
    assert "a backend are a bundle's, and there is none here" in err


@pytest.mark.parametrize("options", [["--json"], []], ids=["json", "table"])
def test_a_bundle_is_scored_without_torch(streets, scenes, options):
    command = ["evaluate", streets, "--images", scenes, "--masks", scenes, "--limit", 1, *options]
    code = (
        "import sys; from fdconv_deploy.cli.app import main\n"
        f"sys.argv = ['fdconv', *{list(map(str, command))!r}]\n"
        "main()\n"
        "assert not {'torch', 'onnx'} & set(sys.modules), 'loaded'"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert not options or json.loads(finished.stdout)["images"] == 1


def test_a_bundle_is_verified_beside_its_own_checkpoint(streets, scenes, monkeypatch, capfd):
    code, out, err = fdconv(
        monkeypatch, capfd, "evaluate", streets, "--against", packaged_checkpoint(),
        "--images", scenes, "--masks", scenes, "--limit", 1,
    )  # fmt: skip
    assert code == 0, err
    said = out.partition(f"{streets} beside {packaged_checkpoint()}:")[2]
    assert "The graph is the network." in said
