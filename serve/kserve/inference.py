"""What both transports share: the request's meaning, its checks, and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.kserve import detection
from fdconv_deploy.serve.model_versions import Version
from fdconv_deploy.serve.schemas import ModelCard
from fdconv_deploy.serve.service import Service

from fdconv_deploy.runtime import Session
from fdconv_deploy.runtime.postprocessing import label_map
from fdconv_deploy.runtime.preprocessing import normalise

INPUT, SIZES = "images", "sizes"
OUTPUTS = ("logits", "labels")
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")
PLATFORM = "onnxruntime_onnx"
# KServe's names of the types that occur here.
TYPES: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "INT64": np.dtype("<i8"),
}


@dataclass(frozen=True)
class InferRequest:
    """An inference request, whichever way it came.

    ``images``: (N, C, H, W) float32 normalised, or (N, H, W, C) uint8, RGB where C is 3.
    ``sizes``, of a detector: (N, 2) float32, height and width of each image within its input; the
    whole input
    when None.
    """

    id: str
    images: npt.NDArray[Any]
    outputs: tuple[str, ...]
    timeout_ms: float | None = None
    sizes: npt.NDArray[Any] | None = None


def model_metadata(version: Version | None, card: ModelCard) -> dict[str, Any]:
    """As the protocol's model metadata; -1 is the batch, of any size."""
    size = card.input
    images = {
        "name": INPUT,
        "datatype": "FP32",
        "shape": [-1, size.channels, size.height, size.width],
    }
    inputs, outputs = [images], []
    if card.instances is not None:
        inputs.append({"name": SIZES, "datatype": "FP32", "shape": [-1, 2]})
        outputs = detection.output_metadata(card.instances)
    elif card.output is not None:
        out = card.output
        shape = [-1, out.channels, out.height, out.width]
        label_type = "UINT8" if len(card.classes) <= 256 else "UINT16"
        outputs = [
            {"name": "logits", "datatype": "FP32", "shape": shape},
            {"name": "labels", "datatype": label_type, "shape": [-1, size.height, size.width]},
        ]
    return {
        "name": card.name,
        "versions": [card.version] if version else [],
        "platform": PLATFORM,
        "inputs": inputs,
        "outputs": outputs,
    }


def output_names(card: ModelCard) -> tuple[str, ...]:
    """The outputs there are."""
    if card.instances is None:
        return OUTPUTS
    return tuple(entry["name"] for entry in detection.output_metadata(card.instances))


def check_tensor(card: ModelCard, name: Any, datatype: str, shape: list[int], most: int) -> None:
    """Refuse a tensor that is no input of this model, before its data is read.

    :raises RefusedError: 400.
    """
    if name == SIZES and card.instances is not None:
        detection.check_sizes(datatype, shape, most)
    elif name == INPUT:
        check_images(card, datatype, shape, most)
    else:
        names = repr(INPUT) if card.instances is None else f"{INPUT!r} or {SIZES!r}"
        raise RefusedError(400, f"The input is called {names}, not {str(name)[:60]!r}.")


def put_together(
    card: ModelCard,
    given: str,
    tensors: dict[str, npt.NDArray[Any]],
    outputs: list[str],
    timeout: float | None,
) -> InferRequest:
    """The request of checked tensors.

    :param given: its id.
    :raises RefusedError: 400, they do not belong together, or an output is unknown.
    """
    if INPUT not in tensors:
        raise RefusedError(400, f"The request must have the input {INPUT!r}.")
    images, sizes = tensors[INPUT], tensors.get(SIZES)
    if sizes is not None:
        detection.check_size_values(sizes, len(images), card.input)
    return InferRequest(given, images, check_outputs(outputs, output_names(card)), timeout, sizes)


def check_images(card: ModelCard, datatype: str, shape: list[int], most: int) -> None:
    """Refuse a tensor that is not a batch of this model's images, before its data is read.

    :raises RefusedError: 400.
    """
    size = card.input
    if datatype == "FP32":
        expected = [size.channels, size.height, size.width]
    elif datatype == "UINT8":
        expected = [size.height, size.width, size.channels]
    else:
        raise RefusedError(
            400,
            f"The input {INPUT!r} is FP32 (normalised, N x {size.channels} x {size.height} x "
            f"{size.width}) or UINT8 ({_bands(size.channels)}, N x {size.height} x {size.width} x "
            f"{size.channels}), not {datatype[:20]!r}.",
        )
    if len(shape) != 4 or shape[1:] != expected or not 1 <= shape[0] <= most:
        raise RefusedError(
            400,
            f"The input {INPUT!r} in {datatype} has the shape [N, "
            f"{', '.join(map(str, expected))}] with N from 1 to {most}, not {shape[:8]}.",
        )


def _bands(channels: int) -> str:
    return "RGB" if channels == 3 else f"{channels} bands"


def check_outputs(names: list[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """The outputs asked for; all when none is named.

    :raises RefusedError: 400, one is unknown.
    """
    for name in names:
        if name not in known:
            raise RefusedError(
                400, f"There is no output {name[:60]!r}; there are {', '.join(known)}."
            )
    return tuple(dict.fromkeys(names)) or known


async def infer(
    service: Service, version: Version, request: InferRequest, deadline: float
) -> tuple[dict[str, npt.NDArray[Any]], list[tuple[str, float]]]:
    """The outputs asked for, by name, and the seconds by stage.

    ``logits`` (N, classes, h, w) float32; ``labels`` (N, H, W) uint8, uint16 above 256
    classes, at the input's size. Of a detector, its graph's outputs.
    """
    session, images = version.session, request.images
    if session.detects:
        rows = await service.scheduler.code(lambda: detection.rows_of(session, request))
        outcome = await service.scheduler.run(version, rows, deadline)
        stages = [("queue", outcome.queue_seconds), ("inference", outcome.run_seconds)]
        return {n: np.stack([row[n] for row in outcome.rows]) for n in request.outputs}, stages
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
    count, height, width, channels = images.shape
    out = np.empty((count, channels, height, width), np.float32)
    for image, slot in zip(images, out, strict=True):
        normalise(image, architecture.preprocessing, out=slot)
    return out


def _labels(session: Session, rows: list[npt.NDArray[np.float32]]) -> npt.NDArray[Any]:
    architecture = session.bundle.manifest.architecture
    assert architecture is not None
    size = session.input_size
    head = architecture.decode_head
    label = partial(
        label_map,
        network=size,
        covered=size,
        image=size,
        align_corners=head.align_corners,
        threshold=head.label_threshold,
    )
    return np.stack([label(row) for row in rows])
