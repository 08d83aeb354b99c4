"""An inference request through its model: tensors in, tensors out, for both transports."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from fdconv_deploy.serve.kserve.tensors import InferRequest
from fdconv_deploy.serve.model_repository import Version
from fdconv_deploy.serve.service import Service

from fdconv_deploy.runtime import Session
from fdconv_deploy.runtime.postprocessing import label_map
from fdconv_deploy.runtime.preprocessing import normalise

Array = npt.NDArray[Any]


async def infer(
    service: Service, version: Version, request: InferRequest, deadline: float
) -> tuple[dict[str, Array], list[tuple[str, float]]]:
    """Run a request.

    Returns:
        The outputs asked for, by name, and (name, seconds) of each stage. A segmentor's are
        ``logits`` (N, classes, h, w) float32 and ``labels`` (N, H, W) at the input's size, uint8
        or, above 256 classes, uint16; a detector's are its graph's outputs.
    """
    session, code = version.session, service.scheduler.code
    images: Any = request.images
    if session.detects:
        images = await code(lambda: _detector_rows(session, request))
    elif images.dtype == np.uint8:
        images = await code(lambda: _normalised(session, request.images))
    outcome = await service.scheduler.run(version, images, deadline)
    stages = [("queue", outcome.queue_seconds), ("inference", outcome.run_seconds)]
    found: dict[str, Array] = {}
    for name in request.outputs:
        if session.detects:
            found[name] = np.stack([row[name] for row in outcome.rows])
        elif name == "labels":
            found[name] = await code(lambda: _labels(session, outcome.rows))
        else:
            rows = outcome.rows
            found[name] = rows[0][None] if len(rows) == 1 else np.stack(rows)
    return found, stages


def _normalised(session: Session, images: Array) -> npt.NDArray[np.float32]:
    count, height, width, channels = images.shape
    out = np.empty((count, channels, height, width), np.float32)
    for image, slot in zip(images, out, strict=True):
        normalise(image, session.preprocessing, out=slot)
    return out


def _detector_rows(session: Session, request: InferRequest) -> Array:
    """Images with their sizes, as a detector runs them; what lies past a size is zero."""
    images = request.images
    rows = np.empty(len(images), session.row_type)
    rows["sizes"] = session.input_size if request.sizes is None else request.sizes
    if images.dtype != np.uint8:
        rows["images"] = images
        return rows
    for image, row in zip(images, rows, strict=True):
        height, width = row["sizes"].astype(int)
        part = image[:height, :width]
        normalise(part, session.preprocessing, session.input_size, out=row["images"])
    return rows


def _labels(session: Session, rows: list[npt.NDArray[np.float32]]) -> Array:
    architecture = session.bundle.manifest.architecture
    assert architecture is not None
    size, head = session.input_size, architecture.decode_head
    label = partial(
        label_map,
        network=size,
        covered=size,
        image=size,
        align_corners=head.align_corners,
        threshold=head.label_threshold,
    )
    return np.stack([label(row) for row in rows])
