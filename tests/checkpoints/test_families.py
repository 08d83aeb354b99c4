"""Networks over MiT, Swin and ConvNeXt: from the frameworks' files to the frameworks' answers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fdconv_deploy.checkpoints import (
    LoadedDetector,
    LoadedSegmentor,
    inspect_checkpoint,
    load_checkpoint,
    load_segmentor,
    read_checkpoint,
)
from fdconv_deploy.checkpoints.infer_config import infer_config
from fdconv_deploy.checkpoints.state_dict import conv_layers
from fdconv_deploy.config import FDConvConfig, TestMode
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.runtime import read_image
from fdconv_deploy.runtime.preprocessing import normalise, published_size, resize
from tests.checkpoints.small import infer, saved, shapes_of
from tests.nn.backbones.published import FAMILIES
from tests.nn.backbones.test_backbones import KEYS
from tests.reference.segmentor import predict

SEGMENTORS = ("segformer_mit", "upernet_swin", "upernet_convnext")
KINDS = ("fdconv", "plain")
TOLERANCE = 1e-5


def index_of(oracle: Path, family: str, kind: str) -> dict[str, Any]:
    return json.loads((oracle / "families" / family / f"{kind}_index.json").read_text())


@cache
def loaded(oracle: Path, family: str, kind: str) -> LoadedSegmentor | LoadedDetector:
    path = oracle / "families" / family / index_of(oracle, family, kind)["checkpoint"]
    return load_checkpoint(path, require_fdconv=False, auxiliary=family.startswith("upernet"))


def input_of(network: Any, tensors: dict[str, Tensor], image: Path) -> Tensor:
    """What the network's own preprocessing makes of a case's image at its pipeline's size."""
    how = network.architecture.preprocessing
    pixels = read_image(image)
    if "pipeline_u8" in tensors:
        pixels = resize(pixels, *published_size(*pixels.shape[:2], how))
        assert (pixels[..., ::-1] == tensors["pipeline_u8"].permute(1, 2, 0).numpy()).all()
    return torch.from_numpy(normalise(pixels, how))[None]


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def run(network: torch.nn.Module, names: set[str], image: Tensor) -> dict[str, Tensor]:
    """Outputs of the modules of these names, the first tensor of each."""
    found: dict[str, Tensor] = {}
    hooks = []
    for place, module in network.named_modules():
        # A Swin's attention cuts the windows itself, which the module above does in mmsegmentation.
        name = place.removesuffix(".w_msa")
        if name in names and not isinstance(module, torch.nn.ModuleDict):

            def keep(_module: Any, _inputs: Any, output: Any, name: str = name) -> None:
                found[name] = output[0] if isinstance(output, tuple) else output

            hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SEGMENTORS)
def test_segmentor_equals_its_framework(oracle: Path, family: str, kind: str, proved: Any) -> None:
    """Scores and labels of every case: odd sizes, tiny maps, slide, the config's own pipeline."""
    network = loaded(oracle, family, kind)
    assert isinstance(network, LoadedSegmentor)
    cases = index_of(oracle, family, kind)["cases"]
    for name, case in cases.items():
        tensors = load_file(oracle / f"families/{family}/{kind}_{name}.safetensors")
        image = input_of(network, tensors, oracle / "families" / family / case["image"])
        if "input" in tensors:
            torch.testing.assert_close(image, tensors["input"], rtol=0, atol=0)
        scores = predict(network, image, TestMode(**case["mode"]))
        scores = torch.nn.functional.interpolate(scores, case["image_hw"], mode="bilinear")[0]
        if "seg_logits" in tensors:
            step = 2 if case["subsampled"] else 1
            error = relative(scores[:, ::step, ::step], tensors["seg_logits"])
            assert error <= TOLERANCE, f"{name}: {error:.1e}"
        best = scores.topk(2, 0).values
        sure = best[0] - best[1] > 1e-4 * case["absmax"]
        assert (scores.argmax(0) == tensors["pred"])[sure].all()
        assert sure.float().mean() > 0.99
    assert network.architecture.test == TestMode(**cases["c"]["mode"])
    proved("segmentors equal to OpenMMLab's", len(cases))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*SEGMENTORS, "mask_rcnn_convnext"])
