"""Objects drawn over their image: masks with outlines, boxes, and labels that can be read."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.visualization import RGB, as_rgb, default_palette

if TYPE_CHECKING:
    from fdconv_deploy.runtime.detection import Detection

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
