"""A state dict under one set of names, and the convolutions that its names and shapes tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fdconv_deploy.checkpoints.settings import Framework
from fdconv_deploy.config import AttentionNorm
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.nn.band_modulation import SavedMasks

Kind = Literal["segmentor", "detector", "classifier", "backbone", "unknown"]
Shapes = Mapping[str, Tensor]

_DETECTOR = ("neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.", "panoptic_head.")
_BACKBONE_NAME = re.compile(
    r"(?:backbone\.)?(?:layer1\.0|layers\.0\.0\.projection|patch_embed\.projection"
    r"|downsample_layers\.0)\."
)
_DYNAMIC = ".KSM_Global.fc.weight"
_BANDS = "FBM.freq_weight_conv_list."
# Buffers of an FDConv layer that the published class does not save, and some copies do.
SAVED_BUFFERS = ("indices", "FBM.cached_masks")
NOT_PARAMETERS = (
    "running_mean", "running_var", "num_batches_tracked", "indices", "cached_masks",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A convolution, as its tensors show it; of a plain one, all after ``dynamic`` is empty.

    ``attentions`` is kernel_num × param_ratio, the length of the kernel attention, and
    ``hidden`` the channels of the attention's hidden layer. What is named as a field of
    :class:`FDConvConfig` is that field, None where the file does not show it. ``masks`` and
    ``indices`` are there if the file saves them with their values.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    dynamic: bool
    attentions: int = 0
    hidden: int = 0
    param_ratio: int | None = None
    spectrum: tuple[int, ...] = ()
    convert_param: bool = True
    linear_mode: bool = False
    use_ksm_local: bool = False
    ksm_only_kernel_att: bool = False
    bands: int = 0
    spatial_group: int = 0
    spatial_kernel: int = 0
    ksm_global_norm: AttentionNorm = "batch"
    masks: SavedMasks | None = field(default=None, compare=False, repr=False)
    indices: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def rows(self) -> int:
        """Rows of the kernel matrix, out × kernel height."""
        return self.out_channels * self.kernel[0]

    @property
    def columns(self) -> int:
        """Columns of the kernel matrix, in × kernel width."""
        return self.in_channels * self.kernel[1]

    @property
    def bins(self) -> int:
        """Bins of the half spectrum: rows × (columns / 2 + 1)."""
        return self.rows * (self.columns // 2 + 1)

    @property
    def kept_bins(self) -> int:
        """Bins that are stored: fewer than `bins` if param_reduction < 1."""
        return self.spectrum[1] if len(self.spectrum) == 3 else self.bins


def kind_of(state: Shapes) -> Kind:
    """What kind of network has these names."""
    if any(key.startswith("decode_head.") for key in state):
        return "segmentor"
    if any(key.startswith(_DETECTOR) for key in state):
        return "detector"
    if any(map(_BACKBONE_NAME.match, state)):
        heads = ("fc.", "head.", "cls_head.")
        return "classifier" if any(key.startswith(heads) for key in state) else "backbone"
    return "unknown"


def backbone_prefix(state: Shapes) -> str:
    """``"backbone."`` if names carry it, else nothing."""
    return "backbone." if any(key.startswith("backbone.") for key in state) else ""


def part(state: Shapes, prefix: str) -> dict[str, Tensor]:
    """The tensors under ``prefix``, their names without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def dynamic_names(state: Shapes) -> list[str]:
    """Names of the FDConv layers, in the file's order; FDLinear's attention is 2-d."""
    return [
        key[: -len(_DYNAMIC)] for key, v in state.items() if key.endswith(_DYNAMIC) and v.ndim == 4
    ]


def as_published(state: Shapes) -> dict[str, Tensor]:
    """A state dict in the published names and layout, where copies have others that are equal.

    The attention's normalisation may be called ``norm``, and the spectrum be one complex tensor.
    """
    names = dynamic_names(state)
    norms = {f"{name}.KSM_Global.norm.": f"{name}.KSM_Global.bn." for name in names}
    spectra = {f"{name}.dft_weight" for name in names}
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        owner, _, last = key.rpartition(".")
        published = f"{norms[f'{owner}.']}{last}" if f"{owner}." in norms else key
        if key in spectra and value.is_complex():
            value = torch.view_as_real(value.contiguous())
        result[key if published in state else published] = value
    return result


def parameters(state: Shapes) -> int:
    """How many numbers are trained: all but normalisation statistics."""
    return sum(v.numel() for k, v in state.items() if k.rpartition(".")[2] not in NOT_PARAMETERS)


