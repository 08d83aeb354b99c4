"""The ``fdconv`` command: what it prints, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from fdconv_deploy.cli import app as cli
from fdconv_deploy.demo import held_out, packaged_checkpoint, packaged_detector, plain_checkpoint
from fdconv_deploy.errors import BundleError
from fdconv_deploy.runtime import BundleWriter


def fdconv(monkeypatch, capfd, *arguments: object) -> tuple[int, str, str]:
    """Run the command in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["fdconv", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capfd.readouterr()
    return code, out, " ".join(err.split())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "streets"
    command = [sys.executable, "-m", "fdconv_deploy", "export", packaged_checkpoint()]
    command += ["-o", path, "--size", "64x96", "--batch", "1", "--batch", "2"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return path


def test_export_proves_what_it_wrote(bundle):
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert sorted(manifest["models"]) == ["1", "2"]
    assert manifest["input"] == {"height": 64, "width": 96}
    for outputs in manifest["parity"]["batches"].values():
        assert outputs[0]["max_rel"] < 1e-5
        assert outputs[0]["argmax_agreement"] > 0.999
    assert len(manifest["group_maps"]) == manifest["graph"]["fdconv_layers"] > 10


def test_verify_on_images(bundle, monkeypatch, capfd):
    images = [path for path, _ in held_out()[:2]]
    code, out, err = fdconv(
        monkeypatch, capfd, "verify", bundle, packaged_checkpoint(), *images, "--json"
    )
    assert code == 0, err
    rows = json.loads(out)
    assert [row["source"] for row in rows] == [path.name for path in images]
    assert all(row["max_rel"] < 1e-5 for row in rows)
    assert all(row["holds"] and row["allowed"] == 1e-4 for row in rows)
    assert all("operators, since" in row["operators"] for row in rows)


def test_verify_refuses_another_network(bundle, monkeypatch, capfd, oracle):
    other = oracle / "segmentor/B_r18b14_mmcv1.pth"
    code, _, err = fdconv(monkeypatch, capfd, "verify", bundle, other)
    assert code == 1
    assert "another network" in err


def test_verify_fails_below_what_float32_can_tell(bundle, monkeypatch, capfd):
    arguments = ["verify", bundle, packaged_checkpoint(), "--tolerance", "1e-12"]
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 1
    assert "the tolerance of 1e-12 is below what float32 itself can tell" in err
    # What it says is enough.
    (least,) = re.findall(r"Give --tolerance (\S+) or more", err)
    code, _, err = fdconv(monkeypatch, capfd, *arguments[:-1], least)
    assert code == 0, err


def test_verify_does_not_blame_a_bundle_for_a_flat_picture(bundle, monkeypatch, capfd, tmp_path):
    """Flat, black and letterboxed frames: the network may amplify rounding on them."""
    frames = {name: np.zeros((480, 640, 3), np.uint8) for name in ("black", "gray", "letterbox")}
    frames["gray"] += 128
    frames["letterbox"][120:360] = cv2.resize(cv2.imread(str(held_out()[0][0])), (640, 240))
    for name, frame in frames.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), frame)
        arguments = ["verify", bundle, packaged_checkpoint(), tmp_path / f"{name}.png"]
        code, out, err = fdconv(monkeypatch, capfd, *arguments)
        assert code == 0, err
        assert f"{name}.png: logits differs from the network's by" in out
        assert "The graph is the network" in out


def test_verify_and_evaluate_print_the_verdict_of_export(bundle, monkeypatch, capfd, tmp_path):
    """One module judges for all of them, and words it."""
    for folder, index in (("images", 0), ("masks", 1)):
        (tmp_path / folder).mkdir()
        shutil.copy(held_out()[0][index], tmp_path / folder / "one.png")
    image = tmp_path / "images" / "one.png"
    _, verified, _ = fdconv(monkeypatch, capfd, "verify", bundle, packaged_checkpoint(), image)
    arguments = ["evaluate", bundle, "--images", image.parent, "--masks", tmp_path / "masks"]
    code, out, err = fdconv(monkeypatch, capfd, *arguments, "--against", packaged_checkpoint())
    assert code == 0, err
    lines = verified.splitlines()
    said = lines[next(i for i, line in enumerate(lines) if line.startswith("one.png:")) :]
    assert len(said) == 3
    assert all(line in out.splitlines() for line in said)
    exported = json.loads((bundle / "manifest.json").read_text())["graph"]["exactness"]
    assert [found["equal"] for found in exported.values()] == [True, True]
    assert exported["1"]["verdict"][-1] == said[-1]


