"""Kernel Spatial Modulation with everything constant folded into two matrices.

BatchNorm folds into the hidden layer, StarReLU's scale and bias and the temperatures into
the heads, the heads into one matrix. ``1 + tanh(z) = 2·sigmoid(2z)``, so both activations
become one sigmoid; the factors left over multiply the kernel and fold into its spectrum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.fdlinear import LinearModulation
from fdconv_deploy.nn.modulation import GlobalModulation, LocalModulation

Float64 = NDArray[np.float64]


def array(tensor: Tensor) -> Float64:
    """A parameter's values in float64."""
    return tensor.detach().cpu().double().numpy()


@dataclass(frozen=True)
class HiddenNorm:
    """A norm of the hidden layer by each image's own values.

    ``GroupNorm(1, A)``: by mean and variance; or, without a ``bias``, RMSNorm: by the mean square.

    weight, bias: ``(A,)`` float32.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    epsilon: float


@dataclass(frozen=True)
class FoldedModulation:
    """``attention = act(heads · relu(norm(hidden · average + hidden_bias))² + head_bias)``.

    ``norm`` is None where nothing is left to do: a BatchNorm is folded into ``hidden``. The
    square is left out where ``squared`` is not set.

    The rows of ``heads`` are the kernel attentions (``P·G``), then, unless the layer has
    kernel attention only, the filter (O), spatial (kh·kw, if any) and channel (I) gates.
    ``act`` is a sigmoid, or where ``softmax`` is set a softmax over each of these by itself.

    hidden: ``(A, I)``, hidden_bias: ``(A,)``, heads: ``(N, A)``, head_bias: ``(N,)``, float32.
    gain: the product of the attentions' constant factors, to be folded into the spectrum.
    """

    hidden: NDArray[np.float32]
    hidden_bias: NDArray[np.float32]
    heads: NDArray[np.float32]
    head_bias: NDArray[np.float32]
    kernel: int
    filter: int
    spatial: int
    channel: int
    softmax: bool
    gain: float
    norm: HiddenNorm | None = None
    squared: bool = True

    @property
    def varies(self) -> bool:
        """Whether any attention depends on the image."""
        return bool(self.heads.any())


def fold_batch_norm(bn: nn.BatchNorm2d) -> tuple[Float64, Float64]:
    """A normalisation's inference form, ``scale`` and ``shift``, each ``(C,)``."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = 1 / np.sqrt(array(bn.running_var) + bn.eps)
    if bn.affine:
        scale = scale * array(bn.weight)
    shift = -array(bn.running_mean) * scale
    return scale, shift + array(bn.bias) if bn.affine else shift


def _hidden_layer(ksm: GlobalModulation) -> tuple[Float64, Float64, HiddenNorm | None]:
    """``hidden``, ``hidden_bias`` and ``norm`` of a `FoldedModulation`."""
    weight = array(ksm.fc.weight)[:, :, 0, 0]
    if isinstance(ksm.bn, nn.BatchNorm2d):
        scale, shift = fold_batch_norm(ksm.bn)
        return weight * scale[:, None], shift, None
    norm = None
    if not isinstance(ksm.bn, nn.Identity) and not (
        isinstance(ksm.bn, nn.GroupNorm) and ksm.bn.num_groups == 1 and ksm.bn.affine
    ):
        raise UnsupportedLayerError(
            f"KSM_Global.bn is {ksm.bn}, which cannot be folded. Expected BatchNorm2d, "
            "GroupNorm(1, C) or Identity."
        )
    if isinstance(ksm.bn, nn.GroupNorm):
        scale, shift = array(ksm.bn.weight), array(ksm.bn.bias)
        norm = HiddenNorm(scale.astype(np.float32), shift.astype(np.float32), ksm.bn.eps)
    return weight, np.zeros(len(weight)), norm


