"""From a network's logits to labels at the image's size, as mmsegmentation does it.

Published: logits at the head's resolution are resized to the network's input, cut to the
part the image covers, resized to the image's own size, and the highest class wins; of a head
with one output, class 1 where its sigmoid is above the head's threshold. Both resizes
are bilinear with the head's ``align_corners``. They are done as one here.
"""

from __future__ import annotations

from fdconv_deploy.runtime.resize import (
    ArrayRows,
    Labels,
    Logits,
    Taps,
    bilinear,
    labels_of,
    resize_logits,
)

__all__ = ["Labels", "Logits", "label_map", "logit_map"]


def label_map(
    logits: Logits,
    network: tuple[int, int],
    covered: tuple[int, int],
    image: tuple[int, int],
    *,
    align_corners: bool,
    threshold: float | None = None,
) -> Labels:
    """The class of every pixel.

    :param logits: (classes, h, w) float32 at the head's resolution.
    :param network: (H, W) of the network's input.
    :param covered: (H, W) of the input's top left part that holds the image.
    :param image: (H, W) of the answer.
    :param threshold: `HeadConfig.label_threshold`: of a head with one output, else None.
    :returns: (H, W) uint8, or uint16 above 256 classes; of equal logits, the lowest class.
    """
    maps = _maps(logits, network, covered, image, align_corners)
    return labels_of(ArrayRows(logits), *maps, threshold=threshold)


def logit_map(
    logits: Logits,
    network: tuple[int, int],
    covered: tuple[int, int],
    image: tuple[int, int],
    *,
    align_corners: bool,
) -> Logits:
    """As :func:`label_map`, before the choice: (classes, H, W) float32."""
    return resize_logits(ArrayRows(logits), *_maps(logits, network, covered, image, align_corners))


def _maps(
    logits: Logits,
    network: tuple[int, int],
    covered: tuple[int, int],
    image: tuple[int, int],
    align_corners: bool,
) -> tuple[Taps, Taps]:
    rows, columns = (
        bilinear(covered[axis], image[axis], align_corners=align_corners).after(
            bilinear(logits.shape[1 + axis], network[axis], align_corners=align_corners)
        )
        for axis in (0, 1)
    )
    return rows, columns
