"""A state dict → the convolution layers in it, from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fdconv_deploy.config import AttentionNorm
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.nn.band_modulation import SavedMasks

Kind = Literal["segmentor", "detector", "classifier", "backbone", "unknown"]
Shapes = Mapping[str, Tensor]

_DETECTOR = ("neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.", "panoptic_head.")
_BACKBONES = tuple(
    f"{owner}{name}"
    for owner in (".", ".backbone.")
    for name in (
        "layer1.0.",
        "layers.0.0.projection.",
        "patch_embed.projection.",
        "downsample_layers.0.",
    )
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
    """A convolution, as its tensors show it.

    ``attentions`` is kernel_num × param_ratio, the length of the kernel attention, and
    ``hidden`` the channels of the attention's hidden layer; both 0 for a plain layer, as
    everything after them. What is named as a field of :class:`FDConvConfig` is that field, None
    where the file does not show it. ``masks`` and ``indices`` are there if the file saves them,
    and not without their values.
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
    def columns(self) -> int:
        """Columns of the kernel matrix, in × kernel width."""
        return self.in_channels * self.kernel[1]

    @property
    def bins(self) -> int:
        """Bins of the half spectrum: rows × (columns / 2 + 1)."""
        rows = self.out_channels * self.kernel[0]
        return rows * (self.columns // 2 + 1)

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
    if any(f".{key}".startswith(_BACKBONES) for key in state):
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


def conv_layers(state: Shapes) -> list[Layer]:
    """All 2-d convolutions, in the file's order, attention's own ones left out.

    Raises:
        CheckpointError: an FDConv layer's tensors don't fit each other.
    """
    dynamic = set(dynamic_names(state))
    found: dict[str, Layer] = {}
    for key, value in state.items():
        owner = module = key.rpartition(".")[0]
        while owner and owner not in dynamic:
            owner = owner.rpartition(".")[0]
        if owner:
            if owner not in found:
                found[owner] = _dynamic_layer(state, owner)
        elif key.endswith(".weight") and value.ndim == 4:
            out, into, height, width = value.shape
            found[module] = Layer(module, into, out, (height, width), dynamic=False)
    return list(found.values())


def layers_named(state: Shapes, names: re.Pattern[str]) -> list[Layer]:
    """The layers of these names, linear ones as 1×1 convolutions, in the file's order.

    Raises:
        CheckpointError: an FDConv layer's tensors don't fit each other.
    """
    dynamic = set(dynamic_names(state))
    found: dict[str, Layer] = {}
    for key, value in state.items():
        match = names.match(key)
        if match is None or match[0] in found:
            continue
        if match[0] in dynamic:
            found[match[0]] = _dynamic_layer(state, match[0])
        elif key == f"{match[0]}.weight" and value.ndim in (2, 4):
            out, into, *kernel = value.shape
            height, width = kernel or (1, 1)
            found[match[0]] = Layer(match[0], into, out, (height, width), dynamic=False)
    return list(found.values())


def shape_of(state: Shapes, key: str, rank: int, *, owner: str, advice: str) -> tuple[int, ...]:
    """The shape of a tensor that has to be there.

    Args:
        state: names → tensors of a part of a network.
        key: the tensor's name in it.
        rank: the dimensions it has to have.
        owner, advice: the part's name, and how the sentence ends where the tensor is missing.

    Raises:
        CheckpointError: the tensor is missing or has another rank.
    """
    tensor = state.get(key)
    if tensor is None or tensor.ndim != rank:
        found = "is not there" if tensor is None else f"has shape {tuple(tensor.shape)}"
        raise CheckpointError(f"{owner}.{key} {found}. Expected a tensor of rank {rank}{advice}")
    return tuple(tensor.shape)


def output_features(state: Shapes, name: str, *, owner: str, advice: str) -> int:
    """Features that a layer which has to be there makes, be it linear or FDConv; see `shape_of`."""
    layers = layers_named(state, re.compile(re.escape(name) + r"(?=\.)"))
    if not layers:
        raise CheckpointError(f"{owner}.{name} is not there{advice}")
    return layers[0].out_channels


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
