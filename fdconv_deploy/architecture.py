"""What a segmentation network is made of, as plain data.

These models are what a checkpoint is told to be, what a network is built from and
what a bundle's manifest records. Nothing here imports torch. Names and defaults are
those of the published FDConv code and of mmsegmentation's ResNet and decode heads.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Act = Literal["sigmoid", "tanh", "softmax"]
HeadType = Literal["UPerHead", "FCNHead", "PSPHead", "ASPPHead", "DepthwiseSeparableASPPHead"]
# What normalises the hidden layer of the global attention: the published BatchNorm or, as in
# copies that train with one image a batch, GroupNorm(1, C), or nothing.
AttentionNorm = Literal["batch", "group", "none"]

RESNET_BLOCKS: dict[int, tuple[str, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}

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
    did, whose comparison takes signed row frequencies (see :func:`own_size_masks`).
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
    """A ResNet whose blocks' convolutions are FDConv layers (``conv``) or plain (``None``).

    ``strides`` and ``dilations`` have one entry per stage. ``contract_dilation`` halves
    the dilation of a dilated stage's first block, as in mmsegmentation; ``multi_grid`` gives
    the dilation of each block of the last stage instead.
    """

    depth: int = 50
    in_channels: int = 3
    base_channels: int = 64
    stem_channels: int | None = None
    num_stages: int = Field(4, ge=1, le=4)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    dilations: tuple[int, ...] = (1, 1, 1, 1)
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    style: Literal["pytorch", "caffe"] = "pytorch"
    deep_stem: bool = False
    avg_down: bool = False
    contract_dilation: bool = False
    multi_grid: tuple[int, ...] | None = None
    conv: FDConvConfig | None = FDConvConfig()


class HeadConfig(Frozen):
    """A decode head of mmsegmentation. ``in_index`` names backbone outputs.

    ``input_transform="resize_concat"`` makes one feature map of several; without it a head
    takes one, and UPerHead each by itself. ``norm=False``: convolutions with a bias instead
    of batch normalisation. The fields after it belong to some types only: ``pool_scales`` to
    UPerHead and PSPHead; ``num_convs``, ``kernel_size``, ``concat_input``, ``dilation`` to
    FCNHead; ``dilations`` to both ASPP heads; ``c1_in_channels`` (0: no finer map) and
    ``c1_channels`` to DepthwiseSeparableASPPHead.
    """

    type: HeadType
    in_channels: tuple[int, ...]
    in_index: tuple[int, ...]
    channels: int
    num_classes: int
    align_corners: bool = False
    input_transform: Literal["resize_concat"] | None = None
    norm: bool = True
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    num_convs: int = 2
    kernel_size: int = 3
    concat_input: bool = True
    dilation: int = 1
    dilations: tuple[int, ...] = (1, 6, 12, 18)
    c1_in_channels: int = 0
    c1_channels: int = 0


class TestMode(Frozen):
    """How the network was tested: on whole images, or sliding a crop over them.

    ``crop_size`` and ``stride`` are (height, width) in pixels, for ``slide`` only.
    """

    __test__ = False  # not a test case, whatever pytest thinks of the name

    mode: Literal["whole", "slide"] = "whole"
    crop_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None


class Preprocessing(Frozen):
    """From an RGB uint8 image to the network's input: ``(rgb - mean) / std``, float32.

    ``scale`` is the (long, short) pixel budget of the published keep-ratio resize, when
    the checkpoint's config told one.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    # False when the network was trained on BGR: channels are then swapped before mean/std.
    bgr_to_rgb: bool = True
    scale: tuple[int, int] | None = None
    keep_ratio: bool = True


class Architecture(Frozen):
    """A whole segmentation network. ``palette`` holds one RGB triple per class."""

    backbone: BackboneConfig
    decode_head: HeadConfig
    auxiliary_head: HeadConfig | None = None
    test: TestMode = TestMode()
    preprocessing: Preprocessing = Preprocessing()
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
