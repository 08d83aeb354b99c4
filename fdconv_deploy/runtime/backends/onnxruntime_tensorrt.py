"""ONNX Runtime with its TensorRT provider: engines made at loading, from the portable graph."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fdconv_deploy.environment import install
from fdconv_deploy.errors import BackendError
from fdconv_deploy.runtime.backends.base import BackendOptions
from fdconv_deploy.runtime.backends.onnxruntime import (
    CPU,
    CUDA,
    OnnxRuntimeBackend,
    import_onnxruntime,
)

TENSORRT = "TensorrtExecutionProvider"
NAME = "onnxruntime-tensorrt"


def providers(folder: Path) -> list[Any]:
    """In ONNX Runtime's notation; measurements of earlier builds are kept in ``folder``.

    Measurements only: engines are code, and ONNX Runtime's own store of them knows no hashes.
    """
    timing = {"trt_timing_cache_enable": True, "trt_timing_cache_path": str(folder)}
    return [(TENSORRT, timing), (CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}), CPU]


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fdconv-deploy" / "onnxruntime-tensorrt"


class OnnxRuntimeTensorRTBackend(OnnxRuntimeBackend):
    """See :class:`OnnxRuntimeBackend`. Loading builds an engine, which takes minutes.

    :raises BackendError: onnxruntime is not installed, or lacks the provider.
    """

    def __init__(self, options: BackendOptions) -> None:
        ort = import_onnxruntime(CUDA)
        if TENSORRT not in ort.get_available_providers():
            raise BackendError(
                "The installed onnxruntime has no TensorRT provider, only "
                f"{', '.join(ort.get_available_providers())}. Install one that has it "
                f"({install('onnxruntime-gpu', 'tensorrt')}), or choose 'onnxruntime-cpu'."
            )
        folder = _cache()
        folder.mkdir(parents=True, exist_ok=True)
        given = options.providers or tuple(providers(folder))
        super().__init__(CUDA, replace(options, providers=given))
        self.name = NAME
