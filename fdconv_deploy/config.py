"""What a segmentation network or a detector is made of, as plain data.

A checkpoint's network is inferred as one of these models, built from it, and a bundle's
manifest records it. Nothing here imports torch. Names and defaults are those of the published
FDConv code, of mmsegmentation's ResNet and decode heads, and of mmdetection's FPN, RPNHead,
Shared2FCBBoxHead, FCNMaskHead and their published configs.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Act = Literal["sigmoid", "tanh", "softmax"]
HeadType = Literal[
    "UPerHead",
    "SegformerHead",
    "FCNHead",
    "PSPHead",
    "ASPPHead",
    "DepthwiseSeparableASPPHead",
    "Mask2FormerHead",
    "MaskDINOHead",
]
# What normalises the hidden layer of the global attention: the published BatchNorm or, as in
# copies that train with one image a batch, GroupNorm(1, C), or nothing.
AttentionNorm = Literal["batch", "group", "none"]
# Red, green and blue of 0 to 255.
Level = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Level, Level, Level]
# Pixels, counts and dilations, far above any in use; what is larger overflows in convolutions.
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
Four = tuple[float, float, float, float]
Loading = Literal["color", "grayscale", "unchanged", "bands"]

RESNET_BLOCKS: dict[int, tuple[str, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}

# What mmsegmentation takes where a head with one output has no threshold.
BINARY_THRESHOLD = 0.3

# mmdetection's published test pipeline: the long side at most 1333, the short one at most 800.
PUBLISHED_SCALE = (1333, 800)
# The published pipelines pad heights and widths to multiples of this.
SIZE_DIVISOR = 32

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class Frozen(BaseModel):
    """Plain data that cannot be changed and takes no field it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BandModulationConfig(Frozen):
    """The published ``fbm_cfg``: Frequency Band Modulation of a layer's input.

    ``spatial_group`` above 64 means one group per channel. ``masks``: ``"cached"`` ones are made
    at ``max_size`` and resized to the feature map, as the present published code does;
    ``"per_call"`` ones are made at the feature map's own size, as the first published version
    did, whose comparison takes signed row frequencies (see :func:`masks_for`).
    """

    k_list: tuple[float, ...] = (2, 4, 8)
    lowfreq_att: bool = False
    act: Act = "sigmoid"
    spatial_group: int = 1
    spatial_kernel: int = 3
    max_size: tuple[int, int] = (64, 64)
    masks: Literal["cached", "per_call"] = "cached"


class FDConvConfig(Frozen):
    """The published ``conv_cfg=dict(type='FDConv', ...)``, without per-layer arguments.

    ``kernel_num=None`` means half the output channels, ``temp=None`` means
    ``kernel_temp``. ``ksm_global_norm`` is no published argument: it is what copies of the
    published class have in place of its BatchNorm.
    """

    reduction: float = 0.0625
    kernel_num: int | None = 4
    use_fdconv_if_c_gt: int = 16
    use_fdconv_if_k_in: tuple[int, ...] = (1, 3)
    use_fbm_if_k_in: tuple[int, ...] = (3,)
    use_fbm_for_stride: bool = False
    kernel_temp: float | None = 1.0
    temp: float | None = None
    att_multi: float = 2.0
    param_ratio: int = 1
    param_reduction: float = 1.0
    ksm_only_kernel_att: bool = False
    use_ksm_local: bool = True
    ksm_local_act: Act = "sigmoid"
    ksm_global_act: Act = "sigmoid"
    ksm_global_norm: AttentionNorm = "batch"
    convert_param: bool = True
    linear_mode: bool = False
    fbm_cfg: BandModulationConfig = BandModulationConfig()


class BackboneConfig(Frozen):
    """What the backbones have in common.

    ``out_indices`` names the stages whose feature maps are given on, finest first. ``conv`` makes
    layers FDConv: the blocks' convolutions of a ResNet, both linear layers of every feed-forward
    network of the others. None: all are plain.
    """

    type: str
    in_channels: int = 3
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    conv: FDConvConfig | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        raise NotImplementedError

    @property
    def output_widths(self) -> tuple[int, ...]:
        """Channels of each output, in the order of ``out_indices``."""
        return tuple(self.widths[i] for i in sorted(self.out_indices))


