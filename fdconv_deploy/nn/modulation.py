"""Kernel Spatial Modulation: four small attentions and one dense one, from a global average.

Source: paper section 3.2 and the published ``KSM_Global`` and ``KSM_Local``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import FDConvConfig
from fdconv_deploy.errors import UnsupportedLayerError

# The standard deviation (and, for the local convolution, the value) of a head that
# starts as good as zero but can still learn.
NEAR_ZERO = 1e-6


class StarReLU(nn.Module):
    """``scale · relu(z)² + bias`` with learned scalars, each ``(1,)`` float32."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, z: Tensor) -> Tensor:
        """Any shape in, the same shape out."""
        return self.scale * F.relu(z) ** 2 + self.bias


class GlobalAttention(NamedTuple):
    """What `GlobalModulation` gives. ``None`` stands for a constant 1.

    channel ``(B, I)``, filter ``(B, O)``, spatial ``(B, kh, kw)``, kernel ``(B, P·G)``.
    """

    channel: Tensor | None
    filter: Tensor | None
    spatial: Tensor | None
    kernel: Tensor


def gate(logits: Tensor, act: str, multiple: float) -> Tensor:
    """Softmax over axis 1, 1 + tanh, or ``multiple`` times the sigmoid."""
    if act == "softmax":
        return torch.softmax(logits, dim=1)
    return 1 + torch.tanh(logits) if act == "tanh" else torch.sigmoid(logits) * multiple


class GlobalModulation(nn.Module):
    """``KSM_Global``: channel, filter, spatial and kernel attention.

    Args:
        kernel_size: (height, width); a height of 1 has no spatial attention.
        groups: number of kernel attentions, ``kernel_num · param_ratio``.
        kernel_temp: of the kernel attention, and of the others where ``config.temp`` is None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        groups: int,
        kernel_temp: float,
        config: FDConvConfig,
    ) -> None:
        super().__init__()
        self.act, self.att_multi = config.ksm_global_act, config.att_multi
        if self.act == "softmax" and not config.ksm_only_kernel_att:
            raise UnsupportedLayerError(
                "ksm_global_act='softmax' is defined for the kernel attention alone: "
                "set ksm_only_kernel_att=True, or use 'sigmoid' or 'tanh'."
            )
        hidden = max(int(in_channels * config.reduction), 16)
        self.kernel_size, self.groups, self.kernel_temp = kernel_size, groups, kernel_temp
        self.temp = kernel_temp if config.temp is None else config.temp
        self.fc = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn: nn.Module = nn.Identity()
        if config.ksm_global_norm != "none":
            batch = config.ksm_global_norm == "batch"
            self.bn = nn.BatchNorm2d(hidden) if batch else nn.GroupNorm(1, hidden)
        self.relu = StarReLU()
        self.channel_fc = self.filter_fc = self.spatial_fc = None
        if not config.ksm_only_kernel_att:
            self.channel_fc = nn.Conv2d(hidden, in_channels, 1)
            self.filter_fc = nn.Conv2d(hidden, out_channels, 1)
            if kernel_size[0] > 1:
                self.spatial_fc = nn.Conv2d(hidden, kernel_size[0] * kernel_size[1], 1)
        self.kernel_fc = nn.Conv2d(hidden, groups, 1)
        for module in self.children():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # filter_fc is left far from zero: a slip of the published code that trained
        # checkpoints started from.
        for head in (self.channel_fc, self.spatial_fc, self.kernel_fc):
            if head is not None:
                nn.init.normal_(head.weight, std=NEAR_ZERO)

    def _gate(self, logits: Tensor) -> Tensor:
        return gate(logits.flatten(1) / self.temp, self.act, self.att_multi)

    def _kernel(self, logits: Tensor) -> Tensor:
        kernel = gate(logits.flatten(1) / self.kernel_temp, self.act, 2 / self.groups)
        return kernel / self.groups if self.act == "tanh" else kernel

    def forward(self, average: Tensor) -> GlobalAttention:
        """``average``: ``(B, I)`` float32, the input's global average."""
        h = self.relu(self.bn(self.fc(average[:, :, None, None])))
        channel = filter_ = spatial = None
        if self.channel_fc is not None and self.filter_fc is not None:
            channel, filter_ = self._gate(self.channel_fc(h)), self._gate(self.filter_fc(h))
            if self.spatial_fc is not None:
                spatial = self._gate(self.spatial_fc(h)).unflatten(1, self.kernel_size)
        return GlobalAttention(channel, filter_, spatial, self._kernel(self.kernel_fc(h)))


class LinearModulation(nn.Module):
    """``KSM_Global`` of the published linear layer: RMSNorm and ReLU, no spatial attention."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int,
        kernel_temp: float,
        config: FDConvConfig,
    ) -> None:
        super().__init__()
        hidden = max(int(in_features * config.reduction), 16)
        self.groups, self.kernel_temp = groups, kernel_temp
        self.temp = kernel_temp if config.temp is None else config.temp
        self.act, self.att_multi = config.ksm_global_act, config.att_multi
        self.fc = nn.Linear(in_features, hidden, bias=False)
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.channel_fc = nn.Linear(hidden, in_features)
        self.filter_fc = nn.Linear(hidden, out_features)
        self.spatial_fc = None
        self.kernel_fc = nn.Linear(hidden, groups)
        for head in (self.channel_fc, self.filter_fc, self.kernel_fc):
            nn.init.normal_(head.weight, std=NEAR_ZERO)
            nn.init.zeros_(head.bias)

    def forward(self, average: Tensor) -> GlobalAttention:
        """``average``: ``(B, I)`` float32, the mean over a sequence."""
        h = F.relu(self.norm(self.fc(average)))
        channel, filter_ = (
            gate(head(h) / self.temp, self.act, self.att_multi)
            for head in (self.channel_fc, self.filter_fc)
        )
        kernel = gate(self.kernel_fc(h) / self.kernel_temp, self.act, 2)
        kernel = kernel * self.groups if self.act == "softmax" else kernel
        return GlobalAttention(channel, filter_, None, kernel)


class LocalModulation(nn.Module):
    """``KSM_Local``: one attention per weight, by a 1-d convolution along the channels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        config: FDConvConfig,
    ) -> None:
        super().__init__()
        self.act, self.att_multi = config.ksm_local_act, config.att_multi
        if self.act == "softmax":
            raise UnsupportedLayerError("ksm_local_act must be 'sigmoid' or 'tanh', got 'softmax'.")
        self.shape = (out_channels, in_channels, *kernel_size)
        half = round(math.log2(in_channels) / 2 + 0.5) // 2
        self.conv = nn.Conv1d(
            1,
            out_channels * kernel_size[0] * kernel_size[1],
            2 * half + 1,
            padding=half,
            bias=False,
        )
        nn.init.constant_(self.conv.weight, NEAR_ZERO)
        self.norm = nn.LayerNorm(in_channels)

    def logits(self, average: Tensor) -> Tensor:
        """``(B, I)`` -> ``(B, I, O·kh·kw)``, before the activation."""
        return self.conv(self.norm(average)[:, None]).transpose(1, 2)

    def forward(self, average: Tensor) -> Tensor:
        """``average``: ``(B, I)`` float32 -> attention ``(B, O, I, kh, kw)``."""
        out_channels, in_channels, *kernel = self.shape
        logits = self.logits(average).reshape(-1, in_channels, out_channels, *kernel)
        return gate(logits.transpose(1, 2), self.act, self.att_multi)
