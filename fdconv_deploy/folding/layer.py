"""One FDConv layer at one input size, folded: the constants of a static-shape graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.bands import FoldedBands, fold_bands
from fdconv_deploy.folding.modulation import (
    FoldedLocal,
    FoldedModulation,
    array,
    fold_local,
    fold_modulation,
)
from fdconv_deploy.folding.spectrum import FoldedSpectrum, fold_spectrum
from fdconv_deploy.nn.fdconv import FDConv2d, FDTokenConv
from fdconv_deploy.nn.spectrum import group_map

Side = Literal["kernel", "feature"]


@dataclass(frozen=True)
class FoldedConv:
    """What a folded layer is made of. ``constant_weight`` stands for everything dynamic.

    padding: (top, left, bottom, right) pixels. output_scale ``(O,)`` float32 is a following
    BatchNorm's; its shift is in ``bias`` ``(O,)``. channel_side, filter_side: whether that
    attention scales the kernel or the convolution's input or output, whichever is smaller.
    by_rows: in a graph, convolve with each row of the kernels by itself and add; see
    ``_by_rows`` in ``export/layers.py``. tokens: features are ``(B, L, C)``, not ``(B, C, H, W)``;
    the kernel is 1×1 and input_size ``(L, 1)``.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    input_size: tuple[int, int]
    modulation: FoldedModulation
    local: FoldedLocal | None
    bands: FoldedBands | None
    spectrum: FoldedSpectrum | None
    constant_weight: NDArray[np.float32] | None
    output_scale: NDArray[np.float32] | None
    bias: NDArray[np.float32] | None
    channel_side: Side = "kernel"
    filter_side: Side = "kernel"
    by_rows: bool = False
    tokens: bool = False

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the convolution's output."""
        return convolved_size(self, self.input_size, self.padding)


def convolved_size(
    conv: FDConv2d | FoldedConv, size: Sequence[int], padding: Sequence[int]
) -> tuple[int, int]:
    """Height and width of a convolution's output; ``padding`` is top, left, bottom, right."""

    def length(axis: int) -> int:
        padded = size[axis] + padding[axis] + padding[axis + 2]
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        return (padded - reach - 1) // conv.stride[axis] + 1

    return length(0), length(1)


