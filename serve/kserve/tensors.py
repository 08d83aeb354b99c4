"""The KServe tensor format: inference requests and answers in JSON, with binary tensors behind it.

:func:`infer_request` checks the tensors of both transports, REST (here) and gRPC.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.model_cards import ModelCard

Array = npt.NDArray[Any]
HEADER_LENGTH = "Inference-Header-Content-Length"
# Memory in bytes that a number in JSON takes while it is read or written, and a list of them.
JSON_BYTES, _LIST_BYTES = 80, 96
# Numbers, and bytes, of a request's JSON beside those of its tensors: names, shapes, parameters.
_BESIDE, _BESIDE_BYTES = 4096, 64 << 10
# Characters of a number in JSON with what is around it, at most.
_TEXT = 48
# The protocol's names of the datatypes that occur here.
DATATYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {"FP32": "<f4", "UINT8": "u1", "UINT16": "<u2", "INT64": "<i8"}.items()
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
# Parameters of Triton's extensions that would change the answer and are not done here. A client
# that got an answer would take it for the one it asked for.
_NOT_DONE = {
    "classification": "classify outputs (class_count). Ask for the output itself",
    "shared_memory_region": "use shared memory. Send and ask for tensors in the request",
    "shared_memory_offset": "use shared memory. Send and ask for tensors in the request",
    "shared_memory_byte_size": "use shared memory. Send and ask for tensors in the request",
    "sequence_id": "keep sequences: each request stands for itself. Leave the sequence out",
    "sequence_start": "keep sequences: each request stands for itself. Leave the sequence out",
    "sequence_end": "keep sequences: each request stands for itself. Leave the sequence out",
}
_OUTPUTS: list[Any] = ["logits", "labels", "boxes", "scores", "count", "masks", "classes"]
_EXAMPLE: dict[str, Any] = {
    "id": "42",
    "inputs": [
        {
            "name": "images",
            "shape": [1, 2, 2, 3],
            "datatype": "UINT8",
            "data": [90, 90, 90, 91, 92, 90, 20, 30, 90, 91, 92, 94],
        }
    ],
    "outputs": [{"name": "labels"}],
}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class Parameters(_Strict):
    """KServe v2: parameters of a request or of one of its tensors.

    Those of Triton's classification, shared memory and sequence extensions are refused, others
    ignored.
    """

    model_config = ConfigDict(extra="allow")

    timeout: int | None = Field(
        default=None, ge=0, description="Of a request: time limit in microseconds; 0 for none."
    )
    binary_data_output: bool | None = Field(
        default=None, description="Of a request: whether outputs are wanted in binary."
    )
    binary_data: bool | None = Field(
        default=None, description="Of an output: whether it is wanted in binary."
    )
    binary_data_size: int | None = Field(
        default=None, ge=0, description="Of a tensor: bytes of its data, which follow the JSON."
    )


class InferTensor(_Strict):
    """KServe v2: a tensor of a request or an answer."""

    name: str
    shape: list[int]
    datatype: str = Field(json_schema_extra={"enum": [*DATATYPES]})
    parameters: Parameters | None = None
    data: list[Any] | None = Field(default=None, description="Row by row; absent in binary.")


class RequestedOutput(_Strict):
    """KServe v2: an output that is wanted."""

    name: str = Field(json_schema_extra={"enum": _OUTPUTS})
    parameters: Parameters | None = Field(default=None, examples=[{"binary_data": True}])


class InferCall(_Strict):
    """KServe v2: an inference request."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    id: str | None = None
    parameters: Parameters | None = None
    inputs: list[InferTensor] = Field(json_schema_extra={"minItems": 1, "maxItems": 2})
    outputs: list[RequestedOutput] | None = None


