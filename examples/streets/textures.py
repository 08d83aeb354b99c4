"""Surfaces of the drawn street: walls, fences, foliage, paving, each with its own frequencies.

Every function takes a ``numpy.random.Generator`` first and returns float32 arrays:
colours in 0..255 as ``(h, w, 3)``, modulations around 0 and coverages in 0..1 as ``(h, w)``.
Colours are drawn by the caller from palettes shared between classes, so what tells a
sidewalk from a road or a hedge from a painted wall is the pattern made here.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Rng = np.random.Generator

_BANK = 512


@lru_cache(maxsize=1)
def _bank() -> Array:
    """One fixed field of white noise; a texture cuts its own window out of it."""
    return np.random.default_rng(0x5EED).standard_normal((_BANK, _BANK), dtype=np.float32)


def white(rng: Rng, h: int, w: int) -> Array:
    """White noise, unit variance, ``(h, w)``: a random, wrapped window of the bank.

    Cutting a window is ten times faster than drawing afresh, and a scene needs dozens.
    """
    y, x = rng.integers(0, _BANK, 2)
    if y + h <= _BANK and x + w <= _BANK:
        return _bank()[y : y + h, x : x + w]
    rows, columns = (y + np.arange(h)) % _BANK, (x + np.arange(w)) % _BANK
    return _bank()[np.ix_(rows, columns)]


def fractal(rng: Rng, h: int, w: int, period: float, octaves: int = 3) -> Array:
    """Smooth noise whose longest waves are about ``period`` pixels; each octave halves it."""
    total = np.zeros((h, w), np.float32)
    norm = 0.0
    for octave in range(octaves):
        step = max(period / 2**octave, 1.0)
        coarse = white(rng, int(np.ceil(h / step)) + 2, int(np.ceil(w / step)) + 2)
        amplitude = 0.65**octave
        total += amplitude * cv2.resize(coarse, (w, h), interpolation=cv2.INTER_LINEAR)
        norm += amplitude**2
    # Bilinear interpolation keeps about 4/9 of the variance of what it stretches.
    return total * np.float32(1.5 / np.sqrt(norm))


def _grid(length: int, period: float, duty: float, phase: float = 0.0) -> NDArray[np.bool_]:
    """``(length,)`` bool: the first ``duty`` of every period."""
    return ((np.arange(length) + phase) / period) % 1.0 < duty


def brick(rng: Rng, h: int, w: int, period: float) -> Array:
    """Running-bond brickwork as a modulation ``(h, w)``; ``period`` is a course's height."""
    course = (np.arange(h) / period).astype(np.int32)
    joints = _grid(h, period, 1.0 / max(period, 2.5))[:, None]
    offset = (course % 2)[:, None] * period
    along = np.arange(w)[None, :] + offset
    heads = (along / (2 * period)) % 1.0 < 1.0 / max(2 * period, 3.0)
    # One shade per brick, looked up by (course, brick).
    shades = white(rng, int(course[-1]) + 1, int(w / (2 * period)) + 3)
    stones = shades[course[:, None], (along / (2 * period)).astype(np.int32)]
    return np.where(joints | heads, 0.9, 0.22 * stones).astype(np.float32)


def wall(rng: Rng, h: int, w: int, ppm: float, colour: Array) -> Array:
    """A wall without windows, ``(h, w, 3)``: brick, siding, slats, panels or plaster.

    ``ppm`` is pixels per metre, ``colour`` RGB ``(3,)``.
    """
    kind = rng.choice(
        ["brick", "siding", "slats", "panels", "plaster"], p=[0.35, 0.15, 0.1, 0.2, 0.2]
    )
    pattern = np.zeros((h, w), np.float32)
    if kind == "brick":
        pattern += brick(rng, h, w, max(ppm * rng.uniform(0.22, 0.4), 2.2)) * rng.uniform(18, 40)
    elif kind == "siding":
        pattern -= (_grid(h, max(ppm * rng.uniform(0.3, 0.6), 3), 0.3) * rng.uniform(20, 45))[
            :, None
        ]
    elif kind == "slats":
        # Longer waves than any fence: the same stripes, told apart by period alone.
        pattern -= (_grid(w, max(ppm * rng.uniform(0.9, 1.5), 5), 0.4) * rng.uniform(20, 40))[
            None, :
        ]
    elif kind == "panels":
        seams = _grid(h, max(ppm * 1.5, 5), 0.09)[:, None] | _grid(w, max(ppm * 2.0, 7), 0.07)[None]
        pattern -= seams * rng.uniform(25, 50)
    pattern += fractal(rng, h, w, 24.0, 2) * rng.uniform(2, 7)
    pattern += white(rng, h, w) * 2.0
    return (colour + pattern[..., None]).astype(np.float32)


