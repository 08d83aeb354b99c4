"""The backbone of a checkpoint, from its names and shapes and the config's backbone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fdconv_deploy.checkpoints.config_parser import UNSET
from fdconv_deploy.checkpoints.infer_fdconv import infer_conv
from fdconv_deploy.checkpoints.settings import Evidence, SettingResolver, from_first
from fdconv_deploy.checkpoints.state_dict import (
    Layer,
    Shapes,
    conv_layers,
    dynamic_names,
    output_features,
    shape_of,
)
from fdconv_deploy.config import (
    RESNET_BLOCKS,
    BackboneConfig,
    ConvNeXtConfig,
    FDConvConfig,
    MixVisionTransformerConfig,
    ResNetConfig,
    SwinTransformerConfig,
)
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.nn.backbones.swin_transformer import relative_positions

_shape = partial(shape_of, owner="backbone")
_hidden = partial(output_features, owner="backbone")

# The layers that FDConv replaces in each.
FEED_FORWARD = {
    "MixVisionTransformer": re.compile(r"layers\.\d+\.1\.\d+\.ffn\.layers\.[04]"),
    "SwinTransformer": re.compile(r"stages\.\d+\.blocks\.\d+\.ffn\.layers\.(?:0\.0|1)"),
    "ConvNeXt": re.compile(r"stages\.\d+\.\d+\.pointwise_conv[12]"),
}
# A name that it alone has: its first convolution.
_MARKS = {
    "MixVisionTransformer": "layers.0.0.projection.weight",
    "SwinTransformer": "patch_embed.projection.weight",
    "ConvNeXt": "downsample_layers.0.0.weight",
}
# mmpretrain's ConvNeXt.arch_settings: depths and channels by name.
_CONVNEXT = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}

_BATCH_NORMS = ("BN", "BN2d", "SyncBN", "MMSyncBN", "BatchNorm2d")
_BLOCK = r"layer(\d+)\.(\d+)\.conv\d$"

Settings = SettingResolver[Any]


def backbone_type(state: Shapes) -> str:
    """The type of backbone that has such names; ``ResNet`` if it is none of the others."""
    return next((kind for kind, name in _MARKS.items() if name in state), "ResNet")


def infer_backbone(
    state: Shapes, evidence: Evidence, stock: Mapping[str, Any] | None = None
) -> BackboneConfig:
    """The backbone, by its names and shapes and the config's ``model.backbone``.

    Args:
        state: the backbone's tensors, names without ``backbone.``; only shapes are read.
        evidence: has the config and takes the settings.
        stock: settings of the stock config that a ResNet is probably of, where they differ from
            the defaults; taken if the config has no backbone.
    """
    _refuse_a_start(state)
    section = evidence.config.section("model", "backbone")
    kind, written = backbone_type(state), section.type
    if written and kind not in written and evidence.overrides.get("backbone.type") != kind:
        raise CheckpointError(
            f"The config's backbone is a {written}, and the weights are named as a {kind}'s. Give "
            "the config they were trained with; if that class computes what a "
            f"{kind} does, set backbone.type={kind}."
        )
    norm = evidence.config.section("model", "decode_head", "norm_cfg")
    norm.refuse_others("decode_head.norm_cfg", *_BATCH_NORMS, eps=1e-5)
    if kind == "ResNet":
        return _resnet(state, evidence, stock)
    model, infer, epsilon = _KINDS[kind]
    norm, act = (evidence.config.section("model", "backbone", n) for n in ("norm_cfg", "act_cfg"))
    norm.refuse_others("backbone.norm_cfg", "LN", "LN2d", eps=epsilon)
    act.refuse_others("backbone.act_cfg", "GELU")
    settings: Settings = SettingResolver(evidence, model, "backbone", section)
    infer(state, settings)
    conv, _ = infer_conv(conv_layers(state, FEED_FORWARD[kind]), settings)
    return settings.build(type=kind, conv=conv)


def _mix_vision_transformer(state: Shapes, settings: Settings) -> None:
    blocks = _blocks(state, r"layers\.(\d+)\.1\.(\d+)\.")
    stages = range(len(blocks))
    patches = [_shape(state, f"layers.{i}.0.projection.weight", 4) for i in stages]
    widths = [patch[0] for patch in patches]
    ratios = [
        _shape(state, f"layers.{i}.1.0.attn.sr.weight", 4)[2]
        if f"layers.{i}.1.0.attn.sr.weight" in state
        else 1
        for i in stages
    ]
    hidden = [_shape(state, f"layers.{i}.1.0.ffn.layers.1.weight", 4)[0] for i in stages]
    settings.exact(
        "shapes",
        in_channels=patches[0][1],
        num_layers=tuple(blocks),
        patch_sizes=tuple(patch[2] for patch in patches),
        sr_ratios=tuple(ratios),
        mlp_ratio=_ratio(hidden, widths),
    )
    heads = settings.resolve(
        "num_heads",
        accepts=lambda value: (
            len(value) == len(widths)
            and len({width / count for width, count in zip(widths, value, strict=True)}) == 1
            and widths[0] % value[0] == 0
        ),
        because=f"the weights' stages have {widths} channels, each embed_dims times its heads",
        note="weights do not show how channels are divided among heads",
    )
    settings.exact("shapes", embed_dims=widths[0] // heads[0])
    settings.exact("names", qkv_bias="layers.0.1.0.attn.attn.in_proj_bias" in state)
    settings.resolve(
        "strides",
        accepts=lambda value: len(value) == len(widths),
        because=f"the weights have {len(widths)} stages and each needs one",
    )
    _outputs(settings, tuple(stages), tuple(stages))


def _swin_transformer(state: Shapes, settings: Settings) -> None:
    settings.section.refuse_others("backbone", qk_scale=None, use_abs_pos_embed=False)
    blocks = _blocks(state, r"stages\.(\d+)\.blocks\.(\d+)\.")
    patch = _shape(state, _MARKS["SwinTransformer"], 4)
    firsts = [f"stages.{i}.blocks.0" for i in range(len(blocks))]
    widths = [_shape(state, f"{first}.norm1.weight", 1)[0] for first in firsts]
    for i, width in enumerate(widths):
        if width != patch[0] * 2**i:
            raise CheckpointError(
                f"Stage {i} of the backbone has {width} channels, where a Swin Transformer with "
                f"embed_dims {patch[0]} has {patch[0] * 2**i}: each stage has twice those of the "
                "one before. The file mixes two networks."
            )
    name = "attn.w_msa.relative_position_bias_table"
    tables = {
        key: _shape(state, key, 2) for key in state if key.endswith(name) and key.startswith("st")
    }
    rows = {table[0] for table in tables.values()}
    window = (round(max(rows, default=0) ** 0.5) + 1) // 2
    if rows != {(2 * window - 1) ** 2}:
        raise CheckpointError(
            f"The backbone's tables of relative positions have {sorted(rows)} rows. Expected one "
            "size of window w for all blocks, so (2w-1)² rows in each; the file mixes two "
            "networks."
        )
    index = f"{firsts[0]}.attn.w_msa.relative_position_index"
    if index in state and not state[index].is_meta:
        expected = relative_positions(window)
        if not torch.equal(state[index].long(), expected):
            raise CheckpointError(
                f"backbone.{index} is not the order of a {window}×{window} window's positions, "
                "row by row. Such an attention cannot be built here."
            )
    settings.exact(
        "shapes",
        in_channels=patch[1],
        embed_dims=patch[0],
        patch_size=patch[2],
        depths=tuple(blocks),
        num_heads=tuple(_shape(state, f"{first}.{name}", 2)[1] for first in firsts),
        window_size=window,
        mlp_ratio=_ratio([_hidden(state, f"{f}.ffn.layers.0.0") for f in firsts], widths),
    )
    settings.exact("names", qkv_bias=f"{firsts[0]}.attn.w_msa.qkv.bias" in state)
    settings.resolve(
        "merging",
        default=UNSET,
        derived="position" if settings.evidence.framework == "detectron2" else "unfold",
        source="names",
    )
    _outputs(settings, _norms(state), tuple(range(len(blocks))))


def _convnext(state: Shapes, settings: Settings) -> None:
    settings.section.refuse_others("backbone", gap_before_final_norm=False, use_grn=False)
    blocks = _blocks(state, r"stages\.(\d+)\.(\d+)\.")
    stem = _shape(state, _MARKS["ConvNeXt"], 4)
    later = [_shape(state, f"downsample_layers.{i}.1.weight", 4) for i in range(1, len(blocks))]
    arch = settings.section.section("arch")
    depths, channels = arch.stated("depths"), arch.stated("channels")
    if not arch:
        name = str(settings.section.stated("arch"))
        depths, channels = _CONVNEXT.get(name, (UNSET, UNSET))
    settings.resolve("depths", config=depths, exact=tuple(blocks), source="names")
    widths = (stem[0], *(shape[0] for shape in later))
    settings.resolve("channels", config=channels, exact=widths, source="shapes")
    settings.exact("shapes", in_channels=stem[1], stem_patch_size=stem[2])
    plain = [state.get(f"stages.{i}.0.pointwise_conv1.weight") for i in range(len(blocks))]
    ranks = {weight.ndim for weight in plain if weight is not None}
    # Of FDConv layers, and of both forms side by side, the form makes no difference.
    linear = UNSET if len(ranks) != 1 or dynamic_names(state) else ranks == {2}
    settings.resolve("linear_pw_conv", exact=linear, matters=linear is not UNSET)
    _outputs(settings, _norms(state), tuple(range(len(blocks))))


_KINDS: dict[str, tuple[type[BackboneConfig], Callable[[Shapes, Settings], None], float]] = {
    "MixVisionTransformer": (MixVisionTransformerConfig, _mix_vision_transformer, 1e-6),
    "SwinTransformer": (SwinTransformerConfig, _swin_transformer, 1e-5),
    "ConvNeXt": (ConvNeXtConfig, _convnext, 1e-6),
}


def _refuse_a_start(state: Shapes) -> None:
    """Converted weights are no network yet: their layers have spectra and no attentions."""
    spectra = [key for key in state if key.endswith(".dft_weight")]
    if spectra and not dynamic_names(state):
        raise CheckpointError(
            f"It holds spectra without attentions ({spectra[0]}, and no KSM_Global): weights for "
            "an FDConv network to start training from, as the published converter and `fdconv "
            "convert` write them. Give the checkpoint that training made, or convert with "
            "--equivalent for a whole network."
        )


def _blocks(names: Iterable[str], pattern: str, first: int = 0) -> list[int]:
    """Blocks in each stage, by names with the numbers of both; the ``first`` stage's number."""
    found: dict[int, set[int]] = {}
    for match in filter(None, map(re.compile(pattern).match, names)):
        found.setdefault(int(match[1]), set()).add(int(match[2]))
    stages = sorted(found)
    whole = all(numbers == set(range(len(numbers))) for numbers in found.values())
    if not found or stages != list(range(first, first + len(found))) or not whole:
        raise CheckpointError(
            f"The backbone has stages {stages} with blocks "
            f"{[sorted(found[stage]) for stage in stages]}. Expected stages from {first} on and "
            "blocks from 0 on, both without a gap; the file may be cut."
        )
    return [len(found[stage]) for stage in stages]


