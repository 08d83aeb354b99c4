"""What the drawn streets' pixels may be, and what of it is found one by one."""

from __future__ import annotations

CLASSES = (
    "road",
    "lane marking",
    "sidewalk",
    "grass",
    "building",
    "fence",
    "pole and sign",
    "tree",
    "sky",
    "person",
    "car",
)
PALETTE = (
    (128, 64, 128),
    (255, 255, 255),
    (244, 35, 232),
    (152, 251, 152),
    (70, 70, 70),
    (190, 153, 153),
    (220, 220, 0),
    (107, 142, 35),
    (70, 130, 180),
    (220, 20, 60),
    (0, 0, 142),
)
(ROAD, LANE, SIDEWALK, GRASS, BUILDING, FENCE, POLE, TREE, SKY, PERSON, CAR) = range(len(CLASSES))

# What a detector finds one by one. Lamps are left out: a box of a bar three pixels wide says
# little, and half a pixel's error makes it another box.
THINGS = ("person", "car", "sign")
