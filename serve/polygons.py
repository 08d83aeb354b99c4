"""Exact polygons of labels, along the pixels' edges: filling them gives the labels back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def class_rings(
    labels: npt.NDArray[Any], number: int, top: int = 0, left: int = 0
) -> list[list[int]]:
    """The outlines of one class.

    Args:
        labels: (H, W).
        number: the class id.
        top: row of the image where the labels begin.
        left: column of the image where the labels begin.

    Returns:
        Closed rings ``[x0, y0, x1, y1, ...]`` of pixel corners, (0, 0) being the top left corner
        of the image. A pixel is of the class when its centre is inside an odd number of rings
        (SVG's ``evenodd``). Pixels that touch only at a corner are in different rings.
    """
    inside = np.pad(labels == number, 1)
    nw, ne, sw, se = inside[:-1, :-1], inside[:-1, 1:], inside[1:, :-1], inside[1:, 1:]
    count = nw.astype(np.int8) + ne + sw + se
    saddle = (count == 2) & (nw == se)
    corner = (count == 1) | (count == 3)
    y, x = np.nonzero(corner)
    sy, sx = np.nonzero(saddle)
    # At a saddle two rings touch: it is two vertices. Where the north-western pixel is of
    # the class, one joins the left and upper edge, the other the right and lower; else one
    # joins left and lower, the other right and upper.
    falling = nw[sy, sx]
    ys, xs = np.concatenate([y, sy, sy]), np.concatenate([x, sx, sx])
    right = np.concatenate([np.zeros_like(y), np.zeros_like(sy), np.ones_like(sy)])
    lower = np.concatenate([np.zeros_like(y), ~falling, falling]).astype(np.intp)
    # Along each grid line, vertices pair up: first with second, third with fourth.
    across = _pairs(np.lexsort((right, xs, ys)))
    down = _pairs(np.lexsort((lower, ys, xs)))
    return _rings(xs + left, ys + top, across, down)


def _pairs(order: npt.NDArray[np.intp]) -> list[int]:
    partner = np.empty(len(order), np.intp)
    partner[order[0::2]] = order[1::2]
    partner[order[1::2]] = order[0::2]
    return partner.tolist()


def _rings(
    xs: npt.NDArray[np.intp], ys: npt.NDArray[np.intp], across: list[int], down: list[int]
) -> list[list[int]]:
    places = np.stack([xs, ys], axis=1).tolist()
    seen = bytearray(len(places))
    rings = []
    for start in range(len(places)):
        if seen[start]:
            continue
        ring: list[int] = []
        at = start
        while not seen[at]:
            other = across[at]
            seen[at] = seen[other] = 1
            ring += places[at]
            ring += places[other]
            at = down[other]
        rings.append(ring)
    return rings
