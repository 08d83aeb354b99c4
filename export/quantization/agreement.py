"""What a graph of lower precision costs in answers: classes of pixels beside float32's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fdconv_deploy.config import SegmentorConfig
from fdconv_deploy.errors import ExportError
from fdconv_deploy.evaluation.metrics import confusion_matrix, scores
from fdconv_deploy.runtime.postprocessing import label_map
from fdconv_deploy.runtime.preprocessing import check_image, normalise, resize

Picture = NDArray[Any]


@dataclass(frozen=True)
class Evaluation:
    """Images to compare two graphs' answers on, and masks of those that have one.

    Raises:
        ExportError: in `compare`, where a mask names a class the network does not have, or is
            of another size than its image.
    """

    pictures: Sequence[Picture]
    masks: Sequence[NDArray[np.integer] | None]
    architecture: SegmentorConfig
    size: tuple[int, int]

    def compare(self, reference: Path, other: Path, batch: int) -> dict[str, Any]:
        """Segment every image by both graphs.

        Args:
            reference, other: graphs of batch size ``batch`` from ``images`` to ``logits``.

        Returns:
            Number of images, share of pixels of the same class, mean IoU of both on those
            images that have a mask, if any have.
        """
        classes = self.architecture.decode_head.labels
        for mask in self.masks:
            if mask is not None:
                _check_classes(mask, classes)
        # One after the other: two sessions of a large network may not fit in memory.
        before = list(self._labels(reference, batch))
        confusions = [np.zeros((classes, classes), np.int64) for _ in range(2)]
        same = pixels = labelled = 0
        for exact, found, mask in zip(before, self._labels(other, batch), self.masks, strict=True):
            if mask is not None:
                _check_size(mask, exact)
            same += int((exact == found).sum())
            pixels += exact.size
            if mask is not None:
                labelled += 1
                for confusion, labels in zip(confusions, (exact, found), strict=True):
                    confusion += confusion_matrix(mask, labels, classes)
        result: dict[str, Any] = {"images": len(self.pictures), "argmax_agreement": same / pixels}
        if labelled:
            single, reduced = (scores(c).mean_iou for c in confusions)
            result |= {
                "labelled": labelled,
                "mean_iou_fp32": single,
                "mean_iou": reduced,
                "mean_iou_change": reduced - single,
            }
        return result

    def _labels(self, model: Path, batch: int) -> Iterator[NDArray[np.integer]]:
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        height, width = self.size
        head, how = self.architecture.decode_head, self.architecture.preprocessing
        # By index: a sequence that reads files need not hold all of them.
        for index in range(len(self.pictures)):
            picture = self.pictures[index]
            image = check_image(picture, how)
            tensor = normalise(resize(image, height, width), how)
            (logits,) = session.run(["logits"], {"images": np.repeat(tensor[None], batch, axis=0)})
            yield label_map(
                logits[0],
                self.size,
                self.size,
                picture.shape[:2],
                align_corners=head.align_corners,
                threshold=head.label_threshold,
            )


def _check_size(mask: NDArray[np.integer], labels: NDArray[np.integer]) -> None:
    if mask.shape != labels.shape:
        found, expected = (f"{height}x{width}" for height, width in (mask.shape, labels.shape))
        raise ExportError(
            f"a mask is {found} (height x width), and its image {expected}. Give masks of their "
            "images' size."
        )


def _check_classes(mask: NDArray[np.integer], classes: int) -> None:
    strange = set(np.unique(mask[mask >= classes]).tolist()) - {255}
    if strange:
        raise ExportError(
            f"a mask names class {min(strange)}, and the network has classes 0 to {classes - 1} "
            "(255 stands for pixels that do not count). Give masks of this network's classes."
        )
