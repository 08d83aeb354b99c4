"""The ResNet of a checkpoint, from its names and shapes and the config's backbone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fdconv_deploy.checkpoints.evidence import (
    UNSET,
    Evidence,
    SettingResolver,
    refuse_unsupported,
    stated,
)
from fdconv_deploy.checkpoints.infer_fdconv import infer_conv
from fdconv_deploy.checkpoints.infer_layers import Layer, Shapes, conv_layers
from fdconv_deploy.config import RESNET_BLOCKS, FDConvConfig, ResNetConfig
from fdconv_deploy.errors import CheckpointError

BATCH_NORMS = ("BN", "BN2d", "SyncBN", "MMSyncBN", "BatchNorm2d")
_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.conv\d$")


def infer_resnet(
    state: Shapes, evidence: Evidence, stock: Mapping[str, Any] | None = None
) -> ResNetConfig:
    """A ResNet, by its names and shapes and the config's ``model.backbone``.

    Args:
        state: the backbone's tensors, names without ``backbone.``; only shapes are read.
        evidence: has the config and takes the settings.
        stock: settings of the stock config this network is probably of, where they differ from
            the defaults; taken if there is no section.

    Raises:
        CheckpointError: it is no ResNet of mmsegmentation's, the config normalises in another
            way than by BatchNorm, or the config or the user contradicts the weights.
    """
    section = evidence.config.section("model", "backbone")
    layers = {layer.name: layer for layer in conv_layers(state)}
    if "layer1.0.conv1" not in layers or not {"conv1", "stem.0"} & set(layers):
        names = ", ".join(list(layers)[:3]) or "no convolution"
        raise CheckpointError(
            "The backbone is none known here: expected a ResNet's layers conv1 or stem, "
            "layer1.0.conv1 and so on, or those of a MixVisionTransformer, SwinTransformer or "
            f"ConvNeXt as OpenMMLab names them, found {names}."
        )
    refuse_unsupported("backbone", section, dcn=None, plugins=None)
    norm = evidence.config.section("model", "backbone", "norm_cfg")
    refuse_unsupported("backbone.norm_cfg", norm, *BATCH_NORMS, eps=1e-5)
    blocks = _blocks(layers)
    stages = len(blocks)
    bottleneck = "layer1.0.conv3" in layers
    kind = "bottleneck" if bottleneck else "basic"
    depths = [d for d, (k, n) in RESNET_BLOCKS.items() if k == kind and n[:stages] == tuple(blocks)]
    if not depths:
        raise CheckpointError(
            f"The backbone has {blocks} {kind} blocks in its stages. Expected those of ResNet-"
            f"{', '.join(map(str, RESNET_BLOCKS))}; another depth is not supported."
        )
    deep = "stem.0" in layers
    first, last = ("stem.0", "stem.6") if deep else ("conv1", "conv1")
    base, stem = layers["layer1.0.conv1"].out_channels, layers[last].out_channels
    _check_widths(layers, base, blocks)
    shortcuts = [name for name in layers if ".downsample." in name]
    averaged = any(name.endswith(".downsample.1") for name in shortcuts)

    settings = SettingResolver(
        evidence,
        ResNetConfig,
        "backbone",
        section,
        defaults={} if section else stock,
        note="as in the stock configs with such a head",
    )
    settings.resolve(
        "depth",
        accepts=lambda value: value in depths,
        derived=depths[0],
        source="names",
        because=f"the weights have {blocks} {kind} blocks",
    )
    settings.exact("shapes", in_channels=layers[first].in_channels, base_channels=base)
    settings.resolve(
        "stem_channels",
        accepts=lambda value: (value or base) == stem,
        derived=stem,
        because=f"the weights' stem makes {stem} channels",
    )
    settings.exact(
        "names", num_stages=stages, deep_stem=deep, avg_down=averaged if shortcuts else UNSET
    )
    for name in ("strides", "dilations"):
        settings.resolve(
            name,
            accepts=lambda value: len(value) >= stages,
            because=f"the weights have {stages} stages and each needs one",
        )
    dilated = any(dilation > 1 for dilation in settings.values["dilations"])
    settings.resolve("contract_dilation", matters=dilated)
    gridded = stated(section, "multi_grid") not in (UNSET, None)
    settings.resolve(
        "multi_grid",
        # Few networks have one, and it is no news that this one has none.
        matters=gridded or "backbone.multi_grid" in evidence.overrides,
        accepts=lambda value: value is None or len(value) == blocks[-1],
        because=f"the weights' last stage has {blocks[-1]} blocks and each needs one dilation",
    )
    settings.resolve(
        "out_indices",
        default=tuple(range(stages)),
        accepts=lambda value: (
            bool(value) and set(value) <= set(range(stages)) and len(set(value)) == len(value)
        ),
        because=f"the weights have the stages 0 to {stages - 1}, each of which is one output",
    )
    conv, styles = _conv(layers, settings, bottleneck)
    settings.resolve(
        "style",
        accepts=lambda value: value in styles,
        derived=UNSET if len(styles) > 1 else next(iter(styles)),
        source="names",
        because="the layers with FBM follow the strides of the other style",
        matters=bottleneck,
    )
    wide = max(layers["layer1.0.conv3"].out_channels // base, 1) if bottleneck else 4
    return settings.build(type="ResNet", expansion=wide if wide != 4 else None, conv=conv)


def _conv(
    layers: Mapping[str, Layer], settings: SettingResolver[ResNetConfig], bottleneck: bool
) -> tuple[FDConvConfig | None, set[str]]:
    """The FDConv config, or None; and the styles that agree with it."""
    scope = [la for la in layers.values() if la.name.startswith("stem.") or _BLOCK.match(la.name)]
    style = settings.evidence.overrides.get("backbone.style", stated(settings.section, "style"))
    strides = settings.values["strides"][: settings.values["num_stages"]]
    # In each style, the names of the convolutions that have a stride above 1.
    strided = {
        style: {"stem.0"} | {f"layer{i}.0.{conv}" for i, s in enumerate(strides, 1) if s > 1}
        for style, conv in (("pytorch", "conv2" if bottleneck else "conv1"), ("caffe", "conv1"))
    }
    candidates = [name for name in strided if name == style] or list(strided)
    return infer_conv(scope, settings, strided, candidates)


def _blocks(layers: Mapping[str, Layer]) -> list[int]:
    """Blocks in each stage."""
    found: dict[int, int] = {}
    for match in filter(None, map(_BLOCK.match, layers)):
        stage = int(match[1])
        found[stage] = max(found.get(stage, 0), int(match[2]) + 1)
    if sorted(found) != list(range(1, len(found) + 1)):
        raise CheckpointError(
            f"The backbone has stages {sorted(found)}. Expected layer1, layer2… without a gap; the "
            "file may be cut."
        )
    return [found[stage] for stage in sorted(found)]


def _check_widths(layers: Mapping[str, Layer], base: int, blocks: Sequence[int]) -> None:
    for stage in range(1, len(blocks) + 1):
        first, second = layers.get(f"layer{stage}.0.conv1"), layers.get(f"layer{stage}.0.conv2")
        width = base * 2 ** (stage - 1)
        for layer in (first, second):
            if layer is None or layer.out_channels != width:
                found = "nothing" if layer is None else f"{layer.out_channels} channels"
                raise CheckpointError(
                    f"Stage {stage} of the backbone has {found} where a ResNet with base_channels "
                    f"{base} has {width}. Wide ResNets and ResNeXt are not supported."
                )
        if second is not None and second.in_channels != width:
            raise CheckpointError(
                f"layer{stage}.0.conv2 takes {second.in_channels} channels in, expected {width}: "
                "grouped convolutions (ResNeXt) are not supported."
            )
