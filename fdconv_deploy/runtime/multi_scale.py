"""Multi-scale and flip: an image segmented at several sizes, and mirrored, and the answers merged.

As mmsegmentation 1.2.2's test-time augmentation (``SegTTAModel`` behind ``TestTimeAug``): the image
is resized by each factor in its own aspect ratio, then mirrored or not; each answer's logits are
mirrored back, resized to the image's own size, and made probabilities by softmax; their mean's
highest class wins. Of a head with one output mmsegmentation takes the sigmoid twice, which leaves
no probability below a half; here it is taken once, and the mean is above the threshold or not.
Scores of detectron2's Mask2Former and MaskDINO are sums of probabilities already, and averaged as
they are, as their own ``SemanticSegmentorWithTTA`` does; mmsegmentation's go through the softmax.

A graph has one input size. In ``slide`` mode that is the crop, and the image's size is free: any
factor is computed as published. In ``whole`` mode a factor takes a graph of that many times the
input size that the image takes by itself, which it is fitted to in the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fdconv_deploy.config import QueryHeadConfig, SegmentorConfig
from fdconv_deploy.errors import BundleError, FDConvError
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.postprocessing import (
    ArrayRows,
    Labels,
    LogitRows,
    Logits,
    Taps,
    bilinear,
    empty_labels,
    resize_maps,
    resized_tiles,
    rows_at_a_time,
)
from fdconv_deploy.runtime.preprocessing import (
    FitDone,
    Pixels,
    best_size,
    check_image,
    keep_ratio_size,
    padded,
    published_size,
    resize,
    scaled_size,
)
from fdconv_deploy.runtime.segmentation import Mode, Segmentation, SegmentationPipeline
from fdconv_deploy.runtime.session import Session
from fdconv_deploy.runtime.sliding_window import SlidingRows, crop_within, slide_stride

Size = tuple[int, int]
Run = Callable[[Logits], Logits]
"""(N, C, H, W) float32, normalised, for any N -> logits (N, classes, h, w) float32."""

_LARGEST_FACTOR = 16.0


@dataclass(frozen=True)
class MultiScale:
    """At which sizes an image is looked at.

    Attributes:
        factors: of the image's size, or of the size that images are fitted to.
        flip: whether its mirror image (left for right) is looked at too, at each of them.
    """

    factors: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        """Refuse factors that are none."""
        if not self.factors or not all(0 < one <= _LARGEST_FACTOR for one in self.factors):
            raise FDConvError(
                f"Factors of several scales are numbers above 0 and up to {_LARGEST_FACTOR:g}, "
                f"e.g. 0.5, 0.75, 1; found {', '.join(map('{:g}'.format, self.factors))}."
            )

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"multi_scale": list(self.factors), "flip": self.flip}

    @property
    def mirrored(self) -> tuple[bool, ...]:
        """What is done at each size, in mmsegmentation's order."""
        return (False, True) if self.flip else (False,)


def segment_at_scales(
    session: Session,
    image: Pixels,
    how: MultiScale,
    *,
    fit: Fit | None = None,
    mode: Mode | None = None,
) -> Segmentation:
    """Label every pixel of an image, by several of its sizes.

    Args:
        session: on a segmentor's bundle. In ``whole`` mode it needs a graph for each factor.
        image: as `Session.segment` takes it, decoded.
        how: the factors; of the image's own size in ``slide`` mode, in ``whole`` mode of the
            input size that it takes, see `best_size`.
        fit: see `Session.segment`.
        mode: see `Session.segment`.

    Raises:
        ImageError: ``image`` is not such an array.
        BundleError: a graph is missing, with what to export; or as `Session.segment`.
    """
    architecture = session.bundle.manifest.architecture
    mode = mode or session.segmentation.mode  # also refuses what is no segmentor
    assert architecture is not None
    if session.panoptic:
        raise BundleError(
            f"The bundle {session.bundle.path} gives panoptic segments, which are not merged over "
            "several sizes or mirror images. Use session.segment(image), on the command line "
            "without --multi-scale and --flip."
        )
    batch = session.batch_sizes[-1]
    if mode == "slide":
        crop = session.input_size
        return segment_sliding(architecture, image, how, crop, session.run, batch)
    image = check_image(image, session.preprocessing)
    base = best_size((image.shape[0], image.shape[1]), session.sizes)
    divisor = architecture.preprocessing.size_divisor
    sizes = [padded(scaled_size(base, factor), divisor) for factor in how.factors]
    missing = [_said(size) for size in sizes if size not in session.sizes]
    if missing:
        a_graph = "a graph" if len(session.sizes) == 1 else "graphs"
        raise BundleError(
            f"The bundle {session.bundle.path} has {a_graph} of "
            f"{', '.join(map(_said, session.sizes))} (height x width), and these factors need "
            f"{', '.join(missing)} too. Export it with --size {' --size '.join(missing)} as well, "
            "leave such factors out, or evaluate the checkpoint, which takes any size."
        )
    return segment_whole(
        architecture, image, how, base, lambda _: session.run, fit or session.segmentation.fit
    )


