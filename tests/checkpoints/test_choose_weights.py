"""The network is found among whatever a training script saves; the rest is listed."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fdconv_deploy.checkpoints import read_checkpoint
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import WEIGHTS, bounded_work, saved


def under(prefix: str, offset: float = 0) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value + offset for name, value in WEIGHTS.items()}


def is_network(state: dict[str, Tensor], offset: float = 0) -> bool:
    return state.keys() == WEIGHTS.keys() and all(
        torch.equal(state[name], value + offset) for name, value in WEIGHTS.items()
    )


ONE = torch.ones(3)


@pytest.mark.parametrize(
    ("state", "listed"),
    [
        (under("model.") | {"criterion.pos_weight": ONE}, "criterion.pos_weight"),
        (under("net.") | {"loss_fn.weight": ONE, "loss_fn.eps": ONE}, "loss_fn.… (2 entries)"),
        (under("seg_model.") | {"val_miou.confmat": ONE}, "val_miou.confmat"),
        (under("a.b.network.") | {"a.prior": ONE}, "a.prior"),
        (under("") | {"criterion.pos_weight": ONE}, "criterion.pos_weight"),
        (under("") | {"decode_head.loss_decode.class_weight": ONE}, "decode_head.loss_decode"),
        (under("segmentor.") | {"text_encoder.weight": ONE}, "text_encoder.weight"),
        (under("_orig_mod.model.") | {"_orig_mod.criterion.w": ONE}, "criterion.w"),
        (under("model.") | {"model.backbone._extra_state": {"amax": 3}}, "backbone._extra_state"),
        (under("") | {"epoch": 3}, "epoch (an int)"),
        (under("") | {"best": None, "names": ["a"]}, "names (a list)"),
        (under("") | {7: ONE}, "an int as a name"),
    ],
)
def test_foreign_entries_are_listed_and_end_nothing(
    tmp_path: Path, state: Any, listed: str
) -> None:
    for content in (state, {"state_dict": state, "epoch": 1}):
        found = read_checkpoint(saved(tmp_path / "a.ckpt", content))
        assert is_network(found.state_dict)
        assert listed in "; ".join(found.dropped)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("backbone.", "backbone._orig_mod."),
        ("decode_head.", "_fsdp_wrapped_module.decode_head._checkpoint_wrapped_module."),
        ("backbone.", "module.backbone.module."),
        ("backbone.conv1", "backbone.conv1._orig_mod"),
    ],
)
def test_wrappers_inside_a_network_are_taken_off(tmp_path: Path, old: str, new: str) -> None:
    state = {name.replace(old, new): value for name, value in WEIGHTS.items()}
    assert is_network(read_checkpoint(saved(tmp_path / "a.pth", state)).state_dict)


def test_wrappers_stay_where_two_names_would_become_one(tmp_path: Path) -> None:
    state = under("") | under("module.", 1)
    found = read_checkpoint(saved(tmp_path / "a.pth", state))
    assert is_network(found.state_dict)
    assert found.other_weights == ("module",)


def test_a_backbone_alone_is_found_under_any_attribute(tmp_path: Path) -> None:
    state = {"encoder.layer1.0.conv1.weight": ONE, "encoder.conv1.weight": ONE, "head.bias": ONE}
    found = read_checkpoint(saved(tmp_path / "a.pth", state))
    assert set(found.state_dict) == {"layer1.0.conv1.weight", "conv1.weight"}
    assert "head.bias" in found.dropped


def test_deepspeed_keeps_weights_under_module(tmp_path: Path) -> None:
    content = {"module": under("model."), "ds_version": "0.15", "ds_config": {}, "optimizer": None}
    found = read_checkpoint(saved(tmp_path / "mp_rank_00_model_states.pt", content))
    assert found.format == "DeepSpeed"
    assert is_network(found.state_dict)
    content["module"] = {name: torch.empty(0) for name in under("model.")}
    with pytest.raises(CheckpointError, match="zero_to_fp32"):
        read_checkpoint(saved(tmp_path / "a.pt", content))


@pytest.mark.parametrize(
    ("content", "others"),
    [
        (under("teacher.", 1) | under("student."), {"teacher": 1}),
        (under("model_ema.", 1) | under("model."), {"model_ema": 1}),
        ({"state_dict": under("ema_model.module.", 1) | under("")}, {"ema_model": 1}),
        ({"ema": under("", 1), "model": under("")}, {"ema": 1}),
        ({"model": {"teacher": under("", 1), "student": under("")}}, {"model.teacher": 1}),
        (
            {"state_dict": under("student.") | under("teacher.", 1), "swa_state": under("", 2)},
            {"teacher": 1, "swa_state": 2, "state_dict.teacher": 1},
        ),
        (
            {
                "state_dict": under("student.") | under("teacher.", 1),
                "state_dict_ema": under("student.", 2) | under("teacher.", 3),
            },
            {"teacher": 1, "state_dict_ema": 2, "state_dict_ema.teacher": 3},
        ),
        # Of two trained ones, the one with FDConv layers; else the one of more tensors.
        (
            {
                "target_net": under("", 1),
                "second": under("") | {"backbone.a.KSM_Global.fc.weight": torch.ones(1, 1, 1, 1)},
            },
            {"target_net": 1},
        ),
    ],
)
def test_one_network_of_several_is_taken_and_the_others_can_be(
    tmp_path: Path, content: Any, others: dict[str, float]
) -> None:
    path = saved(tmp_path / "a.pth", content)
    found = read_checkpoint(path)
    state = {k: v for k, v in found.state_dict.items() if "KSM" not in k}
    assert is_network(state)
    assert set(found.other_weights) == {name for name in others if name != "state_dict.teacher"}
    for name, offset in others.items():
        assert is_network(read_checkpoint(path, weights=name).state_dict, offset)
    with pytest.raises(CheckpointError, match="no weights under 'none'") as caught:
        read_checkpoint(path, weights="none")
    assert all(name in str(caught.value) for name in found.other_weights)
    assert "--weights" in (caught.value.command_line or "")


def test_a_network_with_parts_of_its_own_keeps_them(tmp_path: Path) -> None:
    """They may matter for its answers, so they are not for the reader to leave out."""
    own = {"model.fusion.weight": ONE, "model.iou_head.weight": ONE}
    found = read_checkpoint(saved(tmp_path / "a.pth", under("model.") | own)).state_dict
    assert {"fusion.weight", "iou_head.weight"} <= set(found)


def test_many_networks_and_deep_names_in_a_small_file_are_little_work(tmp_path: Path) -> None:
    many = {f"a{i}.backbone.x": ONE for i in range(3000)} | {f"b{i}.x": ONE for i in range(3000)}
    for state in (many, {"a." * 400_000 + "x": ONE} | under("")):
        path = saved(tmp_path / "a.pth", state)
        with bounded_work(2_000_000):
            found = read_checkpoint(path)
        assert len(found.state_dict) in (1, len(WEIGHTS) + 1)
    assert len(read_checkpoint(saved(tmp_path / "a.pth", many)).other_weights) == 2999


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_pickle_protocol(tmp_path: Path, protocol: int, zipped: bool) -> None:
    content = {
        "state_dict": under("module."),
        "meta": {"cfg": "model = dict()", "seen": defaultdict(int, a=1), "kinds": {"x"}},
        "path": Path("/data"),
    }
    path = tmp_path / "a.pth"
    saved(path, content, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert is_network(found.state_dict)
    assert found.meta == {"cfg": "model = dict()", "seen": {"a": 1}, "kinds": ["x"]}


def test_tied_weights_share_their_memory_still(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = under("") | {"backbone.a": shared, "backbone.b": shared[2:4], "backbone.c": shared[::2]}
    found = read_checkpoint(saved(tmp_path / "a.pth", state)).state_dict
    assert found["backbone.b"].tolist() == [2, 3]
    assert found["backbone.c"].tolist() == [0, 2, 4]
    assert found["backbone.a"].untyped_storage().data_ptr() == (
        found["backbone.b"].untyped_storage().data_ptr()
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
)
def test_every_dtype_is_read_as_it_was(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    value = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    state = under("") | {"backbone.x": value, "backbone.y": value.t(), "backbone.z": value[:0]}
    path = saved(tmp_path / "a.pth", state, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path).state_dict
    for name, expected in state.items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