class InferAnswer(BaseModel):
    """KServe v2: the answer to an inference request."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferTensor]


class InputTensor(NamedTuple):
    """An input as it was sent: its bytes, or its numbers where there are none."""

    name: str
    datatype: str
    shape: list[int]
    raw: bytes | memoryview | None
    numbers: Any


@dataclass(frozen=True)
class InferRequest:
    """A checked inference request.

    Attributes:
        id: the client's, empty without one.
        images: (N, C, H, W) float32 normalised, or (N, H, W, C) uint8, RGB where C is 3.
        sizes: of a detector, (N, 2) float32, height and width of each image within its input;
            the whole input when None.
        outputs: names of the outputs to answer with.
        timeout_ms: the client's time limit.
    """

    id: str
    images: Array
    sizes: Array | None
    outputs: tuple[str, ...]
    timeout_ms: float | None


def json_length(header: str | None, size: int) -> int:
    """How many of a body's bytes are JSON, as the client's header says; all without one.

    Raises:
        RefusedError: 400, the header is not a number of bytes within the body.
    """
    if header is None:
        return size
    if not (header.isascii() and header.isdigit()) or int(header[:20]) > size:
        raise RefusedError(
            400, f"{HEADER_LENGTH} must be the length of the JSON at the body's start, in bytes."
        )
    return int(header)


def most_bytes(card: ModelCard, max_images: int) -> int:
    """Most bytes of a request's body that the model can need: every number as text."""
    return _BESIDE_BYTES + _TEXT * _most_numbers(card, max_images)


def _most_numbers(card: ModelCard, max_images: int) -> int:
    return max_images * sum(math.prod(one.shape[1:]) for one in card.tensors[0])


def json_memory(text: bytes | memoryview, card: ModelCard, max_images: int) -> int:
    """The bytes of memory that reading a request's JSON takes, counted before it is read.

    A list or a number of two characters becomes fifty times as large.

    Raises:
        RefusedError: 413, it holds more numbers or lists than the model's inputs do.
    """
    text = bytes(text)
    numbers, lists = text.count(b",") + 1, text.count(b"[") + text.count(b"{")
    most = _most_numbers(card, max_images)
    if numbers > most + _BESIDE or lists > 2 * most + _BESIDE:
        raise RefusedError(
            413,
            f"The request's JSON holds {numbers:,} values in {lists:,} lists; {max_images} images, "
            f"the most in one request, are {most:,} numbers. Send as many as the shapes say.",
        )
    return len(text) + JSON_BYTES * numbers + _LIST_BYTES * lists


