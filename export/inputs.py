"""Made-up images to compare networks on: what a camera could have given.

Comparing on plain noise would not do: its global averages lie far from those a network was
trained on, attentions run to their ends, and rounding is amplified until it hides errors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fdconv_deploy.architecture import Preprocessing

SAID = "made-up images, 8-bit, with as much contrast at every scale as photographs have, seed 0"


def made_up_images(
    batch: int,
    size: tuple[int, int],
    preprocessing: Preprocessing | None = None,
    *,
    channels: int = 3,
    seed: int = 0,
) -> Tensor:
    """Normalised images of 1/f texture in muted colours.

    Args:
        size: height and width in pixels.
        preprocessing: of the network; the published one if not given.

    Returns:
        ``(batch, channels, height, width)`` float32. The same images for the same arguments.
    """
    preprocessing = preprocessing or Preprocessing()
    generator = torch.Generator().manual_seed(seed)

    def texture(planes: int) -> Tensor:
        total = torch.zeros(batch, planes, *size)
        for scale in (2, 4, 8, 16, 32, 64, 128):
            coarse = [max(length // scale, 2) for length in size]
            noise = torch.randn(batch, planes, *coarse, generator=generator)
            total += scale**0.5 * F.interpolate(noise, size=list(size), mode="bilinear")
        # Of a single pixel the deviation is not defined.
        return (total - total.mean()) / total.std(correction=0).clamp_min(1e-6)

    light = torch.linspace(80, 140, batch)[:, None, None, None]
    images = (light + 50 * texture(1) + 12 * texture(channels)).clamp(0, 255).round()
    mean = torch.tensor(preprocessing.mean)[:channels, None, None]
    std = torch.tensor(preprocessing.std)[:channels, None, None]
    return (images - mean) / std
