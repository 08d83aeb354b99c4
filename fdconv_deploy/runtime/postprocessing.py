"""From a network's logits to labels at the image's size, as mmsegmentation does it.

Published: logits at the head's resolution are resized to the network's input, cut to the
part the image covers, resized to the image's own size, and the highest class wins. Both
resizes are bilinear with the head's ``align_corners``. They are done as one here.
"""

from __future__ import annotations

from fdconv_deploy.errors import BundleError

from .interpolation import ArrayRows, Labels, Logits, Taps, bilinear, labels_of, resize_logits

__all__ = ["Labels", "Logits", "check_classes", "label_map", "logit_map"]


def label_map(
    logits: Logits,
    network: tuple[int, int],
    covered: tuple[int, int],
    image: tuple[int, int],
    *,
    align_corners: bool,
) -> Labels:
    """The class of every pixel.

    :param logits: (classes, h, w) float32 at the head's resolution.
    :param network: (H, W) of the network's input.
    :param covered: (H, W) of the input's top left part that holds the image.
    :param image: (H, W) of the answer.
    :returns: (H, W) uint8, or uint16 above 256 classes; of equal logits, the lowest class.
    """
    check_classes(logits.shape[0])
    return labels_of(ArrayRows(logits), *_maps(logits, network, covered, image, align_corners))


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


def check_classes(classes: int) -> None:
    """Refuse a head of one class, whose label is a matter of a threshold.

    :raises BundleError: it has one.
    """
    if classes < 2:
        raise BundleError(
            "The network's head gives one logit per pixel, and which value counts as the class "
            "is not told by its checkpoint. Labels need two classes or more; use Session.run "
            "for the logits, and your own threshold."
        )


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