def test_layers_equal_their_framework(oracle: Path, family: str, kind: str, proved: Any) -> None:
    network = loaded(oracle, family, kind)
    case = index_of(oracle, family, kind)["cases"]["b"]
    tensors = load_file(oracle / f"families/{family}/{kind}_b.safetensors")
    # A MiT's attention and feed-forward network add their shortcuts in mmsegmentation.
    added = (".attn", ".ffn") if family == "segformer_mit" else ()
    modules = {
        name
        for name, _ in network.named_modules()
        if name in tensors and not (added and name.endswith(added))
    }
    if isinstance(network, LoadedDetector):
        modules = {name for name in modules if name.startswith("backbone.")}
    assert len(modules) >= (5 if kind == "fdconv" else 0)
    parts = {part.split(" = ")[0]: part for part in case["sliced"]}
    target = network if isinstance(network, LoadedSegmentor) else network.backbone
    names = modules if isinstance(network, LoadedSegmentor) else {n[9:] for n in modules}
    found = run(target, names, tensors["input"])
    assert len(found) == len(modules)
    for name, output in found.items():
        full = name if isinstance(network, LoadedSegmentor) else f"backbone.{name}"
        expected = tensors[full]
        if full in parts:
            output = output[:, :16] if "[:, :16]" in parts[full] else output[..., :16]
        error = relative(output, expected)
        assert error <= TOLERANCE, f"{full}: {error:.1e}"
    if "aux_logits" in tensors:
        with torch.no_grad():
            logits = network.auxiliary_head(network.backbone(tensors["input"]))
        assert relative(logits, tensors["aux_logits"]) <= TOLERANCE
    proved("intermediate tensors equal to OpenMMLab's", len(found))


@pytest.mark.parametrize("kind", KINDS)
def test_mask_rcnn_equals_its_framework(oracle: Path, kind: str, proved: Any) -> None:
    network = loaded(oracle, "mask_rcnn_convnext", kind)
    assert isinstance(network, LoadedDetector)
    cases = index_of(oracle, "mask_rcnn_convnext", kind)["cases"]
    for name, case in cases.items():
        tensors = load_file(oracle / f"families/mask_rcnn_convnext/{kind}_{name}.safetensors")
        image = input_of(network, tensors, oracle / "families/mask_rcnn_convnext" / case["image"])
        size = torch.tensor([image.shape[-2:]], dtype=torch.float32)
        height, width = case["meta"]["batch_input_shape"]
        image = torch.nn.functional.pad(
            image, (0, width - image.shape[-1], 0, height - image.shape[-2])
        )
        with torch.no_grad():
            features = network.features(image)
            for level in range(5 if "fpn0" in tensors else 0):
                assert relative(features[level], tensors[f"fpn{level}"]) <= TOLERANCE
            proposals, valid = network.rpn_head.propose(features, size)
            apart = (proposals[0][:, None] - tensors["proposals"][None]).abs().amax(2)
            same = apart.amin(1) < 0.01
            # Scores of these random proposals round to 1 and tie, which decides which of two that
            # overlap remains: the second stage is then judged on the reference's.
            assert int(same.sum()) >= 90
            if not same.all():
                proposals = tensors["proposals"][None]
            boxes, scores, labels, count = network.roi_head.detect(features, proposals, valid, size)
            masks = network.roi_head.masks(features, boxes, labels, count)
        found = int(count)
        assert found == case["detections"]
        error = float((scores[0, :found] - tensors["det_scores"]).abs().max())
        assert error <= 2e-5, f"{name}: {error:.1e}"
        assert torch.equal(labels[0, :found], tensors["det_labels"].long())
        factors = torch.tensor([*case["meta"]["scale_factor"]] * 2)
        boxes = boxes[0, :found] / factors
        assert float((boxes - tensors["det_bboxes"]).abs().max()) < 0.01
        if "mask_head_logits" in tensors:
            logits = tensors["mask_head_logits"][torch.arange(found), labels[0, :found]]
            assert float((masks[0, :found] - logits.sigmoid()).abs().max()) <= 2e-4
    proved("detectors equal to OpenMMLab's", len(cases))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*SEGMENTORS, "mask_rcnn_convnext"])