def fold_modulation(ksm: GlobalModulation) -> FoldedModulation:
    """Fold ``KSM_Global``."""
    hidden, shift, norm = _hidden_layer(ksm)
    star_scale, star_bias = float(ksm.relu.scale.detach()), float(ksm.relu.bias.detach())
    # 1 + tanh(z) = 2·sigmoid(2z)
    slope = 2.0 if ksm.act == "tanh" else 1.0
    gain = {"sigmoid": 2.0, "tanh": 2.0, "softmax": float(ksm.groups)}[ksm.act] / ksm.groups

    weights, biases, sizes = [], [], []
    for head in (ksm.kernel_fc, ksm.filter_fc, ksm.spatial_fc, ksm.channel_fc):
        if head is None:
            sizes.append(0)
            continue
        assert head.bias is not None
        gate = head is not ksm.kernel_fc
        factor = slope / (ksm.temp if gate else ksm.kernel_temp)
        weight = array(head.weight)[:, :, 0, 0]
        weights.append(weight * (star_scale * factor))
        biases.append((array(head.bias) + weight.sum(1) * star_bias) * factor)
        sizes.append(len(weight))
        if gate:
            gain *= 2.0 if ksm.act == "tanh" else ksm.att_multi
    return FoldedModulation(
        hidden.astype(np.float32),
        shift.astype(np.float32),
        np.concatenate(weights).astype(np.float32),
        np.concatenate(biases).astype(np.float32),
        kernel=sizes[0],
        filter=sizes[1],
        spatial=sizes[2],
        channel=sizes[3],
        softmax=ksm.act == "softmax",
        gain=gain,
        norm=norm,
    )


def fold_linear_modulation(ksm: LinearModulation) -> FoldedModulation:
    """Fold ``KSM_Global`` of an `FDLinear`."""
    slope = 2.0 if ksm.act == "tanh" else 1.0
    heads = (
        (ksm.kernel_fc, ksm.kernel_temp),
        (ksm.filter_fc, ksm.temp),
        (ksm.channel_fc, ksm.temp),
    )
    kernel = float(ksm.groups) if ksm.act == "softmax" else 2.0 if ksm.act == "sigmoid" else 1.0
    # 1 + tanh(z) = 2·sigmoid(2z)
    gate = {"sigmoid": ksm.att_multi, "tanh": 2.0, "softmax": 1.0}[ksm.act]
    weight = array(ksm.fc.weight)
    return FoldedModulation(
        weight.astype(np.float32),
        np.zeros(len(weight), np.float32),
        np.concatenate([array(fc.weight) * (slope / temp) for fc, temp in heads]).astype("f4"),
        np.concatenate([array(fc.bias) * (slope / temp) for fc, temp in heads]).astype("f4"),
        kernel=len(ksm.kernel_fc.weight),
        filter=len(ksm.filter_fc.weight),
        spatial=0,
        channel=len(ksm.channel_fc.weight),
        softmax=ksm.act == "softmax",
        gain=kernel * gate**2 * (2.0 if ksm.act == "tanh" else 1.0),
        norm=HiddenNorm(array(ksm.norm.weight).astype(np.float32), None, float(ksm.norm.eps or 0)),
        squared=False,
    )


@dataclass(frozen=True)
class FoldedLocal:
    """``KSM_Local`` as one matrix product in the kernel matrix's own layout.

    With n the normalised average and t a tap of the 1-d convolution, the logit of weight
    (o, u, i, v) is ``sum over t of weight[(o, u), (v, t)] · n[i + t - taps//2]``.

    norm_weight, norm_bias: ``(I,)``; weight: ``(O·kh, kw·taps)``; float32.
    """

    norm_weight: NDArray[np.float32]
    norm_bias: NDArray[np.float32]
    epsilon: float
    weight: NDArray[np.float32]
    taps: int
    gain: float

    @property
    def varies(self) -> bool:
        """Whether the attention depends on the image."""
        return bool(self.weight.any() and self.norm_weight.any())


def fold_local(ksm: LocalModulation) -> FoldedLocal:
    """Fold ``KSM_Local``."""
    out_channels, _, height, width = ksm.shape
    taps = ksm.conv.weight.shape[-1]
    slope = 2.0 if ksm.act == "tanh" else 1.0
    weight = array(ksm.conv.weight).reshape(out_channels * height, width * taps) * slope
    return FoldedLocal(
        array(ksm.norm.weight).astype(np.float32),
        array(ksm.norm.bias).astype(np.float32),
        ksm.norm.eps,
        weight.astype(np.float32),
        taps,
        2.0 if ksm.act == "tanh" else ksm.att_multi,
    )
