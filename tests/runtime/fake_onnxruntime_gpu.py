"""onnxruntime-gpu as the CUDA backend meets it, with the CPU for a GPU.

Answers are ONNX Runtime's own. What is played is what differs: a provider's options, buffers on a
device, a CUDA graph that reads its buffers and nothing else, and what goes wrong at the first run.
"""

from __future__ import annotations

import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import onnxruntime

CUDA = "CUDAExecutionProvider"
NO_CUDNN = (
    "Error in execution: Non-zero status code returned while running Conv node. Name:'conv' Status "
    "Message: cuda_kernel.h:296 RequireCudnnHandle(cudnnHandle_t) [ONNXRuntimeError] : 9 : "
    "NOT_IMPLEMENTED : cuDNN is unavailable or disabled for CUDA Execution Provider: dlopen failed "
    "for libcudnn.so: libcudnn.so: cannot open shared object file: No such file or directory"
)


class _OnGpu:
    """A value whose ``numpy()`` is a copy, as it is of a GPU's memory, not a view."""

    def __init__(self, value: onnxruntime.OrtValue) -> None:
        self._value = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value, name)

    def numpy(self) -> Any:
        return self._value.numpy().copy()


class FakeOnnxRuntimeGpu(ModuleType):
    """The module ``onnxruntime``.

    Args:
        fails: what its runs end with; "" for none.
        captures: whether graphs can be captured.
    """

    def __init__(self, fails: str = "", captures: bool = True) -> None:
        super().__init__("onnxruntime")
        self.fails, self.captures = fails, captures
        self.sessions: list[FakeSession] = []
        real = onnxruntime.OrtValue

        def on_gpu(make: Any) -> Any:
            def made(given: Any, *rest: Any) -> Any:
                *rest, device, number = rest
                assert (device, number) == ("cuda", 0)
                return _OnGpu(make(given, *rest))

            return made

        self.OrtValue = SimpleNamespace(
            ortvalue_from_numpy=on_gpu(real.ortvalue_from_numpy),
            ortvalue_from_shape_and_type=on_gpu(real.ortvalue_from_shape_and_type),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        pass

    def InferenceSession(self, graph: bytes, options: Any, providers: list[Any]) -> FakeSession:
        session = FakeSession(self, graph, options, dict(providers[:1])[CUDA])
        self.sessions.append(session)
        return session


class FakeSession:
    """A session of the CUDA provider. ``threads``: those that ran it."""

    def __init__(self, ort: FakeOnnxRuntimeGpu, graph: bytes, options: Any, given: dict) -> None:
        self._ort, self.options, self.session_options = ort, given, options
        self._real = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])
        self.threads: set[int] = set()
        self.bindings: set[int] = set()
        if given["enable_cuda_graph"] == "1" and not ort.captures:
            raise RuntimeError(
                "[ONNXRuntimeError] : 1 : FAIL : This session cannot use the graph capture feature "
                "as requested by the user as all compute graph nodes have not been partitioned to "
                "the CUDAExecutionProvider"
            )

    def get_providers(self) -> list[str]:
        return [CUDA, "CPUExecutionProvider"]

    def disable_fallback(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def run(self, *_: Any) -> Any:
        raise AssertionError("a captured graph reads its own buffers, not what a run is given")

    def run_with_iobinding(self, binding: Any) -> None:
        self.threads.add(threading.get_ident())
        self.bindings.add(id(binding))
        if self._ort.fails:
            raise RuntimeError(self._ort.fails)
        self._real.run_with_iobinding(binding)