def test_backbone_is_told_by_names_and_shapes(oracle: Path, family: str, kind: str) -> None:
    """Without a config, all but a MiT's heads."""
    path = oracle / "families" / family / index_of(oracle, family, kind)["checkpoint"]
    told = {"backbone.num_heads": (1, 1, 2, 2)} if family == "segformer_mit" else {}
    found = infer_config(read_checkpoint(path).state_dict, overrides=told).architecture.backbone
    expected = FAMILIES[family]
    if kind == "plain":
        assert found == expected.model_copy(update={"conv": None})
    else:
        assert found.conv.kernel_num == expected.conv.kernel_num
        assert found.model_copy(update={"conv": None}) == expected.model_copy(update={"conv": None})


FULL_SIZE = [name for name in KEYS if not name.startswith("mask2former")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_network_is_rebuilt_from_its_key_list(oracle: Path, name: str, kind: str) -> None:
    backbone, kernel_num = KEYS[name]
    suffix = kind if kind == "plain" else f"fdconv_kn{kernel_num}"
    listed = json.loads((oracle / f"families/keys/{name}_{suffix}_keys.json").read_text())
    state = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, (shape, dtype) in listed.items()
    }
    found = infer_config(state)
    assert found.architecture.backbone.model_copy(update={"conv": None}) == backbone
    if kind == "fdconv":
        assert found.architecture.backbone.conv.kernel_num == kernel_num
    if not name.startswith("mask_rcnn"):
        rebuilt = shapes_of(found.architecture)
        assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in state.items()}
    assumed = {setting.field for setting in found.assumed}
    assert ("backbone.num_heads" in assumed) is ("mit" in name)


def states(oracle: Path, family: str) -> tuple[dict[str, Tensor], Any]:
    checkpoint = read_checkpoint(oracle / "families" / family / "fdconv_train.pth")
    return dict(checkpoint.state_dict), checkpoint


@pytest.mark.parametrize(
    ("family", "section", "says"),
    [
        ("upernet_swin", {"type": "ConvNeXt"}, "is a ConvNeXt, and the weights .* SwinTransformer"),
        ("upernet_swin", {"window_size": 12}, "backbone.window_size: the config says 12"),
        ("upernet_swin", {"num_heads": [1, 2, 4, 8]}, "backbone.num_heads"),
        ("upernet_swin", {"use_abs_pos_embed": True}, "use_abs_pos_embed"),
        ("upernet_swin", {"act_cfg": {"type": "ReLU"}}, "backbone.act_cfg is a ReLU"),
        ("upernet_swin", {"out_indices": (1, 2, 3)}, "outputs of the stages"),
        ("upernet_swin", {"out_indices": [1, "a"]}, "backbone.out_indices: .*not possible"),
        ("upernet_convnext", {"arch": "tiny"}, "backbone.depths: the config says"),
        ("upernet_convnext", {"gap_before_final_norm": True}, "gap_before_final_norm"),
        ("upernet_convnext", {"norm_cfg": {"type": "LN2d", "eps": 1e-5}}, "eps"),
        ("segformer_mit", {"num_heads": [1, 2, 5, 8]}, "backbone.num_heads: .*embed_dims times"),
        ("segformer_mit", {"sr_ratios": [8, 4, 2, 2]}, "backbone.sr_ratios"),
        ("segformer_mit", {"type": "ResNet"}, "is a ResNet, and the weights"),
        ("upernet_swin", {"conv_cfg": None}, "has conv_cfg=None, but the weights have 14 FDConv"),
    ],
)
def test_config_of_another_network_is_refused(
    oracle: Path, family: str, section: dict[str, Any], says: str
) -> None:
    state, _ = states(oracle, family)
    with pytest.raises(CheckpointError, match=says):
        infer(state, {"backbone": section})


