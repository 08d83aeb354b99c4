"""Street scenes drawn from a seed: an image and its labels, any size, a few milliseconds.

A scene is a world first (a street with kerbs, houses, fences, trees, traffic, people; all in
metres) and a photograph of it second (light, haze, blur, sensor noise). Classes share their
colours on purpose: road and sidewalk, grass and crowns, walls and fences differ by the
pattern on them, so a network has to look at frequencies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray

from examples.streets import objects, textures
from examples.streets.classes import BUILDING, CLASSES, PALETTE, SKY
from examples.streets.ground import Street, draw_ground
from examples.streets.stage import Camera, Canvas
from examples.streets.textures import Array, Rng

__all__ = ["CLASSES", "PALETTE", "draw_scene"]

# The size the proportions were drawn for; other sizes see the same world.
HEIGHT, WIDTH = 192, 256
_FAR = 75.0


@dataclass(frozen=True)
class _Weather:
    """How the photograph is taken. ``sun`` lights the left (-1) or the right (1) side more."""

    sun: float
    contrast: float
    haze_distance: float
    haze: Array
    sky_top: Array
    sky_low: Array
    clouds: float
    night: float
    gain: Array


def draw_scene(
    seed: int, height: int = HEIGHT, width: int = WIDTH
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw scene number ``seed``.

    Returns ``(rgb, labels)``: uint8 ``(height, width, 3)`` and uint8 ``(height, width)`` of
    indices into ``CLASSES``. The same seed and size give the same scene; another size gives
    another photograph of a similar street. ValueError when a side is under 16 pixels.
    """
    rgb, canvas = draw(seed, height, width)
    return rgb, canvas.labels


def draw(seed: int, height: int = HEIGHT, width: int = WIDTH) -> tuple[NDArray[np.uint8], Canvas]:
    """As `draw_scene`, with the canvas in place of its labels: it tells things apart too."""
    if min(height, width) < 16:
        raise ValueError(f"a scene needs at least 16×16 pixels, not {height}×{width}")
    rng = np.random.default_rng([seed, 0x57EE7])
    weather = _draw_weather(rng)
    # Whatever the shape, the view spans about what a 192×256 one does.
    unit = min(height / HEIGHT, width / WIDTH)
    camera = Camera(
        focal=unit * rng.uniform(150, 235),
        cx=width * rng.uniform(0.33, 0.67),
        horizon=height * rng.uniform(0.4, 0.52),
        elevation=rng.uniform(1.4, 2.4),
    )
    street = Street(
        middle=rng.uniform(-2.2, 2.2), half=rng.uniform(3.4, 5.5), walk=rng.uniform(1.8, 4.2)
    )
    canvas = Canvas(height, width)
    _sky(canvas, camera, rng, weather)
    draw_ground(canvas, camera, rng, street)
    _street_end(canvas, camera, rng, street, weather)
    leaves = objects.leaf(rng)
    for side in (-1, 1):
        _terrace(canvas, camera, rng, street, side, weather, leaves)
    # Everything else stands in front of the houses: farthest first.
    things = _furniture(rng, street, leaves) + _traffic(rng, street)
    for _, put in sorted(things, key=lambda thing: -thing[0]):
        put(canvas, camera, rng)
    return _photograph(canvas, rng, weather, unit), canvas