def _said(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def segment_whole(
    segmentor: SegmentorConfig,
    image: Pixels,
    how: MultiScale,
    base: Size | None,
    run_at: Callable[[Size], Run],
    fit: Fit = "stretch",
) -> Segmentation:
    """Segment an image at several sizes, each as one input.

    Args:
        segmentor: what the network is made of.
        image: as `Session.segment` takes it.
        how: the factors.
        base: (height, width) that they multiply; the image's own if None.
        run_at: the network, for inputs of a (height, width).
        fit: how an image of another aspect ratio is brought to a size.
    """
    merge, preprocessing = _Merge(segmentor, image), segmentor.preprocessing
    own = (merge.image.shape[0], merge.image.shape[1])
    published = own if base is None else published_size(*own, preprocessing)
    for factor in how.factors:
        height, width = _keep_ratio(published, factor)
        scaled = preprocessing.model_copy(update={"scale": (width, height), "keep_ratio": False})
        size = (height, width) if base is None else scaled_size(base, factor)
        size = padded(size, preprocessing.size_divisor)
        at_scale = segmentor.model_copy(update={"preprocessing": scaled})
        pipeline = SegmentationPipeline(at_scale, size, fit)
        run = merge.timed(run_at(size))
        for mirrored in how.mirrored:
            prepared = pipeline.prepare(merge.image, mirrored=mirrored)
            (logits,) = run(prepared.inputs["images"][None])
            place = prepared.placement
            maps = resize_maps(
                logits.shape[1:], size, (place.height, place.width), own,
                align_corners=segmentor.decode_head.align_corners, mirrored=mirrored,
            )  # fmt: skip
            merge.add(View(ArrayRows(logits), *maps, mirrored), place.fit)
    return merge.segmentation("whole")


def segment_sliding(
    segmentor: SegmentorConfig,
    image: Pixels,
    how: MultiScale,
    crop: Size,
    run: Run,
    batch: int,
    *,
    any_size: bool = False,
) -> Segmentation:
    """Segment an image at several of its sizes, by sliding a crop over each.

    Args:
        segmentor: what the network is made of.
        image: as `Session.segment` takes it.
        how: the factors, of the image's own size.
        crop: (height, width) of the network's input.
        run: the network.
        batch: how many crops to run together.
        any_size: see `SegmentationPipeline.slide`.

    Raises:
        BundleError: the network records no stride.
    """
    merge, head = _Merge(segmentor, image), segmentor.decode_head
    stride, align = slide_stride(segmentor.test, crop), head.align_corners
    height, width = merge.image.shape[:2]
    for factor in how.factors:
        scaled = _keep_ratio((height, width), factor)
        resized = resize(merge.image, *scaled, segmentor.preprocessing.resample)
        for mirrored in how.mirrored:
            pixels = resized[:, ::-1] if mirrored else resized
            size = crop_within(crop, pixels) if any_size else crop
            rows = SlidingRows(
                pixels, segmentor.preprocessing, size, stride, merge.timed(run), head, batch
            )
            columns = bilinear(rows.width, width, align_corners=align)
            columns = columns.mirrored(rows.width) if mirrored else columns
            vertical = bilinear(rows.height, height, align_corners=align)
            fit: FitDone = "letterboxed" if rows.padded else "resized"
            merge.add(View(rows, vertical, columns, mirrored), fit)
    return merge.segmentation("slide")


def _keep_ratio(size: Size, factor: float) -> Size:
    """As ``Resize(scale_factor=…, keep_ratio=True)``: within the rounded size, in proportion."""
    return keep_ratio_size(*size, scaled_size(size, factor))


class View(NamedTuple):
    """One answer to an image: logits, and how they are resized to the image's size.

    ``mirrored``: the resized columns come in reverse order.
    """

    logits: LogitRows
    rows: Taps
    columns: Taps
    mirrored: bool


class _Merge:
    """An image on its way through several views, with the time that each stage takes."""

    def __init__(self, segmentor: SegmentorConfig, image: Pixels) -> None:
        self._start, self._inference = time.perf_counter(), 0.0
        self._segmentor = segmentor
        self.image = check_image(image, segmentor.preprocessing)
        self._views: list[View] = []
        self._fit: FitDone = "resized"

    def timed(self, run: Run) -> Run:
        def timed(inputs: Logits) -> Logits:
            start = time.perf_counter()
            logits = run(inputs)
            self._inference += time.perf_counter() - start
            return logits

        return timed

    def add(self, view: View, fit: FitDone) -> None:
        self._views.append(view)
        if fit != "resized":
            self._fit = fit

    def segmentation(self, mode: Mode) -> Segmentation:
        before, inference = time.perf_counter() - self._start, self._inference
        head = self._segmentor.decode_head
        # Which framework a network is of shows in the library that resizes its images.
        detectron2 = self._segmentor.preprocessing.resample == "pillow"
        scores = detectron2 and isinstance(head, QueryHeadConfig)
        labels = merged_labels(self._views, head.label_threshold, scores=scores)
        spent = time.perf_counter() - self._start
        timings = {
            "preprocess": before - inference,
            "inference": self._inference,
            "postprocess": spent - before - (self._inference - inference),
        }
        pipeline = SegmentationPipeline(self._segmentor, (1, 1), "stretch")
        classes, palette = pipeline.classes, pipeline.palette
        return Segmentation(labels, classes, palette, self._fit, mode, timings)


def merged_labels(
    views: Sequence[View], threshold: float | None = None, *, scores: bool = False
) -> Labels:
    """The class of each pixel by the mean of the views' probabilities.

    Args:
        views: all of one size.
        threshold: of logits of one class alone: see `labels_of`.
        scores: the views give scores that are averaged as they are, not logits.

    Returns:
        (H, W) uint8, or uint16 above 256 classes; of equal probabilities, the lowest class.
    """
    classes = views[0].logits.classes
    height, width = views[0].rows.size, views[0].columns.size
    labels = empty_labels(height, width, classes)
    step = rows_at_a_time(width, classes)
    # Every view's pieces of the same rows, one after another.
    streams = [groupby(resized_tiles(*view[:3], step=step), key=itemgetter(0)) for view in views]
    for pieces in zip(*streams, strict=True):
        top = pieces[0][0]
        total = np.zeros((min(step, height - top), width, classes), dtype=np.float32)
        for view, (_, tiles) in zip(views, pieces, strict=True):
            # Columns of a mirrored view come from the right.
            part = total[:, ::-1] if view.mirrored else total
            for _, left, logits in tiles:
                found = logits if scores else _probabilities(logits)
                part[:, left : left + logits.shape[1]] += found
        if threshold is None:
            labels[top : top + len(total)] = total.argmax(axis=2)
        else:
            mean = total[:, :, 0] / np.float32(len(views))
            labels[top : top + len(total)] = mean > np.float32(threshold)
    return labels


def _probabilities(logits: Logits) -> npt.NDArray[np.float32]:
    """Softmax over the last axis; of one class alone, its sigmoid."""
    if logits.shape[-1] == 1:
        with np.errstate(over="ignore"):
            return np.float32(1) / (np.float32(1) + np.exp(-logits))
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shifted /= shifted.sum(axis=-1, keepdims=True)
    return shifted