def test_verify_says_when_it_is_another_checkpoint(bundle, monkeypatch, capfd, tmp_path):
    other = tmp_path / "other.pth"
    state = torch.load(packaged_checkpoint(), weights_only=True)  # noqa: TID251
    weights = state.get("state_dict", state)
    name = next(n for n in weights if n.endswith("conv_seg.weight"))
    weights[name] = weights[name] * 1.5
    torch.save(state, other)
    code, _, err = fdconv(monkeypatch, capfd, "verify", bundle, other)
    assert code == 1
    assert f"exported from another file than this one, {packaged_checkpoint().name}" in err


def test_verify_says_that_all_is_well(bundle, monkeypatch, capfd):
    code, out, _ = fdconv(monkeypatch, capfd, "verify", bundle, packaged_checkpoint())
    assert code == 0
    assert "packaged pictures: logits differs from the network's by" in out
    assert "Layer by layer, on the network's own inputs" in out
    assert "The graph is the network." in out
    assert "Run by onnxruntime-cpu with " in out


def test_verify_refuses_a_senseless_tolerance(bundle, monkeypatch, capfd):
    arguments = ["verify", bundle, packaged_checkpoint(), "--tolerance", "-1"]
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 1
    assert "0 or more" in err


def test_segment_passes_over_what_is_no_image(bundle, monkeypatch, capfd, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    good = [path for path, _ in held_out()[:2]]
    images = [good[0], broken, good[1]]
    code, _, err = fdconv(monkeypatch, capfd, "segment", bundle, *images, "-o", tmp_path / "out")
    assert code == 1
    assert "1 of 3 files" in err
    assert "broken.png" in err
    written = {path.name for path in (tmp_path / "out").iterdir()}
    results = {f"{p.stem}{end}.png" for p in good for end in ("", "_overlay")}
    assert written == results | {"classes.json", "legend.png"}


def test_segment_writes_mask_and_overlay(bundle, monkeypatch, capfd, tmp_path):
    image = held_out()[0][0]
    code, out, err = fdconv(monkeypatch, capfd, "segment", bundle, image, "-o", tmp_path, "--json")
    assert code == 0, err
    facts = json.loads(out)
    mask = Image.open(tmp_path / f"{image.stem}.png")
    assert mask.mode == "P"
    assert mask.size == Image.open(image).size == (facts["width"], facts["height"])
    assert facts["fit"] in ("resized", "stretched")
    assert sum(facts["classes"].values()) == pytest.approx(1, abs=0.01)
    assert Image.open(tmp_path / f"{image.stem}_overlay.png").size == mask.size
    assert len(list(tmp_path.iterdir())) == 4  # and classes.json, legend.png


def test_segment_keeps_an_image_in_the_output_folder(bundle, monkeypatch, capfd, tmp_path):
    image = tmp_path / "street.png"
    image.write_bytes(held_out()[0][0].read_bytes())
    before = image.read_bytes()
    code, _, err = fdconv(monkeypatch, capfd, "segment", bundle, image, "-o", tmp_path)
    assert code == 1
    assert "overwritten" in err
    assert image.read_bytes() == before


def test_segment_refuses_two_images_of_one_name(bundle, monkeypatch, capfd, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / folder / "x.png")
    images = [tmp_path / "a/x.png", tmp_path / "b/x.png"]
    code, _, err = fdconv(monkeypatch, capfd, "segment", bundle, *images, "-o", tmp_path / "out")
    assert code == 1
    assert "both be written" in err
    assert not (tmp_path / "out").exists()


def test_segment_prints_a_line_of_json_for_each_image(bundle, monkeypatch, capfd, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    images = [held_out()[0][0], broken, held_out()[1][0]]
    code, out, _ = fdconv(
        monkeypatch, capfd, "segment", bundle, *images, "-o", tmp_path / "out", "--json"
    )
    assert code == 1
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in lines] == [str(image) for image in images]
    assert ["error" in line for line in lines] == [False, True, False]
    assert lines[0]["backend"] == "onnxruntime-cpu"
    assert "operators, since" in lines[0]["operators"]


def test_segment_takes_a_folder(bundle, monkeypatch, capfd, tmp_path):
    """Its images, in order: neither masks of theirs nor what is no image."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")
    for image, _ in held_out()[:2]:
        for path in (image, image.with_name(f"{image.stem}_labels.png")):
            (folder / path.name).write_bytes(path.read_bytes())
    code, out, err = fdconv(monkeypatch, capfd, "segment", bundle, folder, "-o", tmp_path / "out")
    assert code == 0, err
    names = [image.stem for image, _ in held_out()[:2]]
    assert [Path(line.partition(":")[0]).stem for line in out.splitlines()[:-2]] == names
    assert out.splitlines()[-1].startswith("Run by onnxruntime-cpu with ")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    results = {f"{name}{end}.png" for name in names for end in ("", "_overlay")}
    assert written == results | {"classes.json", "legend.png"}
    code, _, err = fdconv(
        monkeypatch, capfd, "segment", bundle, tmp_path / "out" / "none", "-o", tmp_path
    )
    assert (code, "does not exist" in err) == (1, True)


def test_segment_replaces_results_only_when_told_to(bundle, monkeypatch, capfd, tmp_path):
    """And looks for them before it writes the first."""
    first, second = (image for image, _ in held_out()[:2])
    there = tmp_path / f"{second.stem}_overlay.png"
    there.write_text("of yesterday")
    arguments = ["segment", bundle, first, second, "-o", tmp_path]
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 1
    assert f"{there} exists already" in err
    assert err.endswith("replace it with --overwrite.")
    assert list(tmp_path.iterdir()) == [there]
    code, _, err = fdconv(monkeypatch, capfd, *arguments, "--overwrite")
    assert code == 0, err
    assert Image.open(there).size == Image.open(second).size


def test_what_is_in_the_way_is_said_in_the_words_of_each_face(bundle, monkeypatch, capfd):
    arguments = ["export", packaged_checkpoint(), "-o", bundle, "--size", "64x96"]
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 1
    assert err.endswith("exists already. Give another name, or replace it with --overwrite.")
    with pytest.raises(BundleError, match=r"replace it with overwrite=True\.$"):
        BundleWriter(bundle).__enter__()


def test_inspect_as_json(monkeypatch, capfd):
    code, out, err = fdconv(monkeypatch, capfd, "inspect", packaged_checkpoint(), "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["dynamic_layers"] > 10
    assert report["architecture"]["decode_head"]["num_classes"] == len(
        report["architecture"]["classes"]
    )


def test_inspect_opens_with_a_verdict_that_can_be_pasted(monkeypatch, capfd, tmp_path):
    """The command printed is taken by export as it stands."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    code, out, _ = fdconv(
        monkeypatch,
        capfd,
        "inspect",
        packaged_checkpoint(),
        "--set",
        "preprocessing.scale=[256, 192]",
    )
    assert code == 0
    first, command, classes, size = out.splitlines()[:4]
    assert first.startswith("Ready to export: ")
    assert classes.startswith("Classes: 11: road, lane marking")
    assert size.startswith("Input size: ")
    words = shlex.split(command)
    assert words[:2] == ["fdconv", "export"]
    assert words[words.index("--set") + 1] == "preprocessing.scale=[256, 192]"
    words[words.index("--size") + 1] = "64x96"  # sooner
    code, _, err = fdconv(monkeypatch, capfd, *words[1:])
    assert code == 0, err
    assert (tmp_path / "streets_bundle/manifest.json").exists()


