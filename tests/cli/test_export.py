"""``fdconv export --format``: other files than a bundle, from a checkpoint or from a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch

from fdconv_deploy.demo import packaged_checkpoint
from tests.runtime import toy
from tests.test_cli import fdconv


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes, 32×48, batches 1 and 4."""
    return toy.make_bundle(tmp_path_factory.mktemp("export") / "bundle").path


def test_checkpoint_becomes_an_onnx_file(monkeypatch, capfd, tmp_path):
    output = tmp_path / "streets.onnx"
    arguments = ["export", packaged_checkpoint(), "-o", output, "--format", "onnx"]
    code, out, err = fdconv(
        monkeypatch, capfd, *arguments, "--size", "64x96", "--batch", "2", "--opset", "17", "--json"
    )
    assert code == 0, err
    said = json.loads(out)
    assert said["path"] == str(output)
    assert said["max_rel"] == 0
    model = onnx.load(output)
    assert [entry.version for entry in model.opset_import] == [17]
    shape = model.graph.input[0].type.tensor_type.shape
    assert [dim.dim_value for dim in shape.dim] == [2, 3, 64, 96]
    assert [path.name for path in tmp_path.iterdir()] == ["streets.onnx"]


def test_bundle_becomes_an_onnx_file(bundle, monkeypatch, capfd, tmp_path):
    arguments = ["export", bundle, "-o", tmp_path / "model.onnx", "--format", "onnx"]
    code, out, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 0, err
    assert "nodes of standard operators, opset 18. Largest difference" in out
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 1
    assert "exists already" in err
    assert "--overwrite" in err
    assert fdconv(monkeypatch, capfd, *arguments, "--overwrite", "--batch", "4")[0] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--fit", "pad", "--mode", "whole"], "in which --mode, --fit was settled"),
        (["--fit", "stretch"], "in which --fit was settled"),
        (
            ["--batch", "1,4"],
            "a page has one graph: give one --size and one --batch",
        ),
        (["--opset", "12"], "the opset is 13 to"),
        (["--batch", "3"], "no graph of batch size 3; it has 1, 4"),
    ],
)
def test_options_that_do_not_fit_are_a_sentence(
    bundle, given, message, monkeypatch, capfd, tmp_path
):
    output = tmp_path / "model.onnx"
    code, _, err = fdconv(
        monkeypatch, capfd, "export", bundle, "-o", output, "--format", "onnx", *given
    )
    assert code == 1
    assert message in err
    assert not output.exists()


def test_page_takes_no_batch_size(bundle, monkeypatch, capfd, tmp_path):
    arguments = ["export", bundle, "-o", tmp_path / "page", "--format", "web", "--batch", "4"]
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 1
    assert "a page runs one image at a time" in err


def test_file_of_a_checkpoint_names_what_was_assumed(monkeypatch, capfd, tmp_path):
    file = tmp_path / "unnamed.pth"
    weights = torch.load(packaged_checkpoint(), weights_only=True)["state_dict"]  # noqa: TID251
    torch.save(weights, file)
    arguments = ["export", file, "-o", tmp_path / "model.onnx", "--format", "onnx", "--size", "64"]
    code, out, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 0, err
    assert "Assumed" in out


@pytest.mark.parametrize(
    ("format_", "given", "home"),
    [
        ("bundle", ["--opset", "18"], "onnx"),
        ("triton", ["--opset", "17"], "onnx"),
        ("onnx", ["--onnxruntime-web", "node_modules/onnxruntime-web"], "web"),
        ("bundle", ["--name", "streets"], "triton"),
        ("web", ["--triton-backend", "python"], "triton"),
    ],
)
def test_options_of_another_format_are_refused(format_, given, home, monkeypatch, capfd, tmp_path):
    arguments = ["export", packaged_checkpoint(), "-o", tmp_path / "it", "--format", format_]
    code, _, err = fdconv(monkeypatch, capfd, *arguments, *given)
    assert code == 1
    assert f"{given[0]} is of --format {home} alone: choose that, or leave it out." in err
    assert not list(tmp_path.iterdir())


def test_checkpoint_becomes_a_triton_model(monkeypatch, capfd, tmp_path):
    arguments = ["export", packaged_checkpoint(), "-o", tmp_path / "models", "--format", "triton"]
    code, out, err = fdconv(
        monkeypatch, capfd, *arguments, "--size", "64x96", "--size", "96x64", "--name", "streets",
        "--triton-backend", "onnxruntime", "--json",
    )  # fmt: skip
    assert code == 0, err
    names = ["streets_64x96", "streets_96x64"]
    assert json.loads(out) == {"models": [str(tmp_path / "models" / name) for name in names]}
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == names


def test_bundle_becomes_a_triton_model_of_its_name(bundle, monkeypatch, capfd, tmp_path):
    arguments = ["export", bundle, "-o", tmp_path, "--format", "triton"]
    code, out, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 0, err
    assert f"tritonserver --model-repository={tmp_path}" in out
    assert (tmp_path / "bundle" / "config.pbtxt").is_file()
    code, _, err = fdconv(monkeypatch, capfd, *arguments, "--size", "32x48")
    assert code == 1
    assert "takes images of any size: leave sizes and batches out" in err


def test_triton_name_is_checked_before_the_export(monkeypatch, capfd, tmp_path):
    arguments = ["export", packaged_checkpoint(), "-o", tmp_path / "models", "--format", "triton"]
    code, _, err = fdconv(monkeypatch, capfd, *arguments, "--name", "streets/night")
    assert code == 1
    assert "found 'streets/night'. Give another" in err
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("format_", ["bundle", "onnx", "web", "triton"])
def test_place_is_tried_before_the_checkpoint_is_read(format_, monkeypatch, capfd, tmp_path):
    checkpoint, taken = tmp_path / "broken.pth", tmp_path / "file"
    checkpoint.write_bytes(b"no checkpoint")
    taken.touch()
    arguments = ["export", checkpoint, "-o", taken / "it.onnx", "--format", format_]
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 1
    assert f"error: {taken}" in err
    assert "Give another path, or free that one." in err


@pytest.mark.parametrize("format_", ["bundle", "onnx", "triton"])
def test_failed_export_leaves_no_folder(format_, monkeypatch, capfd, tmp_path):
    checkpoint = tmp_path / "broken.pth"
    checkpoint.write_bytes(b"no checkpoint")
    output = tmp_path / "new" / "deep" / "it.onnx"
    code, _, err = fdconv(
        monkeypatch, capfd, "export", checkpoint, "-o", output, "--format", format_
    )
    assert (code, "broken.pth" in err) == (1, True)
    assert list(tmp_path.iterdir()) == [checkpoint]
