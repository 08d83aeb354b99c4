"""A checkpoint becomes the network it was saved from, or a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fdconv_deploy.checkpoints import load_checkpoint, read_checkpoint, save_checkpoint
from fdconv_deploy.checkpoints.config_writer import format_config
from fdconv_deploy.config import FDConvConfig, SegmentorConfig
from fdconv_deploy.errors import CheckpointError, UnsupportedLayerError
from fdconv_deploy.nn import Segmentor
from tests.checkpoints.small import key_list, small_architecture, weights_of


@pytest.fixture
def architecture() -> SegmentorConfig:
    return small_architecture(auxiliary=True)


@pytest.fixture
def saved(tmp_path: Path, architecture: SegmentorConfig) -> Path:
    path = tmp_path / "small.pth"
    save_checkpoint(path, weights_of(architecture), architecture)
    return path


def logits(network: Segmentor) -> torch.Tensor:
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network(x)


@pytest.mark.parametrize("name", ["mmcv1", "mmengine_published"])
def test_reference_network_gives_its_reference_logits(oracle: Path, name: str) -> None:
    network = load_checkpoint(oracle / "segmentor" / f"B_r18b14_{name}.pth", auxiliary=True)
    reference = load_file(oracle / "segmentor" / "B_reference.safetensors")
    with torch.no_grad():
        features = network.backbone(reference["input"])
        found = {"decode_logits_quarter": network(reference["input"])}
        assert network.auxiliary_head is not None
        found["aux_logits"] = network.auxiliary_head(features)
    for key, value in found.items():
        # The reference's own noise floor is 8e-6 of its largest logit.
        assert (value - reference[key]).abs().max() <= 3e-5 * reference[key].abs().max()
    assert not network.training


def test_network_is_ready(saved: Path, architecture: SegmentorConfig) -> None:
    network = load_checkpoint(saved)
    assert not network.training
    assert network.auxiliary_head is None
    assert network.architecture == architecture.model_copy(update={"auxiliary_head": None})
    assert network.inference.architecture == network.architecture
    tensors = [*network.named_parameters(), *network.named_buffers()]
    assert not [name for name, tensor in tensors if tensor.is_meta]
    with_auxiliary = load_checkpoint(saved, auxiliary=True)
    assert with_auxiliary.architecture == architecture
    assert with_auxiliary.auxiliary_head is not None
    assert torch.equal(logits(network), logits(with_auxiliary))


def test_building_without_initialisation_is_the_same_network(
    saved: Path, architecture: SegmentorConfig
) -> None:
    from fdconv_deploy.nn import Segmentor

    built = Segmentor(architecture)
    built.load_state_dict(weights_of(architecture))
    assert torch.equal(logits(built.eval()), logits(load_checkpoint(saved)))


def test_frequency_order_reaches_the_layers(saved: Path) -> None:
    torch_order = logits(load_checkpoint(saved))
    stable = logits(load_checkpoint(saved, frequency_order="stable"))
    assert not torch.equal(torch_order, stable)


def test_old_and_half_precision_weights(tmp_path: Path, architecture: SegmentorConfig) -> None:
    weights = {
        key: value.half() if value.is_floating_point() else value
        for key, value in weights_of(architecture).items()
        if not key.endswith("num_batches_tracked")
    }
    path = tmp_path / "half.pth"
    save_checkpoint(path, weights, architecture)
    network = load_checkpoint(path)
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    assert torch.isfinite(logits(network)).all()


def test_config_file_and_overrides(tmp_path: Path) -> None:
    architecture = small_architecture(depth=50, style="caffe")
    weights = {f"module.{key}": value for key, value in weights_of(architecture).items()}
    torch.save(weights, tmp_path / "plain.pth")
    assumed = load_checkpoint(tmp_path / "plain.pth")
    assert assumed.architecture.backbone.style == "pytorch"
    assert "backbone.style" in {fact.field for fact in assumed.inference.assumed}
    (tmp_path / "config.py").write_text(format_config(architecture))
    told = load_checkpoint(tmp_path / "plain.pth", config=tmp_path / "config.py")
    assert told.architecture.backbone == architecture.backbone
    asked = load_checkpoint(tmp_path / "plain.pth", overrides={"backbone.style": "caffe"})
    assert torch.equal(logits(told), logits(asked))
    assert not torch.equal(logits(told), logits(assumed))


def test_safetensors_carries_its_config(tmp_path: Path, architecture: SegmentorConfig) -> None:
    metadata = {"config": format_config(architecture), "classes": '["a", "b", "c"]'}
    save_file(weights_of(architecture), tmp_path / "a.safetensors", metadata)
    network = load_checkpoint(tmp_path / "a.safetensors")
    assert network.architecture.test == architecture.test
    assert network.architecture.classes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"backbone.bn1.running_var": None},
            r"1 normalisation statistics .*: backbone\.bn1",
        ),
        ({"backbone.conv1.bias": torch.ones(8)}, r"1 biases of convolutions left over"),
        ({"backbone.layer1.0.conv1.conv_offset.bias": torch.ones(1)}, "deformable"),
        ({"backbone.layer4.1.conv2.KSM_Global.bn.weight": None}, "1 of FDConv layers missing"),
        ({"decode_head.fpn_convs.0.bn.weight": None}, "1 tensors missing: decode_head.fpn_convs"),
        ({"decode_head.extra.weight": torch.ones(1)}, "1 tensors left over: decode_head.extra"),
        ({"backbone.bn1.weight": torch.ones(9)}, r"bn1\.weight \(9,\) instead of \(8,\)"),
        (
            {"backbone.bn1.weight": torch.full((8,), float("nan"))},
            "bn1.weight holds .*not finite",
        ),
        ({"backbone.bn1.weight": torch.full((8,), float("inf"))}, "not finite"),
        ({f"x{i}": torch.ones(1) for i in range(14)}, r"14 tensors left over: x0, .* and 4 more"),
    ],
)
def test_every_tensor_must_fit(
    tmp_path: Path, architecture: SegmentorConfig, change: dict[str, Any], says: str
) -> None:
    weights = weights_of(architecture) | change
    path = tmp_path / "changed.pth"
    torch.save({key: value for key, value in weights.items() if value is not None}, path)
    with pytest.raises(CheckpointError, match=says) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(str(path))


def test_large_finite_weights_are_fine(tmp_path: Path, architecture: SegmentorConfig) -> None:
    weights = weights_of(architecture) | {"backbone.bn1.bias": torch.full((8,), 3e38)}
    torch.save(weights, tmp_path / "large.pth")
    load_checkpoint(tmp_path / "large.pth")


def test_loading_takes_what_was_read(tmp_path: Path) -> None:
    architecture = small_architecture()
    path = tmp_path / "a.pth"
    save_checkpoint(path, weights_of(architecture), architecture)
    assert load_checkpoint(read_checkpoint(path)).architecture == architecture
    save_checkpoint(path, weights_of(small_architecture(conv=None)), architecture)
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        load_checkpoint(read_checkpoint(path))


def test_plain_networks_only_when_asked_for(tmp_path: Path) -> None:
    architecture = small_architecture(conv=None)
    path = tmp_path / "plain.pth"
    save_checkpoint(path, weights_of(architecture), architecture)
    with pytest.raises(CheckpointError, match="is not an FDConv checkpoint"):
        load_checkpoint(path)
    assert load_checkpoint(path, require_fdconv=False).architecture == architecture


def test_auxiliary_head_that_is_not_there(tmp_path: Path) -> None:
    architecture = small_architecture()
    path = tmp_path / "a.pth"
    save_checkpoint(path, weights_of(architecture), architecture)
    with pytest.raises(CheckpointError, match="has no auxiliary head"):
        load_checkpoint(path, auxiliary=True)


def test_spectrum_that_does_not_divide(tmp_path: Path) -> None:
    """kernel_num must divide a layer's bins: the network code says so."""
    architecture = small_architecture()
    weights = weights_of(architecture)
    for key in [key for key in weights if ".KSM_Global.kernel_fc." in key]:
        weights[key] = torch.zeros(5, *weights[key].shape[1:])
    torch.save(weights, tmp_path / "five.pth")
    with pytest.raises(UnsupportedLayerError, match="kernel_num"):
        load_checkpoint(tmp_path / "five.pth")