def read_request(
    body: memoryview, length: int, card: ModelCard, max_images: int
) -> tuple[InferRequest, dict[str, bool]]:
    """Read a body of ``length`` bytes of JSON and then binary tensors, in the inputs' order.

    Returns:
        The request, and which of its outputs the client wants in binary.

    Raises:
        RefusedError: 400, it is not a request that this model can answer.
    """
    try:
        call = InferCall.model_validate_json(bytes(body[:length]))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RefusedError(
            400,
            f"The request's JSON is not an inference request{' at ' * bool(where)}{where}: "
            f"{first['msg']}.",
        ) from error
    asked = [call.parameters, *(tensor.parameters for tensor in call.inputs)]
    asked += [output.parameters for output in call.outputs or []]
    for part in filter(None, asked):
        check_parameters(part.model_extra or {})
    tail, inputs = body[length:], []
    for given in call.inputs:
        raw = None
        if given.parameters and (size := given.parameters.binary_data_size) is not None:
            if given.data is not None:
                raise RefusedError(400, "An input has 'data' or 'binary_data_size', not both.")
            if size > len(tail):
                raise RefusedError(
                    400,
                    f"The input {given.name[:60]!r} has a 'binary_data_size' of {size} bytes, and "
                    f"{len(tail)} follow the JSON.",
                )
            raw, tail = tail[:size], tail[size:]
        inputs.append(InputTensor(given.name, given.datatype, given.shape, raw, given.data))
    if len(tail):
        raise RefusedError(
            400, f"{len(tail)} bytes follow the JSON that no 'binary_data_size' announces."
        )
    parameters, outputs = call.parameters or Parameters(), call.outputs or []
    names = [output.name for output in outputs]
    request = infer_request(card, call.id, inputs, names, parameters.timeout, max_images)
    binary = dict.fromkeys(request.outputs, bool(parameters.binary_data_output))
    for output in outputs:
        if output.parameters and output.parameters.binary_data is not None:
            binary[output.name] = output.parameters.binary_data
    return request, binary


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that ask for what is not done here; empty ones ask for nothing.

    Raises:
        RefusedError: 400, one does.
    """
    for name, value in parameters.items():
        if name in _NOT_DONE and value:
            raise RefusedError(
                400,
                f"The parameter {name!r} is not supported: this service does not "
                f"{_NOT_DONE[name]}.",
            )


def write_answer(
    model: str,
    version: str,
    request: InferRequest,
    outputs: dict[str, Array],
    binary: dict[str, bool],
) -> tuple[list[bytes | memoryview], int | None]:
    """Write an answer: the body's parts, and the JSON's length where binary tensors follow it.

    Raises:
        RefusedError: 400, an output that is wanted in JSON holds values JSON cannot express.
    """
    described: list[dict[str, Any]] = []
    parts: list[bytes | memoryview] = []
    for name, array in outputs.items():
        entry: dict[str, Any] = {"name": name, "datatype": datatype_of(array)}
        entry["shape"] = list(array.shape)
        if binary[name]:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            parts.append(np.ascontiguousarray(array).data.cast("B"))
        elif np.isfinite(array).all():
            entry["data"] = array.reshape(-1).tolist()
        else:
            raise RefusedError(
                400,
                f"The output {name!r} is not finite, which JSON cannot express. Ask for it in "
                "binary.",
            )
        described.append(entry)
    header = {"model_name": model, "model_version": version, "outputs": described}
    if request.id:
        header["id"] = request.id
    text = to_json(header)
    return [text, *parts], len(text) if parts else None


def datatype_of(array: Array) -> str:
    """The protocol's name of an array's datatype."""
    return _NAMES[array.dtype]


def infer_request(
    card: ModelCard,
    request_id: str | None,
    inputs: Sequence[InputTensor],
    outputs: Sequence[str],
    timeout_us: int | None,
    max_images: int,
) -> InferRequest:
    """Check a request's tensors and put them together.

    Args:
        card: of the model it is for.
        request_id: the client's.
        inputs: in any order.
        outputs: names of those wanted; all when empty.
        timeout_us: time limit in microseconds; none when 0 or None.
        max_images: most images in one request.

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
    return InferRequest(
        id=request_id or "",
        images=arrays["images"],
        sizes=arrays.get("sizes"),
        outputs=tuple(dict.fromkeys(outputs or known)),
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
        # A copy only where it does not start at a multiple of its item's size.
        array = np.require(np.frombuffer(given.raw, dtype), requirements="A")
    else:
        raise RefusedError(
            400,
            f"The input {given.name!r}, {given.datatype} of the shape {given.shape}, has "
            f"{count * dtype.itemsize} bytes of data; {len(given.raw)} were sent.",
        )
    return array.reshape(given.shape)


def _from_numbers(given: InputTensor, dtype: np.dtype[Any], count: int) -> Array:
    """Numbers as they are in JSON, or in a message of gRPC, as an array (count,).

    Raises:
        RefusedError: 400, something else than as many numbers of the datatype: null, true, text,
            and numbers past the datatype's range are no numbers, as for Triton.
    """
    numbers = given.numbers if given.numbers is not None else []
    in_json = isinstance(numbers, list)
    numbers = _flat(numbers) if in_json else numbers
    fits = numbers is not None and len(numbers) == count
    if fits:
        try:
            wide = np.array(numbers, np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                array = wide.astype(dtype)
            if in_json or dtype.kind != "f":
                fits = bool(
                    (array == wide).all() if dtype.kind != "f" else np.isfinite(array).all()
                )
        except OverflowError:  # an integer of hundreds of digits
            fits = False
    if not fits:
        raise RefusedError(
            400,
            f"The data of the input {given.name!r} must be a list of {count} numbers within the "
            f"range of {given.datatype}.",
        )
    return array


def _flat(numbers: list[Any]) -> list[Any] | None:
    """Lists in lists, row by row, as one list; None where they hold other things than numbers."""
    while numbers and set(map(type, numbers)) == {list}:
        if len(set(map(len, numbers))) > 1:
            return None
        numbers = list(chain.from_iterable(numbers))
    return numbers if set(map(type, numbers)) <= {int, float} else None