def test_stage_of_another_width_is_refused(oracle: Path, tmp_path: Path) -> None:
    state, checkpoint = states(oracle, "upernet_swin")
    for name in [name for name in state if name.startswith("backbone.stages.2.blocks.0.norm1")]:
        state[name] = torch.ones(100)
    with pytest.raises(CheckpointError, match="Stage 2 of the backbone has 100 channels"):
        infer(state)
    state, checkpoint = states(oracle, "upernet_convnext")
    state["backbone.stages.2.1.gamma"] = torch.ones(50)
    path = saved(tmp_path / "a.pth", {"state_dict": state, "meta": checkpoint.meta})
    with pytest.raises(CheckpointError, match=r"1 of another shape: backbone.stages.2.1.gamma"):
        load_checkpoint(path)


def test_swin_with_missing_parts_is_refused(oracle: Path) -> None:
    state, _ = states(oracle, "upernet_swin")
    cut = {k: v for k, v in state.items() if "stages.1.blocks.0" not in k}
    with pytest.raises(CheckpointError, match="without a gap; the file may be cut"):
        infer(cut)
    cut = {k: v for k, v in state.items() if "bias_table" not in k}
    with pytest.raises(CheckpointError, match="tables of relative positions"):
        infer(cut)
    turned = {k: v.T if k.endswith("position_index") else v for k, v in state.items()}
    with pytest.raises(CheckpointError, match="is not the order of a 7×7 window's positions"):
        infer(turned)


def test_swin_without_its_index_is_the_same(oracle: Path, tmp_path: Path) -> None:
    state, checkpoint = states(oracle, "upernet_swin")
    cut = {k: v for k, v in state.items() if not k.endswith("position_index")}
    assert len(cut) == len(state) - 7
    content = {"state_dict": cut, "meta": checkpoint.meta}
    found = load_segmentor(saved(tmp_path / "a.pth", content)).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in found.items())


def test_narrow_layers_are_taken_in_either_rank(oracle: Path, tmp_path: Path) -> None:
    """A layer too narrow for FDConv is a plain convolution in the published class, or linear."""
    _, checkpoint = states(oracle, "upernet_convnext")
    network = load_segmentor(checkpoint, auxiliary=True)
    narrow = network.architecture.backbone.model_copy(
        update={"conv": FDConvConfig(use_fdconv_if_c_gt=20)}
    )
    changed = network.architecture.model_copy(update={"backbone": narrow})
    state = {k: torch.zeros(v.shape, dtype=v.dtype) + 0.5 for k, v in shapes_of(changed).items()}
    wide = {k: v for k, v in state.items() if "pointwise" in k and v.ndim == 4 and "weight" in k}
    plain = [k for k in wide if k.endswith(("conv1.weight", "conv2.weight"))]
    assert plain
    for form in (state, state | {k: state[k][:, :, 0, 0] for k in plain}):
        found = load_segmentor(saved(tmp_path / f"{form is state}.pth", form))
        assert found.state_dict()[plain[0]].shape == state[plain[0]].shape


@pytest.mark.parametrize("family", [*SEGMENTORS, "mask_rcnn_convnext"])
def test_inspect_finds_it_ready(oracle: Path, family: str) -> None:
    report = inspect_checkpoint(oracle / "families" / family / "fdconv_train.pth")
    assert report.ready, report.problem or report.refusal
    state, _ = states(oracle, family)
    dynamic = sum(layer.dynamic for layer in conv_layers(state))
    assert report.dynamic_layers == dynamic
    assert dynamic == len(index_of(oracle, family, "fdconv")["fdconv_layers"])


def test_loader_by_kind(oracle: Path) -> None:
    detector = load_checkpoint(oracle / "families/mask_rcnn_convnext/fdconv_train.pth")
    assert detector.architecture.neck.in_channels == (20, 36, 48, 64)
