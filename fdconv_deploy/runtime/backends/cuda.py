"""The little of the CUDA runtime that TensorRT's buffers need, by ``cuda-bindings``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fdconv_deploy.environment import install
from fdconv_deploy.errors import BackendError

_OTHERS = "Backend 'onnxruntime-cpu' runs on any machine."
_NO_MEMORY = "cudaErrorMemoryAllocation"


def import_cudart() -> Any:
    """The module ``cuda.bindings.runtime``.

    Raises:
        BackendError: it is not installed.
    """
    try:
        from cuda.bindings import runtime  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise BackendError(
            "TensorRT's buffers need cuda-bindings, which is not installed "
            f"({install('cuda.bindings')}). {_OTHERS}"
        ) from error
    return runtime


class Cuda:
    """The CUDA runtime on the first visible GPU, its errors as sentences.

    Raises:
        BackendError: no GPU, no driver, or no bindings.
    """

    def __init__(self, runtime: Any = None) -> None:
        self.rt = import_cudart() if runtime is None else runtime
        status, *rest = self.rt.cudaGetDeviceCount()
        if self._failed(status) or not rest or rest[0] < 1:
            raise BackendError(
                f"TensorRT needs an NVIDIA GPU and its driver, and CUDA sees none ({status.name}). "
                "Check `nvidia-smi`; in a container, start it with --gpus all. "
                f"{_OTHERS}"
            )

    def _failed(self, status: Any) -> bool:
        return int(status) != 0

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime; what it returns beside its status.

        Raises:
            BackendError: it failed.
        """
        status, *rest = getattr(self.rt, name)(*arguments)
        if self._failed(status):
            if status.name == _NO_MEMORY:
                raise BackendError(
                    f"The GPU has no memory left ({name}). Free some (see `nvidia-smi`), use a "
                    f"bundle of a smaller batch size or input, or another backend. {_OTHERS}"
                )
            raise BackendError(f"CUDA failed in {name}: {status.name}. {_OTHERS}")
        return rest[0] if len(rest) == 1 else rest

    def device(self) -> tuple[str, int]:
        """Name and compute capability, e.g. ``("NVIDIA H200", 90)``."""
        properties = self.call("cudaGetDeviceProperties", 0)
        name = properties.name
        text = name.decode() if isinstance(name, bytes) else str(name)
        return text.rstrip("\0"), 10 * properties.major + properties.minor

    def driver(self, root: Path = Path("/")) -> str:
        """The driver's version; where only CUDA's is told, ``CUDA 13.0``."""
        try:
            told = (root / "proc/driver/nvidia/version").read_text()
        except OSError:
            told = ""
        match = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", told)
        if match is not None:
            return match[1]
        version = int(self.call("cudaDriverGetVersion"))
        return f"CUDA {version // 1000}.{version % 1000 // 10}"
