"""Every backbone computes what the framework of its checkpoint computed, at every size."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from fdconv_deploy.checkpoints.state_dict import backbone_from_detectron2
from fdconv_deploy.config import (
    BackboneConfig,
    ConvNeXtConfig,
    FDConvConfig,
    MixVisionTransformerConfig,
    ResNetConfig,
    SwinTransformerConfig,
)
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.backbones import build_backbone
from tests.nn.backbones.published import (
    FAMILIES,
    PROJECTS,
    family_cases,
    float32_error,
    load_family,
    load_project,
    part_of,
    project_cases,
)

TOLERANCE = 1e-5
B0 = MixVisionTransformerConfig()
B2 = MixVisionTransformerConfig(embed_dims=64, num_layers=(3, 4, 6, 3))
SWIN_T = SwinTransformerConfig()
SWIN_B7 = SwinTransformerConfig(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
SWIN_B = SWIN_B7.model_copy(update={"window_size": 12})
SWIN_L = SwinTransformerConfig(
    embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=12
)
R50 = ResNetConfig(conv=None)
# Full-size networks of OpenMMLab: the backbone, and its kernel_num.
KEYS: dict[str, tuple[BackboneConfig, int]] = {
    "segformer_mit-b0_ade20k": (B0, 32),
    "segformer_mit-b2_ade20k": (B2, 64),
    "upernet_swin-t_ade20k": (SWIN_T, 32),
    "upernet_swin-b_ade20k": (SWIN_B7, 64),
    "upernet_convnext-t_ade20k": (ConvNeXtConfig(), 32),
    "mask_rcnn_convnext-t_coco": (ConvNeXtConfig(), 32),
    "mask2former_swin-b_ade20k": (SWIN_B, 64),
    "mask2former_swin-l_ade20k": (SWIN_L, 64),
    "mask2former_r50_cityscapes": (R50, 64),
    "mask2former_r50_coco-panoptic": (R50, 64),
}
PROJECT_KEYS: dict[str, BackboneConfig] = {
    "mask2former_r50_ade20k": R50,
    "mask2former_swinb_ade20k": SWIN_B,
    "mask2former_swinl_ade20k": SWIN_L,
    "maskdino_r50_ade20k": R50,
    "maskdino_swinl_ade20k_assumed": SWIN_L,
    "maskdino_swinl_coco_panoptic_config": SWIN_L,
}


def assert_equal_features(network, image, expected, tolerance=TOLERANCE):
    with torch.no_grad():
        found = network(image)
    assert [tuple(f.shape) for f in found] == [tuple(f.shape) for f in expected]
    for level, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error <= tolerance, f"level {level}: {error:.1e}"


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "fdconv") for family in FAMILIES]
    + [(family, "plain") for family in FAMILIES if family != "mask2former_panoptic"],
)
def test_backbone_equals_openmmlab(oracle: Path, family, kind, proved):
    network = load_family(oracle, family, kind)
    cases = family_cases(oracle, family, kind)
    assert "b" in cases  # 97×131: odd sizes, padded windows, dropped rows
    for case, (image, features) in cases.items():
        # One of the ResNets loses 2.4e-5 to float32 in the framework, too.
        own = float32_error(oracle, family, kind, case)
        assert_equal_features(network, image, features, max(TOLERANCE, 2 * own))
    proved("backbones equal to OpenMMLab's frameworks", len(cases))


@pytest.mark.parametrize("project", PROJECTS)
def test_backbone_equals_detectron2(oracle: Path, project, proved):
    network = load_project(oracle, project)
    cases = project_cases(oracle, project)
    assert len(cases) == 2
    for image, features in cases.values():
        assert_equal_features(network, image, features)
    proved("backbones equal to detectron2's projects", len(cases))


def shapes(state):
    return {name: list(value.shape) for name, value in state.items()}


def with_conv(config, kernel_num):
    conv = None if kernel_num is None else FDConvConfig(kernel_num=kernel_num)
    with torch.device("meta"):
        return build_backbone(config.model_copy(update={"conv": conv}))


@pytest.mark.parametrize("kind", ["plain", "fdconv"])
@pytest.mark.parametrize("name", KEYS)
def test_full_size_keys_are_openmmlabs(oracle: Path, name, kind):
    config, kernel_num = KEYS[name]
    suffix = kind if kind == "plain" else f"fdconv_kn{kernel_num}"
    listed = json.loads((oracle / f"families/keys/{name}_{suffix}_keys.json").read_text())
    network = with_conv(config, None if kind == "plain" else kernel_num)
    assert shapes(network.state_dict()) == {k: v[0] for k, v in part_of(listed).items()}


@pytest.mark.parametrize("kind", ["", "fdconv64_"])
@pytest.mark.parametrize("name", PROJECT_KEYS)
def test_full_size_keys_are_detectron2s(oracle: Path, name, kind):
    path = oracle / f"query_heads/full_size/{name}_{kind}keys.json.gz"
    listed = json.loads(gzip.decompress(path.read_bytes()))["keys"]
    theirs = {k: torch.empty(v[0], device="meta") for k, v in part_of(listed).items()}
    network = with_conv(PROJECT_KEYS[name], 64 if kind else None)
    assert shapes(backbone_from_detectron2(theirs)) == shapes(network.state_dict())


def test_convnext_computes_the_same_with_weights_of_either_rank():
    torch.manual_seed(0)
    config = ConvNeXtConfig(channels=(8, 12), depths=(1, 2), out_indices=(0, 1))
    linear = build_backbone(config).eval()
    convolutions = build_backbone(config.model_copy(update={"linear_pw_conv": False})).eval()
    expected = convolutions.state_dict()
    assert expected["stages.0.0.pointwise_conv1.weight"].shape == (32, 8, 1, 1)
    state = {k: v.reshape(expected[k].shape) for k, v in linear.state_dict().items()}
    convolutions.load_state_dict(state)
    image = torch.randn(2, 3, 23, 33)
    with torch.no_grad():
        assert_equal_features(convolutions, image, linear(image))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_narrow_pointwise_layers_stay_plain_convolutions(kind):
    """As the published class has them: weights of rank 4 in a linear layer's place, too."""
    config = ConvNeXtConfig(
        channels=(16, 20),
        depths=(1, 1),
        out_indices=(1,),
        linear_pw_conv=kind == "linear",
        conv=FDConvConfig(),
    )
    state = build_backbone(config).state_dict()
    assert state["stages.0.0.pointwise_conv1.weight"].shape == (64, 16, 1, 1)
    assert "stages.1.0.pointwise_conv1.dft_weight" in state


@pytest.mark.parametrize(
    ("config", "size"),
    [(B0, (29, 29)), (SWIN_T, (1, 1)), (SWIN_T, (1, 30)), (ConvNeXtConfig(), (32, 32))],
)
@torch.no_grad()
def test_smallest_images(config, size):
    """The smallest that the frameworks take; smallest_side says so."""
    config = config.model_copy(update={"out_indices": (3,)})
    (feature,) = build_backbone(config).eval()(torch.zeros(1, 3, *size))
    assert feature.shape[1] == config.output_widths[0]
    smallest = config.smallest_side(3)
    assert min(size) == smallest
    if smallest > 1:
        with pytest.raises(RuntimeError):
            build_backbone(config).eval()(torch.zeros(1, 3, smallest - 1, smallest - 1))


def test_kernel_num_that_does_not_divide_is_refused_with_one_that_does():
    config = SWIN_T.model_copy(update={"conv": FDConvConfig(kernel_num=64)})
    with pytest.raises(UnsupportedLayerError, match=r"kernel_num=64 does not .*lower is 48"):
        build_backbone(config)
