"""The KServe tensor format: inference requests and answers in JSON, with binary tensors behind it.

:func:`infer_request` checks the tensors of both transports, REST (here) and gRPC.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json, to_json

from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.model_cards import ModelCard

Array = npt.NDArray[Any]
HEADER_LENGTH = "Inference-Header-Content-Length"
# Memory in bytes that a number of a tensor in JSON takes while it is read, and when it is written.
_READ_BYTES, WRITTEN_BYTES = 12, 24
# Bytes of JSON, numbers, and bytes whose commas are counted, that are worked on at a time. One call
# on so many keeps Python's lock, and so the event loop, for a millisecond or two; one on a whole
# tensor, for up to seconds.
_PIECE_BYTES, _PIECE, _COUNTED = 64 << 10, 16 << 10, 1 << 20
# Of a list of lists of short numbers, memory that a piece takes while it is read.
_PIECE_MEMORY = 4 << 20
# Numbers, and bytes, of a request's JSON beside those of its tensors: names, shapes, parameters.
_BESIDE, _BESIDE_BYTES = 4096, 64 << 10
# A tensor's list, and in a piece of JSON that begins in one, what comes after it.
_DATA, _BEHIND = re.compile(rb'"data"\s*:\s*(?=\[)'), re.compile(rb'["}]')
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
    "class_count": "classify outputs (class_count). Ask for the output itself",
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
    """An input as it was sent: its bytes, or its numbers where there are none.

    Numbers are pieces (count,) float64 from JSON, or a repeated field of a gRPC message.
    """

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
    return _BESIDE_BYTES + _TEXT * max_images * card.input_numbers


def json_memory(text: memoryview, card: ModelCard, max_images: int) -> int:
    """The bytes of memory that reading a request's JSON takes, counted before it is read.

    Raises:
        RefusedError: 413, it holds more numbers than the model's inputs do.
    """
    numbers, most = 1, max_images * card.input_numbers
    for at in range(0, len(text), _COUNTED):
        numbers += bytes(text[at : at + _COUNTED]).count(b",")
        _give_way()
    if numbers > most + _BESIDE:
        raise RefusedError(
            413,
            f"The request's JSON holds {numbers:,} values; {max_images} images, the most in one "
            f"request, are {most:,} numbers. Send as many as the shapes say.",
        )
    return _PIECE_MEMORY + _READ_BYTES * numbers


def _read_json(text: memoryview) -> tuple[InferCall, list[list[Array]]]:
    """Read a request's JSON, its tensors' lists apart, in pieces.

    Returns:
        The request, in which each list of numbers is replaced by ``[n]``, and these lists: the
        pieces (count,) float64 of the n-th.

    Raises:
        RefusedError: 400, it is no inference request.
    """
    lists: list[list[Array]] = []
    rest, at = bytearray(), 0
    while found := _DATA.search(text, at, at + _BESIDE_BYTES):
        rest += text[at : found.end()]
        rest += b"[%d]" % len(lists)
        numbers, at = _read_list(text, found.end())
        lists.append(numbers)
        if len(rest) > _BESIDE_BYTES:
            break
    if len(rest) + len(text) - at > _BESIDE_BYTES:  # nor was it searched beyond
        raise RefusedError(
            400,
            f"The request's JSON is larger than {_BESIDE_BYTES:,} bytes without the 'data' of its "
            "inputs, more than an inference request needs.",
        )
    try:
        return InferCall.model_validate_json(bytes(rest) + bytes(text[at:])), lists
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RefusedError(
            400,
            f"The request's JSON is not an inference request{' at ' * bool(where)}{where}: "
            f"{first['msg']}.",
        ) from error


def _read_list(text: memoryview, at: int) -> tuple[list[Array], int]:
    """Read numbers in a list, or in lists in it, row by row.

    The text is cut at commas. Each piece is JSON by itself once the lists that are open at its
    beginning are opened, and those open at its end closed.

    Args:
        text: JSON.
        at: Where in it the list begins.

    Returns:
        The numbers in pieces (count,) float64, and where the list ends.

    Raises:
        RefusedError: 400, it is no such list.
    """
    pieces: list[Array] = []
    values: list[Any]
    depth = 0
    while True:
        piece = bytes(text[at : at + _PIECE_BYTES])
        behind = _BEHIND.search(piece)
        end = piece.rfind(b"]", 0, behind.start()) + 1 if behind else piece.rfind(b",")
        piece = piece[: max(end, 0)]
        edges = piece.strip()
        before, depth = depth, depth + piece.count(b"[") - piece.count(b"]")
        # A comma beside a bracket would not be seen any more.
        fits = bool(edges) and edges[-1:] != b"[" and depth >= 0
        fits = fits and not (before and edges[:1] == b"]")
        try:
            values = from_json(b"[" * before + piece + b"]" * depth) if fits else [None]
            while set(map(type, values)) == {list}:
                values = list(chain.from_iterable(values))
            fits = set(map(type, values)) <= {int, float}
            pieces.append(np.array(values if fits else [], np.float64))
        except (ValueError, OverflowError):  # no JSON; an integer of hundreds of digits
            fits = False
        at += end
        if not fits or (depth and behind):
            raise RefusedError(
                400,
                "An input's 'data' must be a list of numbers, or of lists of numbers, and nothing "
                "else, within the range of its datatype.",
            )
        if not depth:
            return pieces, at
        at += 1
        _give_way()


def _give_way() -> None:
    """Let others have Python's lock; without a pause this thread has it back before they wake."""
    time.sleep(1e-4)