def _draw_weather(rng: Rng) -> _Weather:
    kind = rng.choice(["clear", "overcast", "haze", "dusk"], p=[0.48, 0.27, 0.14, 0.11])
    top, low = {
        "clear": ((70, 125, 195), (185, 210, 230)),
        "overcast": ((165, 170, 178), (205, 208, 212)),
        "haze": ((175, 180, 182), (212, 210, 204)),
        "dusk": ((75, 80, 115), (225, 165, 125)),
    }[str(kind)]
    shift = rng.normal(0, 12, 3)
    level = rng.uniform(0.5, 0.7) if kind == "dusk" else rng.uniform(0.72, 1.12)
    distance = rng.uniform(30, 70) if kind == "haze" else rng.uniform(90, 400)
    low_colour = np.array(low + shift, np.float32)
    return _Weather(
        sun=float(rng.choice([-1, 1])),
        contrast=rng.uniform(0.12, 0.3) if kind in ("clear", "dusk") else rng.uniform(0, 0.08),
        haze_distance=float(distance),
        haze=low_colour,
        sky_top=np.array(top + shift, np.float32),
        sky_low=low_colour,
        clouds=float(rng.uniform(0, 26)),
        night=float(rng.uniform(0.25, 0.7) if kind == "dusk" else rng.uniform(0, 0.06)),
        gain=(level * rng.uniform(0.93, 1.07, 3)).astype(np.float32),
    )


def _sky(canvas: Canvas, camera: Camera, rng: Rng, weather: _Weather) -> None:
    height, width = canvas.size
    fall = np.clip(np.arange(height) / max(camera.horizon, 1), 0, 1).astype(np.float32)[
        :, None, None
    ]
    canvas.rgb[:] = weather.sky_top * (1 - fall) + weather.sky_low * fall
    clouds = textures.fractal(rng, height, width, 0.35 * width, 4)
    canvas.rgb += (clouds * weather.clouds * (1 - 0.6 * fall[..., 0]))[..., None]
    canvas.labels[:] = SKY


def _street_end(
    canvas: Canvas, camera: Camera, rng: Rng, street: Street, weather: _Weather
) -> None:
    """What closes the view: a row of trees, a house across the street, or nothing."""
    kind, z = rng.random(), _FAR
    if kind < 0.35:
        colour = objects.leaf(rng)
        for x in rng.uniform(-24, 24, 7):
            objects.tree(canvas, camera, rng, float(x), z, colour)
    elif kind < 0.75:
        x = -30.0
        while x < 30:
            wide, tall = rng.uniform(9, 22), rng.uniform(6, 17)
            ppm = float(np.clip(camera.scale(z), 2.5, 8))
            front = textures.facade(
                rng, int(tall * ppm), int(wide * ppm), ppm, objects.masonry(rng), weather.night
            )
            corners = [(x, tall), (x + wide, tall), (x + wide, 0.0), (x, 0.0)]
            seen = [camera.point(a, b, z) for a, b in corners]
            canvas.surface(seen, front, BUILDING, z)
            x += wide + max(rng.uniform(-6, 6), 0.0)


def _terrace(
    canvas: Canvas,
    camera: Camera,
    rng: Rng,
    street: Street,
    side: int,
    weather: _Weather,
    leaves: Array,
) -> None:
    """One side's plots from far to near: houses, and gardens behind a fence or a hedge."""
    light = 1 + weather.contrast * weather.sun * side, 1 - 0.5 * weather.contrast
    x, far = street.front(side), _FAR
    style, tone = int(rng.integers(2**31)), objects.masonry(rng)
    built = rng.uniform(0.35, 0.95)
    plots: list[tuple[float, float, bool]] = []
    while far > 2.5:
        near = far - rng.uniform(7, 16)
        plots.append((near, far, bool(rng.random() < built)))
        far = near
    for near, far, has_house in plots:
        if has_house:
            tall = rng.uniform(4.5, 9) if rng.random() < 0.4 else rng.uniform(8, 20)
            objects.house(canvas, camera, rng, x, near, far, tall, light, weather.night)
            continue
        for _ in range(rng.integers(1, 3)):
            z = rng.uniform(max(near, 4.0), max(far, 4.5))
            objects.tree(canvas, camera, rng, x + side * rng.uniform(2, 8), z, leaves)
        edge = rng.random()
        if edge < 0.5:
            tall = rng.uniform(1.1, 2.3)
            for start in np.arange(far, max(near, 2.2), -5.0):
                end = max(start - 5.0, near)
                objects.fence(canvas, camera, rng, style, x, float(end), float(start), tall, tone)
        elif edge < 0.7:
            objects.hedge(canvas, camera, rng, x, near, far, rng.uniform(0.9, 2.2), leaves)