class ResNetConfig(BackboneConfig):
    """mmsegmentation's ResNet.

    A bottleneck gives ``expansion`` times its width, 4 times if it is None. ``strides`` and
    ``dilations`` have one entry per stage. ``contract_dilation`` halves the dilation of a dilated
    stage's first block, as in mmsegmentation; ``multi_grid`` gives the dilation of each block of
    the last stage instead.
    """

    type: Literal["ResNet"] = "ResNet"
    depth: int = 50
    base_channels: int = 64
    expansion: Positive | None = None
    stem_channels: int | None = None
    num_stages: int = Field(4, ge=1, le=4)
    strides: tuple[Positive, ...] = (1, 2, 2, 2)
    dilations: tuple[Positive, ...] = (1, 1, 1, 1)
    style: Literal["pytorch", "caffe"] = "pytorch"
    deep_stem: bool = False
    avg_down: bool = False
    contract_dilation: bool = False
    multi_grid: tuple[Positive, ...] | None = None
    conv: FDConvConfig | None = FDConvConfig()

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(
            self.base_channels * 2**i * self.block_expansion for i in range(self.num_stages)
        )

    @property
    def block_expansion(self) -> int:
        """A block's output channels over its width."""
        return (self.expansion or 4) if RESNET_BLOCKS[self.depth][0] == "bottleneck" else 1

    def smallest_side(self, stage: int) -> int:
        """Pixels an image needs each way so that the stages up to this one see something."""
        return 4 * math.prod(self.strides[: stage + 1])


class _StagesConfig(BackboneConfig):
    """A backbone whose tuples, but for ``out_indices``, have one entry for each stage."""

    @model_validator(mode="after")
    def _one_entry_per_stage(self) -> _StagesConfig:
        given = {name: value for name, value in self if name != "out_indices"}
        lengths = {name: len(value) for name, value in given.items() if isinstance(value, tuple)}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {count}" for name, count in lengths.items())
            raise ValueError(f"there must be one entry for each stage, got {found}")
        stages = len(self.widths)
        if not self.out_indices or not set(self.out_indices) <= set(range(stages)):
            raise ValueError(
                f"out_indices {self.out_indices} must name some of the stages 0…{stages - 1}"
            )
        return self


class MixVisionTransformerConfig(_StagesConfig):
    """SegFormer's backbone (MiT), as mmsegmentation names it.

    A stage has ``embed_dims * num_heads`` channels, so every head has ``embed_dims``; keys and
    values are of a map shrunk by its ``sr_ratios``. Defaults are MiT-B0's.
    """

    type: Literal["MixVisionTransformer"] = "MixVisionTransformer"
    embed_dims: Positive = 32
    num_layers: tuple[Positive, ...] = (2, 2, 2, 2)
    num_heads: tuple[Positive, ...] = (1, 2, 5, 8)
    patch_sizes: tuple[Positive, ...] = (7, 3, 3, 3)
    strides: tuple[Positive, ...] = (4, 2, 2, 2)
    sr_ratios: tuple[Positive, ...] = (8, 4, 2, 1)
    mlp_ratio: Positive = 4
    qkv_bias: bool = True

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dims * heads for heads in self.num_heads)

    def smallest_side(self, stage: int) -> int:
        """Pixels each way of which a convolution of stride ``sr_ratios`` finds one position."""
        strides = [math.prod(self.strides[: i + 1]) for i in range(stage + 1)]
        return max(s * (r - 1) + 1 for s, r in zip(strides, self.sr_ratios, strict=False))


class SwinTransformerConfig(_StagesConfig):
    """Swin. Each stage has twice the channels of the one before; defaults are Swin-T's.

    ``merging`` is the order of the four pixels' channels where a stage halves the map:
    ``"unfold"`` goes by channel first (mmsegmentation, mmdetection), ``"position"`` by pixel,
    column by column (Microsoft's code, so detectron2's projects).
    """

    type: Literal["SwinTransformer"] = "SwinTransformer"
    embed_dims: Positive = 96
    patch_size: Positive = 4
    window_size: Positive = 7
    depths: tuple[Positive, ...] = (2, 2, 6, 2)
    num_heads: tuple[Positive, ...] = (3, 6, 12, 24)
    mlp_ratio: Positive = 4
    qkv_bias: bool = True
    merging: Literal["unfold", "position"] = "unfold"

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dims * 2**i for i in range(len(self.depths)))

    def smallest_side(self, stage: int) -> int:
        """One pixel: every map is padded."""
        return 1


