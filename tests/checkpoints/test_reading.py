"""Every file layout is read, real packages' files too; damaged and foreign ones get a sentence."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
import types
import zipfile
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

FILES = Path(__file__).parents[1] / "real_packages"


NAMES = {"backbone.0.weight", "backbone.1.running_mean", "decode_head.conv_seg.bias"}


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


def test_truncated_files(tmp_path: Path) -> None:
    for zipped in (True, False):
        whole = saved(tmp_path / "a.pth", WEIGHTS, _use_new_zipfile_serialization=zipped)
        data = whole.read_bytes()
        for part in (0.2, 0.5, 0.9, 0.99):
            path = tmp_path / "cut.pth"
            path.write_bytes(data[: int(len(data) * part)])
            with pytest.raises(CheckpointError, match=r"[Dd]ownload"):
                read_checkpoint(path)
    zoo = pickle.dumps({"model": {"stem.conv1.weight": np.zeros((8, 3, 7, 7), np.float32)}})
    (tmp_path / "cut.pkl").write_bytes(zoo[:-60])
    with pytest.raises(CheckpointError, match=r"(?s)missing or changed.*\.pkl\)") as caught:
        read_checkpoint(tmp_path / "cut.pkl")
    assert "Error" not in str(caught.value)
    whole = tmp_path / "a.safetensors"
    save_file(WEIGHTS, whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="safetensors file but cannot be read"):
        read_checkpoint(tmp_path / "cut.safetensors")


def test_damaged_bytes_are_an_error_or_still_tensors(tmp_path: Path) -> None:
    data = saved(tmp_path / "a.pth", {"meta": {"cfg": "a=1"}, "state_dict": WEIGHTS}).read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 3):
            damaged[place] = generator.integers(0, 256)
        path = tmp_path / "damaged.pth"
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            found = read_checkpoint(path)
            assert all(isinstance(v, torch.Tensor) for v in found.state_dict.values())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"hello world, I am a text", "is not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"\x1f\x8b\x08\x00" * 4, "gzip"),
        (b"PK\x03\x04 but no zip", "cut short"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(path)


def test_folder_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")
    saved(tmp_path / "epoch_3.pth", WEIGHTS)
    with pytest.raises(CheckpointError, match=r"is a folder.*epoch_3\.pth"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (torch.ones(3), "holds a single tensor"),
        ([1, 2], "holds a list"),
        ({"epoch": 3, "lr": 0.1}, "holds no weights.*epoch, lr"),
        ({"state_dict": {}}, "empty state dict"),
        ({"state_dict": {"x": [1]}}, "empty state dict"),
        ({"a": torch.ones(2).to_sparse()}, "sparse"),
        ({"a": torch.empty(3, device="meta")}, "no data"),
        ({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, "claims"),
    ],
)
def test_not_a_state_dict(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(saved(tmp_path / "a.pth", content))


def test_compressed_zip_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.pth", {"a": torch.zeros(1 << 20)})
    path = tmp_path / "bomb.pth"
    with (
        zipfile.ZipFile(whole) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert path.stat().st_size < 1 << 16
    with pytest.raises(CheckpointError, match="compressed entries"):
        read_checkpoint(path)


def test_torchscript_and_other_archives(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\x02}.")
        archive.writestr("net/constants.pkl", b"\x80\x02).")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"without PyTorch's data\.pkl"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("train", "mmengine training"),
        ("train_ema", "mmengine training"),
        ("published", "mmengine published"),
    ],
)
def test_mmengine_runner_and_publish_tool(name: str, layout: str) -> None:
    found = read_checkpoint(FILES / f"mmengine/files/{name}.pth")
    assert found.format == layout
    assert set(found.state_dict) >= NAMES
    assert "message_hub" in found.dropped
    assert found.meta["dataset_meta"]["classes"] == ("road", "sky")
    assert "ResNet_FDConv" in found.meta["cfg"]
    if name == "train_ema":
        assert found.other_weights == ("ema_state_dict",)
        trained = read_checkpoint(found.path, weights="ema_state_dict").state_dict
        assert trained.keys() == found.state_dict.keys()
        assert not torch.equal(trained["backbone.0.weight"], found.state_dict["backbone.0.weight"])


@pytest.mark.parametrize(
    ("name", "others"),
    [("model", ()), ("compiled", ()), ("averaged", ("current_model_state",))],
)
def test_lightning_with_hyper_parameters_of_omegaconf(name: str, others: tuple[str, ...]) -> None:
    found = read_checkpoint(FILES / f"lightning/files/{name}.ckpt")
    assert found.format == "Lightning"
    assert set(found.state_dict) >= NAMES
    assert not any("criterion" in key or "loss" in key for key in found.state_dict)
    assert {"criterion.pos_weight", "train_loss.… (2 entries)"} <= set(found.dropped)
    assert found.other_weights == others


def test_detectron2_checkpoints_and_pickles_of_arrays_are_the_same_weights() -> None:
    folder = FILES / "fvcore/files"
    expected = read_checkpoint(folder / "model.pth")
    assert expected.format == "detectron2"
    for protocol in (2, 4, 5):
        found = read_checkpoint(folder / f"model_{protocol}.pkl")
        assert found.format == "detectron2"
        assert set(found.state_dict) == set(expected.state_dict)
        for name, value in found.state_dict.items():
            assert value.dtype == expected.state_dict[name].dtype
            assert torch.equal(value, expected.state_dict[name])


def test_numpy_archives_are_named_as_what_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"backbone.conv1.weight": np.ones(3)})
    with pytest.raises(CheckpointError, match=r"\.npz.*from_numpy"):
        read_checkpoint(tmp_path / "a.npz")
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(CheckpointError, match="one NumPy array"):
        read_checkpoint(tmp_path / "a.npy")


def test_fsdp_flat_parameters_are_named_as_what_they_are(tmp_path: Path) -> None:
    state = {"backbone._flat_param": torch.ones(8), "backbone.a.b": torch.ones(1)}
    with pytest.raises(CheckpointError, match="FULL_STATE_DICT"):
        read_checkpoint(saved(tmp_path / "a.pth", state))


def test_training_checkpoint_of_mmengine_is_known(oracle: Path) -> None:
    found = read_checkpoint(oracle / "families/segformer_mit/fdconv_train.pth")
    assert found.format == "mmengine training"
    assert found.meta["mmengine_version"] == "0.10.7"


def pickled_alone(path: Path, content: Any, protocol: int) -> Path:
    """As detectron2's conversion scripts write: by pickle, without torch.save."""
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("arrays", [False, True], ids=["tensors", "arrays"])
def test_weights_pickled_without_torch_save_are_read(
    tmp_path: Path, arrays: bool, protocol: int
) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    model: dict[str, Any] = {
        "stem.conv1.weight": whole,
        "view": whole[1:, ::2],
        "half": torch.arange(3).half(),
        "empty": torch.empty(0, 2),
        "count": torch.tensor(7),
    }
    held = {k: v.numpy() for k, v in model.items()} if arrays else model
    content = {"model": held, "__author__": "third_party", "matching_heuristics": True}
    found = read_checkpoint(pickled_alone(tmp_path / "a.pkl", content, protocol))
    assert found.format == "detectron2"
    assert list(found.state_dict) == list(model)
    for name, value in model.items():
        assert torch.equal(found.state_dict[name], value)
        assert found.state_dict[name].dtype == value.dtype


