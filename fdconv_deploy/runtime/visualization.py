"""Labels as pictures and numbers: indexed PNG, overlay, areas, and colours for classes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.postprocessing import Labels

if TYPE_CHECKING:
    from fdconv_deploy.runtime.detection import Detection


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


Picture = npt.NDArray[np.uint8]


def instance_colours(count: int) -> tuple[RGB, ...]:
    """Black for what is no object, then a colour for each of ``count`` objects."""
    return default_palette(count + 1)


def draw_instances(image: Picture, found: Detection, opacity: float) -> Picture:
    """The image with its objects drawn, the best scores last and so on top.

    :param image: (H, W, 3) uint8 RGB.
    :param opacity: of the masks' colours, 0 to 1; outlines, boxes and labels are opaque.
    :raises ImageError: ``opacity`` is not within 0 to 1.
    """
    if not 0 <= opacity <= 1:
        raise ImageError(f"The opacity of an overlay is a number from 0 to 1, not {opacity}.")
    out = as_rgb(image).copy()
    thickness = max(1, round(min(image.shape[:2]) / 400))
    worst_first = range(len(found) - 1, -1, -1)
    if found.has_masks:
        for index in worst_first:
            _draw_mask(out, found, index, opacity, thickness)
    picture = Image.fromarray(out)
    pen = ImageDraw.Draw(picture)
    font = _font(max(11, round(min(image.shape[:2]) / 45)))
    for index in worst_first:
        _draw_box(pen, font, found, index, thickness, picture.size)
    return np.asarray(picture)


def _draw_mask(
    canvas: Picture, found: Detection, index: int, opacity: float, thickness: int
) -> None:
    part = found.pasted[index]
    height, width = part.pixels.shape
    if not height or not width:
        return
    colour = found.palette[int(found.labels[index])]
    view = canvas[part.top : part.top + height, part.left : part.left + width]
    inside = part.pixels
    plain = np.full_like(view, colour)
    mixed = cv2.addWeighted(view, 1 - opacity, plain, opacity, 0)
    np.copyto(view, mixed, where=inside[..., None])
    # Objects of one class have one colour: an outline parts those that touch.
    outlines, _ = cv2.findContours(
        inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(part.left, part.top)
    )
    cv2.drawContours(canvas, outlines, -1, colour, thickness)


def _draw_box(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    found: Detection,
    index: int,
    thickness: int,
    size: tuple[int, int],
) -> None:
    colour = found.palette[int(found.labels[index])]
    x1, y1, x2, y2 = found.boxes[index].tolist()
    # A box's far edges are those of its last pixels.
    corners = (x1, y1, max(x2 - 1, x1), max(y2 - 1, y1))
    pen.rectangle(corners, outline=colour, width=thickness)
    text = f"{found.classes[int(found.labels[index])]} {found.scores[index]:.2f}"
    _, _, wide, high = pen.textbbox((0, 0), text, font=font)
    margin = max(1, int(high) // 6)
    # Above the box, else inside it at its top; never out of the picture where it can fit.
    left = max(min(x1, size[0] - wide - 2 * margin), 0)
    above = y1 - high - 2 * margin
    top = above if above >= 0 else max(y1, 0)
    pen.rectangle((left, top, left + wide + 2 * margin, top + high + 2 * margin), fill=colour)
    red, green, blue = colour
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    pen.text((left + margin, top + margin), text, fill="black" if bright else "white", font=font)


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