class ConvNeXtConfig(_StagesConfig):
    """mmpretrain's ConvNeXt with a norm for each output; defaults are ConvNeXt-T's.

    ``linear_pw_conv``: a block's two pointwise layers are linear, with weights of rank 2;
    otherwise convolutions, of rank 4. They compute the same.
    """

    type: Literal["ConvNeXt"] = "ConvNeXt"
    channels: tuple[Positive, ...] = (96, 192, 384, 768)
    depths: tuple[Positive, ...] = (3, 3, 9, 3)
    stem_patch_size: Positive = 4
    linear_pw_conv: bool = True

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return self.channels

    def smallest_side(self, stage: int) -> int:
        """Pixels that one position of the stage's map covers, in a row; nothing is padded."""
        return int(self.stem_patch_size * 2**stage)


def _backbone_type(value: Any) -> Any:
    """The tag of a backbone; bundles from before there were several recorded none."""
    return value.get("type", "ResNet") if isinstance(value, dict) else getattr(value, "type", None)


AnyBackboneConfig = Annotated[
    Annotated[ResNetConfig, Tag("ResNet")]
    | Annotated[MixVisionTransformerConfig, Tag("MixVisionTransformer")]
    | Annotated[SwinTransformerConfig, Tag("SwinTransformer")]
    | Annotated[ConvNeXtConfig, Tag("ConvNeXt")],
    Discriminator(_backbone_type),
]


class DecodeHeadConfig(Frozen):
    """What mmsegmentation's decode heads have in common. ``in_index`` names backbone outputs.

    ``input_transform="resize_concat"`` makes one feature map of several; without it a head
    takes one, and UPerHead and SegformerHead each by itself. ``norm=False``: convolutions with a
    bias instead of batch normalisation.

    ``out_channels`` is 1 for a head that distinguishes two classes by one output, None where
    there is an output for each of ``num_classes`` (which may be 1 as well). Of one output, a
    pixel is of class 1 where its sigmoid is above ``threshold``, else of class 0: the rule of
    mmsegmentation 1.2.2's ``BaseDecodeHead.__init__`` (None means 0.3) and
    ``BaseSegmentor.postprocess_result``.
    """

    type: HeadType
    in_channels: tuple[int, ...]
    in_index: tuple[int, ...]
    channels: int
    num_classes: int
    align_corners: bool = False
    input_transform: Literal["resize_concat"] | None = None
    norm: bool = True
    out_channels: Literal[1] | None = None
    threshold: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _without_fields_of_other_heads(cls, values: Any) -> Any:
        """Drop them: bundles once recorded the fields of all heads for each of them."""
        if not isinstance(values, dict):
            return values
        others = _HEAD_FIELDS - set(cls.model_fields)
        return {name: value for name, value in values.items() if name not in others}

    @property
    def outputs(self) -> int:
        """Number of channels of the logits."""
        return self.out_channels or self.num_classes

    @property
    def labels(self) -> int:
        """Number of values that a pixel's label can have: 2 of a head with one output."""
        return max(self.num_classes, 2)

    @property
    def label_threshold(self) -> float | None:
        """Probability above which a pixel is of class 1; None where the highest logit wins."""
        if self.outputs > 1:
            return None
        return BINARY_THRESHOLD if self.threshold is None else self.threshold


class UPerHeadConfig(DecodeHeadConfig):
    """UPerHead: a pyramid pooling of ``pool_scales``, and a feature pyramid."""

    type: Literal["UPerHead"] = "UPerHead"
    pool_scales: tuple[Positive, ...] = (1, 2, 3, 6)


class SegformerHeadConfig(DecodeHeadConfig):
    """SegformerHead: a 1×1 convolution of each map, and one of all of them together."""

    type: Literal["SegformerHead"] = "SegformerHead"


