"""Which files an ONNX file points at, read from its bytes without the onnx package.

ONNX tensors may keep their data in another file, named by a path inside the .onnx file.
A bundle is opened only if every such path stays inside it (CVE-2024-5187 and its kin),
so the names are read here, before anything else parses the file. The reader knows just
the protobuf fields that can lead to a tensor; numbers are those of onnx.proto3.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

# message -> {field number: message of that field}
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def external_locations(path: Path) -> set[str]:
    """Every external-data ``location`` in the ONNX file at ``path``, as written there.

    :raises ValueError: the file is not an ONNX file, or is cut off.
    """
    found: set[str] = set()
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # A work list rather than recursion: nesting depth is the file's to choose.
        pending = [("Model", 0, len(data))]
        while pending:
            message, start, end = pending.pop()
            if message == "Entry":
                entry = {field: data[a:b] for field, a, b in _fields(data, start, end)}
                if entry.get(1) == b"location":
                    found.add(entry.get(2, b"").decode("utf-8"))
                continue
            inner = _FIELDS[message]
            for field, a, b in _fields(data, start, end):
                if field in inner:
                    pending.append((inner[field], a, b))
    return found


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The length-delimited fields of the message in ``data[start:end]``: number, start, end."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        kind = tag & 7
        if kind == _BYTES:
            length, at = _varint(data, at, end)
            if at + length > end:
                raise ValueError("the file is cut off or not ONNX")
            yield tag >> 3, at, at + length
            at += length
        elif kind == _VARINT:
            _, at = _varint(data, at, end)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError("the file is cut off or not ONNX")
    if at != end:
        raise ValueError("the file is cut off or not ONNX")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("the file is cut off or not ONNX")
