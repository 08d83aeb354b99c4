"""An inference request through its model: tensors in, tensors out, for both transports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fdconv_deploy.runtime import Session, Tensors
from fdconv_deploy.runtime.preprocessing import Placement, Prepared, normalise
from fdconv_deploy.serve.admission import Memory
from fdconv_deploy.serve.batching import Code
from fdconv_deploy.serve.kserve.tensors import WRITTEN_BYTES, InferRequest
from fdconv_deploy.serve.model_repository import Version
from fdconv_deploy.serve.service import Service

T = TypeVar("T")
Array = npt.NDArray[Any]


async def infer(
    service: Service,
    version: Version,
    request: InferRequest,
    deadline: float,
    write: Callable[[dict[str, Array]], T],
    in_json: Collection[str] = (),
) -> tuple[T, list[tuple[str, float]]]:
    """Run a request, and write its answer.

    Args:
        service: That was asked.
        version: Of the model.
        request: What is to be run.
        deadline: By when, on the scheduler's clock; writing included.
        write: Makes the answer of the outputs asked for, by name. A segmentor's are ``logits``
            (N, classes, h, w) float32 and ``labels`` (N, H, W) at the input's size, uint8 or,
            above 256 classes, uint16; a detector's are its graph's outputs.
        in_json: Names of those that are written as JSON, which is done on another thread.

    Returns:
        What ``write`` made, and (name, seconds) of each stage.
    """
    start = time.perf_counter()
    try:
        with Memory(service.admission) as memory:
            await memory.take(_memory(version, request, in_json), deadline)
            code = partial(service.scheduler.code, deadline=deadline, on_leave=memory.hold)
            outputs, stages = await _infer(service, version, request, deadline, code)
            return await code(lambda: write(outputs)) if in_json else write(outputs), stages
    except Exception as error:
        service.count_failure(version, error, start)
        raise


def _memory(version: Version, request: InferRequest, in_json: Collection[str]) -> int:
    """The bytes that a request takes at most, beside its body."""
    each = version.tensor_bytes
    for output in version.card.tensors[1]:
        made = 2 if output.name == "labels" and "labels" in request.outputs else 0
        if size := made + WRITTEN_BYTES * (output.name in in_json):
            each += size * math.prod(output.shape[1:])
    return each * len(request.images)


async def _infer(
    service: Service,
    version: Version,
    request: InferRequest,
    deadline: float,
    code: Code,
) -> tuple[dict[str, Array], list[tuple[str, float]]]:
    session = version.session
    if request.images.dtype == np.uint8:  # to be normalised, which would keep the event loop
        inputs = await code(lambda: _inputs(session, request))
    else:
        inputs = _inputs(session, request)
    lane = version.lane(session.input_size)
    outcome = await service.scheduler.run(lane, inputs, deadline)
    stages = [("queue", outcome.queue_seconds), ("inference", outcome.run_seconds)]
    found: dict[str, Array] = {}
    for name in request.outputs:
        if name == "labels" and not session.detects:
            found[name] = await code(lambda: _labels(session, outcome.rows))
        else:
            rows = [row[name] for row in outcome.rows]
            found[name] = rows[0][None] if len(rows) == 1 else np.stack(rows)
    return found, stages


def _inputs(session: Session, request: InferRequest) -> dict[str, Array]:
    """A request's images as the network takes them; a detector's are zero past their sizes."""
    images, count = request.images, len(request.images)
    if not session.detects:
        return {"images": session.segmentation.normalise_batch(images)}
    given = session.input_size if request.sizes is None else request.sizes
    sizes = np.ascontiguousarray(np.broadcast_to(np.asarray(given, np.float32), (count, 2)))
    if images.dtype == np.uint8:
        out = np.empty((count, 3, *session.input_size), np.float32)
        for image, (height, width), slot in zip(images, sizes.astype(int), out, strict=True):
            normalise(image[:height, :width], session.preprocessing, session.input_size, slot)
        images = out
    return {"images": images, "sizes": sizes}


def _labels(session: Session, rows: list[Tensors]) -> Array:
    size = session.input_size
    whole = Prepared({}, Placement("resized", *size, size), 0.0, size)
    return np.stack([session.segmentation.finish(whole, row).labels for row in rows])
