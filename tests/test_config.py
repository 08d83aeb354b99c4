"""Networks as plain data: what is recorded of them, and what earlier versions recorded."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fdconv_deploy.config import (
    BackboneConfig,
    DepthwiseSeparableASPPHeadConfig,
    FCNHeadConfig,
    HeadConfig,
    SegmentorConfig,
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
    config = SegmentorConfig(backbone=BackboneConfig(depth=18), decode_head=head)
    recorded = config.model_dump(mode="json")
    recorded["decode_head"] |= ALL_FIELDS
    assert SegmentorConfig.model_validate(recorded) == config


def test_head_is_recorded_without_fields_of_other_heads() -> None:
    recorded = FCNHeadConfig(**COMMON).model_dump()
    assert {"num_convs", "dilation"} <= set(recorded)
    assert not {"pool_scales", "dilations", "c1_channels"} & set(recorded)


@pytest.mark.parametrize("change", [{"type": "SegformerHead"}, {"unknown": 1}, {"channels": "?"}])
def test_head_refuses_other_types_and_fields(change: dict[str, object]) -> None:
    head = FCNHeadConfig(**COMMON).model_dump() | change
    with pytest.raises(ValidationError):
        SegmentorConfig.model_validate({"backbone": {}, "decode_head": head})
