"""One weights file that the graphs of all batch sizes share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx
from onnx import ModelProto, TensorProto

# Smaller tensors (shapes, biases tiled per batch size) stay in the graph itself.
INLINE_BYTES = 1024
# ONNX Runtime maps aligned tensors from the file; 64 is a cache line.
ALIGNMENT = 64


class WeightsFile:
    """Writes tensors once each, whichever graphs name them. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> WeightsFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        self._file.close()

    def _place(self, data: bytes) -> tuple[int, int]:
        key = hashlib.sha256(data).hexdigest()
        if key not in self._places:
            assert self._file is not None
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            self._places[key] = (self._file.tell(), len(data))
            self._file.write(data)
        return self._places[key]

    def take(self, model: ModelProto) -> None:
        """Move a model's large initializers here; it then refers to this file by name."""
        for tensor in model.graph.initializer:
            if not tensor.HasField("raw_data"):
                values = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
            if len(tensor.raw_data) <= INLINE_BYTES:
                continue
            offset, length = self._place(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            del tensor.external_data[:]
            place = {"location": self.path.name, "offset": str(offset), "length": str(length)}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)
