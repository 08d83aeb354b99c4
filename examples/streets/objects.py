"""What stands in a drawn street: houses, fences, trees, poles, cars, people.

Each function draws one thing on a canvas through a camera. Positions are metres on the
ground: ``x`` to the right of the camera, ``z`` ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

import numpy as np

from examples.streets import textures
from examples.streets.classes import BUILDING, CAR, FENCE, PERSON, POLE, TREE
from examples.streets.stage import Camera, Canvas
from examples.streets.textures import Array, Rng

_Rest = ParamSpec("_Rest")
_Draw = Callable[Concatenate[Canvas, _Rest], None]


def _one(kind: str) -> Callable[[_Draw[_Rest]], _Draw[_Rest]]:
    """Mark a function as drawing one thing of a kind in `classes.THINGS`."""

    def mark(draw: _Draw[_Rest]) -> _Draw[_Rest]:
        @wraps(draw)
        def whole(canvas: Canvas, *rest: _Rest.args, **named: _Rest.kwargs) -> None:
            with canvas.thing(kind):
                draw(canvas, *rest, **named)

        return whole

    return mark


def masonry(rng: Rng) -> Array:
    """A colour for walls, fences and paving alike, RGB ``(3,)``: class is not told by it."""
    grey = rng.uniform(70, 205)
    tint = rng.choice(
        [(0, 0, 0), (28, -2, -22), (45, -15, -30), (20, 12, -18), (-18, 14, -14), (-14, -2, 16)],
        p=[0.35, 0.2, 0.12, 0.13, 0.12, 0.08],
    )
    return np.clip(grey + tint * rng.uniform(0.4, 1.2), 25, 235).astype(np.float32)


def paint(rng: Rng) -> Array:
    """A colour for cars and clothes, RGB ``(3,)``: mostly greys and dark, some vivid."""
    if rng.random() < 0.5:
        return (rng.uniform(25, 225) + rng.uniform(-10, 10, 3)).astype(np.float32)
    return rng.uniform(20, 225, 3).astype(np.float32)


def leaf(rng: Rng) -> Array:
    """A colour for crowns, hedges and grass alike, RGB ``(3,)``: green, olive or autumn."""
    kind = rng.random()
    low, high = ((45, 80, 30), (85, 125, 55)) if kind < 0.7 else ((95, 85, 35), (160, 120, 60))
    return rng.uniform(low, high).astype(np.float32)


def _texels(camera: Camera, near: float, length: float, height: float) -> tuple[int, int, float]:
    """Texture (height, width, pixels per metre) fit for a plane whose near edge is at ``near``.

    Never finer than the image shows it, nor than 11 texels a metre: the rest is wasted time.
    """
    ppm = float(np.clip(0.8 * camera.scale(max(near, 4.0)), 3.0, 11.0))
    return max(int(height * ppm), 4), max(int(length * ppm), 4), ppm


def side_plane(
    camera: Camera, x: float, near: float, far: float, top: float, bottom: float = 0.0
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Corners and edge depths, left to right on screen, of an upright plane along the street."""
    left, right = (near, far) if x < 0 else (far, near)
    corners = [
        camera.point(x, top, left),
        camera.point(x, top, right),
        camera.point(x, bottom, right),
        camera.point(x, bottom, left),
    ]
    return corners, (left, right)