def sides_of(
    padding: Sequence[int] | str, kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """Pixels at the top, left, bottom and right, of a convolution's ``padding``."""
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        top, left = total[0] // 2, total[1] // 2
        return top, left, total[0] - top, total[1] - left
    vertical, horizontal = padding[0], padding[-1]
    return vertical, horizontal, vertical, horizontal


def padding_of(layer: FDConv2d) -> tuple[int, int, int, int]:
    """Pixels at the top, left, bottom and right."""
    return sides_of(layer.padding, layer.kernel_size, layer.dilation)


def _cheapest(folded: FoldedConv) -> FoldedConv:
    """The layer with each attention, and the kernels' rows, where they touch fewest numbers."""
    height = folded.kernel_size[0]
    weights = folded.out_channels * folded.in_channels * math.prod(folded.kernel_size)
    inputs = folded.in_channels * math.prod(folded.input_size)
    outputs = folded.out_channels * math.prod(folded.output_size)
    # With spatial attention the kernel is multiplied along its columns anyway, and channel
    # attention joins for nothing. A scaled output loses its bias to a pass of its own.
    with_spatial = folded.modulation.spatial > 0
    # Moving runs of a kernel row's width apart costs about four times a plain copy, per number.
    moved = (height - 1) * (inputs + outputs)
    return replace(
        folded,
        channel_side="kernel" if with_spatial or weights <= inputs else "feature",
        filter_side="kernel" if weights <= 2 * outputs else "feature",
        by_rows=folded.spectrum is not None and height > 1 and 4 * weights > moved,
    )


def _spectra(layer: FDConv2d) -> tuple[NDArray[np.complex128], NDArray[np.int64]]:
    """A layer's spectra and groups, ``(P, R, C//2+1)``, alpha folded in."""
    groups = group_map(layer.indices.cpu(), layer.rows, layer.columns).numpy()
    offset = np.arange(layer.param_ratio)[:, None, None] * layer.kernel_num
    groups = np.where(groups >= 0, groups + offset, -1)
    if layer.convert_param:
        stored = array(layer.dft_weight)
    else:
        sizes = layer.out_channels, layer.in_channels, *layer.kernel_size
        matrix = array(layer.weight).reshape(sizes).transpose(0, 2, 1, 3)
        matrix = matrix.reshape(layer.rows, layer.columns)
        spectrum = np.fft.rfft2(matrix) / layer.spectrum_scale
        stored = np.stack([spectrum.real, spectrum.imag], -1)[None]
        stored = np.repeat(stored, layer.param_ratio, 0)
    if layer.param_reduction < 1:
        full = np.zeros((*groups.shape, 2))
        rows, columns = layer.indices.flatten(2).cpu().numpy().transpose(1, 0, 2)
        full[np.arange(layer.param_ratio)[:, None], rows, columns] = stored
        stored = full
    spectra = np.ascontiguousarray(stored).view(np.complex128)[..., 0] * layer.alpha
    return spectra, groups


def fold_layer(
    layer: FDConv2d,
    input_size: tuple[int, int],
    *,
    name: str = "",
    scale: NDArray[np.float64] | None = None,
    shift: NDArray[np.float64] | None = None,
) -> FoldedConv:
    """Fold a dynamic layer for inputs of one height and width.

    Args:
        layer: in eval mode.
        input_size: height and width of the layer's input; of tokens their number, and 1.
        scale, shift: ``(O,)``, a BatchNorm after the layer, see `fold_batch_norm`.

    Raises:
        ExportError: the layer is plain, or the kernel does not fit the padded input.
    """
    if not layer.is_dynamic:
        raise ExportError(f"layer {name!r} is a plain convolution; there is nothing to fold.")
    modulation = fold_modulation(layer.KSM_Global)
    local = fold_local(layer.KSM_Local) if layer.KSM_Local is not None else None
    bands = fold_bands(layer.FBM, *input_size) if layer.FBM is not None else None
    constant = constant_kernel(layer, modulation, local)
    spectrum = None
    if constant is None:
        spectra, groups = _spectra(layer)
        gain = modulation.gain * (1.0 if local is None else local.gain)
        spectrum = fold_spectrum(spectra * gain, groups, layer.columns)

    bias = array(layer.bias) if layer.bias is not None else None
    if scale is not None and shift is not None:
        bias = shift if bias is None else bias * scale + shift
    folded = FoldedConv(
        name=name,
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        kernel_size=(layer.kernel_size[0], layer.kernel_size[1]),
        stride=(layer.stride[0], layer.stride[1]),
        padding=padding_of(layer),
        dilation=(layer.dilation[0], layer.dilation[1]),
        input_size=input_size,
        modulation=modulation,
        local=local,
        bands=bands,
        spectrum=spectrum,
        constant_weight=constant,
        output_scale=None if scale is None else scale.astype(np.float32),
        bias=None if bias is None else bias.astype(np.float32),
        tokens=isinstance(layer, FDTokenConv),
    )
    height, width = folded.output_size
    if height < 1 or width < 1:
        raise ExportError(
            f"layer {name!r}: a {folded.kernel_size} kernel does not fit its "
            f"{input_size[0]}×{input_size[1]} input. Export at a larger size."
        )
    return _cheapest(folded)


def constant_kernel(
    layer: FDConv2d, modulation: FoldedModulation, local: FoldedLocal | None
) -> NDArray[np.float32] | None:
    """The kernel ``(O, I, kh, kw)`` if no image can change it, else None.

    So it is with converted layers that were never trained, and pruned ones.
    """
    if modulation.varies or (local is not None and local.varies):
        return None
    double = copy.deepcopy(layer).double().eval()
    average = torch.zeros(1, layer.in_channels, dtype=torch.float64)
    with torch.no_grad():
        detail = double.KSM_Local(average) if double.KSM_Local is not None else None
        kernel = double.kernels(double.KSM_Global(average), detail, full=True)
    return kernel[0].float().numpy()
