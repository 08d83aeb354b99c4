"""The KServe tensor format of REST: requests and answers in JSON, with binary tensors behind it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json, to_json

from fdconv_deploy.serve.errors import RefusedError, where_invalid
from fdconv_deploy.serve.kserve.inference import (
    DATATYPE_OF,
    DATATYPES,
    PIECE,
    Array,
    InferRequest,
    InputTensor,
    check_parameters,
    give_way,
    infer_request,
)
from fdconv_deploy.serve.model_cards import ModelCard
from fdconv_deploy.serve.model_repository import Version

HEADER_LENGTH = "Inference-Header-Content-Length"
# Memory in bytes that a number takes while it is read.
_READ_BYTES = 12
# Bytes of JSON, and bytes whose commas are counted, that are worked on at a time; see PIECE.
_PIECE_BYTES, _COUNTED = 64 << 10, 1 << 20
# Of a list of lists of short numbers, memory that a piece takes while it is read.
_PIECE_MEMORY = 4 << 20
# Numbers, and bytes, of a request's JSON beside those of its tensors: names, shapes, parameters.
_BESIDE, _BESIDE_BYTES = 4096, 64 << 10
# A tensor's list, and in a piece of JSON that begins in one, what comes after it.
_DATA, _BEHIND = re.compile(rb'"data"\s*:\s*(?=\[)'), re.compile(rb'["}]')
# Characters of a number in JSON with what is around it, at most.
_TEXT = 48
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


def json_length(header: str | None, size: int) -> int:
    """How many of a body's bytes are JSON, as the client's header says; all without one."""
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
    """The memory that reading JSON takes; a 413 where it holds more numbers than the inputs."""
    numbers, most = 1, max_images * card.input_numbers
    for at in range(0, len(text), _COUNTED):
        numbers += bytes(text[at : at + _COUNTED]).count(b",")
        give_way()
    if numbers > most + _BESIDE:
        raise RefusedError(
            413,
            f"The request's JSON holds {numbers:,} values; {max_images} images, the most in one "
            f"request, are {most:,} numbers. Send as many as the shapes say.",
        )
    return _PIECE_MEMORY + _READ_BYTES * numbers


def _read_json(text: memoryview) -> tuple[InferCall, list[list[Array]]]:
    """A request in which the n-th list of numbers is ``[n]``, and these, each in pieces."""
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
        raise RefusedError(
            400, f"The request's JSON is not an inference request{where_invalid(error)}."
        ) from error


def _read_list(text: memoryview, at: int) -> tuple[list[Array], int]:
    """Numbers in a list that begins at ``at``, or in lists in it, in pieces; and where it ends.

    The text is cut at commas. Each piece is JSON by itself once the lists that are open at its
    beginning are opened, and those open at its end closed.
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
            fits = fits and bool(np.isfinite(pieces[-1]).all())
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
        give_way()


def read_request(body: memoryview, length: int, card: ModelCard, max_images: int) -> InferRequest:
    """A body of ``length`` bytes of JSON, then binary tensors in the inputs' order, as a request.

    Refused, by a 400, if it is none.
    """
    call, lists = _read_json(body[:length])
    parameters, outputs = call.parameters or Parameters(), call.outputs or []
    asking: list[InferCall | InferTensor | RequestedOutput] = [call, *call.inputs, *outputs]
    for holder in asking:
        if holder.parameters:
            check_parameters(holder.parameters.model_extra or {})
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
    own = {
        output.name: output.parameters.binary_data
        for output in outputs
        if output.parameters and output.parameters.binary_data is not None
    }
    return infer_request(
        card,
        call.id,
        inputs,
        [output.name for output in outputs],
        parameters.timeout,
        max_images,
        lambda name: own.get(name, bool(parameters.binary_data_output)),
    )


def write_answer(
    request: InferRequest, version: Version, outputs: dict[str, Array]
) -> tuple[list[bytes | memoryview], int | None]:
    """An answer: the body's parts, and the JSON's length where binary tensors follow it."""
    text: list[bytes | memoryview] = []
    parts: list[bytes | memoryview] = []
    # By hand: what may need an escape is the client's id alone, and any library's code is in no
    # cache of the processor after an inference.
    own_id = b',"id":' + to_json(request.id) if request.id else b""
    last = f'{{"model_name":"{version.name}","model_version":"{version.card.version}"'.encode()
    last, comma = last + own_id + b',"outputs":[', ""
    for name, array in outputs.items():
        shape = ",".join(map(str, array.shape))
        entry = (
            f'{comma}{{"name":"{name}","datatype":"{DATATYPE_OF[array.dtype]}","shape":[{shape}],'
        )
        if name not in request.in_json:
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
    for at in range(0, flat.size, PIECE):
        piece = flat[at : at + PIECE]
        if not np.isfinite(piece).all():
            raise RefusedError(
                400,
                f"The output {name!r} is not finite, which JSON cannot express. Ask for it in "
                "binary.",
            )
        yield b"," * bool(at) + to_json(piece.tolist())[1:-1]
        if at + PIECE < flat.size:
            give_way()