def conv_layers(state: Shapes, names: re.Pattern[str] | None = None) -> list[Layer]:
    """All 2-d convolutions, in the file's order, attention's own ones left out.

    With ``names``, the layers of these names, linear ones as 1×1 convolutions.
    """
    dynamic = set(dynamic_names(state))
    ranks = (4,) if names is None else (2, 4)
    found: dict[str, Layer] = {}
    for key, value in state.items():
        owner = module = key.rpartition(".")[0]
        for _ in range(4):  # as deep as an FDConv layer's tensors lie
            if owner not in dynamic:
                owner = owner.rpartition(".")[0]
        name = owner if owner in dynamic else module
        if name in found or (names is not None and not names.fullmatch(name)):
            continue
        if owner in dynamic:
            found[name] = _dynamic_layer(state, name)
        elif key.endswith(".weight") and value.ndim in ranks:
            out, into, *kernel = value.shape
            height, width = kernel or (1, 1)
            found[name] = Layer(name, into, out, (height, width), dynamic=False)
    return list(found.values())


def shape_of(state: Shapes, key: str, rank: int, *, owner: str) -> tuple[int, ...]:
    """The shape of the tensor ``key`` of a network's part ``owner``."""
    tensor = state.get(key)
    if tensor is None or tensor.ndim != rank:
        found = "is not there" if tensor is None else f"has shape {tuple(tensor.shape)}"
        raise CheckpointError(
            f"{owner}.{key} {found}. Expected a tensor of rank {rank}; the file may be cut, or of "
            "another version of this network."
        )
    return tuple(tensor.shape)


def output_features(state: Shapes, name: str, *, owner: str) -> int:
    """Features that the layer ``name`` of ``owner`` makes, be it linear or FDConv."""
    layers = conv_layers(state, re.compile(re.escape(name)))
    if not layers:
        raise CheckpointError(f"{owner}.{name} is not there. The file may be cut.")
    return layers[0].out_channels


def numbered(state: Shapes, prefix: str, *, owner: str) -> int:
    """How many numbered modules there are under ``owner.prefix``."""
    found = {key.split(".")[0] for key in part(state, f"{prefix}.")}
    numbers = sorted(int(name) for name in found if name.isdigit())
    if not numbers or numbers != list(range(len(numbers))):
        raise CheckpointError(
            f"{owner}.{prefix} has parts {numbers}. Expected them numbered from 0 without a gap: "
            "some are missing, so the file may be cut."
        )
    return len(numbers)


def _dynamic_layer(state: Shapes, name: str) -> Layer:
    own = part(state, f"{name}.")
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    first = shapes["KSM_Global.fc.weight"]
    if 0 in first:
        raise _misfit(name, f"KSM_Global.fc.weight has shape {first}, expected (hidden, in, 1, 1)")
    hidden, into = first[:2]
    spectrum = shapes.get("dft_weight", ())
    out, kernel = _out_and_kernel(state, name, into, shapes)
    local = shapes.get("KSM_Local.conv.weight")
    if local is not None and local[0] != out * kernel[0] * kernel[1]:
        needed = f"{out}·{kernel[0]}·{kernel[1]}"
        raise _misfit(name, f"KSM_Local makes {local[0]} numbers, {needed} needed")
    bands = [key for key in own if key.startswith(_BANDS) and key.endswith(".weight")]
    group, _, spatial, _ = own[bands[0]].shape if bands else (0, 0, 0, 0)
    stored = {key.rpartition(".")[2] for key in own if key.startswith("KSM_Global.bn.")}
    norm: AttentionNorm = "group" if stored else "none"
    masks, indices = (own.get(buffer) for buffer in ("FBM.cached_masks", "indices"))
    return Layer(
        name,
        into,
        out,
        kernel,
        dynamic=True,
        attentions=shapes.get("KSM_Global.kernel_fc.weight", (1,))[0],
        hidden=hidden,
        param_ratio=spectrum[0] if spectrum else None,
        spectrum=spectrum,
        convert_param=bool(spectrum),
        linear_mode=not spectrum and len(shapes["weight"]) == 2,
        use_ksm_local=local is not None,
        ksm_only_kernel_att="KSM_Global.filter_fc.weight" not in own,
        bands=len(bands),
        spatial_group=group,
        spatial_kernel=spatial,
        ksm_global_norm="batch" if stored & {"running_mean", "running_var"} else norm,
        masks=None if masks is None or masks.is_meta else _saved_masks(name, masks),
        indices=None if indices is None or indices.is_meta else indices,
    )


