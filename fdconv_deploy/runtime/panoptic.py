"""Panoptic segments and instances from queries' classes and masks.

As mmdetection 3.3's ``MaskFormerFusionHead`` and the ``panoptic_inference`` and
``instance_inference`` of Mask2Former's and MaskDINO's repositories: mask logits are resized to the
network's input, cut to what the image covers, resized to the image, and only then made
probabilities. Both resizes are one here, and done some rows at a time: a hundred masks of a 4K
image would be 3 GB.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from fdconv_deploy.config import MaskDINOHeadConfig, QueryHeadConfig, SegmentorConfig
from fdconv_deploy.runtime.detection import Detection
from fdconv_deploy.runtime.manifest import Fit
from fdconv_deploy.runtime.postprocessing import (
    ArrayRows,
    Logits,
    Pasted,
    View,
    empty_labels,
    sigmoid,
    softmax,
    view_of,
)
from fdconv_deploy.runtime.preprocessing import Prepared
from fdconv_deploy.runtime.segmentation import Segmentation, SegmentationPipeline
from fdconv_deploy.runtime.visualization import encode


@dataclass(frozen=True)
class Segment:
    """One segment of an image.

    Attributes:
        id: its value in `PanopticSegmentation.ids`, from 1.
        label: index into the answer's classes.
        is_thing: whether it is one object, not all of a class.
        score: of the class, 0 to 1; of stuff in several pieces, the first's.
        area: number of its pixels.
    """

    id: int
    label: int
    is_thing: bool
    score: float
    area: int


@dataclass(frozen=True)
class PanopticSegmentation(Segmentation):
    """Segments of an image. ``labels`` are their classes; what is in none is "void", the last.

    Attributes:
        ids: (H, W) int32, the segment of each pixel; 0 where there is none.
        segments: in the order in which they were found.
        instances: objects with scores, which may overlap; None where the network gives none.
    """

    ids: npt.NDArray[np.int32]
    segments: tuple[Segment, ...]
    instances: Detection | None = None

    def kept(self, min_score: float) -> PanopticSegmentation:
        """With only those instances that score ``min_score`` or more; segments stay."""
        if self.instances is None:
            return self
        return replace(self, instances=self.instances.kept(min_score))

    def segments_info(self) -> list[dict[str, Any]]:
        """For JSON, a segment each, in COCO's words with class, score and area."""
        return [
            {
                "id": segment.id,
                "category_id": segment.label,
                "isthing": segment.is_thing,
                "class": self.classes[segment.label],
                "score": round(segment.score, 6),
                "area": segment.area,
            }
            for segment in self.segments
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: as a segmentor's, and segments and objects."""
        found = {**super().as_dict(), "segments_info": self.segments_info()}
        if self.instances is not None:
            found["instances"] = self.instances.as_dicts()
        return found

    def panoptic_png(self) -> bytes:
        """COCO's panoptic PNG: a pixel's segment is its red + 256 green + 65536 blue."""
        shifted = [self.ids >> shift & 255 for shift in (0, 8, 16)]
        return encode(Image.fromarray(np.stack(shifted, axis=-1).astype(np.uint8)), "PNG")


class PanopticPipeline(SegmentationPipeline):
    """As `SegmentationPipeline`, for networks that give queries' classes and masks."""

    def __init__(
        self, segmentor: SegmentorConfig, sizes: Sequence[tuple[int, int]], fit: Fit = "stretch"
    ) -> None:
        super().__init__(segmentor, sizes, fit)
        head, rule = segmentor.decode_head, segmentor.panoptic
        if not isinstance(head, QueryHeadConfig) or rule is None:
            raise TypeError("a panoptic pipeline is for a head with queries and 'panoptic'")
        self._classes, self._rule, self.mode = head.num_classes, rule, "whole"
        self._scores: Callable[[Logits], Logits] = softmax
        self._temperature: float | None = None
        if isinstance(head, MaskDINOHeadConfig) and head.class_scores == "sigmoid":
            # Its own scores are told by sigmoids, though a softmax makes them sharper then.
            self._scores, self._temperature = sigmoid, head.temperature

    def finish(
        self,
        prepared: Prepared,
        outputs: Mapping[str, npt.NDArray[Any]],
        inference_seconds: float = 0.0,
        *,
        size: tuple[int, int] | None = None,
    ) -> PanopticSegmentation:
        """Find the segments, and the objects; arguments as `SegmentationPipeline.finish`'s.

        ``outputs`` are ``classes`` (Q, class outputs) and ``masks`` (Q, h, w) float32 logits, and
        MaskDINO's ``boxes`` (Q, 4).
        """
        start = time.perf_counter()
        masks = outputs["masks"]
        view = view_of(masks, prepared, size, align_corners=False)
        sure = self._scores(outputs["classes"])
        ids, segments = self._segments(sure, masks, view)
        labels = empty_labels(ids.shape, len(self.classes))
        of_segment = [len(self.classes) - 1, *(segment.label for segment in segments)]
        labels[:] = np.array(of_segment)[ids]
        instances = None
        if self._rule.instance_on:
            instances = self._instances(sure, outputs, prepared, view)
        timings = prepared.timings(inference_seconds, start)
        return PanopticSegmentation(
            labels,
            self.classes,
            self.palette,
            prepared.fit,
            "whole",
            timings,
            ids=ids,
            segments=segments,
            instances=instances,
        )

    def _segments(
        self, sure: Logits, masks: Logits, view: View
    ) -> tuple[npt.NDArray[np.int32], tuple[Segment, ...]]:
        """(H, W) int32 segment numbers, 0 for none, and the segments from 1 on.

        ``sure`` (Q, class outputs) are probabilities and ``masks`` (Q, h, w) logits, which ``view``
        brings to the image.
        """
        rule, probabilities = self._rule, sure
        if self._temperature is not None:
            probabilities = softmax(sure / np.float32(self._temperature))
        labels, scores = probabilities.argmax(1), probabilities.max(1)
        is_sure = sure.max(1) > np.float32(rule.object_mask_thr)
        queries = np.flatnonzero(is_sure & (sure.argmax(1) != self._classes))
        ids = np.zeros((view.rows.size, view.columns.size), np.int32)
        if not len(queries):
            return ids, ()
        owner = np.empty(ids.shape, np.int32)
        strong = np.empty(ids.shape, np.bool_)
        original = np.zeros(len(queries), np.int64)
        weights = scores[queries]
        for place, logits in view._replace(logits=ArrayRows(masks[queries])).tiles():
            found = sigmoid(logits)
            best = (found * weights).argmax(-1)
            owner[place] = best
            strong[place] = np.take_along_axis(found, best[..., None], -1)[..., 0] >= 0.5
            original += (found >= 0.5).sum((0, 1))
        owned = np.bincount(owner.ravel(), minlength=len(queries))
        both = np.bincount(owner[strong], minlength=len(queries))
        only_strong = rule.rule == "detectron2" or rule.filter_low_score
        number_of = np.zeros(len(queries), np.int32)  # 0: no segment
        segments: list[Segment] = []
        stuff: dict[int, int] = {}
        for index, query in enumerate(queries.tolist()):
            area = int(both[index] if only_strong else owned[index])
            if not owned[index] or not original[index] or (rule.rule == "detectron2" and not area):
                continue
            if owned[index] / original[index] < rule.iou_thr:
                continue
            label = int(labels[query])
            is_thing = label in rule.thing_classes
            number = len(segments) + 1
            number = number if is_thing else stuff.setdefault(label, number)
            number_of[index] = number
            if number > len(segments):
                segments.append(Segment(number, label, is_thing, float(scores[query]), area))
            else:
                first = segments[number - 1]
                segments[number - 1] = replace(first, area=first.area + area)
        ids = number_of[owner]
        if only_strong:
            ids[~strong] = 0
        return ids, tuple(segments)

    def _instances(
        self,
        sure: Logits,
        outputs: Mapping[str, npt.NDArray[Any]],
        prepared: Prepared,
        view: View,
    ) -> Detection:
        """The objects, the best score first: arguments as those of `_segments`."""
        flat = sure[:, : self._classes].ravel()
        best = np.argsort(-flat, kind="stable")[: self._rule.max_per_image]
        queries, labels = np.divmod(best, self._classes)
        things = np.isin(labels, self._rule.thing_classes)
        queries, labels, scores = queries[things], labels[things], flat[best][things]
        used, place = np.unique(queries, return_inverse=True)
        height, width = view.rows.size, view.columns.size
        inside = np.zeros((len(used), height, width), np.bool_)
        total = np.zeros(len(used))
        masks = view._replace(logits=ArrayRows(outputs["masks"][used]))
        for (down, across), logits in masks.tiles():
            there = logits > 0
            total += (sigmoid(logits) * there).sum((0, 1), dtype=np.float64)
            inside[:, down, across] = there.transpose(2, 0, 1)
        counts = inside.sum((1, 2))
        scores = (scores * (total / (counts + 1e-6))[place]).astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        cut = [_cut(mask) for mask in inside]
        parts = tuple(cut[place[number]] for number in order)
        own = outputs.get("boxes")
        if own is None:  # as of bundles before MaskDINO's had them
            sides = [(p.left, p.top, *p.pixels.shape[::-1]) for p in parts]
            boxes = np.array(sides, np.float32).reshape(-1, 2, 2)
        else:
            # Shares of the network's input, of which the image covers a part.
            scale = np.divide(prepared.network, prepared.covered)[::-1] * (width, height)
            boxes = own[queries[order]].reshape(-1, 2, 2) * scale.astype(np.float32)
            boxes[:, 0] -= boxes[:, 1] / 2
        boxes[:, 1] += boxes[:, 0]
        return Detection(
            boxes=boxes.reshape(-1, 4),
            scores=scores[order],
            labels=labels[order].astype(np.int64),
            mask_probabilities=None,
            mask_threshold=0.5,
            image_size=(height, width),
            resized_to=prepared.covered,
            classes=self.classes[:-1],
            palette=self.palette[:-1],
            fit=prepared.fit,
            timings={},
            parts=parts,
        )


def _cut(mask: npt.NDArray[np.bool_]) -> Pasted:
    """A mask within its box; none is at the top left, of no size."""
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    return Pasted(top, left, mask[top : top + height, left : left + width].copy())