class FCNHeadConfig(DecodeHeadConfig):
    """FCNHead: ``num_convs`` convolutions; with ``concat_input``, one more beside the input."""

    type: Literal["FCNHead"] = "FCNHead"
    num_convs: int = 2
    kernel_size: int = 3
    concat_input: bool = True
    dilation: Positive = 1


class PSPHeadConfig(DecodeHeadConfig):
    """PSPHead: a pyramid pooling of ``pool_scales``."""

    type: Literal["PSPHead"] = "PSPHead"
    pool_scales: tuple[Positive, ...] = (1, 2, 3, 6)


class ASPPHeadConfig(DecodeHeadConfig):
    """ASPPHead (DeepLabV3): a convolution for each of ``dilations``, side by side."""

    type: Literal["ASPPHead"] = "ASPPHead"
    dilations: tuple[Positive, ...] = (1, 6, 12, 18)


class DepthwiseSeparableASPPHeadConfig(DecodeHeadConfig):
    """DepthwiseSeparableASPPHead (DeepLabV3+), which also takes the backbone's first output.

    ``c1_in_channels`` and ``c1_channels`` are the channels of that finer map before and after
    its convolution; 0 without one.
    """

    type: Literal["DepthwiseSeparableASPPHead"] = "DepthwiseSeparableASPPHead"
    dilations: tuple[Positive, ...] = (1, 6, 12, 18)
    c1_in_channels: int = 0
    c1_channels: int = 0


class QueryHeadConfig(DecodeHeadConfig):
    """What Mask2Former's and MaskDINO's heads have in common: masks and classes of queries.

    A pixel decoder of ``channels`` mixes backbone outputs by deformable attention: the ones at
    ``levels``, places in ``in_index``. A decoder of ``hidden_channels`` turns ``num_queries``
    into classes and masks of ``mask_channels``. Tensors tell all but heads and ``norm_groups``;
    of deformable attention they tell the product of heads, levels and points. ``conv`` makes all
    feed-forward networks FDConv, as the published converter does with a whole network.
    """

    num_queries: Positive = 100
    levels: tuple[int, ...] = (1, 2, 3)
    hidden_channels: Positive = 256
    mask_channels: Positive = 256
    norm_groups: Positive = 32
    encoder_layers: Positive = 6
    encoder_heads: Positive = 8
    encoder_points: Positive = 4
    encoder_feedforward: Positive = 1024
    decoder_layers: Positive = 9
    decoder_heads: Positive = 8
    decoder_feedforward: Positive = 2048
    enforce_input_proj: bool = False
    conv: FDConvConfig | None = None

    @property
    def class_outputs(self) -> int:
        """Class logits of a query."""
        return self.num_classes + 1

    @property
    def input_projection(self) -> bool:
        """Whether the decoder brings the pixel decoder's maps to its own width."""
        return self.enforce_input_proj or self.hidden_channels != self.channels

    @model_validator(mode="after")
    def _divisible(self) -> QueryHeadConfig:
        for channels, number, what in (
            (self.channels, self.encoder_heads, "encoder_heads"),
            (self.channels, self.norm_groups, "norm_groups"),
            (self.hidden_channels, self.decoder_heads, "decoder_heads"),
        ):
            if channels % number:
                raise ValueError(f"{what} must divide {channels} channels, and is {number}")
        if len(self.in_channels) != 4 or len(self.in_index) != 4:
            raise ValueError(
                f"a {self.type} takes four maps, found in_channels {self.in_channels} and "
                f"in_index {self.in_index}"
            )
        if not self.levels or list(self.levels) != list(range(4))[-len(self.levels) :]:
            raise ValueError(f"levels must be the coarsest of 0…3 in order, found {self.levels}")
        return self


class Mask2FormerHeadConfig(QueryHeadConfig):
    """Mask2FormerHead of mmdetection, also of detectron2's project.

    ``pre_norm`` normalises what a decoder layer's attention takes, not what it gives.
    """

    type: Literal["Mask2FormerHead"] = "Mask2FormerHead"
    pre_norm: bool = False

    @model_validator(mode="after")
    def _three_levels(self) -> Mask2FormerHeadConfig:
        if len(self.levels) != 3:
            raise ValueError(f"a Mask2FormerHead has three levels, found {self.levels}")
        return self