def test_inspect_says_at_which_size_it_was_trained(monkeypatch, capfd, tmp_path):
    content = torch.load(packaged_checkpoint(), weights_only=True)  # noqa: TID251
    content["meta"]["cfg"] += "\ncrop_size = (160, 224)\n"
    torch.save(content, tmp_path / "trained.pth")
    _, out, _ = fdconv(monkeypatch, capfd, "inspect", tmp_path / "trained.pth")
    assert "Input size: 160x224, which it was trained at" in out
    assert "--size takes any other\n" in out
    assert "--size 160x224" in out.splitlines()[1]
    _, out, _ = fdconv(monkeypatch, capfd, "inspect", tmp_path / "trained.pth", "--json")
    report = json.loads(out)
    assert (report["ready"], report["training_size"]) == (True, [160, 224])
    assert shlex.split(report["command"])[2] == str(tmp_path / "trained.pth")


@pytest.mark.parametrize("fault", ["not finite", "left over"])
def test_inspect_is_not_ready_where_export_would_refuse(monkeypatch, capfd, tmp_path, fault):
    """One verdict for both commands."""
    content = torch.load(packaged_checkpoint(), weights_only=True)  # noqa: TID251
    name = "decode_head.conv_seg.weight"
    if fault == "not finite":
        content["state_dict"][name] = content["state_dict"][name] * float("nan")
    else:
        content["state_dict"]["backbone.layer1.0.conv1.weight_g"] = torch.ones(16, 1, 1, 1)
    torch.save(content, tmp_path / "faulty.pth")
    code, out, _ = fdconv(monkeypatch, capfd, "inspect", tmp_path / "faulty.pth")
    assert code == 1
    assert out.startswith("Not ready to export")
    assert fault in " ".join(out.split())
    arguments = ["export", tmp_path / "faulty.pth", "-o", tmp_path / "out", "--size", "64"]
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert (code, fault in err) == (1, True)