def test_another_detector_is_named(tmp_path: Path, oracle: Path) -> None:
    keys = key_list(oracle / "mmdet" / "faster_rcnn_r50_fpn_fdconv_kn64_c80_keys_mmdet2.28.1.json")
    proposals_only = [key for key in keys if not key.startswith("roi_head.")]
    small = {key: torch.zeros(1) for key in proposals_only}
    torch.save({"state_dict": small}, tmp_path / "detector.pth")
    with pytest.raises(CheckpointError, match=r"detector\.pth: .*it is a detector.*backbone can"):
        load_checkpoint(tmp_path / "detector.pth")


@pytest.mark.slow
def test_full_size_network(tmp_path: Path, oracle: Path) -> None:
    keys = key_list(oracle / "segmentor" / "upernet_r50_fdconv_kn64_c150_keys.json")
    weights = {key: torch.zeros(v.shape, dtype=v.dtype) for key, v in keys.items()}
    torch.save(weights, tmp_path / "full.pth")
    before = torch.random.get_rng_state()
    network = load_checkpoint(tmp_path / "full.pth", auxiliary=True)
    assert torch.equal(torch.random.get_rng_state(), before)  # no weight is initialised in vain
    assert network.state_dict().keys() == keys.keys()
    assert sum(p.numel() for p in network.parameters()) == 70_143_996
    conv = network.architecture.backbone.conv
    assert conv == FDConvConfig(kernel_num=64)