class MaskDINOHeadConfig(QueryHeadConfig):
    """MaskDINOHead. Settings by the names of its configuration where they have one.

    ``extra_levels`` is ``TOTAL_NUM_FEATURE_LEVELS`` less the maps that enter. ``feature_order``
    is the name, though ``"high2low"`` begins with the lowest resolution. ``no_object``: the class
    layer has one output more than classes. ``class_scores`` is how logits become scores: a
    softmax that ends with "no object", or sigmoids, made sharper by a softmax of ``temperature``
    unless it is None (``PANO_TRANSFORM_EVAL``).
    """

    type: Literal["MaskDINOHead"] = "MaskDINOHead"
    encoder_feedforward: Positive = 2048
    decoder_points: Positive = 4
    num_queries: Positive = 300
    extra_levels: int = Field(0, ge=0)
    feature_order: Literal["high2low", "low2high"] = "high2low"
    two_stage: bool = True
    learn_tgt: bool = False
    initialize_box_type: Literal["no", "mask2box", "bitmask"] = "no"
    no_object: bool = False
    class_scores: Literal["softmax", "sigmoid"] = "sigmoid"
    temperature: float | None = Field(0.06, gt=0)

    @property
    def class_outputs(self) -> int:
        """Class logits of a query."""
        return self.num_classes + self.no_object

    @property
    def has_query_feat(self) -> bool:
        """Whether contents of the queries are learned; else the encoder gives them."""
        return self.learn_tgt or not self.two_stage

    @model_validator(mode="after")
    def _sensible(self) -> MaskDINOHeadConfig:
        if self.class_scores == "softmax" and not self.no_object:
            raise ValueError("class_scores 'softmax' needs the output for no object")
        if not self.two_stage and self.initialize_box_type != "no":
            raise ValueError("initialize_box_type needs two_stage: single-stage boxes are learned")
        if self.hidden_channels != 256:
            raise ValueError(
                f"MaskDINO's decoder has 256 channels, found {self.hidden_channels}: its box "
                "encoding is of four times 128"
            )
        if self.extra_levels > 1 and self.feature_order == "low2high":
            raise ValueError(
                "feature_order 'low2high' with more than one extra level is not supported: "
                "MaskDINO's code mixes up their positions"
            )
        return self


_AnyHead = (
    UPerHeadConfig
    | SegformerHeadConfig
    | FCNHeadConfig
    | PSPHeadConfig
    | ASPPHeadConfig
    | DepthwiseSeparableASPPHeadConfig
    | Mask2FormerHeadConfig
    | MaskDINOHeadConfig
)
HeadConfig = Annotated[_AnyHead, Field(discriminator="type")]
HEAD_CONFIGS: dict[HeadType, type[_AnyHead]] = {
    config.model_fields["type"].default: config for config in get_args(_AnyHead)
}
_HEAD_FIELDS = {name for config in HEAD_CONFIGS.values() for name in config.model_fields}


class TestMode(Frozen):
    """How the network was tested: on whole images, or sliding a crop over them.

    ``crop_size`` and ``stride`` are (height, width) in pixels, for ``slide`` only.
    """

    __test__ = False  # not a test case, whatever pytest thinks of the name

    mode: Literal["whole", "slide"] = "whole"
    crop_size: tuple[Positive, Positive] | None = None
    stride: tuple[Positive, Positive] | None = None


