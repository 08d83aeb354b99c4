"""A :class:`SegmentorConfig` → the mmsegmentation config that describes the same network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fdconv_deploy.config import BackboneConfig, DecodeHeadConfig, Preprocessing, SegmentorConfig


def format_config(architecture: SegmentorConfig) -> str:
    """Python config text in mmsegmentation 1.x's form, which :func:`parse_config` reads back.

    Everything the network depends on is written out, defaults too, so that the text
    stays true if a default changes.
    """
    preprocessing = architecture.preprocessing
    model = {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "bgr_to_rgb": preprocessing.bgr_to_rgb,
        },
        "backbone": backbone_section(architecture.backbone),
        "decode_head": _head(architecture.decode_head),
    }
    if architecture.auxiliary_head is not None:
        model["auxiliary_head"] = _head(architecture.auxiliary_head)
    test = architecture.test
    sliding = {"crop_size": test.crop_size, "stride": test.stride}
    model["test_cfg"] = {"mode": test.mode} | {k: v for k, v in sliding.items() if v is not None}
    sections = {"model": model, "test_pipeline": _pipeline(preprocessing)}
    return config_source(sections)


def backbone_section(config: BackboneConfig) -> dict[str, Any]:
    """A config's ``model.backbone``."""
    values = config.model_dump()
    conv = values.pop("conv")
    if conv is not None:
        # The published class takes no such argument, and has no other normalisation.
        if conv["ksm_global_norm"] == "batch":
            del conv["ksm_global_norm"]
        values["conv_cfg"] = {"type": "FDConv", **conv}
    kind = "ResNet" if conv is None else "ResNet_FDConv"
    return {"type": kind, **values, "norm_cfg": {"type": "SyncBN", "requires_grad": True}}


def _head(config: DecodeHeadConfig) -> dict[str, Any]:
    values = config.model_dump()
    if config.type == "UPerHead":
        del values["input_transform"]  # it sets its own, and takes no other
    if config.type == "UPerHead" or config.input_transform is not None:
        values |= {"in_channels": list(config.in_channels), "in_index": list(config.in_index)}
    else:
        values |= {"in_channels": config.in_channels[0], "in_index": config.in_index[0]}
    norm = values.pop("norm")
    return values | {"norm_cfg": {"type": "SyncBN", "requires_grad": True} if norm else None}


def _pipeline(preprocessing: Preprocessing) -> list[dict[str, Any]]:
    steps = [_loader(preprocessing)]
    if preprocessing.scale is not None or not preprocessing.keep_ratio:
        resize = {"scale": preprocessing.scale, "keep_ratio": preprocessing.keep_ratio}
        steps.append({"type": "Resize", **resize})
    return [*steps, {"type": "PackSegInputs"}]


def _loader(preprocessing: Preprocessing) -> dict[str, Any]:
    """The step that loads a file, as :class:`Preprocessing` has it."""
    if preprocessing.loading == "bands":
        return {"type": "LoadSingleRSImageFromFile", "to_float32": preprocessing.to_float32}
    step: dict[str, Any] = {"type": "LoadImageFromFile"}
    if preprocessing.loading != "color":
        step["color_type"] = preprocessing.loading
    return step | ({"to_float32": True} if preprocessing.to_float32 else {})


def config_source(sections: Mapping[str, Any]) -> str:
    """Python source that assigns each section to its name."""
    return "".join(f"{name} = {_source(value)}\n" for name, value in sections.items())


def _source(value: Any, indent: int = 0) -> str:
    """Python source: ``dict(…)`` over several lines, everything else as its repr."""
    inner = " " * (indent + 4)
    if isinstance(value, dict):
        items = [f"{inner}{key}={_source(item, indent + 4)},\n" for key, item in value.items()]
        return f"dict(\n{''.join(items)}{' ' * indent})"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        lines = [f"{inner}{_source(item, indent + 4)},\n" for item in value]
        return f"[\n{''.join(lines)}{' ' * indent}]"
    return repr(value)