def test_buffers_of_profilers_and_preprocessors_are_left_out(monkeypatch, capfd, tmp_path):
    content = torch.load(packaged_checkpoint(), weights_only=True)  # noqa: TID251
    for name in ("total_ops", "backbone.conv1.total_ops", "backbone.conv1.total_params"):
        content["state_dict"][name] = torch.zeros(1)
    content["state_dict"]["data_preprocessor.mean"] = torch.zeros(3, 1, 1)
    torch.save(content, tmp_path / "profiled.pth")
    code, out, _ = fdconv(monkeypatch, capfd, "inspect", tmp_path / "profiled.pth")
    assert code == 0
    assert "4 buffers of a profiler or of the data preprocessor" in " ".join(out.split())


def test_inspect_lists_layers_when_asked(monkeypatch, capfd):
    _, out, _ = fdconv(monkeypatch, capfd, "inspect", packaged_checkpoint())
    assert "layer3.0.conv2" not in out
    _, out, _ = fdconv(monkeypatch, capfd, "inspect", packaged_checkpoint(), "--layers")
    assert "layer3.0.conv2" in out


def test_inspect_of_another_network(monkeypatch, capfd, tmp_path):
    """The report says what is wrong; the exit code says that there is no exporting it."""
    torch.save({"some.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    code, out, _ = fdconv(monkeypatch, capfd, "inspect", tmp_path / "other.pth", "--json")
    assert code == 1
    report = json.loads(out)
    assert report["problem"]
    assert (report["ready"], report["command"]) == (False, None)
    _, out, _ = fdconv(monkeypatch, capfd, "inspect", tmp_path / "other.pth")
    assert out.startswith("Not ready to export: ")


def test_inspect_says_what_export_will_refuse(monkeypatch, capfd, tmp_path):
    """And is not wrong about it."""
    code, out, _ = fdconv(monkeypatch, capfd, "inspect", plain_checkpoint())
    assert code == 0
    assert "fdconv export will refuse it: No layer in it is an FDConv layer" in " ".join(
        out.split()
    )
    arguments = ["export", plain_checkpoint(), "-o", tmp_path / "out", "--size", "64"]
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 1
    assert "not an FDConv checkpoint" in err
    weights = torch.load(packaged_checkpoint(), weights_only=True)["state_dict"]  # noqa: TID251
    backbone = {k: v for k, v in weights.items() if k.startswith("backbone.")}
    torch.save(backbone, tmp_path / "backbone.pth")
    code, out, _ = fdconv(monkeypatch, capfd, "inspect", tmp_path / "backbone.pth", "--json")
    assert code == 0
    assert "no whole segmentation network" in json.loads(out)["refusal"]
    _, out, _ = fdconv(monkeypatch, capfd, "inspect", packaged_checkpoint(), "--json")
    assert json.loads(out)["refusal"] is None


def test_inspect_fits_in_80_columns(monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = fdconv(monkeypatch, capfd, "inspect", packaged_checkpoint(), "--layers")
    # Paths and commands are copied, so they are not broken into lines.
    lines = out.splitlines()[2:]
    (row,) = [line for line in lines if line.startswith(" layer3.0.conv2 ")]
    assert row.split()[-1] == "MB"  # whole, on one line
    assert max(map(len, lines)) <= 80


def test_a_bundle_is_known_by_one_line(bundle, monkeypatch, capfd, tmp_path):
    def digest(path: Path) -> str:
        _, out, _ = fdconv(monkeypatch, capfd, "verify", path, packaged_checkpoint(), "--json")
        return json.loads(out)[0]["bundle"]

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    assert digest(copy) == digest(bundle)
    _, out, _ = fdconv(monkeypatch, capfd, "verify", bundle, packaged_checkpoint())
    assert f"Bundle {digest(bundle)} (sha256 of its manifest)." in out
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["fit"] = "pad"
    (copy / "manifest.json").write_text(json.dumps(manifest, indent=2))
    assert digest(copy) != digest(bundle)


def test_a_detector_does_not_slide(monkeypatch, capfd, tmp_path):
    arguments = ["export", packaged_detector(), "-o", tmp_path / "out", "--size", "64"]
    code, _, err = fdconv(monkeypatch, capfd, *arguments, "--mode", "slide")
    assert code == 1
    assert "a detector, which takes the whole image; mode 'slide' is of segmentation" in err


def test_a_bundle_in_a_checkpoints_place(bundle, monkeypatch, capfd):
    code, _, err = fdconv(monkeypatch, capfd, "inspect", bundle)
    assert code == 1
    assert "is a bundle, which an export made. Expected a PyTorch checkpoint" in err


class Evil:
    """A pickle that would write a file when it is loaded the careless way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def bad_checkpoint(kind: str, folder: Path) -> Path:
    path = folder / "bad.pth"
    whole = packaged_checkpoint().read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "malicious":
        torch.save({"state_dict": {"x": torch.zeros(1)}, "meta": Evil(folder / "ran")}, path)
    elif kind == "not FDConv":
        torch.save({"fc.weight": torch.zeros(3, 4)}, path)
    else:
        content = torch.load(packaged_checkpoint(), weights_only=True)  # noqa: TID251 - our own
        state = content["state_dict"]
        if kind == "class count":
            for key in [k for k in state if "conv_seg" in k]:
                state[key] = state[key][:-1].clone()
        elif kind == "unknown head":
            renamed = {k.replace("psp_modules", "aspp_modules"): v for k, v in state.items()}
            content["state_dict"] = renamed
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "kind", ["truncated", "malicious", "not FDConv", "class count", "unknown head"]
)
def test_bad_checkpoints_end_in_a_sentence(kind, monkeypatch, capfd, tmp_path):
    checkpoint = bad_checkpoint(kind, tmp_path)
    destination = tmp_path / "out"
    arguments = ["export", checkpoint, "-o", destination, "--size", "64x64"]
    code, out, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 1
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pth"]


def stand_ins(folder: Path, out: Path) -> dict[str, Path]:
    """What the words in capitals in the argument lists below stand for."""
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.txt").write_text("no image")
    (folder / "broken").mkdir()
    (folder / "broken" / "street.png").write_bytes(b"not a PNG")
    return {
        "CHECKPOINT": packaged_checkpoint(),
        "OUT": out,
        "EMPTY": Path(__file__),  # valid Python that describes no network, and no image
        "NO IMAGES": folder / "notes",
        "BROKEN": folder / "broken",
        "HELD OUT": held_out()[0][0].parent,
    }


GOOD = ["export", "CHECKPOINT", "-o", "OUT", "--size", "64"]
# Mistakes that are found before torch is imported.
USAGE = [
    ([*GOOD[:4], "--size", "4x"], 2, "HEIGHTxWIDTH"),
    ([*GOOD[:4], "--size", "99999"], 1, "16384"),
    ([*GOOD, "--batch", "0"], 2, "--batch is a number from 1"),
    ([*GOOD, "--batch", "1,x"], 2, "or several such as 1,4"),
    (["export", "nowhere.pth", "-o", "OUT", "--size", "64"], 1, "does not exist"),
    ([*GOOD, "--config", "nowhere.py"], 1, "does not exist"),
    (["export", "CHECKPOINT", "-o", "EMPTY", "--size", "64"], 1, "is a file"),
    ([*GOOD, "--precision", "fp8"], 2, "'fp8' is not one of"),
    ([*GOOD, "--activations", "both"], 2, "'both' is not one of"),
    ([*GOOD, "--tolerance", "-1"], 1, "0 or more, e.g. 0.0001; got -1"),
    ([*GOOD, "--precision", "fp16", "--tolerance", "nan"], 1, "or more, e.g. 0.02; got nan"),
    ([*GOOD, "--precision", "int8"], 1, "--calibrate FOLDER"),
    ([*GOOD, "--precision", "int8", "--calibrate", "nowhere"], 1, "does not exist"),
    ([*GOOD, "--precision", "int8", "--calibrate", "NO IMAGES"], 1, "holds no images"),
    ([*GOOD, "--precision", "int8", "--calibrate", "BROKEN"], 1, "is not a JPEG"),
    ([*GOOD, "--calibrate", "HELD OUT"], 1, "the precision is fp32"),
    ([*GOOD, "--mode", "half"], 2, "'half' is not one of"),
    ([*GOOD, "--keep-fp32", "decode_head"], 1, "keep_fp32 names modules"),
    ([*GOOD, "--image", "EMPTY"], 1, "is not a JPEG"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (["export", "CHECKPOINT", "-o", "OUT"], 1, "--size 512x512"),
        (["export", "CHECKPOINT", "-o", "OUT", "--size", "0x5"], 2, "HEIGHTxWIDTH"),
        (["export", "CHECKPOINT", "-o", "OUT", "--size", "64", "--set", "style"], 2, "FIELD=VALUE"),
        (["export", "CHECKPOINT", "-o", "OUT", "--size", "64", "--fit", "crop"], 2, "stretch"),
        (["segment", "nowhere", "x.png", "-o", "OUT"], 1, "does not exist"),
        (["serve", "nowhere", "--port", "0"], 1, "does not exist"),
        (["serve", "nowhere", "--log-level", "loud"], 2, "log-level"),
        (["serve", "nowhere", "--isolation", "fork"], 2, "process"),
        (["serve", "nowhere", "--tls-key", "x"], 1, "do not fit together: tls_certificate and"),
        ([*GOOD, "--set", "nope=1"], 1, "'nope' is not a field of this network. fdconv inspect"),
        (["bench", "CHECKPOINT", "--size", "4x"], 2, "HEIGHTxWIDTH"),
        (["serve", "nowhere", "--api-keys", "/dev/null"], 1, "holds no API key"),
        (["serve", "nowhere", "--api-keys", "nokeys"], 1, "cannot be read"),
        (
            ["export", "CHECKPOINT", "-o", "OUT", "--size", "64", "--config", "EMPTY"],
            1,
            "no network",
        ),
        (["export", "CHECKPOINT", "-o", "/proc/none", "--size", "64"], 1, "/proc"),
        (["export", "CHECKPOINT", "-o", "OUT", "--size", "4x4"], 1, "shrinks its input"),
        *USAGE,
    ],
)
def test_wrong_arguments_end_in_a_sentence(
    arguments, code, hint, monkeypatch, capfd, tmp_path, tmp_path_factory
):
    names = stand_ins(tmp_path_factory.mktemp("given"), tmp_path / "out")
    got, out, err = fdconv(monkeypatch, capfd, *(names.get(a, a) for a in arguments))
    assert got == code
    assert hint in err
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir())


def test_usage_mistakes_are_found_before_torch_is_imported(tmp_path):
    names = stand_ins(tmp_path, tmp_path / "out")
    lists = [[str(names.get(a, a)) for a in arguments] for arguments, _, _ in USAGE]
    program = (
        "import sys\n"
        "from fdconv_deploy.cli.app import main\n"
        f"for arguments in {lists!r}:\n"
        "    sys.argv = ['fdconv', *arguments]\n"
        "    try: main()\n"
        "    except SystemExit as stop: assert stop.code, arguments\n"
        "    else: sys.exit(f'{arguments} was accepted')\n"
        "    assert 'torch' not in sys.modules, arguments\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_help_is_instant_and_loads_nothing_heavy():
    program = (
        "import sys; sys.argv = ['fdconv', '--help']\n"
        "from fdconv_deploy.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'cv2'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_segmenting_loads_no_torch(bundle, tmp_path):
    image = tmp_path / "x.png"
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(image)
    arguments = ["fdconv", "segment", str(bundle), str(image), "-o", str(tmp_path / "out")]
    program = (
        f"import sys; sys.argv = {arguments!r}\n"
        "from fdconv_deploy.cli.app import main\n"
        "main()\n"
        "sys.exit('torch was loaded' if 'torch' in sys.modules else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            "try: stop()\nexcept SystemExit: raise ImportError('numpy did not import') from None",
            id="another error",
        ),
        pytest.param(
            "try: stop()\nexcept SystemExit: pass\nraise ValueError('a callback failed')",
            id="an error of its own",
        ),
        pytest.param("try: stop()\nexcept BaseException: pass\ntime.sleep(60)", id="swallowed"),
        pytest.param(
            "class Dying:\n    def __del__(self): stop()\nDying()\ntime.sleep(60)", id="unraisable"
        ),
        pytest.param("try: stop()\nfinally: time.sleep(0.5); print('whole')", id="tidying up"),
        pytest.param(
            "def tidying():\n    try: yield\n    finally: time.sleep(0.5); print('whole')\n"
            "for _ in tidying(): stop()",
            id="a generator tidying up",
        ),
        pytest.param("import stopped_in; time.sleep(60)", id="importing"),
    ],
)
def test_a_stop_ends_the_command(tmp_path, command):
    # A stop within an import waits for its end: torch's would abort the process.
    module = "import __main__\ntry: __main__.stop()\nexcept BaseException: print('cut')\n"
    (tmp_path / "stopped_in.py").write_text(module + "print('whole')\n")
    program = (
        "import os, signal, sys, time\n"
        "from fdconv_deploy.cli import app\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "def stop():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.5)\n"
        f"app.app = lambda: exec({command!r}, globals())\n"
        "app.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    whole = "whole\n" if command.startswith("import") or "print" in command else ""
    assert (done.returncode, done.stdout) == (143, whole), done.stderr


def test_a_stop_after_the_command_ends_the_process():
    program = (
        "import atexit, os, signal\n"
        "from fdconv_deploy.cli import app\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "app.app = lambda: None\n"
        "app.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")


def test_a_stopped_export_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "fdconv_deploy", "export", packaged_checkpoint()]
    command += ["-o", tmp_path / "bundle", "--size", "64x96"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list(tmp_path.iterdir()):  # until it has begun to write
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=600) == 143
    assert not list(tmp_path.iterdir())


def test_export_says_what_it_assumed(monkeypatch, capfd, tmp_path):
    state = torch.load(packaged_checkpoint(), weights_only=True)["state_dict"]  # noqa: TID251
    torch.save(state, tmp_path / "plain.pth")
    arguments = ["export", tmp_path / "plain.pth", "-o", tmp_path / "bundle", "--size", "64x96"]
    code, out, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 0, err
    assert "Assumed" in out
    assert "preprocessing.mean" in " ".join(out.split())
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert "backbone.strides" in manifest["graph"]["assumed"]