def _out_and_kernel(
    state: Shapes, name: str, into: int, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, tuple[int, int]]:
    """Output channels and kernel size of a dynamic layer that takes ``into`` channels."""
    spectrum, weight = shapes.get("dft_weight", ()), shapes.get("weight", ())
    out = shapes.get("KSM_Global.filter_fc.weight", (0,))[0]
    if len(spectrum) == 4:
        # (groups, rows, frequencies, 2). An even number of columns and the odd one after it have
        # as many frequencies; columns are a multiple of the channels.
        rows, columns = spectrum[1], 2 * (spectrum[2] - 1)
        columns += 1 if columns % into and not (columns + 1) % into else 0
        width = columns // into
        # Only square kernels and those of height 1 have output channels that only this shows.
        height = rows // out if out else width
        out = out or rows // max(width, 1)
        if out * height != rows or into * width != columns or not width:
            raise _misfit(
                name, f"dft_weight has shape {spectrum}, KSM_Global takes {into} channels"
            )
        return out, (height, width)
    if len(spectrum) == 3:
        # Bins alone: the channels, if nothing in the layer shows them, are those of the
        # normalisation that follows, and the kernel's taps are those attended to.
        owner, _, last = name.rpartition(".")
        if not out:
            norm = f"{int(last) + 1}" if last.isdigit() else last.replace("conv", "bn")
            if norm == last or f"{owner}.{norm}.weight" not in state:
                raise _misfit(name, "nothing shows its number of output channels")
            out = int(state[f"{owner}.{norm}.weight"].shape[0])
        if "KSM_Local.conv.weight" in shapes:
            taps = shapes["KSM_Local.conv.weight"][0] // max(out, 1)
        elif "KSM_Global.filter_fc.weight" in shapes:
            taps = shapes.get("KSM_Global.spatial_fc.weight", (1,))[0]
        else:  # nothing attends to taps: the layer's place in a ResNet's block decides
            bottleneck = any(key.startswith(f"{owner}.conv3.") for key in state)
            taps = 1 if bottleneck and last in ("conv1", "conv3") else 9
        side = round(max(taps, 1) ** 0.5)
        return out, (side, side)
    if len(weight) in (2, 4):
        return weight[0], (weight[2], weight[3]) if len(weight) == 4 else (1, 1)
    raise _misfit(name, "it has attention but no dft_weight and no weight")


def _saved_masks(name: str, buffer: Tensor) -> SavedMasks:
    try:
        return SavedMasks.read(buffer)
    except ValueError as error:
        raise _misfit(name, f"its FBM.cached_masks cannot be read: {error}") from None


def _misfit(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"The FDConv layer {name} does not fit together: {what}. Expected the tensors of the "
        "published FDConv layer; the file may be of another version or damaged."
    )


# Tensors of a framework's network → the same under OpenMMLab's names, which networks here have

