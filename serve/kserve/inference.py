"""An inference request through its model: tensors in, tensors out, for REST and gRPC."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fdconv_deploy.runtime import Session, Tensors
from fdconv_deploy.runtime.preprocessing import Prepared, normalise
from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.model_cards import ModelCard
from fdconv_deploy.serve.model_repository import Version
from fdconv_deploy.serve.service import Work
from fdconv_deploy.serve.telemetry import Stages

T = TypeVar("T")
Array = npt.NDArray[Any]
# Memory in bytes that a number takes while it is written as JSON.
WRITTEN_BYTES = 24
# Numbers that are worked on at a time. One call on so many keeps Python's lock, and so the event
# loop, for a millisecond or two; one on a whole tensor, for up to seconds.
PIECE = 16 << 10
# The protocol's names of the datatypes that occur here.
DATATYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {"FP32": "<f4", "UINT8": "u1", "UINT16": "<u2", "INT64": "<i8"}.items()
}
DATATYPE_OF = {dtype: name for name, dtype in DATATYPES.items()}
# Parameters of Triton's extensions that would change the answer and are not done here. A client
# that got an answer would take it for the one it asked for.
_NOT_DONE = {
    **dict.fromkeys(
        ("classification", "class_count"),
        "classify outputs (class_count). Ask for the output itself",
    ),
    **dict.fromkeys(
        ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"),
        "use shared memory. Send and ask for tensors in the request",
    ),
    **dict.fromkeys(
        ("sequence_id", "sequence_start", "sequence_end"),
        "keep sequences: each request stands for itself. Leave the sequence out",
    ),
}


class InputTensor(NamedTuple):
    """An input as it was sent: its bytes, or its numbers in pieces (count,) float64."""

    name: str
    datatype: str
    shape: list[int]
    raw: bytes | memoryview | None
    numbers: Iterable[Array]


@dataclass(frozen=True)
class InferRequest:
    """An inference request, checked against the card of the model it is for."""

    card: ModelCard
    id: str  # the client's, empty without one
    images: Array  # (N, C, H, W) float32 normalised, or (N, H, W, C) uint8, RGB where C is 3
    sizes: Array | None  # of a detector, (N, 2) float32 within the input; the whole input if None
    outputs: tuple[str, ...]  # names of those to answer with
    in_json: frozenset[str]  # and of those to be written as JSON
    timeout_ms: float | None


def give_way() -> None:
    """Let others have Python's lock; without a pause this thread has it back before they wake."""
    time.sleep(1e-4)


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Refuse, by a 400, parameters that ask for what is not done here; empty ones do not."""
    for name, value in parameters.items():
        if name in _NOT_DONE and value:
            does = _NOT_DONE[name]
            raise RefusedError(
                400, f"The parameter {name!r} is not supported: this service does not {does}."
            )


def infer_request(
    card: ModelCard,
    request_id: str | None,
    inputs: Sequence[InputTensor],
    outputs: Sequence[str],
    timeout_us: int | None,
    max_images: int,
    binary: Callable[[str], bool] = lambda _: True,
) -> InferRequest:
    """Check a request's tensors against the card of its model, and put them together.

    Without ``outputs`` all are wanted, each in ``binary`` or in JSON; a ``timeout_us``, in
    microseconds, of 0 is none.

    Raises:
        RefusedError: 400, they are no inputs or outputs of this model.
    """
    names, known = ([tensor.name for tensor in side] for side in card.tensors)
    if not 1 <= len(inputs) <= len(names):
        wanted = "exactly one input, 'images'" if len(names) == 1 else "'images' and 'sizes'"
        raise RefusedError(400, f"The request must have {wanted}.")
    arrays: dict[str, Array] = {}
    for given in inputs:
        if given.name not in names:
            raise RefusedError(
                400,
                f"The input is called {' or '.join(map(repr, names))}, not {given.name[:60]!r}.",
            )
        if given.name in arrays:
            raise RefusedError(400, f"The input {given.name!r} is there twice.")
        _check_layout(card, given, max_images)
        arrays[given.name] = _array(given)
    if "images" not in arrays:
        raise RefusedError(400, "The request must have the input 'images'.")
    if "sizes" in arrays:
        _check_size_values(card, arrays["sizes"], len(arrays["images"]))
    for name in outputs:
        if name not in known:
            raise RefusedError(
                400, f"There is no output {name[:60]!r}; there are {', '.join(known)}."
            )
    asked = tuple(dict.fromkeys(outputs or known))
    return InferRequest(
        card=card,
        id=request_id or "",
        images=arrays["images"],
        sizes=arrays.get("sizes"),
        outputs=asked,
        in_json=frozenset(name for name in asked if not binary(name)),
        timeout_ms=timeout_us / 1e3 if timeout_us else None,
    )


def _check_layout(card: ModelCard, given: InputTensor, most: int) -> None:
    """Refuse a tensor of another datatype or shape than its input's."""
    channels, height, width = card.input.channels, card.input.height, card.input.width
    pixels = "RGB" if channels == 3 else f"{channels} bands"
    layouts = {
        "images": {
            "FP32": ([channels, height, width], "normalised"),
            "UINT8": ([height, width, channels], pixels),
        },
        "sizes": {"FP32": ([2], "height and width of each image within its input")},
    }[given.name]
    shape, _ = layouts.get(given.datatype, (None, ""))
    if given.shape[1:] != shape or not 1 <= given.shape[0] <= most:
        expected = " or ".join(
            f"[N, {', '.join(map(str, shape))}] in {datatype} ({meaning})"
            for datatype, (shape, meaning) in layouts.items()
        )
        more = ", ".join(f"{size.height}x{size.width}" for size in card.other_sizes)
        more = more and f" This model's further sizes ({more}) are for images, at /v1/segment."
        raise RefusedError(
            400,
            f"The input {given.name!r} has the shape {expected}, with N from 1 to {most}; found "
            f"{given.shape[:8]} in {given.datatype[:20]!r}.{more}",
        )


