"""The ground of a drawn street: road and markings, sidewalks, grass, in world metres."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples.streets import objects, textures
from examples.streets.classes import GRASS, LANE, ROAD, SIDEWALK
from examples.streets.stage import Camera, Canvas
from examples.streets.textures import Array, Rng


@dataclass(frozen=True)
class Street:
    """The street's plan in metres; ``middle`` is where the road's axis runs."""

    middle: float
    half: float
    walk: float

    def kerb(self, side: int) -> float:
        """The x of a side's kerb; ``side`` is -1 (left) or 1."""
        return self.middle + side * self.half

    def front(self, side: int) -> float:
        """The building line."""
        return self.middle + side * (self.half + self.walk)


def draw_ground(canvas: Canvas, camera: Camera, rng: Rng, street: Street) -> None:
    """Road, markings, sidewalks and the ground behind them, pixel by pixel in world metres."""
    height, width = canvas.size
    first = max(int(np.ceil(camera.horizon + 0.5)), 0)
    rows = np.arange(first, height, dtype=np.float32)[:, None]
    z = np.minimum(camera.focal * camera.elevation / (rows + 0.5 - camera.horizon), 400.0)
    x = (np.arange(width, dtype=np.float32)[None, :] + 0.5 - camera.cx) * z / camera.focal
    x -= np.float32(street.middle)
    z = np.broadcast_to(z, x.shape)
    # A pixel's stretch of ground along the street, where it is longest.
    footprint = z * z / (camera.focal * camera.elevation)
    away = np.abs(x)
    size = (height - first, width)
    grain = textures.white(rng, *size)
    patches = textures.fractal(rng, *size, 40.0, 2)

    road = np.empty((*x.shape, 3), np.float32)
    road[:] = objects.masonry(rng) * 0.35 + rng.uniform(40, 95)
    road += (grain * rng.uniform(3, 10) + patches * rng.uniform(1, 6))[..., None]
    if rng.random() < 0.15:
        road += textures.paving(rng, x, z, footprint, "setts", rng.uniform(0.2, 0.35))[..., None]
    # Tyres darken their tracks.
    track = np.cos((away - 0.5 * street.half) * (2 * np.pi / 1.7)) * (away < street.half)
    road -= (track * rng.uniform(0, 7))[..., None]
    labels = np.full(x.shape, ROAD, np.uint8)
    marks = _markings(rng, x, z, street)
    wear = np.clip(rng.uniform(0.75, 1.0) + 0.1 * patches, 0.45, 1.0)[marks][:, None]
    mark_colour = np.array(
        rng.choice([(225, 225, 220), (215, 215, 205), (225, 190, 70)]), np.float32
    )
    road[marks] += wear * (mark_colour - road[marks])
    labels[marks] = LANE

    kind = rng.choice(["slabs", "setts", "joints"], p=[0.5, 0.3, 0.2])
    period = {"slabs": (0.6, 1.1), "setts": (0.25, 0.4), "joints": (0.6, 1.0)}[str(kind)]
    walk = textures.paving(rng, x, z, footprint, str(kind), rng.uniform(*period))
    walk += textures.fractal(rng, *size, 10.0, 2) * rng.uniform(1, 4)
    tone = objects.masonry(rng) * 0.35 + rng.uniform(45, 110)
    kerb = (away < street.half + 0.22) * np.float32(rng.uniform(10, 45))
    paved = away >= street.half
    road[paved] = (tone + (walk + kerb)[..., None])[paved]
    labels[paved] = SIDEWALK

    lawn_colour = objects.leaf(rng) + rng.uniform(0, 25)
    behind = away >= street.half + street.walk
    if rng.random() < 0.5:  # a strip of grass along the kerb
        inner = street.half + rng.uniform(0.3, 0.6) * street.walk
        behind |= (away > street.half + 0.22) & (away < inner)
    blades = 6 * grain + 4 * patches
    road[behind] = (lawn_colour + blades[..., None])[behind]
    labels[behind] = GRASS

    canvas.rgb[first:], canvas.labels[first:], canvas.depth[first:] = road, labels, z
    if rng.random() < 0.5:  # the shadow of one side's houses
        edge = street.front(int(rng.choice([-1, 1]))) * rng.uniform(0.2, 0.9) - street.middle
        shade = (x > edge) if edge > 0 else (x < edge)
        canvas.rgb[first:][shade] *= np.float32(rng.uniform(0.6, 0.85))


def _markings(rng: Rng, x: Array, z: Array, street: Street) -> NDArray[np.bool_]:
    """Where the road is painted, ``(h, w)``: centre and edge lines, a crossing, a stop line."""
    away = np.abs(x)
    on_road = away < street.half - 0.15
    phase, period = rng.uniform(0, 6), rng.uniform(3.5, 6.0)
    dashes = ((z + phase) / period) % 1.0 < rng.uniform(0.45, 0.65)
    style = rng.random()
    if style < 0.6:
        marks = (away < 0.14) & dashes
    elif style < 0.85:
        marks = (away > 0.08) & (away < 0.3)  # a double line
    else:
        marks = (np.abs(away - street.half / 3) < 0.14) & dashes  # three lanes
    if rng.random() < 0.5:
        marks |= np.abs(away - (street.half - 0.5)) < 0.13
    if rng.random() < 0.5:
        start, depth = rng.uniform(4.5, 16), rng.uniform(2.5, 4.0)
        within = (z > start) & (z < start + depth)
        stripes = ((x + 20) / rng.uniform(0.9, 1.2)) % 1.0 < 0.5
        marks = np.where((z > start - 1.4) & (z < start + depth + 0.8), within & stripes, marks)
        marks |= (z > start - 1.4) & (z < start - 1.0) & (x > 0)
    return marks & on_road & (z < 40)
