"""Which weights of a file with several: named by ``inspect``, taken by every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fdconv_deploy.checkpoints import load_checkpoint, read_checkpoint
from fdconv_deploy.demo import held_out, packaged_checkpoint
from fdconv_deploy.latency.networks import RunOptions, Target, expand_targets, load_network
from tests.test_cli import fdconv

BIAS = "decode_head.conv_seg.bias"


def streets() -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """Meta, weights, and other weights, which put all of the image into class 1."""
    stored = read_checkpoint(packaged_checkpoint())
    other = {name: value.clone() for name, value in stored.state_dict.items()}
    other[BIAS][1] += 1000
    return stored.meta, stored.state_dict, other


def layouts(meta: dict, state: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, dict]:
    """Name of the other weights → a file with both."""

    def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{prefix}{name}": value for name, value in weights.items()}

    return {
        "state_dict_ema": {"epoch": 3, "meta": meta, "state_dict": state, "state_dict_ema": other},
        "teacher": {
            "meta": meta,
            "state_dict": under("teacher.", other) | under("student.", state),
        },
        "current_model_state": {
            "pytorch-lightning_version": "2.6.0",
            "state_dict": under("net._orig_mod.", state),
            "current_model_state": under("net._orig_mod.", other),
            "meta": meta,
        },
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    result = {}
    for name, content in layouts(*streets()).items():
        result[name] = folder / f"{name}.pth"
        torch.save(content, result[name])
    return result


@pytest.mark.parametrize("name", ["state_dict_ema", "teacher", "current_model_state"])
def test_inspect_shows_what_to_type_and_the_loader_takes_it(files, name, monkeypatch, capfd):
    code, out, err = fdconv(monkeypatch, capfd, "inspect", files[name])
    assert code == 0, err
    assert f"Other weights in it: {name}. To take them: --weights {name}" in " ".join(out.split())
    expected = streets()[1][BIAS]
    assert torch.equal(load_checkpoint(files[name]).state_dict()[BIAS], expected)
    taken = load_checkpoint(files[name], weights=name).state_dict()[BIAS]
    assert taken[1] == expected[1] + 1000


@pytest.mark.parametrize("command", ["inspect", "export", "convert", "verify", "evaluate", "bench"])
def test_every_command_has_the_option(command, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = fdconv(monkeypatch, capfd, command, "--help")
    assert code == 0
    assert "--weights" in out


def test_a_name_that_is_not_there_is_refused_with_those_that_are(files, monkeypatch, capfd):
    code, _, err = fdconv(
        monkeypatch, capfd, "inspect", files["teacher"], "--weights", "state_dict_ema"
    )
    assert code == 1
    assert "no weights under 'state_dict_ema'; it has:" in err
    assert "teacher" in err
    assert "--weights NAME" in err


def test_export_verify_evaluate_and_bench_take_the_same_weights(
    files, tmp_path, monkeypatch, capfd
):
    path, option = files["state_dict_ema"], ("--weights", "state_dict_ema")
    bundle = tmp_path / "bundle"
    arguments = ("export", path, "-o", bundle, "--size", "64x96", *option)
    code, _, err = fdconv(monkeypatch, capfd, *arguments)
    assert code == 0, err
    # The bundle records which weights it is of.
    for given in (option, ()):
        code, _, err = fdconv(monkeypatch, capfd, "verify", bundle, path, *given)
        assert code == 0, err
    code, _, err = fdconv(monkeypatch, capfd, "verify", bundle, path, "--weights", "state_dict")
    assert code == 1
    assert "differs from the network" in err
    image, mask = held_out()[0]
    for folder, file in (("images", image), ("masks", mask)):
        (tmp_path / folder).mkdir()
        shutil.copy(file, tmp_path / folder / f"a{file.suffix}")
    both = ("evaluate", bundle, "--images", tmp_path / "images", "--masks", tmp_path / "masks")
    code, out, err = fdconv(monkeypatch, capfd, *both, "--against", path, "--json")
    assert code == 0, err
    ours, theirs = (side["mean_iou"] for side in json.loads(out)["sides"])
    assert ours == theirs
    score = ("evaluate", path, "--images", tmp_path / "images", "--masks", tmp_path / "masks")
    found = []
    for chosen in ((), option):
        code, out, err = fdconv(monkeypatch, capfd, *score, *chosen, "--json")
        assert code == 0, err
        found.append(json.loads(out)["sides"][0]["mean_iou"])
    assert found[0] > 0.3 > found[1]
    options = RunOptions(threads=1, size=(64, 64), weights="state_dict_ema")
    (target,), _ = expand_targets([path], options)
    assert target.options.weights == "state_dict_ema"
    network, _ = load_network(Target.model_validate_json(target.model_dump_json()))
    assert network.state_dict()[BIAS][1] > 500


def test_convert_takes_the_weights_that_are_named(tmp_path, monkeypatch, capfd):
    plain = {"layer1.0.conv1.weight": torch.ones(64, 64, 3, 3), "conv1.weight": torch.ones(64, 3)}
    doubled = {name: 2 * value for name, value in plain.items()}
    torch.save({"state_dict": plain, "ema": doubled}, tmp_path / "a.pth")
    made = []
    for chosen in ((), ("--weights", "ema")):
        out = tmp_path / f"{len(made)}.pth"
        arguments = ("convert", tmp_path / "a.pth", "-o", out, *chosen)
        code, _, err = fdconv(monkeypatch, capfd, *arguments)
        assert code == 0, err
        made.append(read_checkpoint(out).state_dict["layer1.0.conv1.dft_weight"])
    assert torch.allclose(made[1], 2 * made[0])


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("model.", {"criterion.pos_weight": torch.ones(11)}),
        ("segmentor.net.", {"segmentor.loss.weight": torch.ones(11)}),
        ("module.backbone_and_head.", {"module.val_iou.confmat": torch.ones(11, 11), "step": 3}),
    ],
)
def test_a_foreign_tensor_beside_the_network_does_not_end_it(
    tmp_path, prefix, beside, monkeypatch, capfd
):
    meta, state, _ = streets()
    content = {f"{prefix}{name}": value for name, value in state.items()} | beside
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": content, "meta": meta, "hyper_parameters": {"lr": 1e-3}}, path)
    code, out, err = fdconv(monkeypatch, capfd, "inspect", path)
    assert code == 0, err
    for name in beside:
        assert name.removeprefix("module.") in out
    loaded = load_checkpoint(path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items() if name in loaded)
