"""Frequency Band Modulation: each band of the input weighted by its own map.

Source: paper section 3.3 and the published ``FrequencyBandModulation``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.architecture import BandModulationConfig
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.modulation import NEAR_ZERO


@lru_cache(maxsize=64)
def _cached_masks(k_list: tuple[float, ...], max_size: tuple[int, int]) -> Tensor:
    vertical = torch.fft.fftfreq(max_size[0], dtype=torch.float32, device="cpu").abs()
    horizontal = torch.fft.rfftfreq(max_size[1], dtype=torch.float32, device="cpu").abs()
    radius = torch.maximum(vertical[:, None], horizontal[None, :])
    # A float32 comparison: 1e-8 vanishes beside 0.25 and not beside 0.125.
    return torch.stack([radius < 0.5 / k + 1e-8 for k in k_list]).float()


def band_masks(
    k_list: tuple[float, ...], height: int, width: int, max_size: tuple[int, int] = (64, 64)
) -> Tensor:
    """Low-pass masks over the half spectrum, one per ``k``.

    Made once at ``max_size`` and resized to the feature map by nearest neighbour, so at
    many sizes a mask is not symmetric in its rows.

    Returns:
        ``(len(k_list), height, width // 2 + 1)`` float32 of 0 and 1.
    """
    masks = _cached_masks(tuple(k_list), tuple(max_size))
    return F.interpolate(masks[None], size=(height, width // 2 + 1), mode="nearest")[0]


class BandModulation(nn.Module):
    """``FBM``: ``(B, I, H, W)`` in, the same shape out."""

    def __init__(self, in_channels: int, config: BandModulationConfig) -> None:
        super().__init__()
        if not config.k_list:
            raise UnsupportedLayerError("fbm_cfg.k_list is empty: name one band at least, as [2].")
        if config.spatial_kernel % 2 == 0:
            raise UnsupportedLayerError(
                f"fbm_cfg.spatial_kernel must be odd, got {config.spatial_kernel}: an even kernel "
                "gives a band weight of another size than the feature map."
            )
        groups = in_channels if config.spatial_group > 64 else config.spatial_group
        if in_channels % groups:
            raise UnsupportedLayerError(
                f"fbm_cfg.spatial_group={groups} does not divide the layer's {in_channels} input "
                "channels. Use a divisor, or more than 64 for one group per channel."
            )
        self.config = config
        self.groups = groups
        self.freq_weight_conv_list = nn.ModuleList(
            nn.Conv2d(
                in_channels,
                groups,
                config.spatial_kernel,
                padding=config.spatial_kernel // 2,
                groups=groups,
            )
            for _ in range(len(config.k_list) + config.lowfreq_att)
        )
        for name, parameter in self.freq_weight_conv_list.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=NEAR_ZERO)
            else:
                nn.init.zeros_(parameter)

    def _weight(self, band: int, x: Tensor) -> Tensor:
        logits = self.freq_weight_conv_list[band](x)
        if self.config.act == "sigmoid":
            weight = torch.sigmoid(logits) * 2
        elif self.config.act == "tanh":
            weight = 1 + torch.tanh(logits)
        else:
            weight = torch.softmax(logits, dim=1) * self.groups
        return weight[:, :, None]

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(B, I, H, W)`` float."""
        height, width = x.shape[-2:]
        work = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        masks = band_masks(self.config.k_list, height, width, self.config.max_size)
        spectrum = torch.fft.rfft2(work)

        def weighted(band: int, part: Tensor) -> Tensor:
            grouped = part.unflatten(1, (self.groups, -1))
            return (self._weight(band, x) * grouped).flatten(1, 2)

        total = torch.zeros_like(work)
        previous = work
        for band, mask in enumerate(masks.to(work)):
            low = torch.fft.irfft2(spectrum * mask, s=(height, width))
            total = total + weighted(band, previous - low)
            previous = low
        if self.config.lowfreq_att:
            previous = weighted(len(masks), previous)
        return (total + previous).to(x.dtype)
