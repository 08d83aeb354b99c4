"""What the client gives for an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.coco_rle import decode


@dataclass(frozen=True)
class Answer:
    """One image's segmentation.

    ``labels``: (H, W) int32, indices into the model's classes, −1 where a class was not asked
    for. ``classes``: as the service describes them, with ``id``, ``name``, ``color``, ``area``
    (pixels) and ``share`` (0–1). ``timings_ms``: by stage.
    """

    labels: npt.NDArray[np.int32]
    classes: list[dict[str, Any]]
    fit: str
    mode: str
    model: str
    timings_ms: dict[str, float]
    request_id: str

    @property
    def areas(self) -> dict[str, int]:
        """Pixels by class name."""
        return {entry["name"]: entry["area"] for entry in self.classes}

    @classmethod
    def of(cls, found: dict[str, Any], request_id: str) -> Answer:
        """Out of a segmentor's JSON, with run lengths."""
        mask = found["mask"]
        labels = np.repeat(np.array(mask["values"], np.int32), mask["counts"])
        return cls(
            labels.reshape(mask["size"]),
            found["classes"],
            found["fit"],
            found["mode"],
            found["model"],
            found["timings_ms"],
            request_id,
        )


@dataclass(frozen=True)
class Objects:
    """One image's objects, the best score first.

    ``boxes``: (N, 4) float32 x1, y1, x2, y2 in pixels of the image. ``scores``: (N,) float32.
    ``labels``: (N,) int64, class numbers, and ``names`` the classes' names. ``masks``:
    (N, H, W) bool; None when the model gives none or they were not asked for. ``timings_ms``: by
    stage.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    names: tuple[str, ...]
    masks: npt.NDArray[np.bool_] | None
    fit: str
    model: str
    timings_ms: dict[str, float]
    request_id: str

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def of(cls, found: dict[str, Any], request_id: str, *, masks: bool) -> Objects:
        """Out of a detector's JSON, with run lengths where ``masks`` were asked for.

        :param masks: whether the model gives masks and they were asked for.
        """
        entries = found["instances"]
        shape = found["height"], found["width"]
        pixels = np.zeros((len(entries), *shape), np.bool_) if masks else None
        if pixels is not None:
            for canvas, entry in zip(pixels, entries, strict=True):
                canvas[:] = decode(entry["mask"])
        return cls(
            np.array([entry["box"] for entry in entries], np.float32).reshape(-1, 4),
            np.array([entry["score"] for entry in entries], np.float32),
            np.array([entry["label"] for entry in entries], np.int64),
            tuple(entry["class"] for entry in entries),
            pixels,
            found["fit"],
            found["model"],
            found["timings_ms"],
            request_id,
        )
