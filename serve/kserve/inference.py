"""What both transports share: the request's meaning, its checks, and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.runtime import Session
from fdconv_deploy.runtime.postprocessing import label_map
from fdconv_deploy.runtime.preprocessing import normalise
from serve.problems import RefusedError
from serve.service import Service
from serve.versions import Version

INPUT = "images"
OUTPUTS = ("logits", "labels")
EXTENSIONS = ("binary_tensor_data", "model_repository")
PLATFORM = "onnxruntime_onnx"
# KServe's names of the types that occur here.
TYPES: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
}


@dataclass(frozen=True)
class InferRequest:
    """An inference request, whichever way it came.

    ``images``: (N, 3, H, W) float32 normalised, or (N, H, W, 3) uint8 RGB.
    """

    id: str
    images: npt.NDArray[Any]
    outputs: tuple[str, ...]
    timeout_ms: float | None = None


def tensor_types(labels: np.dtype[Any]) -> dict[str, str]:
    """KServe's type name of each output."""
    return {"logits": "FP32", "labels": "UINT8" if labels == np.uint8 else "UINT16"}


def model_metadata(version: Version | None, card: Any) -> dict[str, Any]:
    """As the protocol's model metadata; -1 is the batch, of any size."""
    classes = len(card.classes)
    label_type = "UINT8" if classes <= 256 else "UINT16"
    size, out = card.input, card.output
    return {
        "name": card.name,
        "versions": [card.version] if version else [],
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, 3, size.height, size.width]}],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, classes, out.height, out.width]},
            {"name": "labels", "datatype": label_type, "shape": [-1, size.height, size.width]},
        ],
    }


def check_images(card: Any, datatype: str, shape: list[int], most: int) -> None:
    """Refuse a tensor that is not a batch of this model's images, before its data is read.

    :raises RefusedError: 400.
    """
    size = card.input
    if datatype == "FP32":
        expected = [3, size.height, size.width]
    elif datatype == "UINT8":
        expected = [size.height, size.width, 3]
    else:
        raise RefusedError(
            400,
            f"The input {INPUT!r} is FP32 (normalised, N x 3 x {size.height} x {size.width}) or "
            f"UINT8 (RGB, N x {size.height} x {size.width} x 3), not {datatype[:20]!r}.",
        )
    if len(shape) != 4 or shape[1:] != expected or not 1 <= shape[0] <= most:
        raise RefusedError(
            400,
            f"The input {INPUT!r} in {datatype} has the shape [N, "
            f"{', '.join(map(str, expected))}] with N from 1 to {most}, not {shape[:8]}.",
        )


def check_outputs(names: list[str]) -> tuple[str, ...]:
    """The outputs asked for; all when none is named.

    :raises RefusedError: 400, one is unknown.
    """
    for name in names:
        if name not in OUTPUTS:
            raise RefusedError(
                400, f"There is no output {name[:60]!r}; there are {', '.join(OUTPUTS)}."
            )
    return tuple(dict.fromkeys(names)) or OUTPUTS


async def infer(
    service: Service, version: Version, request: InferRequest, deadline: float
) -> tuple[dict[str, npt.NDArray[Any]], list[tuple[str, float]]]:
    """The outputs asked for, by name, and the seconds by stage.

    ``logits`` (N, classes, h, w) float32; ``labels`` (N, H, W) uint8, uint16 above 256
    classes, at the input's size.
    """
    session, images = version.session, request.images
    if images.dtype == np.uint8:
        images = await service.scheduler.code(lambda: _normalised(session, images))
    outcome = await service.scheduler.run(version, images, deadline)
    found: dict[str, npt.NDArray[Any]] = {}
    if "labels" in request.outputs:
        found["labels"] = await service.scheduler.code(lambda: _labels(session, outcome.rows))
    if "logits" in request.outputs:
        found["logits"] = together(outcome.rows)
    stages = [("queue", outcome.queue_seconds), ("inference", outcome.run_seconds)]
    return {name: found[name] for name in request.outputs}, stages


def together(rows: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Rows as one array, without a copy where they are one run's whole answer in order."""
    base = rows[0].base
    if base is not None and base.shape == (len(rows), *rows[0].shape):
        step = base.strides[0]
        start = base.__array_interface__["data"][0]
        if all(
            row.base is base and row.__array_interface__["data"][0] == start + place * step
            for place, row in enumerate(rows)
        ):
            return base
    return rows[0][None] if len(rows) == 1 else np.stack(rows)


def _normalised(session: Session, images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    architecture = session.bundle.manifest.architecture
    assert architecture is not None
    count, height, width, _ = images.shape
    out = np.empty((count, 3, height, width), np.float32)
    for image, slot in zip(images, out, strict=True):
        normalise(image, architecture.preprocessing, out=slot)
    return out


def _labels(session: Session, rows: list[npt.NDArray[np.float32]]) -> npt.NDArray[Any]:
    architecture = session.bundle.manifest.architecture
    assert architecture is not None
    size = session.input_size
    align = architecture.decode_head.align_corners
    return np.stack([label_map(row, size, size, size, align_corners=align) for row in rows])
