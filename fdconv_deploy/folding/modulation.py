"""Kernel Spatial Modulation with everything constant folded into two matrices.

BatchNorm folds into the hidden layer, StarReLU's scale and bias and the temperatures into
the heads, the heads into one matrix. ``1 + tanh(z) = 2·sigmoid(2z)``, so both activations
become one sigmoid; the factors left over multiply the kernel and fold into its spectrum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.modulation import GlobalModulation, LinearModulation, LocalModulation

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]


def array(tensor: Tensor) -> Float64:
    """A parameter's values in float64."""
    return tensor.detach().cpu().double().numpy()


@dataclass(frozen=True)
class HiddenNorm:
    """A norm of the hidden layer by each image's own values; ``weight``, ``bias``: ``(A,)``.

    ``GroupNorm(1, A)``: by mean and variance; or, without a ``bias``, RMSNorm: by the mean square.
    """

    weight: Float32
    bias: Float32 | None
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

    hidden: Float32
    hidden_bias: Float32
    heads: Float32
    head_bias: Float32
    kernel: int
    filter: int
    spatial: int
    channel: int
    softmax: bool
    gain: float
    norm: HiddenNorm | None = None
    squared: bool = True

    @property
    def sizes(self) -> list[int]:
        """Lengths of the kernel, filter, spatial and channel attentions; 0 for absent ones."""
        return [self.kernel, self.filter, self.spatial, self.channel]

    @property
    def varies(self) -> bool:
        """Whether any attention depends on the image."""
        return bool(self.heads.any())


def normalisation(held: Sequence[Float64 | None], epsilon: float) -> tuple[Float64, Float64]:
    """A BatchNorm's inference form, ``scale`` and ``shift``, each ``(C,)``.

    held: its weight and bias, if any, running mean and variance.
    """
    weight, bias, mean, variance = held
    assert mean is not None
    assert variance is not None
    scale = 1 / np.sqrt(variance + epsilon)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def fold_batch_norm(bn: nn.BatchNorm2d) -> tuple[Float64, Float64]:
    """`normalisation` of a module."""
    held = bn.weight, bn.bias, bn.running_mean, bn.running_var
    return normalisation([None if part is None else array(part) for part in held], bn.eps)


def _hidden_norm(
    norm: nn.Module, channels: int
) -> tuple[Float64 | float, Float64, HiddenNorm | None]:
    """What a norm of the hidden layer multiplies and adds, and what it leaves to each image."""
    if isinstance(norm, nn.BatchNorm2d):
        return *fold_batch_norm(norm), None
    left = None
    if isinstance(norm, nn.RMSNorm):
        left = HiddenNorm(array(norm.weight).astype(np.float32), None, float(norm.eps or 0))
    elif isinstance(norm, nn.GroupNorm) and norm.num_groups == 1 and norm.affine:
        weight, bias = (array(part).astype(np.float32) for part in (norm.weight, norm.bias))
        left = HiddenNorm(weight, bias, norm.eps)
    if left is not None or isinstance(norm, nn.Identity):
        return 1.0, np.zeros(channels), left
    raise UnsupportedLayerError(
        f"KSM_Global.bn is {norm}, which cannot be folded. Expected BatchNorm2d, "
        "GroupNorm(1, C) or Identity."
    )


def fold_modulation(ksm: GlobalModulation | LinearModulation) -> FoldedModulation:
    """Fold ``KSM_Global``."""
    hidden = array(ksm.fc.weight).reshape(len(ksm.fc.weight), -1)
    star_scale, star_bias = 1.0, 0.0
    gain = float(ksm.groups) if ksm.act == "softmax" else 2.0
    if isinstance(ksm, LinearModulation):
        scale, shift, norm = _hidden_norm(ksm.norm, len(hidden))
    else:
        scale, shift, norm = _hidden_norm(ksm.bn, len(hidden))
        star_scale, star_bias = float(ksm.relu.scale.detach()), float(ksm.relu.bias.detach())
        gain /= ksm.groups
    # 1 + tanh(z) = 2·sigmoid(2z)
    slope = 2.0 if ksm.act == "tanh" else 1.0

    weights, biases, sizes = [], [], []
    for head in (ksm.kernel_fc, ksm.filter_fc, ksm.spatial_fc, ksm.channel_fc):
        if head is None:
            sizes.append(0)
            continue
        assert head.bias is not None
        gate = head is not ksm.kernel_fc
        factor = slope / (ksm.temp if gate else ksm.kernel_temp)
        weight = array(head.weight).reshape(len(head.weight), -1)
        weights.append(weight * (star_scale * factor))
        biases.append((array(head.bias) + weight.sum(1) * star_bias) * factor)
        sizes.append(len(weight))
        if gate:
            gain *= {"sigmoid": ksm.att_multi, "tanh": 2.0, "softmax": 1.0}[ksm.act]
    return FoldedModulation(
        (hidden * np.reshape(scale, (-1, 1))).astype(np.float32),
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
        squared=not isinstance(ksm, LinearModulation),
    )


@dataclass(frozen=True)
class FoldedLocal:
    """``KSM_Local`` as one matrix product in the kernel matrix's own layout.

    With n the normalised average and t a tap of the 1-d convolution, the logit of weight
    (o, u, i, v) is ``sum over t of weight[(o, u), (v, t)] · n[i + t - taps//2]``.

    norm_weight, norm_bias: ``(I,)``; weight: ``(O·kh, kw·taps)``; float32.
    """

    norm_weight: Float32
    norm_bias: Float32
    epsilon: float
    weight: Float32
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
