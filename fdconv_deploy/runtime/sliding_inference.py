"""A whole image labelled by sliding a crop over it: ``Session.segment`` in ``slide`` mode."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import numpy.typing as npt

from fdconv_deploy.config import SegmentorConfig
from fdconv_deploy.runtime.preprocessing import check_image, published_size, resize
from fdconv_deploy.runtime.resize import Labels, Logits
from fdconv_deploy.runtime.sliding_window import SlidingRows, slide_labels, slide_stride


def slide(
    image: npt.NDArray[Any],
    architecture: SegmentorConfig,
    crop: tuple[int, int],
    run: Callable[[Logits], Logits],
    batch: int,
) -> tuple[Labels, Literal["letterboxed", "resized"], dict[str, float]]:
    """Label every pixel of an image, crop by crop.

    :param image: (H, W, C) as `check_image` takes it, any size.
    :param crop: height and width of the graphs' input.
    :param run: (N, C, *crop) float32 to logits, for any N.
    :param batch: how many crops to run together.
    :returns: the labels (H, W), whether the image had to be padded, and the seconds each stage
        took.
    :raises ImageError: ``image`` is not such an array.
    :raises BundleError: the network records no stride.
    """
    start, inside = time.perf_counter(), 0.0

    def timed(inputs: Logits) -> Logits:
        nonlocal inside
        began = time.perf_counter()
        try:
            return run(inputs)
        finally:
            inside += time.perf_counter() - began

    head = architecture.decode_head
    image = check_image(image, architecture.preprocessing)
    size = image.shape[0], image.shape[1]
    stride = slide_stride(architecture.test, crop)
    resized = resize(image, *published_size(*size, architecture.preprocessing))
    source = SlidingRows(
        resized,
        architecture.preprocessing,
        crop,
        stride,
        timed,
        classes=head.outputs,
        batch=batch,
        align_corners=head.align_corners,
    )
    before = time.perf_counter() - start
    labels = slide_labels(
        source, size, align_corners=head.align_corners, threshold=head.label_threshold
    )
    after = time.perf_counter() - start - before - inside
    timings = {"preprocess": before, "inference": inside, "postprocess": after}
    return labels, "letterboxed" if source.padded else "resized", timings