_DETECTRON2 = re.compile(r"(?:backbone\.)?(?:stem\.conv1|res2\.0\.conv1|patch_embed\.proj)\.")
_HEAD = "sem_seg_head."
Rename = tuple[str, str | Callable[[re.Match[str]], str]]
# mmdetection's Mask2Former; 2.x's layers list attentions and feed-forward networks.
_PANOPTIC_HEAD: list[Rename] = [
    (r"^panoptic_head\.", "decode_head."),
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.0\.", r"\1.cross_attn."),
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.1\.", r"\1.self_attn."),
    (r"(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"(\.layers\.\d+)\.ffns\.0\.", r"\1.ffn."),
]


def framework_of(state: Shapes) -> Framework:
    """Whose names these are: detectron2's and its projects', or OpenMMLab's."""
    own = any(key.startswith(_HEAD) or _DETECTRON2.match(key) for key in state)
    return "detectron2" if own else "OpenMMLab"


def in_openmmlab_names(state: Shapes) -> dict[str, Tensor]:
    """A network's tensors under the names of OpenMMLab and of the published FDConv layer.

    Mask2Former's head is ``decode_head`` as in mmsegmentation, where mmdetection has
    ``panoptic_head``.
    """
    if framework_of(state) == "OpenMMLab":
        older = any(key.startswith("panoptic_head.") for key in state)
        return as_published(_renamed(state, _PANOPTIC_HEAD) if older else state)
    prefix = backbone_prefix(state)
    rest = {key: value for key, value in state.items() if not key.startswith(_HEAD)}
    backbone = backbone_from_detectron2(part(rest, prefix))
    head = head_from_detectron2(part(state, _HEAD))
    return as_published(
        {f"{prefix}{key}": value for key, value in backbone.items()}
        | {f"decode_head.{key}": value for key, value in head.items()}
        | {key: value for key, value in rest.items() if not key.startswith(prefix)}
    )


def _renamed(state: Shapes, renames: Sequence[Rename]) -> dict[str, Tensor]:
    """The tensors under names to which all ``renames`` were applied, one after another."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


_BACKBONE: list[Rename] = [
    # ResNet: res2 is layer1, and a convolution holds its norm.
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.conv1\.", "conv1."),
    (r"^res(\d)\.", lambda match: f"layer{int(match[1]) - 1}."),
    (r"^(layer\d\.\d+)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"^(layer\d\.\d+)\.shortcut\.", r"\1.downsample.0."),
    (r"^(layer\d\.\d+)\.conv(\d)\.norm\.", r"\1.bn\2."),
    # Swin.
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^layers\.(\d+)\.(blocks\.\d+)\.attn\.", r"stages.\1.\2.attn.w_msa."),
    (r"^layers\.(\d+)\.(blocks\.\d+)\.mlp\.fc1\.", r"stages.\1.\2.ffn.layers.0.0."),
    (r"^layers\.(\d+)\.(blocks\.\d+)\.mlp\.fc2\.", r"stages.\1.\2.ffn.layers.1."),
    (r"^layers\.(\d+)\.(blocks\.\d+\.norm\d|downsample)\.", r"stages.\1.\2."),
]


def backbone_from_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a ResNet's or a Swin's tensors, of names without ``backbone.``.

    They compute the same: a frozen BatchNorm, which gets the counter that others have, is one in
    evaluation; Swin differs in the order of merged patches, `SwinTransformerConfig.merging`.
    """
    renamed = _renamed(state, _BACKBONE)
    for name in [name for name in renamed if name.endswith(".running_var")]:
        counter = torch.zeros((), dtype=torch.int64, device=renamed[name].device)
        renamed.setdefault(name.replace(".running_var", ".num_batches_tracked"), counter)
    return renamed


_PIXEL_DECODER: list[Rename] = [
    # Files from before the head had a version of its own leave the inner name out, or double it.
    (r"^pixel_decoder\.pixel_decoder\.", "pixel_decoder."),
    (r"^(input_proj|transformer|mask_features|adapter_1|layer_1)\b", r"pixel_decoder.\1"),
    (r"\binput_proj\.(\d+)\.0\.", r"input_convs.\1.conv."),
    (r"\binput_proj\.(\d+)\.1\.", r"input_convs.\1.gn."),
    (r"\btransformer\.level_embed$", "level_encoding.weight"),
    (r"\btransformer\.encoder\.", "encoder."),
    (r"\.norm1\.", ".norms.0."),
    (r"\.norm2\.", ".norms.1."),
    (r"\.linear1\.", ".ffn.layers.0.0."),
    (r"\.linear2\.", ".ffn.layers.1."),
    (r"\bmask_features\.", "mask_feature."),
    (r"\badapter_1\.norm\.", "lateral_convs.0.gn."),
    (r"\badapter_1\.", "lateral_convs.0.conv."),
    (r"\blayer_1\.norm\.", "output_convs.0.gn."),
    (r"\blayer_1\.", "output_convs.0.conv."),
]
_LAYER = r"transformer_decoder.layers.\1."
_MASK2FORMER: list[Rename] = [
    (r"^transformer_cross_attention_layers\.(\d+)\.multihead_attn\.", _LAYER + "cross_attn.attn."),
    (r"^transformer_self_attention_layers\.(\d+)\.self_attn\.", _LAYER + "self_attn.attn."),
    (r"^transformer_cross_attention_layers\.(\d+)\.norm\.", _LAYER + "norms.0."),
    (r"^transformer_self_attention_layers\.(\d+)\.norm\.", _LAYER + "norms.1."),
    (r"^transformer_ffn_layers\.(\d+)\.norm\.", _LAYER + "norms.2."),
    (r"^transformer_ffn_layers\.(\d+)\.linear1\.", _LAYER + "ffn.layers.0.0."),
    (r"^transformer_ffn_layers\.(\d+)\.linear2\.", _LAYER + "ffn.layers.1."),
    (r"^decoder_norm\.", "transformer_decoder.post_norm."),
    (r"^class_embed\.", "cls_embed."),
    (r"^mask_embed\.layers\.0\.", "mask_embed.0."),
    (r"^mask_embed\.layers\.1\.", "mask_embed.2."),
    (r"^mask_embed\.layers\.2\.", "mask_embed.4."),
    (r"^static_query\.", "query_feat."),
]
_PREDICTOR: list[Rename] = [(r"^input_proj\.", "decoder_input_projs.")]


def head_from_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a head's tensors, of names without ``sem_seg_head.``.

    The pixel decoder, whose tensors may lack its name, and Mask2Former's decoder get mmdetection's
    names; MaskDINO's decoder keeps its own, of which the heads here have all.
    """
    predictor = part(state, "predictor.")
    pixels = {key: value for key, value in state.items() if not key.startswith("predictor.")}
    is_maskdino = any(key.startswith("decoder.layers.") for key in predictor)
    renames = _PREDICTOR if is_maskdino else [*_MASK2FORMER, *_PREDICTOR]
    return _renamed(pixels, _PIXEL_DECODER) | _renamed(predictor, renames)
