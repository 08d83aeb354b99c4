"""Labels as pictures and numbers: indexed PNG, overlay, areas, and colours for classes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.resize import Labels

RGB = tuple[int, int, int]
_PALETTE_SIZE = 256


def default_palette(classes: int) -> tuple[RGB, ...]:
    """Colours for classes that came without any: the first 256 all different.

    The bits of the class number are dealt out over red, green and blue, highest bit of
    each colour first, so that neighbouring numbers look unlike (the PASCAL VOC colours).
    """
    colours = []
    for number in range(classes):
        colour = [0, 0, 0]
        for bit in range(number.bit_length()):
            if number >> bit & 1 and bit < 24:
                colour[bit % 3] |= 0x80 >> (bit // 3)
        colours.append((colour[0], colour[1], colour[2]))
    return tuple(colours)


def mask_png(labels: Labels, palette: tuple[RGB, ...]) -> bytes:
    """Labels (H, W) as an indexed PNG: each pixel's value is its class, shown in its colour.

    :raises ImageError: more than 256 classes, which an indexed PNG cannot hold.
    """
    if len(palette) > _PALETTE_SIZE or labels.dtype != np.uint8:
        raise ImageError(
            f"An indexed PNG holds at most {_PALETTE_SIZE} classes; this network has "
            f"{len(palette)}. Use the overlay, or the labels themselves."
        )
    image = Image.fromarray(labels)
    image.putpalette([value for colour in palette for value in colour])  # L becomes P
    return encode(image, "PNG")


def as_rgb(image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """An image of any bands, to be looked at: (H, W, 3) uint8.

    RGB is left as it is. Of other images the first three bands are shown as red, green and blue,
    of fewer than three the first in gray; each is stretched from its 2nd to its 98th percentile,
    where it is not in eight bits.

    :param image: (H, W) or (H, W, C), any real type.
    """
    bands = image if image.ndim == 3 else image[:, :, None]
    shown = bands[:, :, :3] if bands.shape[2] >= 3 else bands[:, :, [0, 0, 0]]
    if shown.dtype == np.uint8:
        return np.ascontiguousarray(shown)
    low, high = np.percentile(shown, (2, 98), axis=(0, 1)).astype(np.float64)
    scaled = (shown - low) * (255 / np.where(high > low, high - low, 1))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def overlay(
    image: npt.NDArray[Any],
    labels: Labels,
    palette: tuple[RGB, ...],
    opacity: float = 0.5,
) -> npt.NDArray[np.uint8]:
    """The image with every pixel's class colour laid over it.

    :param image: (H, W, 3) uint8 RGB, or another that :func:`as_rgb` shows.
    :param labels: (H, W), each below ``len(palette)``.
    :param opacity: 0 gives the image, 1 the colours alone.
    :returns: (H, W, 3) uint8 RGB.
    :raises ImageError: the sizes differ, or ``opacity`` is not within 0 to 1.
    """
    if not 0 <= opacity <= 1:
        raise ImageError(f"The opacity of an overlay is a number from 0 to 1, not {opacity}.")
    if image.shape[:2] != labels.shape:
        raise ImageError(
            f"The image {image.shape[:2]} and its labels {labels.shape} differ in size; an "
            "overlay needs the labels at the image's size."
        )
    image = as_rgb(image)
    # Each (class, value) pair's answer is looked up, so no pixel is computed in float.
    colours = np.asarray(palette, dtype=np.float32)
    values = np.arange(256, dtype=np.float32)
    out = np.empty_like(image)
    for channel in range(3):
        mixed = (1 - opacity) * values[None, :] + opacity * colours[:, channel, None]
        out[:, :, channel] = np.rint(mixed).astype(np.uint8)[labels, image[:, :, channel]]
    return out


def legend(classes: Sequence[str], palette: Sequence[RGB]) -> Image.Image:
    """A picture that shows each class's colour beside its number and name, one a line.

    Args:
        classes: names, in the order of their numbers.
        palette: an RGB colour for each.

    Returns:
        An RGB picture, as large as its text needs.
    """
    font, line = ImageFont.load_default(14), 22
    texts = [f"{number}  {name}" for number, name in enumerate(classes)]
    width = max((round(font.getlength(text)) for text in texts), default=0)
    picture = Image.new("RGB", (width + 3 * line, line * len(texts) + line // 2), "white")
    pen = ImageDraw.Draw(picture)
    for number, (text, colour) in enumerate(zip(texts, palette, strict=True)):
        top = number * line + line // 4
        pen.rectangle((8, top + 2, 8 + line, top + line - 2), fill=colour, outline="black")
        pen.text((2 * line, top + line // 2), text, fill="black", font=font, anchor="lm")
    return picture


def class_areas(labels: Labels, classes: int) -> npt.NDArray[np.int64]:
    """How many pixels each class has: (classes,) int64, summing to H · W."""
    return np.bincount(labels.reshape(-1), minlength=classes).astype(np.int64)


def encode(
    image: Image.Image | npt.NDArray[np.uint8], kind: Literal["PNG", "JPEG"], **options: Any
) -> bytes:
    """A picture's file, as bytes. PNG at compression 3 unless told: half the time of 6."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    settings: dict[str, Any] = {"compress_level": 3} if kind == "PNG" else {"quality": 90}
    buffer = io.BytesIO()
    picture.save(buffer, kind, **{**settings, **options})
    return buffer.getvalue()
