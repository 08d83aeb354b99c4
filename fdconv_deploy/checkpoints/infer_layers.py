"""A state dict → the convolution layers in it, from names and shapes alone."""

from __future__ import annotations

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
_DYNAMIC = ".KSM_Global.fc.weight"
_BANDS = ".FBM.freq_weight_conv_list."
# Buffers of an FDConv layer that the published class does not save, and some copies do.
SAVED_BUFFERS = ("indices", "FBM.cached_masks")
NOT_PARAMETERS = (
    "running_mean", "running_var", "num_batches_tracked", "indices", "cached_masks",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A convolution as its tensors tell it.

    ``attentions`` is kernel_num × param_ratio, the length of the kernel attention, and
    ``hidden`` the channels of the attention's hidden layer; both 0 for a plain layer, as
    everything after them. ``ratio`` is None when the file does not tell param_ratio. ``norm`` is
    that of the attention's hidden layer. ``masks`` and ``indices`` are there if the file saves
    them, and not without their values.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    dynamic: bool
    attentions: int = 0
    hidden: int = 0
    ratio: int | None = None
    spectrum: tuple[int, ...] = ()
    converted: bool = True
    linear: bool = False
    local: bool = False
    only_kernel: bool = False
    bands: int = 0
    spatial_group: int = 0
    spatial_kernel: int = 0
    norm: AttentionNorm = "batch"
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
    if any(f".{key}".startswith((".layer1.0.", ".backbone.layer1.0.")) for key in state):
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
    """Names of the FDConv layers, in the file's order. (FDLinear's attention is 2-d.)"""
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
    names = dict.fromkeys(dynamic_names(state))
    inside = tuple(f"{name}.{inner}" for name in names for inner in ("KSM_", "FBM."))
    found: dict[str, Layer] = {}
    for key, value in state.items():
        owner = key.rpartition(".")[0]
        dynamic = _owner(key, names)
        if dynamic is not None:
            if dynamic not in found:
                found[dynamic] = _dynamic_layer(state, dynamic)
        elif key.endswith(".weight") and value.ndim == 4 and not key.startswith(inside):
            out, into, height, width = value.shape
            found[owner] = Layer(owner, into, out, (height, width), dynamic=False)
    return list(found.values())


def _owner(key: str, names: Mapping[str, None]) -> str | None:
    for mark in (
        ".KSM_Global.", ".KSM_Local.", ".FBM.", ".dft_weight", ".weight", ".bias", ".indices",
    ):  # fmt: skip
        name, found, _ = key.partition(mark)
        if found and name in names:
            return name
    return None


def _dynamic_layer(state: Shapes, name: str) -> Layer:
    def shape(suffix: str) -> tuple[int, ...] | None:
        tensor = state.get(f"{name}.{suffix}")
        return None if tensor is None else tuple(tensor.shape)

    hidden, into = _known(name, "KSM_Global.fc.weight", shape("KSM_Global.fc.weight"))[:2]
    attentions = (shape("KSM_Global.kernel_fc.weight") or (1,))[0]
    spectrum, weight = shape("dft_weight"), shape("weight")
    taps = (shape("KSM_Global.spatial_fc.weight") or (1,))[0]
    only_kernel = shape("KSM_Global.filter_fc.weight") is None
    local = shape("KSM_Local.conv.weight")
    ratio: int | None = None
    kernel: tuple[int, int]
    if spectrum is not None and len(spectrum) == 4:
        ratio = spectrum[0]
        columns = _columns(spectrum[2], into)
        width = columns // into
        # Only square kernels and those of height 1 have an out count told by nothing else.
        out = (shape("KSM_Global.filter_fc.weight") or (0,))[0]
        height = spectrum[1] // out if out else width
        out = out or spectrum[1] // max(width, 1)
        kernel = (height, width)
        if out * height != spectrum[1] or into * width != columns or not width:
            raise _misfit(
                name, f"dft_weight has shape {spectrum}, KSM_Global takes {into} channels"
            )
    elif spectrum is not None and len(spectrum) == 3:
        ratio = spectrum[0]
        out = (shape("KSM_Global.filter_fc.weight") or (0,))[0] or _out_channels(state, name)
        if local is not None:
            side = _square_root(local[0] // max(out, 1))
        else:
            side = _side_in_resnet(state, name) if only_kernel else _square_root(taps)
        kernel = (side, side)
    elif weight is not None and len(weight) == 4:
        out, kernel = weight[0], (weight[2], weight[3])
    elif weight is not None and len(weight) == 2:
        out, kernel = weight[0], (1, 1)
    else:
        raise _misfit(name, "it has attention but no dft_weight and no weight")
    if local is not None and local[0] != out * kernel[0] * kernel[1]:
        raise _misfit(
            name, f"KSM_Local makes {local[0]} numbers, {out}·{kernel[0]}·{kernel[1]} needed"
        )
    bands = [key for key in state if key.startswith(name + _BANDS) and key.endswith(".weight")]
    group, _, spatial, _ = state[bands[0]].shape if bands else (0, 0, 0, 0)
    return Layer(
        name,
        into,
        out,
        kernel,
        dynamic=True,
        attentions=attentions,
        hidden=hidden,
        ratio=ratio,
        spectrum=spectrum or (),
        converted=spectrum is not None,
        linear=spectrum is None and weight is not None and len(weight) == 2,
        local=local is not None,
        only_kernel=only_kernel,
        bands=len(bands),
        spatial_group=group,
        spatial_kernel=spatial,
        norm=_norm(state, name),
        masks=_saved_masks(state, name),
        indices=_with_values(state.get(f"{name}.indices")),
    )


def _columns(frequencies: int, channels: int) -> int:
    """Columns of a kernel matrix with so many in its half spectrum: a multiple of channels.

    An even number of columns and the odd one after it have as many.
    """
    even = 2 * (frequencies - 1)
    return even + 1 if even % channels and not (even + 1) % channels else even


def _norm(state: Shapes, name: str) -> AttentionNorm:
    """What normalises the attention's hidden layer, from what is stored of it."""
    stored = part(state, f"{name}.KSM_Global.bn.")
    if "running_mean" in stored or "running_var" in stored:
        return "batch"
    return "group" if stored else "none"


def _saved_masks(state: Shapes, name: str) -> SavedMasks | None:
    buffer = _with_values(state.get(f"{name}.FBM.cached_masks"))
    if buffer is None:
        return None
    try:
        return SavedMasks.read(buffer)
    except ValueError as error:
        raise _misfit(name, f"its FBM.cached_masks cannot be read: {error}") from None


def _with_values(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None or buffer.is_meta else buffer


def _known(name: str, suffix: str, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    if shape is None or len(shape) != 4:
        raise _misfit(name, f"{suffix} has shape {shape}, expected (hidden, in, 1, 1)")
    return shape


def _out_channels(state: Shapes, name: str) -> int:
    """Of a layer that does not tell itself: the size of the normalisation that follows it."""
    owner, _, last = name.rpartition(".")
    norm = f"{owner}.{last.replace('conv', 'bn')}" if "conv" in last else f"{owner}.{int(last) + 1}"
    tensor = state.get(f"{norm}.weight")
    if tensor is None:
        raise _misfit(name, "its number of output channels stands nowhere")
    return int(tensor.shape[0])


def _side_in_resnet(state: Shapes, name: str) -> int:
    """Kernel size of a layer that does not tell itself: from its place in a ResNet's block."""
    block, _, last = name.rpartition(".")
    bottleneck = any(key.startswith(f"{block}.conv3.") for key in state)
    return 1 if bottleneck and last in ("conv1", "conv3") else 3


def _square_root(value: int) -> int:
    return round(max(value, 1) ** 0.5)


def _misfit(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"The FDConv layer {name} does not fit together: {what}. Expected the tensors of the "
        "published FDConv layer; the file may be of another version or damaged."
    )
