"""Whatever can be built is told back: from its names and shapes, and in full with its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fdconv_deploy.checkpoints import read_checkpoint, save_checkpoint
from fdconv_deploy.checkpoints.config_parser import config_of, parse_config
from fdconv_deploy.checkpoints.config_writer import format_config
from fdconv_deploy.checkpoints.infer_config import infer_config
from fdconv_deploy.config import (
    BandModulationConfig,
    DecodeHeadConfig,
    FCNHeadConfig,
    FDConvConfig,
    Preprocessing,
    PSPHeadConfig,
    ResNetConfig,
    SegmentorConfig,
    TestMode,
    UPerHeadConfig,
)
from fdconv_deploy.errors import UnsupportedLayerError
from tests.checkpoints.small import expansion, head_config, shapes_of

acts = st.sampled_from(["sigmoid", "tanh"])
floats = st.floats(0.1, 8.0)


@st.composite
def bands(draw: st.DrawFn) -> BandModulationConfig:
    return BandModulationConfig(
        k_list=draw(st.sampled_from([(2, 4, 8), (2,), (2, 4), (8, 2), (2.5, 3, 4, 16)])),
        lowfreq_att=draw(st.booleans()),
        act=draw(st.sampled_from(["sigmoid", "tanh", "softmax"])),
        spatial_group=draw(st.sampled_from([1, 2, 4, 65, 100])),
        spatial_kernel=draw(st.sampled_from([1, 3, 5])),
        max_size=draw(st.sampled_from([(64, 64), (32, 48)])),
    )


@st.composite
def convs(draw: st.DrawFn) -> FDConvConfig:
    only = draw(st.booleans())
    convert = draw(st.booleans())
    kernel_num = draw(st.sampled_from([2, 4, 8, None]))
    return FDConvConfig(
        reduction=draw(st.sampled_from([0.0625, 0.5, 0.3, 1 / 3])),
        kernel_num=kernel_num,
        use_fdconv_if_c_gt=draw(st.sampled_from([8, 16, 20, 64, 4096])),
        use_fdconv_if_k_in=draw(st.sampled_from([(1, 3), (3,), (1,), (3, 1, 5)])),
        use_fbm_if_k_in=draw(st.sampled_from([(3,), (1, 3), (1,), ()])),
        use_fbm_for_stride=draw(st.booleans()),
        kernel_temp=draw(floats if kernel_num else st.none() | floats),
        temp=draw(st.none() | floats),
        att_multi=draw(floats),
        param_ratio=draw(st.sampled_from([1, 2, 3])),
        param_reduction=draw(st.sampled_from([1.0, 0.5, 0.3] if convert else [1.0]) | st.just(2.0)),
        ksm_only_kernel_att=only,
        use_ksm_local=draw(st.booleans()),
        ksm_local_act=draw(acts),
        ksm_global_act=draw(acts | st.just("softmax") if only else acts),
        convert_param=convert,
        fbm_cfg=draw(bands()),
    )


@st.composite
def backbones(draw: st.DrawFn) -> ResNetConfig:
    stages, depth = draw(st.integers(1, 4)), draw(st.sampled_from([18, 34, 50]))
    outputs = draw(st.sets(st.integers(0, stages - 1), min_size=1))
    strides = draw(st.sampled_from([(1, 2, 2, 2), (1, 2, 1, 1)]))
    return ResNetConfig(
        depth=depth,
        in_channels=draw(st.sampled_from([1, 3, 4])),
        base_channels=draw(st.sampled_from([8, 12, 24])),
        stem_channels=draw(st.sampled_from([None, 16, 24])),
        num_stages=stages,
        strides=strides[:stages],
        dilations=draw(st.sampled_from([(1, 1, 1, 1), (1, 1, 2, 4)]))[:stages],
        out_indices=tuple(sorted(outputs)),
        style=draw(st.sampled_from(["pytorch", "caffe"])),
        deep_stem=draw(st.booleans()),
        # With one stage there is no strided shortcut to show it.
        avg_down=draw(st.booleans()) if stages > 1 else False,
        contract_dilation=draw(st.booleans()),
        multi_grid=draw(st.none() | st.just((1, 2, 4))) if (depth, stages) == (50, 4) else None,
        conv=draw(st.none() | convs()),
    )


@st.composite
def heads(draw: st.DrawFn, backbone: ResNetConfig, classes: int) -> DecodeHeadConfig:
    outputs = backbone.out_indices
    widths = [backbone.base_channels * 2**i * expansion(backbone) for i in outputs]
    common: dict[str, Any] = {
        "channels": draw(st.sampled_from([4, 8])),
        "num_classes": classes,
        "align_corners": draw(st.booleans()),
        "norm": draw(st.booleans()),
        "out_channels": 1 if classes == 2 and draw(st.booleans()) else None,
    }
    if classes == 1 or common["out_channels"]:
        common["threshold"] = draw(st.sampled_from([0.0, 0.3, 0.5]))
    if draw(st.booleans()) and len(outputs) > 1:
        index = tuple(sorted(draw(st.sets(st.sampled_from(range(len(outputs))), min_size=2))))
        return UPerHeadConfig(
            in_channels=tuple(widths[i] for i in index),
            in_index=index,
            pool_scales=draw(st.sampled_from([(1, 2, 3, 6), (1, 2), (2, 3, 5)])),
            **common,
        )
    index = tuple(draw(st.permutations(range(len(outputs))))[: draw(st.integers(1, len(outputs)))])
    common |= {"in_channels": tuple(widths[i] for i in index), "in_index": index}
    if len(index) > 1:
        common["input_transform"] = "resize_concat"
    kind = draw(st.sampled_from(["FCNHead", "PSPHead", "ASPPHead", "DepthwiseSeparableASPPHead"]))
    if kind == "PSPHead":
        return PSPHeadConfig(pool_scales=draw(st.sampled_from([(1, 2), (2,)])), **common)
    if kind == "FCNHead":
        convolutions = draw(st.integers(0, 2))
        if convolutions == 0:
            common["channels"] = sum(common["in_channels"])
        joins = draw(st.booleans())
        return FCNHeadConfig(
            num_convs=convolutions,
            kernel_size=draw(st.sampled_from([1, 3])),
            concat_input=joins,
            dilation=draw(st.sampled_from([1, 2])),
            **(common if convolutions or joins else common | {"norm": True}),
        )
    common["dilations"] = draw(st.sampled_from([(1, 6, 12, 18), (1, 2), (3, 1, 1)]))
    if kind == "DepthwiseSeparableASPPHead" and draw(st.booleans()):
        common |= {"c1_in_channels": widths[0], "c1_channels": draw(st.sampled_from([3, 5]))}
    return head_config(type=kind, **common)


@st.composite
def architectures(draw: st.DrawFn) -> SegmentorConfig:
    backbone = draw(backbones())
    classes = draw(st.integers(1, 5))
    sizes = st.tuples(st.integers(1, 999), st.integers(1, 999))
    slides = draw(st.booleans())
    keep = draw(st.booleans())
    scale = draw(st.none() | sizes)
    if scale and keep:
        scale = (max(scale), min(scale))
    colour = st.tuples(*[st.integers(0, 255)] * 3)
    named, painted = draw(st.booleans()), draw(st.booleans())
    names = st.lists(st.text(max_size=5), min_size=classes, max_size=classes)
    palette = st.lists(colour, min_size=classes, max_size=classes)
    numbers = st.floats(0.01, 255)
    channels = backbone.in_channels
    loadings = ["bands", "unchanged", *{1: ["grayscale"], 3: ["color"]}.get(channels, [])]
    return SegmentorConfig(
        backbone=backbone,
        decode_head=draw(heads(backbone, classes)),
        auxiliary_head=draw(st.none() | heads(backbone, classes)),
        test=TestMode(
            mode="slide" if slides else "whole",
            crop_size=draw(sizes) if slides else None,
            stride=draw(sizes) if slides else None,
        ),
        preprocessing=Preprocessing(
            mean=draw(st.tuples(*[numbers] * channels)),
            std=draw(st.tuples(*[numbers] * channels)),
            loading=draw(st.sampled_from(loadings)),
            to_float32=draw(st.booleans()),
            bgr_to_rgb=draw(st.booleans()),
            scale=scale,
            keep_ratio=keep,
        ),
        classes=tuple(draw(names)) if named else (),
        palette=tuple(draw(palette)) if painted else (),
    )


def built(architecture: SegmentorConfig) -> dict[str, torch.Tensor]:
    try:
        return shapes_of(architecture)
    except UnsupportedLayerError:
        assume(False)
        raise


quick = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@quick
@given(architectures())
def test_config_written_is_read_back_with_the_shapes(architecture: SegmentorConfig) -> None:
    state = built(architecture)
    config = parse_config(format_config(architecture))
    meta = {
        "dataset_meta": {
            "classes": architecture.classes,
            "palette": [list(colour) for colour in architecture.palette],
        }
    }
    found = infer_config(state, config=config, meta=meta)
    assert found.architecture == architecture
    expected = ("has one output", "names cannot tell them apart")
    assert all(any(words in note for words in expected) for note in found.notes)


@quick
@given(architectures())
def test_config_inferred_from_shapes_alone_has_the_same_shapes(
    architecture: SegmentorConfig,
) -> None:
    state = built(architecture)
    # What a config would be needed for: see BandModulationConfig and DecodeHeadConfig.
    preprocessing = architecture.preprocessing
    overrides: dict[str, Any] = {
        f"preprocessing.{n}": getattr(preprocessing, n) for n in ("mean", "std")
    }
    conv = architecture.backbone.conv
    if any(".FBM." in key for key in state):
        assert conv is not None
        overrides["backbone.conv.fbm_cfg.k_list"] = conv.fbm_cfg.k_list
    for name in ("decode_head", "auxiliary_head"):
        head = getattr(architecture, name)
        if head is not None and head.type in ("UPerHead", "PSPHead"):
            overrides[f"{name}.pool_scales"] = head.pool_scales
        if head is not None and "ASPP" in head.type:
            overrides[f"{name}.dilations"] = head.dilations
        if getattr(head, "c1_in_channels", 0):
            overrides["backbone.out_indices"] = architecture.backbone.out_indices
    if conv is not None and not conv.convert_param and any(".KSM_Global." in key for key in state):
        overrides["backbone.conv.param_ratio"] = conv.param_ratio
    # Which of the layers are strided shows in FBM, so strides other than usual must be given.
    overrides["backbone.strides"] = architecture.backbone.strides
    found = infer_config(state, overrides=overrides).architecture
    rebuilt = shapes_of(found)
    assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in state.items()}
    assert sorted(found.decode_head.in_channels) == sorted(architecture.decode_head.in_channels)


@quick
@given(architectures())
def test_config_written_has_no_argument_that_openmmlab_does_not_take(
    architecture: SegmentorConfig,
) -> None:
    config = parse_config(format_config(architecture))
    # ResNet has none of that name, and heads of mmsegmentation 0.x neither of these.
    assert ("expansion" in config.section("model", "backbone")) == (
        getattr(architecture.backbone, "expansion", None) is not None
    )
    head = config.section("model", "decode_head")
    for name in ("out_channels", "threshold"):
        assert (name in head) == (getattr(architecture.decode_head, name) is not None)


@settings(quick, max_examples=15)
@given(architecture=architectures())
def test_config_in_a_file_is_read_back(
    tmp_path_factory: Any, architecture: SegmentorConfig
) -> None:
    state = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in built(architecture).items()}
    path: Path = tmp_path_factory.mktemp("round") / "a.pth"
    save_checkpoint(path, state, architecture)
    found = read_checkpoint(path)
    inference = infer_config(found.state_dict, config=config_of(found.meta), meta=found.meta)
    assert inference.architecture == architecture
    assert {k: v.shape for k, v in found.state_dict.items()} == {
        k: v.shape for k, v in state.items()
    }
    path.unlink()