class Preprocessing(Frozen):
    """From an image to the network's input: ``(image - mean) / std``, float32, band by band.

    ``mean`` and ``std`` have a value for each band the network takes. ``scale`` is the
    (long, short) pixel budget of the published keep-ratio resize, where the config has one.

    ``loading`` is how files were loaded in training:

    - ``color``: 8 bits of red, green and blue, as ``LoadImageFromFile`` does by default.
    - ``grayscale`` and ``unchanged``: as its ``color_type`` of that name, by OpenCV. A file of
      four bands is then blue, green, red, alpha.
    - ``bands``: every band of the file, in the file's order and type, as mmsegmentation's
      ``LoadSingleRSImageFromFile`` (GDAL), mmcv's ``imdecode_backend="tifffile"`` and
      ``numpy.load`` do.

    ``to_float32`` is the loader's setting: pixels become float32 before they are resized, and
    so are not rounded to their own type after it.

    ``size_divisor``: the normalised image is padded with zeros, at the right and the bottom, to
    multiples of it. ``resample`` is the library that resizes; Pillow's (detectron2) averages where
    an image shrinks, OpenCV's (mmcv) does not.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[Annotated[float, Field(gt=0)], ...] = IMAGENET_STD
    # Where False, a network that loads by OpenCV was trained on BGR. Of three bands only, as
    # mmsegmentation 1.2.2's SegDataPreProcessor has it.
    bgr_to_rgb: bool = True
    scale: tuple[int, int] | None = None
    keep_ratio: bool = True
    loading: Loading = "color"
    to_float32: bool = False
    size_divisor: Positive = 1
    resample: Literal["opencv", "pillow"] = "opencv"

    @property
    def channels(self) -> int:
        """Number of bands of an image."""
        return len(self.mean)

    @property
    def reversed(self) -> bool:
        """Whether the network takes an image's three bands in the opposite order.

        Arrays are RGB here where mmcv's are BGR; bands of files are in the file's order in both.
        """
        return self.channels == 3 and self.bgr_to_rgb == (self.loading == "bands")

    @model_validator(mode="after")
    def _matching(self) -> Preprocessing:
        if not self.mean or len(self.std) != len(self.mean):
            raise ValueError(f"there are {len(self.mean)} means and {len(self.std)} deviations")
        if self.loading == "color" and len(self.mean) != 3:
            raise ValueError(f"loading 'color' gives 3 bands, and there are {len(self.mean)} means")
        return self


class PanopticConfig(Frozen):
    """How queries' classes and masks become panoptic segments, instances, and classes.

    ``rule`` is whose: mmdetection's MaskFormerFusionHead, or the projects of detectron2
    (``MODEL.MASK_FORMER.TEST``). Names are mmdetection's; detectron2's ``OBJECT_MASK_THRESHOLD``
    is ``object_mask_thr``, its ``OVERLAP_THRESHOLD`` ``iou_thr``, ``DETECTIONS_PER_IMAGE``
    ``max_per_image``.
    """

    rule: Literal["openmmlab", "detectron2"] = "openmmlab"
    thing_classes: tuple[Annotated[int, Field(ge=0)], ...] = ()
    panoptic_on: bool = True
    instance_on: bool = False
    object_mask_thr: float = Field(0.8, ge=0, le=1)
    iou_thr: float = Field(0.8, ge=0, le=1)
    filter_low_score: bool = False
    max_per_image: Positive = 100


class SegmentorConfig(Frozen):
    """A whole segmentation network. ``palette`` holds one RGB triple per class.

    ``panoptic`` is for query heads whose answer is segments and instances; None: classes alone.
    """

    backbone: AnyBackboneConfig
    decode_head: HeadConfig
    auxiliary_head: HeadConfig | None = None
    test: TestMode = TestMode()
    preprocessing: Preprocessing = Preprocessing()
    panoptic: PanopticConfig | None = None
    classes: tuple[str, ...] = ()
    palette: tuple[Colour, ...] = ()

    @model_validator(mode="after")
    def _matching(self) -> SegmentorConfig:
        if self.panoptic is not None and not isinstance(self.decode_head, QueryHeadConfig):
            raise ValueError(
                f"a {self.decode_head.type} gives no segments: 'panoptic' must be null"
            )
        bands, channels = self.preprocessing.channels, self.backbone.in_channels
        if bands != channels:
            raise ValueError(f"the backbone takes {channels} bands, the preprocessing {bands}")
        return self


class BoxCoderConfig(Frozen):
    """DeltaXYWHBBoxCoder: ``delta * stds + means`` are shifts and log-scales of a box."""

    means: Four = (0.0, 0.0, 0.0, 0.0)
    stds: Four = (1.0, 1.0, 1.0, 1.0)


class FPNConfig(Frozen):
    """The feature pyramid. Levels past the backbone's are the last one, every other pixel."""

    in_channels: tuple[int, ...] = (256, 512, 1024, 2048)
    out_channels: int = 256
    num_outs: int = 5


