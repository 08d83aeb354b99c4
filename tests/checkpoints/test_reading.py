"""Every file layout is read, and none is executed."""

from __future__ import annotations

import sys
import types
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fdconv_deploy.checkpoints import read_checkpoint
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import WEIGHTS, saved


def wrapped(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{key}": value for key, value in WEIGHTS.items()}


def same(state: dict[str, torch.Tensor]) -> bool:
    return state.keys() == WEIGHTS.keys() and all(
        torch.equal(state[key], value) for key, value in WEIGHTS.items()
    )


@pytest.fixture
def mmengine(monkeypatch: pytest.MonkeyPatch) -> type:
    """A stand-in of mmengine that exists only while a file is written."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self.max_length = 1000000
            self._log_history = np.arange(3.0)
            self._count_history = np.ones(3, dtype=np.int64)

    HistoryBuffer.__module__ = module.__name__
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return HistoryBuffer


@pytest.mark.parametrize(
    ("name", "layout", "classes"),
    [("mmcv1", "mmcv 1.x", "CLASSES"), ("mmengine_published", "mmengine published", None)],
)
def test_reference_files_are_read(
    oracle: Path, name: str, layout: str, classes: str | None
) -> None:
    found = read_checkpoint(oracle / "segmentor" / f"B_r18b14_{name}.pth")
    assert found.format == layout
    assert len(found.state_dict) == 477
    labels = found.meta[classes] if classes else found.meta["dataset_meta"]["classes"]
    assert labels[0] == "sky"
    assert len(labels) == 7


def test_training_checkpoint_of_mmengine_needs_no_mmengine(
    tmp_path: Path, mmengine: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {
        "meta": {
            "cfg": "model = dict()",
            "mmengine_version": "0.10.7",
            "dataset_meta": {"classes": ("a", "b"), "palette": np.array([[1, 2, 3], [4, 5, 6]])},
            "best_score": np.float32(1.5),
        },
        "state_dict": OrderedDict(WEIGHTS),
        "message_hub": {
            "log_scalars": {"train/loss": mmengine()},
            "runtime_info": {"iter": np.int64(3), "rng": np.random.default_rng(0).random(2)},
        },
        "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]},
        "param_schedulers": [{"_last_value": [0.1]}],
    }
    path = saved(tmp_path / "iter_10.pth", content)
    monkeypatch.undo()
    assert "mmengine" not in sys.modules
    found = read_checkpoint(path)
    assert found.format == "mmengine training"
    assert same(found.state_dict)
    assert set(found.dropped) == {"message_hub", "optimizer", "param_schedulers"}
    assert found.meta["dataset_meta"]["palette"] == [[1, 2, 3], [4, 5, 6]]
    assert found.meta["best_score"] == 1.5
    assert "mmengine" not in sys.modules


def test_training_arguments_are_inert(tmp_path: Path) -> None:
    content = {"model": WEIGHTS, "args": Namespace(out=Path("/x"), lr=0.1), "epoch": 3}
    found = read_checkpoint(saved(tmp_path / "a.pth", content))
    assert same(found.state_dict)
    assert found.dropped == ("args", "epoch")


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        OrderedDict(WEIGHTS),
        {"model": WEIGHTS},
        {"state_dict": WEIGHTS, "epoch": 3},
        {"model_state_dict": WEIGHTS},
        {"state_dict_ema": WEIGHTS},
        {
            "ema_state_dict": {
                "steps": torch.tensor(3),
                **{f"module.{k}": v for k, v in WEIGHTS.items()},
            }
        },
        {"state_dict": wrapped("module.")},
        wrapped("module."),
        wrapped("_orig_mod."),
        wrapped("model.module."),
        {"state_dict": WEIGHTS | {"ema_backbone_conv1_weight": torch.zeros(2, 3)}},
        {"state_dict": {k: torch.nn.Parameter(v) for k, v in WEIGHTS.items()}},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_plain_layouts_and_prefixes(tmp_path: Path, content: Any, zipped: bool) -> None:
    path = saved(tmp_path / "a.pth", content, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert found.format == "plain"
    assert same(found.state_dict)
    assert not any(tensor.requires_grad for tensor in found.state_dict.values())


def test_averaged_weights_are_named_and_can_be_taken(tmp_path: Path) -> None:
    averaged = {key: value + 1 for key, value in WEIGHTS.items()}
    path = saved(tmp_path / "a.pth", {"state_dict": WEIGHTS, "state_dict_ema": averaged})
    found = read_checkpoint(path)
    assert same(found.state_dict)
    assert found.other_weights == ("state_dict_ema",)
    taken = read_checkpoint(path, weights="state_dict_ema").state_dict
    assert torch.equal(taken["backbone.conv1.weight"], WEIGHTS["backbone.conv1.weight"] + 1)
    with pytest.raises(CheckpointError, match=r"no weights under 'ema'.*state_dict"):
        read_checkpoint(path, weights="ema")


def test_safetensors_with_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    metadata = {
        "config": "model = dict()",
        "classes": '["a", "b"]',
        "palette": "[[1, 2, 3], [4, 5, 6]]",
        "format": "pt",
    }
    save_file(WEIGHTS, path, metadata)
    found = read_checkpoint(path)
    assert found.format == "safetensors"
    assert same(found.state_dict)
    assert found.meta["config"] == "model = dict()"
    assert found.meta["dataset_meta"] == {"classes": ["a", "b"], "palette": [[1, 2, 3], [4, 5, 6]]}
    save_file(WEIGHTS, path, {"classes": "a, b"})
    with pytest.raises(CheckpointError, match="'classes' should be a JSON list"):
        read_checkpoint(path)


def test_safetensors_under_another_name_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    save_file(WEIGHTS, path)
    assert same(read_checkpoint(path).state_dict)