def _ratio(hidden: Sequence[int], widths: Sequence[int]) -> int:
    ratios = {h / w for h, w in zip(hidden, widths, strict=True)}
    ratio = int(next(iter(ratios)))
    if ratios != {ratio}:
        raise CheckpointError(
            f"The backbone's feed-forward networks have {list(hidden)} hidden channels in stages "
            f"of {list(widths)}. Expected the same whole multiple (mlp_ratio) in each; the file "
            "mixes two networks."
        )
    return ratio


def _norms(state: Shapes) -> tuple[int, ...]:
    """Stages whose output has a norm, which are those given on."""
    return tuple(sorted(int(key[4:-7]) for key in state if re.fullmatch(r"norm\d\.weight", key)))


def _outputs(settings: Settings, outputs: tuple[int, ...], stages: tuple[int, ...]) -> None:
    """``out_indices``: with a norm for each output, names tell; otherwise any stages may be."""
    written = from_first(settings.section.stated("out_indices"), len(stages))
    if isinstance(written, tuple) and all(isinstance(stage, int) for stage in written):
        written = tuple(sorted(written))
    told = settings.model in (SwinTransformerConfig, ConvNeXtConfig)
    settings.resolve(
        "out_indices",
        config=written,
        default=outputs,
        exact=outputs if told else UNSET,
        accepts=lambda value: 0 < len(set(value)) == len(value) and set(value) <= set(stages),
        source="names",
        because=f"the weights have outputs of the stages {list(outputs)}, each once",
    )


