"""What a scene is drawn on: a pinhole camera over flat ground, and a canvas that composites.

World coordinates are metres: X to the right, Y up from the ground, Z ahead of the camera.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from examples.streets.textures import Array

# cv2 takes polygon corners as fixed point with this many fractional bits.
_SHIFT = 4

_TURN = np.linspace(0, 2 * np.pi, 20, endpoint=False)
_RIM = np.stack([np.cos(_TURN), np.sin(_TURN)], 1)


@dataclass(frozen=True)
class Camera:
    """A pinhole ``elevation`` metres above the ground; ``focal``, ``cx``, ``horizon`` in pixels."""

    focal: float
    cx: float
    horizon: float
    elevation: float

    def point(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Where the world point (x, y, z), in metres, is seen: (column, row) in pixels."""
        return self.cx + self.focal * x / z, self.horizon + self.focal * (self.elevation - y) / z

    def scale(self, z: float) -> float:
        """Pixels per metre at distance ``z``."""
        return self.focal / z


class Canvas:
    """Image ``rgb (H, W, 3)`` float32 0..255, ``labels (H, W)`` uint8, ``depth (H, W)`` metres.

    ``things (H, W)`` uint16 tells whose a pixel is: ``n`` for the thing ``kinds[n - 1]``, 0 for
    what is not counted one by one.
    """

    def __init__(self, height: int, width: int) -> None:
        self.rgb = np.zeros((height, width, 3), np.float32)
        self.labels = np.zeros((height, width), np.uint8)
        self.depth = np.full((height, width), 1e4, np.float32)
        self.things = np.zeros((height, width), np.uint16)
        self.kinds: list[str] = []
        self._thing = 0

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.labels.shape[0], self.labels.shape[1]

    @contextmanager
    def thing(self, kind: str) -> Iterator[None]:
        """What is drawn within is one thing, of this kind."""
        self.kinds.append(kind)
        self._thing = len(self.kinds)
        try:
            yield
        finally:
            self._thing = 0

    def window(self, points: NDArray[np.float64]) -> tuple[int, int, int, int] | None:
        """The (left, top, right, bottom) box round ``points`` that is on the canvas, if any."""
        height, width = self.size
        columns, rows = points.T.tolist()
        # Plain Python: for a handful of corners, numpy's calls cost more than the work.
        left, top = max(int(min(columns)) - 2, 0), max(int(min(rows)) - 2, 0)
        right, bottom = min(int(max(columns)) + 3, width), min(int(max(rows)) + 3, height)
        return (left, top, right, bottom) if right > left and bottom > top else None

    def blend(
        self,
        box: tuple[int, int, int, int],
        shape: Array,
        colour: ArrayLike,
        label: int | None,
        depth: float | Array,
        cover: Array | None = None,
    ) -> None:
        """Lay ``colour`` over ``box`` where ``shape`` (h, w) in 0..1 is, through ``cover``.

        The label takes the whole shape, also where the cover has gaps: a fence is a fence
        between its bars. ``label=None`` (a shadow, a reflection) keeps the labels below.
        """
        left, top, right, bottom = box
        area = slice(top, bottom), slice(left, right)
        alpha = shape if cover is None else shape * cover
        below = self.rgb[area]
        below += alpha[..., None] * (np.asarray(colour, np.float32) - below)
        if label is not None:
            inside = shape > 0.5
            self.labels[area][inside] = label
            self.things[area][inside] = self._thing
            self.depth[area][inside] = depth[inside] if isinstance(depth, np.ndarray) else depth

    def polygon(
        self,
        points: Sequence[tuple[float, float]] | NDArray[np.float64],
        colour: ArrayLike,
        label: int | None,
        depth: float,
        opacity: float = 1.0,
    ) -> None:
        """Fill an anti-aliased polygon; ``points`` are (column, row) in pixels."""
        corners = np.asarray(points, np.float64)
        box = self.window(corners)
        if box is None:
            return
        left, top, right, bottom = box
        mask = np.zeros((bottom - top, right - left), np.uint8)
        fixed = np.round((corners - (left, top)) * (1 << _SHIFT)).clip(-(2**24), 2**24)
        cv2.fillPoly(mask, [fixed.astype(np.int32)], 255, cv2.LINE_AA, _SHIFT)
        self.blend(box, mask.astype(np.float32) * (opacity / 255), colour, label, depth)

    def ellipse(
        self,
        centre: tuple[float, float],
        radii: tuple[float, float],
        colour: ArrayLike,
        label: int | None,
        depth: float,
        opacity: float = 1.0,
    ) -> None:
        """Fill an ellipse; ``radii`` are (horizontal, vertical) in pixels."""
        self.polygon(_RIM * radii + centre, colour, label, depth, opacity)

    def stroke(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        width: float,
        colour: ArrayLike,
        label: int | None,
        depth: float,
    ) -> None:
        """Draw a straight bar ``width`` pixels wide."""
        (ax, ay), (bx, by) = start, end
        # fillPoly's anti-aliasing adds half a pixel on each side: take it off here.
        half = max(width - 1.0, 0.2) / 2 / (math.hypot(bx - ax, by - ay) + 1e-9)
        dx, dy = (ay - by) * half, (bx - ax) * half
        bar = [(ax - dx, ay - dy), (bx - dx, by - dy), (bx + dx, by + dy), (ax + dx, ay + dy)]
        self.polygon(bar, colour, label, depth)

    def surface(
        self,
        corners: Sequence[tuple[float, float]],
        texture: Array,
        label: int,
        depth: float | tuple[float, float],
        cover: Array | None = None,
    ) -> None:
        """Hang ``texture`` (h, w, 3) in perspective between four corners.

        ``corners``: (column, row) of the texture's top left, top right, bottom right and
        bottom left. ``depth`` is one distance, or those of the left and the right edge.
        ``cover`` (h, w) makes it see-through.
        """
        quad = np.asarray(corners, np.float64)
        box = self.window(quad)
        if box is None:
            return
        left, top, right, bottom = box
        h, w = texture.shape[:2]
        source = np.array([(0, 0), (w, 0), (w, h), (0, h)], np.float32)
        size = (right - left, bottom - top)
        target = (quad - (left, top)).astype(np.float32)
        matrix = cv2.getPerspectiveTransform(source, target)
        flags, border = cv2.INTER_LINEAR, cv2.BORDER_REPLICATE
        colour = cv2.warpPerspective(texture, matrix, size, flags=flags, borderMode=border)
        see = None
        if cover is not None:
            warped = cv2.warpPerspective(cover, matrix, size, flags=flags, borderMode=border)
            see = np.asarray(warped, np.float32)
        mask = np.zeros(size[::-1], np.uint8)
        fixed = np.round(target.astype(np.float64) * (1 << _SHIFT)).clip(-(2**24), 2**24)
        cv2.fillPoly(mask, [fixed.astype(np.int32)], 255, cv2.LINE_AA, _SHIFT)
        distance: float | Array
        if isinstance(depth, tuple):
            # Along a plane in perspective, one over the depth is linear in the column.
            ends = sorted([(quad[0, 0], 1 / depth[0]), (quad[1, 0], 1 / depth[1])])
            columns = np.arange(left, right, dtype=np.float64)
            inverse = np.interp(columns, [end[0] for end in ends], [end[1] for end in ends])
            distance = np.broadcast_to((1 / inverse).astype(np.float32), mask.shape)
        else:
            distance = depth
        shape = mask.astype(np.float32) / np.float32(255)
        self.blend(box, shape, colour, label, distance, see)