def house(
    canvas: Canvas,
    camera: Camera,
    rng: Rng,
    x: float,
    near: float,
    far: float,
    height: float,
    light: tuple[float, float],
    night: float,
) -> None:
    """A house along the street at ``x``; ``light`` shades its street side and its near end."""
    colour = masonry(rng) if rng.random() < 0.85 else leaf(rng) + 15
    if rng.random() < 0.12:
        colour = rng.uniform((110, 130, 150), (170, 190, 215)).astype(np.float32)  # near the sky's
    near = max(near, 2.2)
    h, w, ppm = _texels(camera, near, far - near, height)
    h = min(h, 360)
    # The end wall: the part of it that juts out over a lower neighbour or a gap stays seen.
    outer = x + np.sign(x) * 9.0
    ends = sorted((x, outer))
    end = [(ends[0], height), (ends[1], height), (ends[1], 0.0), (ends[0], 0.0)]
    end_wall = textures.wall(rng, max(h // 2, 4), max(int(4.5 * ppm), 4), 0.5 * ppm, colour)
    canvas.surface(
        [camera.point(a, b, near) for a, b in end], end_wall * np.float32(light[1]), BUILDING, near
    )
    front = textures.facade(rng, h, w, h / height, colour, night)
    corners, depth = side_plane(camera, x, near, far, height)
    canvas.surface(corners, front * np.float32(light[0]), BUILDING, depth)


def fence(
    canvas: Canvas, camera: Camera, rng: Rng, style: int, x: float, near: float, far: float,
    height: float, colour: Array,
) -> None:  # fmt: skip
    """One panel of fence along the street; equal ``style`` seeds give matching panels."""
    near = max(near, 2.2)
    if far - near < 0.5:
        return
    h, w, ppm = _texels(camera, near, far - near, height)
    cover = textures.fence(np.random.default_rng(style), h, w, ppm)
    grain = colour + textures.white(rng, h, w)[..., None] * np.float32(6)
    corners, depth = side_plane(camera, x, near, far, height)
    canvas.surface(corners, grain, FENCE, depth, cover)


def hedge(
    canvas: Canvas, camera: Camera, rng: Rng, x: float, near: float, far: float, height: float,
    colour: Array,
) -> None:  # fmt: skip
    """A clipped hedge along the street: a wall of leaves, labelled tree."""
    near = max(near, 2.2)
    if far - near < 0.5:
        return
    h, w, ppm = _texels(camera, near, far - near, height)
    leaves, _ = textures.foliage(rng, h, w, max(0.6 * ppm, 3.0), colour)
    corners, depth = side_plane(camera, x, near, far, height)
    canvas.surface(corners, leaves, TREE, depth)


def tree(canvas: Canvas, camera: Camera, rng: Rng, x: float, z: float, colour: Array) -> None:
    """A trunk under a crown of frayed blobs."""
    height, spread = rng.uniform(4.0, 9.0), rng.uniform(1.3, 2.8)
    scale = camera.scale(z)
    foot, fork = camera.point(x, 0, z), camera.point(x + rng.uniform(-0.3, 0.3), 0.5 * height, z)
    canvas.ellipse(foot, (spread * scale, 0.16 * spread * scale), (25, 25, 30), None, z, 0.35)
    bark = rng.uniform((50, 38, 28), (95, 80, 65))
    canvas.stroke(foot, fork, max(0.34 * scale, 2.0), bark, TREE, z)
    centre = camera.point(x, 0.68 * height, z)
    reach = np.array([spread, 0.36 * height]) * scale
    box = canvas.window(np.array([centre - 1.25 * reach, centre + 1.25 * reach]))
    if box is None:
        return
    left, top, right, bottom = box
    h, w = bottom - top, right - left
    leaves, clumps = textures.foliage(rng, h, w, max(0.7 * scale, 3.0), colour)
    columns = ((np.arange(left, right) - centre[0]) / reach[0])[None, :]
    rows = ((np.arange(top, bottom) - centre[1]) / reach[1])[:, None]
    field = 1.0 - (columns**2 + rows**2) + 0.22 * clumps
    shape = np.clip(0.5 + 4.0 * field, 0.0, 1.0).astype(np.float32)
    canvas.blend(box, shape, leaves, TREE, z)


def lamp(canvas: Canvas, camera: Camera, rng: Rng, x: float, z: float) -> None:
    """A street lamp leaning over the road, or a traffic light."""
    scale, colour = camera.scale(z), rng.uniform(30, 150) + rng.uniform(-8, 8, 3)
    height = rng.uniform(4.5, 7.5)
    width = float(np.clip(0.2 * scale, 2.4, 7.0))
    foot, top = camera.point(x, 0, z), camera.point(x, height, z)
    canvas.stroke(foot, top, width, colour, POLE, z)
    reach = -np.sign(x) * rng.uniform(0.8, 2.2)
    if rng.random() < 0.7:
        tip = camera.point(x + reach, height + 0.3, z)
        canvas.stroke(top, tip, max(0.8 * width, 2.2), colour, POLE, z)
        canvas.ellipse(tip, (0.35 * scale, 0.13 * scale), (235, 230, 205), POLE, z)
    else:
        _lights(canvas, camera, rng, x, rng.uniform(2.6, 3.6), z)


def _lights(canvas: Canvas, camera: Camera, rng: Rng, x: float, y: float, z: float) -> None:
    """A traffic light's box and the lamp that is on."""
    scale = camera.scale(z)
    middle = np.array(camera.point(x, y, z))
    half = np.array([0.2, 0.5]) * scale
    canvas.polygon(middle + half * [(-1, -1), (1, -1), (1, 1), (-1, 1)], (28, 28, 26), POLE, z)
    row, colour = [(-0.32, (235, 40, 30)), (0.0, (240, 180, 30)), (0.32, (50, 215, 110))][
        rng.integers(3)
    ]
    canvas.ellipse((middle[0], middle[1] + row * scale), (0.12 * scale,) * 2, colour, POLE, z)


@_one("sign")
def sign(canvas: Canvas, camera: Camera, rng: Rng, x: float, z: float) -> None:
    """A post with one or two hatched boards."""
    scale, height = camera.scale(z), rng.uniform(2.3, 3.2)
    post = rng.uniform(70, 170) + rng.uniform(-8, 8, 3)
    width = float(np.clip(0.12 * scale, 2.2, 5.0))
    canvas.stroke(camera.point(x, 0, z), camera.point(x, height, z), width, post, POLE, z)
    size = rng.uniform(0.75, 1.15)
    for level in range(1 + (rng.random() < 0.35)):
        y = height - level * (size + 0.08)
        half = size / 2
        corners = [(x - half, y), (x + half, y), (x + half, y - size), (x - half, y - size)]
        face = textures.board(rng, int(np.clip(size * scale, 5, 48)))
        canvas.surface([camera.point(a, b, z) for a, b in corners], face, POLE, z)


@_one("car")
def car(canvas: Canvas, camera: Camera, rng: Rng, x: float, z: float, towards: bool) -> None:
    """A car along the street whose near end is at ``z``: body, cabin, glass, wheels, lights."""
    body, length = paint(rng), rng.uniform(3.6, 4.6)
    width, waist, roof = rng.uniform(0.82, 0.95), rng.uniform(0.8, 1.0), rng.uniform(1.4, 1.9)
    glass = rng.uniform((35, 45, 55), (105, 125, 145))
    at, scale = camera.point, camera.scale(z)
    near, far = z, z + length
    flank = x - width if x > 0 else x + width  # the side that is turned to the camera
    shadow = [(x - 1.1, near - 0.3), (x + 1.1, near - 0.3), (x + 1.1, far), (x - 1.1, far)]
    canvas.polygon([at(a, 0, max(b, 1.5)) for a, b in shadow], (18, 18, 20), None, z, 0.6)
    detailed = scale > 5.0  # below, the small parts are less than a pixel
    if abs(x) > width:
        side = [(0.18, near), (waist, near), (waist, far), (0.18, far)]
        canvas.polygon([at(flank, y, d) for y, d in side], body * 0.78, CAR, z)
        tumble = flank + (0.12 if flank < x else -0.12)
        cabin = [(flank, waist, near + 0.25), (tumble, roof, near + 0.7),
                 (tumble, roof, far - 1.2), (flank, waist, far - 0.5)]  # fmt: skip
        canvas.polygon([at(*p) for p in cabin], body * 0.7, CAR, z)
        glazed = [(flank, waist + 0.05, near + 0.6), (tumble, roof - 0.12, near + 0.9),
                  (tumble, roof - 0.12, far - 1.4), (flank, waist + 0.05, far - 0.9)]  # fmt: skip
        canvas.polygon([at(*p) for p in glazed], glass * 0.9, CAR, z)
        for d in (near + 0.8, far - 0.8) if detailed else ():
            wheel = at(flank, 0.32, d)
            radius = 0.33 * camera.scale(d)
            squash = min(abs(flank) / d + 0.15, 1.0)
            canvas.ellipse(wheel, (radius * squash, radius), (20, 20, 22), CAR, z)
    for tyre in (-0.75, 0.75):
        foot = np.array(at(x + tyre * width, 0.2, near))
        half = np.array([0.12, 0.22]) * scale
        canvas.polygon(foot + half * [(-1, -1), (1, -1), (1, 1), (-1, 1)], (18, 18, 20), CAR, z)
    base = waist - 0.08  # the bonnet hides it: no gap between the two
    top = [(-width, base), (-width + 0.12, roof), (width - 0.12, roof), (width, base)]
    canvas.polygon([at(x + a, b, near + 0.3) for a, b in top], body * 1.05, CAR, z)
    pane = [(-width + 0.1, waist), (-width + 0.2, roof - 0.12),
            (width - 0.2, roof - 0.12), (width - 0.1, waist)]  # fmt: skip
    canvas.polygon([at(x + a, b, near + 0.3) for a, b in pane], glass, CAR, z)
    front = [(-width, 0.22), (-width, waist), (width, waist), (width, 0.22)]
    canvas.polygon([at(x + a, b, near) for a, b in front], body, CAR, z)
    if not detailed:
        return
    bumper = [(-width, 0.22), (-width, 0.42), (width, 0.42), (width, 0.22)]
    canvas.polygon([at(x + a, b, near) for a, b in bumper], body * 0.55, CAR, z)
    lamps = (245, 240, 215) if towards else (200, 25, 20)
    for side_ in (-0.78, 0.78):
        centre = at(x + side_ * width, waist - 0.18, near)
        canvas.ellipse(centre, (0.16 * scale, 0.09 * scale), lamps, CAR, z)
    plate = [(-0.26, 0.46), (-0.26, 0.57), (0.26, 0.57), (0.26, 0.46)]
    canvas.polygon([at(x + a, b, near) for a, b in plate], (225, 225, 205), CAR, z)


@_one("person")
def person(canvas: Canvas, camera: Camera, rng: Rng, x: float, z: float) -> None:
    """Someone walking: legs apart, a plain or striped coat, arms, a head."""
    tall, scale = rng.uniform(1.45, 1.95), camera.scale(z)
    coat, trousers = paint(rng), paint(rng) * 0.7
    skin = rng.uniform(0.35, 1.0) * np.array([235, 195, 165])
    hair = rng.uniform(15, 130) * np.array([1.0, 0.85, 0.7])
    stride = rng.uniform(0.05, 0.3)

    def at(dx: float, up: float) -> tuple[float, float]:
        return camera.point(x + dx, up * tall, z)

    canvas.ellipse(at(0, 0), (0.4 * scale, 0.09 * scale), (20, 20, 25), None, z, 0.4)
    for foot in (-stride, stride):
        canvas.stroke(
            at(0.4 * foot, 0.52), at(foot, 0.01), max(0.17 * scale, 1.5), trousers, PERSON, z
        )
    for hand in (-1, 1):
        reach = hand * rng.uniform(0.22, 0.34)
        canvas.stroke(
            at(hand * 0.19, 0.8), at(reach, 0.5), max(0.1 * scale, 1.2), coat * 0.8, PERSON, z
        )
    coat_outline = [(-0.15, 0.83), (0.15, 0.83), (0.22, 0.77), (0.19, 0.46), (-0.19, 0.46),
                    (-0.22, 0.77)]  # fmt: skip
    canvas.polygon([at(*p) for p in coat_outline], coat, PERSON, z)
    if rng.random() < 0.4:
        other, stripes = paint(rng), rng.integers(2, 5)
        for stripe in range(stripes):
            y = 0.5 + 0.28 * (stripe + 0.5) / stripes
            width = max(0.14 * tall * scale / stripes, 0.9)
            canvas.stroke(at(-0.18, y), at(0.18, y), width, other, PERSON, z)
    head = at(0, 0.92)
    canvas.ellipse(head, (0.11 * scale, 0.145 * scale), skin, PERSON, z)
    canvas.ellipse((head[0], head[1] - 0.05 * scale), (0.12 * scale, 0.1 * scale), hair, PERSON, z)
