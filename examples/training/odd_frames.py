"""Frames unlike the drawn streets: blank, letterboxed, overexposed, no street at all."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Rng = np.random.Generator
# RGB 0..255 (H, W, 3); values beyond are clipped where a batch is made.
Image = NDArray[np.float32]


def flat(rng: Rng, image: Image) -> Image:
    """One colour (black, white, a gray, or any), sometimes with a sensor's noise."""
    colours: tuple[Callable[[], NDArray[np.float64]], ...] = (
        lambda: np.zeros(3),
        lambda: np.full(3, 255.0),
        lambda: np.full(3, rng.uniform(0, 255)),
        lambda: rng.uniform(0, 255, 3),
    )
    frame = np.broadcast_to(colours[rng.integers(len(colours))](), image.shape)
    if rng.random() < 0.3:
        frame = frame + rng.normal(0, rng.uniform(0.5, 8), image.shape)
    return frame.astype(np.float32)


def texture(rng: Rng, image: Image) -> Image:
    """Noise whose amplitude falls with some power of frequency, as a photograph's does."""
    height, width = image.shape[:2]
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    radius[0, 0] = 1.0
    amplitude = radius ** -rng.uniform(0, 2)
    amplitude[0, 0] = 0.0
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) * amplitude
    noise = np.fft.irfft2(spectrum, (height, width)).transpose(1, 2, 0)
    gray = noise.mean(2, keepdims=True)
    noise = gray + rng.uniform(0, 1) * (noise - gray)
    noise *= rng.uniform(2, 80) / max(float(noise.std()), 1e-6)
    return (noise + rng.uniform(0, 255, 3)).astype(np.float32)


def letterboxed(rng: Rng, image: Image) -> Image:
    """The image beside bars of one colour, on one side or on both."""
    height, width = image.shape[:2]
    share = rng.uniform(0.25, 0.9)
    inner = (int(height * share), width) if rng.random() < 0.5 else (height, int(width * share))
    frame = flat(rng, image)
    top = rng.choice([0, (height - inner[0]) // 2])
    left = rng.choice([0, (width - inner[1]) // 2])
    small = cv2.resize(image, inner[::-1], interpolation=cv2.INTER_AREA)
    frame[top : top + inner[0], left : left + inner[1]] = small
    return frame


def developed(rng: Rng, image: Image) -> Image:
    """The image with another contrast, brightness, saturation and blur, or as a negative."""
    gray = image.mean(2, keepdims=True)
    image = gray + rng.uniform(0, 1.6) * (image - gray)
    if rng.random() < 0.2:
        image = 255 - image
    image = (image - image.mean()) * rng.uniform(0.1, 2.0) + rng.uniform(10, 245)
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 6))
    return image.astype(np.float32)