def read_request(
    body: memoryview, length: int, card: ModelCard, max_images: int
) -> tuple[InferRequest, dict[str, bool]]:
    """Read a body of ``length`` bytes of JSON and then binary tensors, in the inputs' order.

    Returns:
        The request, and which of its outputs the client wants in binary.

    Raises:
        RefusedError: 400, it is not a request that this model can answer.
    """
    call, lists = _read_json(body[:length])
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
        # Not the n-th list where the key was spelled in another way, by escapes.
        numbers = lists[given.data[0]] if given.data in [[n] for n in range(len(lists))] else []
        inputs.append(InputTensor(given.name, given.datatype, given.shape, raw, numbers))
    if len(tail):
        raise RefusedError(
            400, f"{len(tail)} bytes follow the JSON that no 'binary_data_size' announces."
        )
    parameters, outputs = call.parameters, call.outputs or []
    names = [output.name for output in outputs]
    timeout = parameters.timeout if parameters else None
    request = infer_request(card, call.id, inputs, names, timeout, max_images)
    in_binary = bool(parameters and parameters.binary_data_output)
    binary = dict.fromkeys(request.outputs, in_binary)
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
    text: list[bytes | memoryview] = []
    parts: list[bytes | memoryview] = []
    # By hand: what may need an escape is the client's id alone, and any library's code is in no
    # cache of the processor after an inference.
    own_id = b',"id":' + to_json(request.id) if request.id else b""
    last = f'{{"model_name":"{model}","model_version":"{version}"'.encode() + own_id
    last, comma = last + b',"outputs":[', ""
    for name, array in outputs.items():
        shape = ",".join(map(str, array.shape))
        entry = f'{comma}{{"name":"{name}","datatype":"{datatype_of(array)}","shape":[{shape}],'
        if binary[name]:
            parts.append(np.ascontiguousarray(array).data.cast("B"))
            last += f'{entry}"parameters":{{"binary_data_size":{array.nbytes}}}}}'.encode()
        else:
            text += [last, entry.encode(), b'"data":[', *_written(name, array)]
            last = b"]}"
        comma = ","
    text.append(last + b"]}")
    return text + parts, sum(map(len, text)) if parts else None


def _written(name: str, array: Array) -> Iterator[bytes]:
    """An output's numbers in JSON, with commas between them, in pieces."""
    flat = array.reshape(-1)
    for at in range(0, flat.size, _PIECE):
        piece = flat[at : at + _PIECE]
        if not np.isfinite(piece).all():
            raise RefusedError(
                400,
                f"The output {name!r} is not finite, which JSON cannot express. Ask for it in "
                "binary.",
            )
        yield b"," * bool(at) + to_json(piece.tolist())[1:-1]
        if at + _PIECE < flat.size:
            _give_way()


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
    """Numbers in pieces of JSON, or in a message of gRPC, as an array (count,).

    Raises:
        RefusedError: 400, something else than as many numbers of the datatype: null, true, text,
            and numbers past the datatype's range are no numbers, as for Triton.
    """
    numbers = given.numbers
    in_json = isinstance(numbers, list)
    starts = range(0, 0 if in_json else len(numbers), _PIECE)
    array, at, fits = np.empty(count, dtype), 0, True
    for piece in numbers if in_json else (numbers[start : start + _PIECE] for start in starts):
        wide = np.array(piece, np.float64)
        if at + len(wide) > count:
            fits = False
            break
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = wide.astype(dtype)
        if in_json or dtype.kind != "f":
            fits &= bool((narrow == wide).all() if dtype.kind != "f" else np.isfinite(narrow).all())
        array[at : at + len(wide)] = narrow
        at += len(wide)
        if at < count:
            _give_way()
    fits &= at == count
    if not fits:
        raise RefusedError(
            400,
            f"The data of the input {given.name!r} must be a list of {count} numbers within the "
            f"range of {given.datatype}.",
        )
    return array