class RPNHeadConfig(Frozen):
    """The region proposal head, and the anchors it shifts: one set per pyramid level.

    An anchor of level ``i`` is ``strides[i] * scale`` pixels wide and high before ``ratios``,
    which are height / width.
    """

    feat_channels: int = 256
    scales: tuple[float, ...] = (8.0,)
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    bbox_coder: BoxCoderConfig = BoxCoderConfig()

    @property
    def num_anchors(self) -> int:
        """Anchors at each position."""
        return len(self.scales) * len(self.ratios)


class RoIConfig(Frozen):
    """How a head's features are cut out: SingleRoIExtractor with RoIAlign, aligned.

    A region smaller than twice ``finest_scale`` (the square root of its area, in pixels) is
    cut out of the first of ``featmap_strides``' levels, and one level further per doubling.
    ``sampling_ratio=0`` takes as many samples as pixels of the level fall in a bin.
    """

    output_size: int = 7
    featmap_strides: tuple[int, ...] = (4, 8, 16, 32)
    finest_scale: int = 56
    sampling_ratio: int = Field(default=0, ge=0)


class BoxHeadConfig(Frozen):
    """Shared2FCBBoxHead: ``num_shared_fcs`` linear layers, then classes and box deltas."""

    num_classes: int = 80
    fc_out_channels: int = 1024
    num_shared_fcs: int = 2
    reg_class_agnostic: bool = False
    bbox_coder: BoxCoderConfig = BoxCoderConfig(stds=(0.1, 0.1, 0.2, 0.2))
    roi: RoIConfig = RoIConfig()


class MaskHeadConfig(Frozen):
    """FCNMaskHead: ``num_convs`` convolutions, a 2×2 deconvolution, a mask for each class."""

    num_classes: int = 80
    num_convs: int = 4
    conv_kernel_size: int = 3
    conv_out_channels: int = 256
    class_agnostic: bool = False
    roi: RoIConfig = RoIConfig(output_size=14)


class RPNTestConfig(Frozen):
    """mmdetection's ``test_cfg.rpn``: per level the best ``nms_pre``, then NMS per level.

    Boxes no wider or no higher than ``min_bbox_size`` pixels are left out; below 0, none are.
    """

    nms_pre: Positive = 1000
    max_per_img: Positive = 1000
    nms_iou_threshold: float = Field(default=0.7, ge=0, le=1)
    min_bbox_size: float = 0.0


class RCNNTestConfig(Frozen):
    """mmdetection's ``test_cfg.rcnn``: boxes above ``score_thr``, then NMS per class.

    ``mask_thr_binary`` is the probability from which a pixel is the object's, masks only.
    """

    score_thr: float = Field(default=0.05, ge=0, le=1)
    nms_iou_threshold: float = Field(default=0.5, ge=0, le=1)
    max_per_img: Positive = 100
    mask_thr_binary: float = Field(default=0.5, ge=0, le=1)


class DetectorTestConfig(Frozen):
    """How boxes are chosen, in each of the two stages."""

    rpn: RPNTestConfig = RPNTestConfig()
    rcnn: RCNNTestConfig = RCNNTestConfig()


class DetectorConfig(Frozen):
    """Faster R-CNN, or with a ``mask_head`` Mask R-CNN. One RGB triple per class in ``palette``."""

    backbone: AnyBackboneConfig
    neck: FPNConfig = FPNConfig()
    rpn_head: RPNHeadConfig = RPNHeadConfig()
    bbox_head: BoxHeadConfig = BoxHeadConfig()
    mask_head: MaskHeadConfig | None = None
    test: DetectorTestConfig = DetectorTestConfig()
    preprocessing: Preprocessing = Preprocessing(scale=PUBLISHED_SCALE)
    classes: tuple[str, ...] = ()
    palette: tuple[Colour, ...] = ()

    @property
    def mask_size(self) -> int:
        """Height and width of a predicted mask; 0 without a mask head."""
        return 0 if self.mask_head is None else 2 * self.mask_head.roi.output_size

    @property
    def published_size(self) -> tuple[int, int]:
        """(height, width) in pixels of a landscape image, resized and padded as published."""
        long, short = self.preprocessing.scale or PUBLISHED_SCALE
        height, width = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in (short, long))
        return height, width