def facade(rng: Rng, h: int, w: int, ppm: float, colour: Array, night: float = 0.0) -> Array:
    """A house front ``(h, w, 3)``: a wall, a window grid of its own periods, a ground floor.

    ``night`` in 0..1 is the share of windows that are lit.
    """
    image = wall(rng, h, w, ppm, colour)
    curtain = rng.random() < 0.25  # a glass curtain wall: nearly all window
    floor = max(ppm * rng.uniform(2.6, 3.6), 6.0)
    bay = max(ppm * rng.uniform(1.3, 3.2), 5.0)
    tall, wide = (0.85, 0.88) if curtain else rng.uniform((0.4, 0.4), (0.65, 0.7))
    ground = int(h - floor * rng.uniform(1.0, 1.25))
    rows = _grid(h, floor, tall, rng.uniform(0, 0.25 * floor))
    rows[max(ground, 0) :] = False
    columns = _grid(w, bay, wide, -(1 - wide) / 2 * bay)
    # Every pane has its own reflection; lit ones are warm.
    storey = (np.arange(h) / floor).astype(np.int32)[:, None]
    column = (np.arange(w) / bay).astype(np.int32)[None, :]
    variety = rng.random((int(storey[-1, 0]) + 1, int(column[0, -1]) + 1)).astype(np.float32)
    glass = np.array(rng.uniform((30, 40, 50), (130, 160, 190)), np.float32)
    panes = glass * (0.6 + 0.7 * variety[..., None])
    panes[variety < night] = (250, 215, 130)
    glazing = panes[storey, column]
    if rng.random() < 0.6:  # mullions
        bars = _grid(w, bay / rng.integers(2, 4), 1.2 / bay * 2)[None, :, None]
        glazing = np.where(bars, 0.5 * glazing + 0.5 * colour, glazing)
    window = rows[:, None] & columns[None, :]
    image = np.where(window[..., None], glazing, image)
    if 0 < ground < h and rng.random() < 0.7:
        image[ground:] = _shopfront(rng, h - ground, w, ppm, colour)
    if rng.random() < 0.5:  # cornice
        image[: max(int(0.4 * ppm), 1)] = colour * rng.uniform(0.5, 1.3)
    return image.astype(np.float32)


def _shopfront(rng: Rng, h: int, w: int, ppm: float, colour: Array) -> Array:
    """A ground floor ``(h, w, 3)``: dark glass between piers, under a sign band or awning."""
    image = np.empty((h, w, 3), np.float32)
    image[:] = colour * rng.uniform(0.5, 1.1)
    piers = _grid(w, max(ppm * rng.uniform(1.8, 4.0), 7), 0.82)
    image[int(0.25 * h) : int(0.95 * h), piers] = rng.uniform(25, 110, 3)
    band = slice(int(0.02 * h), max(int(0.24 * h), 1))
    first, second = rng.uniform(40, 235, (2, 3))
    stripes = _grid(w, max(ppm * rng.uniform(0.35, 0.7), 3), 0.5) & (rng.random() < 0.5)
    image[band] = np.where(stripes[:, None], first, second)
    return image + white(rng, h, w)[..., None] * 3.0