_Thing = tuple[float, Callable[[Canvas, Camera, Rng], None]]


def _furniture(rng: Rng, street: Street, leaves: Array) -> list[_Thing]:
    """(distance, draw) of what stands on the sidewalks: lamps, signs, trees, railings, people."""
    things: list[_Thing] = []

    def add(z: float, draw: Callable[..., None], *rest: object) -> None:
        def call(canvas: Canvas, camera: Camera, rng: Rng) -> None:
            draw(canvas, camera, rng, *rest)

        things.append((z, call))

    for side in (-1, 1):
        kerb = street.kerb(side) + side * 0.45
        z, step = rng.uniform(5, 16), rng.uniform(10, 18)
        while z < 32 and rng.random() < 0.9:
            add(z, objects.lamp, kerb, z)
            z += step
        for z in rng.uniform(4.5, 18, rng.integers(0, 4)):
            add(z, objects.sign, kerb + side * rng.uniform(0, 0.4), float(z))
        if rng.random() < 0.45:
            for z in np.arange(rng.uniform(6, 10), 45, rng.uniform(7, 12)):
                add(z, objects.tree, kerb + side * 0.4, float(z), leaves)
        if rng.random() < 0.3:  # a railing along the kerb
            style, tone, tall = (
                int(rng.integers(2**31)),
                objects.masonry(rng),
                rng.uniform(0.9, 1.3),
            )
            start = rng.uniform(3, 10)
            for z in np.arange(start, start + rng.uniform(8, 26), 3.0):
                add(z, objects.fence, style, kerb, float(z), float(z) + 3.0, tall, tone)
        for z in rng.uniform(4.0, 13, rng.integers(0, 5)):
            x = street.middle + side * (street.half + street.walk * rng.uniform(0.3, 0.9))
            add(z, objects.person, x, float(z))
    return things


def _traffic(rng: Rng, street: Street) -> list[_Thing]:
    """(distance, draw) of the cars on the road and of people crossing it."""
    things: list[_Thing] = []
    for side in (-1, 1):
        parked = rng.random() < 0.4
        lane = street.middle + side * (street.half - 1.15 if parked else 0.5 * street.half)
        z = rng.uniform(5, 22)
        for _ in range(rng.integers(0, 5 if parked else 3)):
            call = partial(_car, x=lane + rng.uniform(-0.25, 0.25), z=z, towards=side < 0)
            things.append((z, call))
            z += rng.uniform(5.5, 8) if parked else rng.uniform(9, 25)
    for z in rng.uniform(5, 14, rng.integers(0, 3)):
        x = street.middle + rng.uniform(-1, 1) * (street.half - 0.6)
        things.append((float(z), partial(_person, x=x, z=float(z))))
    return things


def _car(canvas: Canvas, camera: Camera, rng: Rng, x: float, z: float, towards: bool) -> None:
    objects.car(canvas, camera, rng, x, z, towards)


def _person(canvas: Canvas, camera: Camera, rng: Rng, x: float, z: float) -> None:
    objects.person(canvas, camera, rng, x, z)


def _photograph(canvas: Canvas, rng: Rng, weather: _Weather, unit: float) -> NDArray[np.uint8]:
    """Haze by distance, exposure, lens blur, sensor noise, 8 bits."""
    air = np.exp(-canvas.depth / np.float32(weather.haze_distance))[..., None]
    air[canvas.labels == SKY] = 1.0
    image = canvas.rgb * air + weather.haze * (1 - air)
    image *= weather.gain
    sigma = unit * rng.uniform(0.2, 0.75)
    if sigma > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image += noise * np.float32(rng.uniform(0.8, 5.0))
    np.clip(image, 0, 255, out=image)
    gamma = rng.uniform(0.85, 1.2)
    curve = 255 * np.linspace(0, 1, 256) ** gamma
    return cv2.LUT(image.astype(np.uint8), np.round(curve).astype(np.uint8)).astype(np.uint8)