class _Nested:
    """Pickles as torch's own function on bytes of the writer's choice."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self.content,)


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("echo run",)


def test_file_within_a_pickle_is_not_trusted(tmp_path: Path) -> None:
    code = pickle.dumps(_Runs())
    with pytest.raises(CheckpointError, match=r"is code and not weights.* nothing in it was run"):
        read_checkpoint(pickled_alone(tmp_path / "a.pkl", {"model": {"a": _Nested(code)}}, 4))
    with pytest.raises(CheckpointError, match=r"is code and not weights.* nothing in it was run"):
        read_checkpoint(pickled_alone(tmp_path / "b.pkl", {"model": {"a": _Runs()}}, 4))
    content: Any = 1
    for _ in range(3000):  # a file in a file in a file …
        content = _Nested(pickle.dumps(content))
        if len(content.content) > 200_000:
            break
    state = {"model": {"a": content, "b": torch.ones(1)}}
    found = read_checkpoint(pickled_alone(tmp_path / "c.pkl", state, 4))
    assert list(found.state_dict) == ["b"]
    cut = io.BytesIO()
    torch.save(torch.ones(4).storage(), cut, _use_new_zipfile_serialization=False)
    state = {"model": {"a": _Nested(cut.getvalue()[:-4])}}
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        read_checkpoint(pickled_alone(tmp_path / "d.pkl", state, 4))