def fence(rng: Rng, h: int, w: int, ppm: float) -> Array:
    """Coverage ``(h, w)`` in 0..1 of bars, mesh, planks or rails; gaps show what is behind."""
    kind = rng.choice(["bars", "mesh", "planks", "rails"], p=[0.4, 0.25, 0.2, 0.15])
    period = max(ppm * rng.uniform(0.16, 0.3), 3.0)
    cover = np.zeros((h, w), np.float32)
    if kind == "bars":
        cover[:, _grid(w, period, max(0.35, 1.0 / period))] = 1.0
    elif kind == "mesh":
        y, x = np.mgrid[:h, :w].astype(np.float32)
        wires = np.minimum(((x + y) / period) % 1.0, ((x - y) / period) % 1.0)
        cover = np.where(wires < max(0.25, 0.9 / period), 0.9, 0.08).astype(np.float32)
    elif kind == "planks":
        cover[:, _grid(w, period, 0.72)] = 1.0
    else:
        cover[_grid(h, max(h / 4, 3.0), 0.4)] = 1.0
    posts = _grid(w, max(ppm * 2.0, 10), max(0.06, 1.5 / (ppm * 2.0)))
    cover[:, posts] = 1.0
    rail = max(int(0.07 * h), 1)
    cover[:rail] = 1.0
    if kind != "rails":
        cover[-2 * rail : -rail] = 1.0
    return cover


def foliage(rng: Rng, h: int, w: int, period: float, colour: Array) -> tuple[Array, Array]:
    """Leaves: colour ``(h, w, 3)`` and the field ``(h, w)`` that frays a crown's outline."""
    clumps = fractal(rng, h, w, period, 2)
    leaves = white(rng, h, w)
    light = 26.0 * clumps + 15.0 * leaves
    light += np.linspace(16, -22, h, dtype=np.float32)[:, None]  # lit from above
    return colour + light[..., None] * np.array([0.9, 1.0, 0.7], np.float32), clumps


def paving(rng: Rng, x: Array, z: Array, footprint: Array, kind: str, period: float) -> Array:
    """Joints on the ground as a modulation ``(h, w)``, drawn in metres, fading where too fine.

    ``x``, ``z`` and ``footprint`` are ``(h, w)`` in metres: where a pixel looks, and how long
    a stretch of ground it covers. ``kind`` is ``slabs``, ``setts`` or ``joints``.
    """
    if kind == "setts":
        course = np.floor(z / period)
        along, width = x / (1.6 * period) + 0.5 * (course % 2), 0.2
        joints = (along % 1.0 < width * 0.8) | ((z / period) % 1.0 < width)
    elif kind == "slabs":
        joints = ((x / period) % 1.0 < 0.1) | ((z / period) % 1.0 < 0.14)
    else:
        joints = (z / (3 * period)) % 1.0 < 0.06
    # What a pixel can't resolve averages out instead of turning into moiré.
    visible = np.clip(1.6 - 1.6 * footprint / period, 0.0, 1.0)
    return (-joints.astype(np.float32) * visible * rng.uniform(22, 48)).astype(np.float32)


def board(rng: Rng, size: int) -> Array:
    """A road sign's face, ``(size, size, 3)``: hatching, chevrons, checks or a symbol."""
    first, second = (
        np.array(c, np.float32)
        for c in [
            ((240, 240, 235), (200, 30, 30)),
            ((245, 200, 30), (25, 25, 25)),
            ((235, 235, 240), (30, 70, 170)),
            ((240, 240, 240), (20, 110, 60)),
        ][rng.integers(4)]
    )
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    kind = rng.integers(4)
    if kind == 0:
        pattern = ((x + y) * rng.uniform(2, 4)) % 1.0 < 0.5
    elif kind == 1:
        pattern = ((np.abs(x - 0.5) + y) * rng.uniform(2, 4)) % 1.0 < 0.5
    elif kind == 2:
        n = rng.integers(3, 6)
        pattern = ((x * n).astype(int) + (y * n).astype(int)) % 2 == 0
    else:
        pattern = (np.hypot(x - 0.5, y - 0.5) > 0.36) | (np.abs(y - 0.5) < 0.1)
    return np.where(pattern[..., None], second, first).astype(np.float32)
