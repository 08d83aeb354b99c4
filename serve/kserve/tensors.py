"""The protocol's JSON, and its binary tensor extension."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.kserve.inference import TYPES, InferRequest, check_tensor, put_together

HEADER_LENGTH = "Inference-Header-Content-Length"
# JSON larger than this, in bytes, is read and written beside the event loop.
SMALL_JSON = 64 << 10


def read_request(
    body: memoryview, length: int, card: Any, most: int
) -> tuple[InferRequest, dict[str, bool]]:
    """The request in a body, and which outputs the client wants in binary.

    "" stands for the outputs it does not name.

    :param length: of the JSON before the binary tensors, as :func:`json_length` gives it.
    :raises RefusedError: 400, it is not one this model can answer.
    """
    try:
        found = json.loads(bytes(body[:length]))
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "The request's JSON cannot be read.") from error
    if not isinstance(found, dict):
        raise RefusedError(400, "The request must be a JSON object.")
    inputs = found.get("inputs")
    most_inputs = 1 if card.instances is None else 2
    if (
        not isinstance(inputs, list)
        or not 1 <= len(inputs) <= most_inputs
        or not all(isinstance(given, dict) for given in inputs)
    ):
        wanted = "exactly one input, 'images'" if most_inputs == 1 else "'images' and 'sizes'"
        raise RefusedError(400, f"The request must have {wanted}.")
    outputs = found.get("outputs") or []
    if not isinstance(outputs, list) or not all(
        isinstance(o, dict) and isinstance(o.get("name"), str) for o in outputs
    ):
        raise RefusedError(400, "'outputs' must be a list of objects with a 'name'.")
    given, parameters = found.get("id", ""), _parameters(found)
    request = put_together(
        card,
        given if isinstance(given, str) else "",
        _tensors(inputs, body[length:], card, most),
        [o["name"] for o in outputs],
        timeout_ms(parameters.get("timeout")),
    )
    binary = {"": bool(parameters.get("binary_data_output", False))}
    for output in outputs:
        binary[output["name"]] = bool(_parameters(output).get("binary_data", binary[""]))
    return request, binary


def write_answer(
    model: str,
    version: str,
    request: InferRequest,
    outputs: dict[str, npt.NDArray[Any]],
    binary: dict[str, bool],
) -> tuple[list[Any], int | None]:
    """The answer's parts, and the length of its JSON where binary tensors follow it."""
    described, tail = [], []
    for name, array in outputs.items():
        kind = next(k for k, dtype in TYPES.items() if dtype == array.dtype)
        entry: dict[str, Any] = {"name": name, "datatype": kind, "shape": list(array.shape)}
        if binary.get(name, binary[""]):
            entry["parameters"] = {"binary_data_size": array.nbytes}
            tail.append(np.ascontiguousarray(array).data.cast("B"))
        else:
            if not np.isfinite(array).all():
                raise RefusedError(
                    400,
                    f"The output {name!r} is not finite, which JSON cannot say. Ask for it "
                    "in binary.",
                )
            entry["data"] = array.reshape(-1).tolist()
        described.append(entry)
    header = {"model_name": model, "model_version": version, "outputs": described}
    if request.id:
        header["id"] = request.id
    text = json.dumps(header, separators=(",", ":")).encode()
    return [text, *tail], len(text) if tail else None


def timeout_ms(microseconds: Any) -> float | None:
    """The request's own time limit, as Triton's clients give it.

    :raises RefusedError: 400, not a number above 0.
    """
    if microseconds is None or microseconds == 0:
        return None
    if isinstance(microseconds, int) and not isinstance(microseconds, bool) and microseconds > 0:
        return microseconds / 1e3
    raise RefusedError(400, "The parameter 'timeout' is a whole number of microseconds above 0.")


def json_length(given: str | None, size: int) -> int:
    """How many of a body's bytes are JSON, as the client's header says; all without one.

    :raises RefusedError: 400.
    """
    if given is None:
        return size
    if not (given.isascii() and given.isdigit()) or int(given[:20]) > size:
        raise RefusedError(
            400, f"{HEADER_LENGTH} must be the length of the JSON at the body's start, in bytes."
        )
    return int(given)


def _parameters(of: Any) -> dict[str, Any]:
    found = of.get("parameters") if isinstance(of, dict) else None
    return found if isinstance(found, dict) else {}


def _tensors(
    inputs: list[dict[str, Any]], tail: memoryview, card: Any, most: int
) -> dict[str, npt.NDArray[Any]]:
    """Every input by name; those in binary lie in ``tail`` in their order."""
    found: dict[str, npt.NDArray[Any]] = {}
    for given in inputs:
        name = given.get("name")
        if name in found:
            raise RefusedError(400, f"The input {name!r} is there twice.")
        last = given is inputs[-1]
        array, used = _tensor(given, tail, card, most, last=last)
        found[str(name)] = array
        tail = tail[used:]
    return found


def _tensor(
    given: dict[str, Any], tail: memoryview, card: Any, most: int, *, last: bool
) -> tuple[npt.NDArray[Any], int]:
    """One input, and how many bytes of ``tail`` it takes; the last one takes all of them."""
    name, datatype, shape = given.get("name"), given.get("datatype"), given.get("shape")
    if not isinstance(datatype, str) or not isinstance(shape, list):
        raise RefusedError(400, "An input must have a 'datatype' and a 'shape'.")
    if not all(isinstance(side, int) and not isinstance(side, bool) for side in shape):
        raise RefusedError(400, "A 'shape' is a list of whole numbers.")
    check_tensor(card, name, datatype, shape, most)
    dtype, count = TYPES[datatype], math.prod(shape)
    size = _parameters(given).get("binary_data_size")
    if size is None:
        if last and len(tail):
            raise RefusedError(400, "Bytes follow the JSON that no input's parameters speak of.")
        return _from_json(given.get("data"), dtype, count).reshape(shape), 0
    if "data" in given:
        raise RefusedError(400, "An input has 'data' or 'binary_data_size', not both.")
    expected = count * dtype.itemsize
    if size != expected or expected > len(tail) or (last and expected != len(tail)):
        raise RefusedError(
            400,
            f"A {datatype} tensor of the shape {shape} has {expected} bytes; "
            f"'binary_data_size' says {str(size)[:20]} and {len(tail)} follow the JSON.",
        )
    return aligned(np.frombuffer(tail[:expected], dtype)).reshape(shape), expected


def aligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array itself, or a copy where it does not start at a multiple of its item's size."""
    return np.require(array, requirements="A")


def _from_json(data: Any, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    wrong = RefusedError(
        400, f"'data' must be a list of {count} numbers within the range of the datatype."
    )
    if not isinstance(data, list):
        raise wrong
    try:
        numbers = np.array(data, np.float64).reshape(-1)
        if numbers.size != count or (
            dtype == np.uint8 and not ((numbers >= 0) & (numbers <= 255) & (numbers % 1 == 0)).all()
        ):
            raise wrong
        with np.errstate(over="ignore"):
            return numbers.astype(dtype)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise wrong from error