def _resnet(state: Shapes, evidence: Evidence, stock: Mapping[str, Any] | None) -> ResNetConfig:
    section = evidence.config.section("model", "backbone")
    layers = {layer.name: layer for layer in conv_layers(state)}
    if "layer1.0.conv1" not in layers or not {"conv1", "stem.0"} & set(layers):
        names = ", ".join(list(layers)[:3]) or "no convolution"
        raise CheckpointError(
            "The backbone is none known here: expected a ResNet's layers conv1 or stem, "
            "layer1.0.conv1 and so on, or those of a MixVisionTransformer, SwinTransformer or "
            f"ConvNeXt as OpenMMLab names them, found {names}."
        )
    section.refuse_others("backbone", dcn=None, plugins=None)
    norm = evidence.config.section("model", "backbone", "norm_cfg")
    norm.refuse_others("backbone.norm_cfg", *_BATCH_NORMS, eps=1e-5)
    blocks = _blocks(layers, _BLOCK, first=1)
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

    note = "as in the stock configs with such a head"
    defaults = {} if section else stock
    settings = SettingResolver(
        evidence, ResNetConfig, "backbone", section, defaults=defaults, note=note
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
    gridded = section.stated("multi_grid") not in (UNSET, None)
    settings.resolve(
        "multi_grid",
        # Few networks have one, and it is no news that this one has none.
        matters=gridded or "backbone.multi_grid" in evidence.overrides,
        accepts=lambda value: value is None or len(value) == blocks[-1],
        because=f"the weights' last stage has {blocks[-1]} blocks and each needs one dilation",
    )
    every = tuple(range(stages))
    _outputs(settings, every, every)
    conv, styles = _resnet_conv(layers, settings, bottleneck)
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


def _resnet_conv(
    layers: Mapping[str, Layer], settings: SettingResolver[ResNetConfig], bottleneck: bool
) -> tuple[FDConvConfig | None, set[str]]:
    """The FDConv config, or None; and the styles that agree with it."""
    scope = [
        la for la in layers.values() if la.name.startswith("stem.") or re.match(_BLOCK, la.name)
    ]
    style = settings.evidence.overrides.get("backbone.style", settings.section.stated("style"))
    strides = settings.values["strides"][: settings.values["num_stages"]]
    # In each style, the names of the convolutions that have a stride above 1.
    strided = {
        style: {"stem.0"} | {f"layer{i}.0.{conv}" for i, s in enumerate(strides, 1) if s > 1}
        for style, conv in (("pytorch", "conv2" if bottleneck else "conv1"), ("caffe", "conv1"))
    }
    candidates = [name for name in strided if name == style] or list(strided)
    return infer_conv(scope, settings, strided, candidates)


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
