"""Networks as plain data: what is recorded of them, and what earlier versions recorded."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fdconv_deploy.config import (
    BackboneConfig,
    ConvNeXtConfig,
    DepthwiseSeparableASPPHeadConfig,
    FCNHeadConfig,
    FDConvConfig,
    HeadConfig,
    MixVisionTransformerConfig,
    ResNetConfig,
    SegmentorConfig,
    SwinTransformerConfig,
)

COMMON = {"in_channels": (64,), "in_index": (3,), "channels": 8, "num_classes": 3}
# The fields of all heads, which bundles once recorded of each of them.
ALL_FIELDS = {
    "pool_scales": [1, 2, 3, 6],
    "num_convs": 1,
    "kernel_size": 3,
    "concat_input": False,
    "dilation": 1,
    "dilations": [1, 12, 24, 36],
    "c1_in_channels": 16,
    "c1_channels": 8,
}


@pytest.mark.parametrize(
    "head",
    [
        FCNHeadConfig(**COMMON, num_convs=1, concat_input=False),
        DepthwiseSeparableASPPHeadConfig(
            **COMMON, dilations=(1, 12, 24, 36), c1_in_channels=16, c1_channels=8
        ),
    ],
)
def test_head_of_an_earlier_bundle_is_read(head: HeadConfig) -> None:
    config = SegmentorConfig(backbone=ResNetConfig(depth=18), decode_head=head)
    recorded = config.model_dump(mode="json")
    recorded["decode_head"] |= ALL_FIELDS
    assert SegmentorConfig.model_validate(recorded) == config


def test_head_is_recorded_without_fields_of_other_heads() -> None:
    recorded = FCNHeadConfig(**COMMON).model_dump()
    assert {"num_convs", "dilation"} <= set(recorded)
    assert not {"pool_scales", "dilations", "c1_channels"} & set(recorded)


@pytest.mark.parametrize("change", [{"type": "GCHead"}, {"unknown": 1}, {"channels": "?"}])
def test_head_refuses_other_types_and_fields(change: dict[str, object]) -> None:
    head = FCNHeadConfig(**COMMON).model_dump() | change
    with pytest.raises(ValidationError):
        SegmentorConfig.model_validate({"backbone": {}, "decode_head": head})


def test_backbone_of_an_earlier_bundle_is_a_resnet() -> None:
    config = SegmentorConfig(
        backbone=ResNetConfig(depth=18, base_channels=8), decode_head=FCNHeadConfig(**COMMON)
    )
    recorded = config.model_dump(mode="json")
    del recorded["backbone"]["type"]
    assert SegmentorConfig.model_validate(recorded) == config


@pytest.mark.parametrize(
    ("backbone", "widths"),
    [
        (MixVisionTransformerConfig(embed_dims=64, num_layers=(3, 4, 6, 3)), (64, 128, 320, 512)),
        (SwinTransformerConfig(out_indices=(1, 3), merging="position"), (192, 768)),
        (ConvNeXtConfig(linear_pw_conv=False, conv=FDConvConfig()), (96, 192, 384, 768)),
    ],
)
def test_backbone_is_recorded_by_type(backbone: BackboneConfig, widths: tuple[int, ...]) -> None:
    config = SegmentorConfig(backbone=backbone, decode_head=FCNHeadConfig(**COMMON))
    assert config.backbone.output_widths == widths
    assert SegmentorConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"type": "VisionTransformer"}, "VisionTransformer"),
        ({"type": "ConvNeXt", "depths": [3, 3]}, "one entry for each stage"),
        ({"type": "SwinTransformer", "out_indices": [4]}, "out_indices"),
        ({"type": "SwinTransformer", "depth": 50}, "depth"),
        ({"depths": [3, 3]}, "depths"),
    ],
)
def test_backbone_refuses_what_it_does_not_know(backbone: dict[str, object], message: str) -> None:
    head = FCNHeadConfig(**COMMON).model_dump()
    with pytest.raises(ValidationError, match=message):
        SegmentorConfig.model_validate({"backbone": backbone, "decode_head": head})
