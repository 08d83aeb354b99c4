"""What is done with an image before a detector runs, and with its outputs afterwards."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.config import DetectorConfig, Preprocessing
from fdconv_deploy.runtime.detection import Detection
from fdconv_deploy.runtime.detection_letterbox import DetectorPlacement, place_whole
from fdconv_deploy.runtime.preprocessing import check_image, normalise, resize
from fdconv_deploy.runtime.visualization import RGB, default_palette


def prepare(
    image: npt.NDArray[np.uint8],
    network: tuple[int, int],
    preprocessing: Preprocessing,
    out: npt.NDArray[np.float32],
) -> DetectorPlacement:
    """Resize an image, normalise it, and pad it with zeros.

    :param image: (h, w, 3) uint8 RGB.
    :param network: (H, W) of the input.
    :param out: (3, H, W) float32, written into.
    :raises ImageError: ``image`` is not such an array.
    """
    image = check_image(image, preprocessing)
    placement = place_whole((image.shape[0], image.shape[1]), network, preprocessing)
    normalise(resize(image, placement.height, placement.width), preprocessing, network, out=out)
    return placement


def finish(
    outputs: Mapping[str, npt.NDArray[Any]],
    placement: DetectorPlacement,
    detector: DetectorConfig,
    seconds: dict[str, float],
) -> Detection:
    """One image's outputs, as ``Manifest`` says them without the batch, as its objects.

    :param seconds: of the stages before this one.
    """
    start = time.perf_counter()
    count = int(outputs["count"])
    masks = outputs.get("masks")
    boxes = placement.to_image(outputs["boxes"][:count])
    timings = {**seconds, "postprocess": time.perf_counter() - start}
    return Detection(
        boxes,
        # Copies, since these are parts of a whole batch's.
        outputs["scores"][:count].copy(),
        outputs["labels"][:count].copy(),
        None if masks is None else masks[:count].copy(),
        detector.test.rcnn.mask_thr_binary,
        placement.image,
        (placement.height, placement.width),
        detector_classes(detector),
        detector_palette(detector),
        placement.fit,
        timings,
    )


def detector_classes(detector: DetectorConfig) -> tuple[str, ...]:
    """The classes' names; numbers where the checkpoint gave none."""
    count = detector.bbox_head.num_classes
    return detector.classes or tuple(f"class {number}" for number in range(count))


def detector_palette(detector: DetectorConfig) -> tuple[RGB, ...]:
    """The classes' colours; generated where the checkpoint gave none, black not among them."""
    return detector.palette or default_palette(detector.bbox_head.num_classes + 1)[1:]
