"""Frequency Band Modulation: each band of the input weighted by its own map.

Source: paper section 3.3 and the published ``FrequencyBandModulation``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.config import BandModulationConfig
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.modulation import NEAR_ZERO, gate


def _radius(size: tuple[int, int]) -> Tensor:
    vertical = torch.fft.fftfreq(size[0], dtype=torch.float32, device="cpu").abs()
    horizontal = torch.fft.rfftfreq(size[1], dtype=torch.float32, device="cpu").abs()
    return torch.maximum(vertical[:, None], horizontal[None, :])


@lru_cache(maxsize=64)
def _cached_masks(k_list: tuple[float, ...], max_size: tuple[int, int]) -> Tensor:
    radius = _radius(max_size)
    # A float32 comparison: 1e-8 vanishes beside 0.25 and not beside 0.125.
    return torch.stack([radius < 0.5 / k + 1e-8 for k in k_list]).float()


def masks_for(config: BandModulationConfig, height: int, width: int) -> Tensor:
    """The low-pass masks that a band modulation applies to ``height`` × ``width``, one per ``k``.

    ``masks="cached"``: made once at ``max_size`` and resized by nearest neighbour, so at many sizes
    a mask is not symmetric in its rows. ``masks="per_call"``: as the first published band
    modulation made them in each call, at the feature map's own size, strictly below 0.5 / k, and
    without an absolute value: every negative row frequency passes, and no mask is symmetric.

    Returns:
        ``(len(k_list), height, width // 2 + 1)`` float32 of 0 and 1.
    """
    if config.masks == "cached":
        masks = _cached_masks(config.k_list, config.max_size)
        return F.interpolate(masks[None], size=(height, width // 2 + 1), mode="nearest")[0]
    vertical = torch.fft.fftfreq(height, dtype=torch.float32, device="cpu")
    horizontal = torch.fft.rfftfreq(width, dtype=torch.float32, device="cpu")
    largest = torch.maximum(vertical[:, None], horizontal[None, :])
    return torch.stack([largest < 0.5 / k for k in config.k_list]).float()


# Of masks that are read: far more than any network has, and far less than memory.
_LARGEST = 4096


@dataclass(frozen=True)
class SavedMasks:
    """A ``cached_masks`` buffer that was read.

    masks: ``(bands, height, width // 2 + 1)`` float32 of 0 and 1. k_list: bands that have these
    masks, or None: they are not the published masks of any.
    """

    masks: Tensor
    k_list: tuple[float, ...] | None

    @classmethod
    def read(cls, buffer: Tensor) -> SavedMasks:
        """A buffer of any type: ``(bands, 1, height, width // 2 + 1)``, or without the 1.

        Raises:
            ValueError: no masks: the sentence says what was found and what was expected.
        """
        shape = tuple(buffer.shape)
        whole = len(shape) == 3 or (len(shape) == 4 and shape[1] == 1)
        if not whole or 0 in shape:
            raise ValueError(
                f"it has shape {shape}; expected (bands, 1, height, width // 2 + 1), as (3, 1, 64, "
                "33)"
            )
        if max(shape) > _LARGEST:
            raise ValueError(f"it has shape {shape}; expected no more than {_LARGEST} each way")
        masks = buffer.detach().cpu()
        if masks.is_complex():
            if masks.imag.count_nonzero():
                raise ValueError("it holds complex numbers; expected zeros and ones")
            masks = masks.real
        if masks.dtype != torch.bool and not ((masks == 0) | (masks == 1)).all():
            raise ValueError("it holds other numbers than zeros and ones")
        masks = masks.reshape(shape[0], *shape[-2:]).float()
        for size in _sizes(masks):
            bands = tuple(_band_of(mask, size) for mask in masks)
            if None not in bands:
                return cls(masks, tuple(k for k in bands if k is not None))
        return cls(masks, None)

    def are_of(self, k_list: tuple[float, ...], size: tuple[int, int]) -> bool:
        """Whether they are the published masks of these bands, made at ``size``."""
        if len(k_list) != len(self.masks) or not all(k > 0 for k in k_list):
            return False
        made = _cached_masks(tuple(k_list), size)
        return made.shape == self.masks.shape and torch.equal(made, self.masks)

    def size_for(self, k_list: tuple[float, ...]) -> tuple[int, int] | None:
        """(height, width) at which these bands have these masks, or None."""
        return next((size for size in _sizes(self.masks) if self.are_of(k_list, size)), None)


def _sizes(masks: Tensor) -> list[tuple[int, int]]:
    """The two (height, width) that have masks of this shape, the even width first."""
    height, frequencies = masks.shape[-2:]
    widths = (2 * frequencies - 2, 2 * frequencies - 1)
    return [(height, width) for width in widths if width > 0]


def _band_of(mask: Tensor, size: tuple[int, int]) -> float | None:
    """The roundest k whose published mask, made at ``size``, this is; None if there is none."""
    radius = _radius(size)
    kept = mask > 0
    if not kept[0, 0]:
        return None  # every low-pass keeps the zero frequency
    inside, outside = float(radius[kept].max()), radius[~kept]
    # 0.5 / k lies between the last radius that passes and the first that does not.
    least = 0.5 / float(outside.min()) if len(outside) else 0.25
    most = 0.5 / inside if inside else 4 * least
    for k in _round_numbers(least, most):
        if torch.equal(_cached_masks((k,), size)[0], mask):
            return k
    return None


def _round_numbers(least: float, most: float) -> Iterator[float]:
    """Numbers about ``least`` to ``most``: powers of two, then those of fewest digits."""
    yield 2.0 ** math.floor(math.log2(most) + 1e-6)
    for scale in (1, 10, 100, 1000):
        lowest = math.ceil(least * scale)
        yield from (k / scale for k in (lowest, lowest + 1, math.floor(most * scale)) if k)
    yield (least + most) / 2


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
        weight = gate(logits, self.config.act, 2)
        weight = weight * self.groups if self.config.act == "softmax" else weight
        return weight[:, :, None]

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(B, I, H, W)`` float."""
        height, width = x.shape[-2:]
        work = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        masks = masks_for(self.config, height, width)
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
