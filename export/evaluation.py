"""What a graph of lower precision costs in answers: classes of pixels beside float32's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fdconv_deploy.architecture import Architecture
from fdconv_deploy.demo.metrics import confusion_matrix, scores
from fdconv_deploy.errors import ExportError
from fdconv_deploy.runtime.postprocessing import label_map
from fdconv_deploy.runtime.preprocessing import normalise, resize

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Evaluation:
    """Images to compare two graphs' answers on, and masks of those that have one.

    Raises:
        ExportError: in `compare`, where a mask names a class the network does not have.
    """

    pictures: Sequence[Picture]
    masks: Sequence[NDArray[np.integer] | None]
    architecture: Architecture
    size: tuple[int, int]

    def compare(self, reference: Path, other: Path, batch: int) -> dict[str, Any]:
        """Segment every image by both graphs.

        Args:
            reference, other: graphs of batch size ``batch`` from ``images`` to ``logits``.

        Returns:
            Number of images, share of pixels of the same class, mean IoU of both on those
            images that have a mask, if any have.
        """
        sessions = [
            onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            for path in (reference, other)
        ]
        classes = self.architecture.decode_head.num_classes
        confusions = [np.zeros((classes, classes), np.int64) for _ in sessions]
        same = pixels = labelled = 0
        for picture, mask in zip(self.pictures, self.masks, strict=True):
            labels = list(self._labels(sessions, picture, batch))
            same += int((labels[0] == labels[1]).sum())
            pixels += labels[0].size
            if mask is None:
                continue
            _check_classes(mask, classes)
            labelled += 1
            for place, found in enumerate(labels):
                confusions[place] += confusion_matrix(mask, found, classes)
        result: dict[str, Any] = {"images": len(self.pictures), "argmax_agreement": same / pixels}
        if labelled:
            before, after = (scores(c).mean_iou for c in confusions)
            result |= {
                "labelled": labelled,
                "mean_iou_fp32": before,
                "mean_iou": after,
                "mean_iou_change": after - before,
            }
        return result

    def _labels(
        self, sessions: Sequence[Any], picture: Picture, batch: int
    ) -> Iterator[NDArray[np.integer]]:
        height, width = self.size
        tensor = normalise(resize(picture, height, width), self.architecture.preprocessing)
        feed = np.repeat(tensor[None], batch, axis=0)
        for session in sessions:
            (logits,) = session.run(["logits"], {"images": feed})
            yield label_map(
                logits[0],
                self.size,
                self.size,
                picture.shape[:2],
                align_corners=self.architecture.decode_head.align_corners,
            )


def _check_classes(mask: NDArray[np.integer], classes: int) -> None:
    strange = set(np.unique(mask[mask >= classes]).tolist()) - {255}
    if strange:
        raise ExportError(
            f"a mask names class {min(strange)}, and the network has classes 0 to {classes - 1} "
            "(255 stands for pixels that do not count). Give masks of this network's classes."
        )
