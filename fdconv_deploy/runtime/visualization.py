"""Answers as pictures: indexed masks, overlays, legends, drawn objects, colours of classes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.postprocessing import Labels, Pasted, row_blocks

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

    Raises:
        ImageError: more than 256 classes, which an indexed PNG cannot hold.
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
    """An image of any bands, (H, W) or (H, W, C), to be looked at: (H, W, 3) uint8.

    RGB is left as it is. Of other images the first three bands are shown as red, green and blue,
    of fewer than three the first in gray; each is stretched from its 2nd to its 98th percentile,
    where it is not in eight bits.
    """
    bands = image if image.ndim == 3 else image[:, :, None]
    shown = bands[:, :, :3] if bands.shape[2] >= 3 else bands[:, :, [0, 0, 0]]
    if shown.dtype == np.uint8:
        return np.ascontiguousarray(shown)
    low, high = np.percentile(shown, (2, 98), axis=(0, 1)).astype(np.float64)
    scaled = (shown - low) * (255 / np.where(high > low, high - low, 1))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def check_drawing(image: npt.NDArray[Any], size: tuple[int, ...], opacity: float) -> None:
    """Refuse (``ImageError``) to draw what was found in an image of ``size`` over another."""
    if not 0 <= opacity <= 1:
        raise ImageError(f"The opacity of an overlay is a number from 0 to 1, not {opacity}.")
    if image.shape[:2] != size:
        raise ImageError(
            f"The image {image.shape[:2]} and the one that was answered for {size} differ in size."
        )


def overlay(
    image: npt.NDArray[Any],
    labels: Labels,
    palette: tuple[RGB, ...],
    opacity: float = 0.5,
) -> npt.NDArray[np.uint8]:
    """The image with every pixel's class colour laid over it: (H, W, 3) uint8 RGB.

    ``image`` is what `as_rgb` shows; ``opacity`` 0 gives it, 1 the colours alone. ``labels`` are
    (H, W), each below ``len(palette)``. Raises as `check_drawing`.
    """
    check_drawing(image, labels.shape, opacity)
    image = as_rgb(image)
    # Each (class, value) pair's answer is looked up, so no pixel is computed in float.
    colours = np.asarray(palette, dtype=np.float32)
    values = np.arange(256, dtype=np.float32)
    out = np.empty_like(image)
    for channel in range(3):
        mixed = (1 - opacity) * values[None, :] + opacity * colours[:, channel, None]
        table = np.rint(mixed).astype(np.uint8)
        for rows in row_blocks(labels.shape):
            out[rows, :, channel] = table[labels[rows], image[rows, :, channel]]
    return out


def legend(classes: Sequence[str], palette: Sequence[RGB]) -> Image.Image:
    """An RGB picture of each class's colour beside its number and name, one a line."""
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


def encode(
    image: Image.Image | npt.NDArray[np.uint8], kind: Literal["PNG", "JPEG"], **options: Any
) -> bytes:
    """A picture as a file's bytes. PNG is compressed at level 3: half the time of level 6."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    settings: dict[str, Any] = {"compress_level": 3} if kind == "PNG" else {"quality": 90}
    buffer = io.BytesIO()
    picture.save(buffer, kind, **{**settings, **options})
    return buffer.getvalue()


def draw_instances(
    image: npt.NDArray[np.uint8],
    boxes: npt.NDArray[np.float32],
    captions: Sequence[str],
    colours: Sequence[RGB],
    masks: Sequence[Pasted],
    opacity: float,
) -> npt.NDArray[np.uint8]:
    """The image (H, W, 3) uint8 RGB with its objects drawn, the first on top.

    ``boxes`` are (N, 4) x1, y1, x2, y2 in pixels of the image, with a caption and a colour each,
    and a mask each or none at all. ``opacity`` is of the masks' colours; all else is opaque.
    """
    out = as_rgb(image).copy()
    thickness = max(1, round(min(image.shape[:2]) / 400))
    for mask, colour in reversed([*zip(masks, colours, strict=False)]):
        _draw_mask(out, mask, colour, opacity, thickness)
    picture = Image.fromarray(out)
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(11, round(min(image.shape[:2]) / 45)))
    for (x1, y1, x2, y2), text, colour in reversed(
        [*zip(boxes.tolist(), captions, colours, strict=True)]
    ):
        # A box's far edges are those of its last pixels.
        corners = (x1, y1, max(x2 - 1, x1), max(y2 - 1, y1))
        pen.rectangle(corners, outline=colour, width=thickness)
        _, _, wide, high = pen.textbbox((0, 0), text, font=font)
        margin = max(1, int(high) // 6)
        # Above the box, else inside it at its top; never out of the picture where it can fit.
        left = max(min(x1, picture.width - wide - 2 * margin), 0)
        above = y1 - high - 2 * margin
        top = above if above >= 0 else max(y1, 0)
        pen.rectangle((left, top, left + wide + 2 * margin, top + high + 2 * margin), fill=colour)
        bright = np.dot(colour, (0.299, 0.587, 0.114)) > 140
        pen.text((left + margin, top + margin), text, "black" if bright else "white", font)
    return np.asarray(picture)


def _draw_mask(
    canvas: npt.NDArray[np.uint8], mask: Pasted, colour: RGB, opacity: float, thickness: int
) -> None:
    if not mask.pixels.size:
        return
    view = mask.of(canvas)
    mixed = cv2.addWeighted(view, 1 - opacity, np.full_like(view, colour), opacity, 0)
    np.copyto(view, mixed, where=mask.pixels[..., None])
    # Objects of one class have one colour: an outline parts those that touch.
    outlines, _ = cv2.findContours(
        mask.pixels.astype(np.uint8),
        cv2.RETR_CCOMP,
        cv2.CHAIN_APPROX_NONE,
        offset=(mask.left, mask.top),
    )
    cv2.drawContours(canvas, outlines, -1, colour, thickness)
