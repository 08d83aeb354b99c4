"""Mask2Former's and MaskDINO's heads, and what becomes of their queries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from fdconv_deploy.checkpoints.config_parser import UNSET, Section
from fdconv_deploy.checkpoints.infer_fdconv import infer_conv
from fdconv_deploy.checkpoints.settings import Evidence, SettingResolver
from fdconv_deploy.checkpoints.state_dict import (
    Shapes,
    conv_layers,
    numbered,
    output_features,
    shape_of,
)
from fdconv_deploy.config import (
    HEAD_CONFIGS,
    Mask2FormerHeadConfig,
    MaskDINOHeadConfig,
    PanopticConfig,
)
from fdconv_deploy.errors import CheckpointError

QueryHeadType = Literal["Mask2FormerHead", "MaskDINOHead"]
Settings = SettingResolver[Any]

_shape = partial(shape_of, owner="decode_head")
_outputs = partial(output_features, owner="decode_head")
_count = partial(numbered, owner="decode_head")

# Parts of which either is enough to know a head by, beside its pixel decoder.
_MARKS: dict[QueryHeadType, tuple[str, str]] = {
    "Mask2FormerHead": ("cls_embed.", "transformer_decoder."),
    "MaskDINOHead": ("class_embed.", "decoder."),
}
_CLASSES = {"Mask2FormerHead": "cls_embed", "MaskDINOHead": "class_embed"}
_DECODER = {"Mask2FormerHead": "transformer_decoder.layers", "MaskDINOHead": "decoder.layers"}
_FEED_FORWARD = re.compile(
    r"(?:(?:pixel_decoder\.encoder|transformer_decoder)\.layers\.\d+\.ffn\.layers\.(?:0\.0|1)"
    r"|decoder\.layers\.\d+\.linear[12])"
)
# Where mmdetection's configs have fields that it names in another way: 3.x's, then 2.x's.
_ENCODER, _LAYERS = "pixel_decoder.encoder", "transformer_decoder"
_ENTRIES = {
    "channels": ("feat_channels",),
    "hidden_channels": ("feat_channels",),
    "mask_channels": ("out_channels",),
    "norm_groups": ("pixel_decoder.norm_cfg.num_groups",),
    "enforce_input_proj": ("enforce_decoder_input_project",),
    "encoder_layers": (f"{_ENCODER}.num_layers",),
    "encoder_heads": (
        f"{_ENCODER}.layer_cfg.self_attn_cfg.num_heads",
        f"{_ENCODER}.transformerlayers.attn_cfgs.num_heads",
    ),
    "encoder_points": (
        f"{_ENCODER}.layer_cfg.self_attn_cfg.num_points",
        f"{_ENCODER}.transformerlayers.attn_cfgs.num_points",
    ),
    "encoder_feedforward": (f"{_ENCODER}.layer_cfg.ffn_cfg.feedforward_channels",),
    "decoder_layers": (f"{_LAYERS}.num_layers",),
    "decoder_heads": (
        f"{_LAYERS}.layer_cfg.self_attn_cfg.num_heads",
        f"{_LAYERS}.transformerlayers.attn_cfgs.num_heads",
    ),
    "decoder_feedforward": (f"{_LAYERS}.layer_cfg.ffn_cfg.feedforward_channels",),
}


def query_head_type(state: Shapes) -> QueryHeadType | None:
    """Which of the two a head is by its names; None if it is neither."""
    if any(key.startswith("pixel_decoder.input_convs.") for key in state):
        found = (k for k, marks in _MARKS.items() if any(key.startswith(marks) for key in state))
        return next(found, None)
    # Without it, both parts of one are enough.
    for kind, marks in _MARKS.items():
        if all(any(key.startswith(mark) for key in state) for mark in marks):
            raise CheckpointError(
                f"decode_head has {' and '.join(mark[:-1] for mark in marks)} as a {kind}, but no "
                "pixel_decoder.input_convs: parts of the head are missing, so the file may be cut."
            )
    return None


def infer_query_head(
    state: Shapes, kind: QueryHeadType, widths: Sequence[int], evidence: Evidence
) -> Mask2FormerHeadConfig | MaskDINOHeadConfig:
    """The decode head of these names (without ``decode_head.``), over outputs of ``widths``."""
    config = evidence.config
    section = config.section("model", "decode_head") or config.section("model", "panoptic_head")
    model = HEAD_CONFIGS[kind]
    written = {name: section.stated(name, *_ENTRIES.get(name, ())) for name in model.model_fields}
    things, stuff = section.stated("num_things_classes"), section.stated("num_stuff_classes")
    if written["num_classes"] is UNSET and isinstance(things, int) and isinstance(stuff, int):
        written["num_classes"] = things + stuff
    activation = section.stated("pixel_decoder.act_cfg.type")
    pixels = Section({"act_cfg": activation})
    pixels.refuse_others("decode_head.pixel_decoder", act_cfg="ReLU")
    written["conv_cfg"] = section.stated("conv_cfg")
    settings: Settings = SettingResolver(evidence, model, "decode_head", written)
    settings.resolve("type", config=UNSET, exact=kind, source="names")
    # Settings of other heads, which these have in one way only.
    settings.values |= {
        "in_channels": tuple(widths),
        "in_index": tuple(range(len(widths))),
        "align_corners": False,
        "input_transform": None,
        "norm": True,
        "out_channels": None,
        "threshold": None,
    }
    if len(widths) != 4:
        raise CheckpointError(
            f"A {kind} takes four of the backbone's outputs, which has {len(widths)}. If "
            "out_indices leaves a stage out, correct it."
        )
    outputs, width = _shape(state, f"{_CLASSES[kind]}.weight", 2)
    masks, channels = _shape(state, "pixel_decoder.mask_feature.weight", 4)[:2]
    decoder = _DECODER[kind]
    first = f"{decoder}.0.{'ffn.layers.0.0' if kind == 'Mask2FormerHead' else 'linear1'}"
    encoder = "pixel_decoder.encoder.layers"
    settings.exact(
        "shapes",
        channels=channels,
        mask_channels=masks,
        hidden_channels=width,
        encoder_feedforward=_outputs(state, f"{encoder}.0.ffn.layers.0.0"),
        decoder_feedforward=_outputs(state, first),
    )
    layers = _count(state, encoder), _count(state, decoder)
    settings.exact("names", encoder_layers=layers[0], decoder_layers=layers[1])
    projected = "decoder_input_projs.0.weight" in state
    settings.resolve(
        "enforce_input_proj",
        exact=projected if width == channels else UNSET,
        source="names",
        matters=width == channels,
    )
    entering = _levels(settings, state, widths)
    levels = len(entering) + settings.values.get("extra_levels", 0)
    _attention(settings, state, "encoder", f"{encoder}.0.self_attn", levels)
    settings.resolve(
        "norm_groups",
        accepts=lambda value: channels % value == 0,
        because=f"the pixel decoder has {channels} channels, which groups divide",
    )
    if issubclass(model, MaskDINOHeadConfig):
        _maskdino(settings, state, outputs, levels, decoder)
    else:
        settings.exact("shapes", num_classes=outputs - 1)
        settings.exact("shapes", num_queries=_shape(state, "query_feat.weight", 2)[0])
        settings.resolve(
            "decoder_heads",
            accepts=lambda value: width % value == 0,
            because=f"queries have {width} channels, which heads divide",
        )
        settings.resolve("pre_norm", matters=evidence.framework == "detectron2")
    conv, _ = infer_conv(conv_layers(state, _FEED_FORWARD), settings)
    built = settings.build(conv=conv)
    assert isinstance(built, Mask2FormerHeadConfig | MaskDINOHeadConfig)
    return built


def _levels(settings: Settings, state: Shapes, widths: Sequence[int]) -> tuple[int, ...]:
    """The backbone's outputs that enter the encoder, and MaskDINO's order of them."""
    convs = [
        _shape(state, f"pixel_decoder.input_convs.{i}.conv.weight", 4)
        for i in range(_count(state, "pixel_decoder.input_convs"))
    ]
    entering = [shape[1] for shape in convs if shape[2] == 1]
    levels = tuple(range(4))[-len(entering) :] if entering else ()
    ascending = [widths[level] for level in levels]
    if not levels or entering not in (ascending, ascending[::-1]):
        raise CheckpointError(
            f"decode_head.pixel_decoder takes feature maps of {entering} channels, and the "
            f"backbone's outputs have {tuple(widths)}. Expected its coarsest ones, in order; the "
            "file mixes two networks."
        )
    settings.values["levels"] = levels
    if settings.model is MaskDINOHeadConfig:
        told = UNSET if entering == entering[::-1] else entering == ascending
        order = UNSET if told is UNSET else "low2high" if told else "high2low"
        settings.resolve("feature_order", exact=order)
        settings.exact("names", extra_levels=len(convs) - len(entering))
    return levels


def _attention(settings: Settings, state: Shapes, part: str, name: str, levels: int) -> None:
    """Heads and points of deformable attention, of which weights show the product."""
    rows, columns = _shape(state, f"{name}.attention_weights.weight", 2)
    product = rows // levels

    def explains(heads: int) -> bool:
        return heads > 0 and product % heads == 0 and columns % heads == 0

    because = (
        f"the weights have {rows} attention weights, which are heads × {levels} levels × points"
    )
    heads = settings.resolve(f"{part}_heads", accepts=explains, because=because)
    settings.resolve(f"{part}_points", exact=product // heads, because=because)


def _maskdino(settings: Settings, state: Shapes, outputs: int, levels: int, decoder: str) -> None:
    if "label_enc.weight" in state:
        classes = _shape(state, "label_enc.weight", 2)[0]
        if outputs - classes not in (0, 1):
            raise CheckpointError(
                f"decode_head.class_embed makes {outputs} outputs for {classes} classes "
                "(label_enc). Expected one for each, and one more for no object."
            )
        settings.exact("shapes", num_classes=classes, no_object=outputs > classes)
    else:
        known = settings.resolve("no_object", note="weights without label_enc do not show it")
        settings.exact("shapes", num_classes=outputs - known)
    two_stage = "enc_output.weight" in state
    settings.exact("names", two_stage=two_stage)
    feat = "query_feat.weight" in state
    settings.resolve("learn_tgt", exact=feat if two_stage else UNSET, matters=two_stage)
    queries = next(
        (state[k].shape[0] for k in ("query_feat.weight", "query_embed.weight") if k in state),
        UNSET,
    )
    settings.resolve("num_queries", exact=queries, note="no weight shows it")
    if settings.evidence.settings[-1].source == "published default":
        settings.evidence.notes.append(
            f"How many queries it makes of an image is in none of its weights: "
            f"{settings.values['num_queries']} is assumed, and with another number its answers are "
            "others. Give the network's config, or --set decode_head.num_queries=…."
        )
    _attention(settings, state, "decoder", f"{decoder}.0.cross_attn", levels)
    settings.resolve("initialize_box_type", matters=two_stage)
    no_object = settings.values["no_object"]
    settings.resolve(
        "class_scores",
        default="softmax" if no_object else "sigmoid",
        accepts=lambda value: value == "sigmoid" or no_object,
        because="the weights have no output for no object",
    )
    settings.resolve("temperature", matters=settings.values["class_scores"] == "sigmoid")


def infer_panoptic(evidence: Evidence, count: int) -> PanopticConfig | None:
    """How queries of ``count`` classes become segments and instances; None: classes alone."""
    config = evidence.config
    section = config.section("model", "panoptic")
    fusion = config.section("model", "panoptic_fusion_head")
    given = any(name.startswith("panoptic.") for name in evidence.overrides)
    if not (section or fusion or given):
        return None
    if not section:
        section = config.section("model", "test_cfg")
        things = fusion.get("num_things_classes")
        if isinstance(things, int) and 0 <= things < 10_000:
            section["thing_classes"] = tuple(range(things))
    settings: Settings = SettingResolver(evidence, PanopticConfig, "panoptic", section)
    settings.resolve(
        "thing_classes",
        # COCO's panoptic classes begin with its 80 things.
        default=tuple(range(80)) if count == 133 else tuple(range(count)) if count == 80 else UNSET,
        accepts=lambda value: all(index < count for index in value),
        because=f"the head has {count} classes, some of them of things "
        "(--set 'panoptic.thing_classes=[0, 1, …]' gives their numbers)",
    )
    stuff = len(settings.values["thing_classes"]) < count
    settings.resolve("panoptic_on", default=stuff)
    settings.resolve("instance_on")
    for name in ("iou_thr", "object_mask_thr", "filter_low_score"):
        settings.resolve(name, matters=settings.values["panoptic_on"])
    settings.resolve("max_per_image", matters=settings.values["instance_on"])
    settings.resolve("rule", default="openmmlab", matters=False)
    return settings.build()