def _check_size_values(card: ModelCard, sizes: Array, images: int) -> None:
    if len(sizes) != images:
        raise RefusedError(
            400, f"Every image has a size: {images} images came with {len(sizes)} sizes."
        )
    height, width = card.input.height, card.input.width
    if not ((sizes >= 1) & (sizes <= [height, width]) & (sizes % 1 == 0)).all():
        raise RefusedError(
            400,
            f"The input 'sizes' holds whole numbers of pixels, heights from 1 to {height} and "
            f"widths from 1 to {width}.",
        )


def _array(given: InputTensor) -> Array:
    """An input whose datatype and shape are checked, as an array."""
    dtype, count = DATATYPES[given.datatype], math.prod(given.shape)
    if given.raw is None:
        array = _from_numbers(given, dtype, count)
    elif len(given.raw) == count * dtype.itemsize:
        array = np.frombuffer(given.raw, dtype)
        if not array.flags.aligned:
            array = array.copy()
    else:
        raise RefusedError(
            400,
            f"The input {given.name!r}, {given.datatype} of the shape {given.shape}, has "
            f"{count * dtype.itemsize} bytes of data; {len(given.raw)} were sent.",
        )
    return array.reshape(given.shape)


def _from_numbers(given: InputTensor, dtype: np.dtype[Any], count: int) -> Array:
    """As many numbers, all of them within the datatype's range, as an array (count,)."""
    array, at, fits = np.empty(count, dtype), 0, True
    for wide in given.numbers:
        if at + len(wide) > count:
            fits = False
            break
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = wide.astype(dtype)
        same = np.isfinite(narrow) == np.isfinite(wide) if dtype.kind == "f" else narrow == wide
        fits &= bool(same.all())
        array[at : at + len(wide)] = narrow
        at += len(wide)
        if at < count:
            give_way()
    if not fits or at < count:
        raise RefusedError(
            400,
            f"The data of the input {given.name!r} must be a list of {count} numbers within the "
            f"range of {given.datatype}.",
        )
    return array


async def infer(
    work: Work,
    request: InferRequest,
    write: Callable[[InferRequest, Version, dict[str, Array]], T],
) -> tuple[T, Stages]:
    """Run an admitted request; what ``write`` made of the outputs asked for, and the stages.

    A segmentor's outputs are ``logits`` (N, classes, h, w) float32 and ``labels`` (N, H, W) at the
    input's size, uint8 or, above 256 classes, uint16; a detector's are its graph's. JSON is
    written on another thread.
    """
    version = work.version
    if version.card is not request.card and version.card.tensors != request.card.tensors:
        raise RefusedError(
            503,
            f"The model {version.name!r} was just replaced by one of other tensors. Read its "
            "metadata, and send the request again.",
            work.service.admission.retry_after(),
        )
    await work.memory.take(_memory(version, request), work.deadline)
    outputs, stages = await _run(work, request)
    if request.in_json:
        return await work.code(lambda: write(request, version, outputs)), stages
    return write(request, version, outputs), stages


def _memory(version: Version, request: InferRequest) -> int:
    """The bytes that a request takes at most, beside its body."""
    each = version.tensor_bytes
    for output in version.card.tensors[1]:
        made = 2 if output.name == "labels" and "labels" in request.outputs else 0
        if size := made + WRITTEN_BYTES * (output.name in request.in_json):
            each += size * math.prod(output.shape[1:])
    return each * len(request.images)


async def _run(work: Work, request: InferRequest) -> tuple[dict[str, Array], Stages]:
    session = work.version.session
    if request.images.dtype == np.uint8:  # to be normalised, which would keep the event loop
        inputs = await work.code(lambda: _inputs(session, request))
    else:
        inputs = _inputs(session, request)
    outcome = await work.run(inputs)
    found: dict[str, Array] = {}
    for name in request.outputs:
        if name == "labels" and not session.detects:
            found[name] = await work.code(lambda: _labels(session, outcome.rows))
        else:
            rows = [row[name] for row in outcome.rows]
            found[name] = rows[0][None] if len(rows) == 1 else np.stack(rows)
    return found, [("queue", outcome.queue_seconds), ("inference", outcome.run_seconds)]


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
    whole = Prepared({}, size, "resized", size, size)
    return np.stack([session.segmentation.finish(whole, row).labels for row in rows])
