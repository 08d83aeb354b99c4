"""ONNX Runtime, on the CPU or on an NVIDIA GPU through its CUDA provider."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.errors import BackendError
from fdconv_deploy.runtime.batching import linear_cost
from fdconv_deploy.runtime.bundle import Bundle

from .base import BackendOptions, Tensors

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_INSTALL = {
    CPU: "pip install 'fdconv-deploy[cpu]'",
    CUDA: "pip install 'fdconv-deploy[gpu]'",
}
_NUMPY_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class OnnxRuntimeBackend:
    """Runs graphs in ONNX Runtime with one execution provider first.

    :raises BackendError: onnxruntime is not installed, or lacks the provider.
    """

    def __init__(self, provider: str, options: BackendOptions) -> None:
        self._ort = import_onnxruntime(provider)
        self.name = "onnxruntime-cuda" if provider == CUDA else "onnxruntime-cpu"
        self.device = "cuda" if provider == CUDA else "cpu"
        self._provider = provider
        self._threads = options.threads
        if options.providers is not None:
            self._providers: list[Any] = list(options.providers)
            self._provider = first_name(self._providers)
        elif provider == CUDA:
            # The default, EXHAUSTIVE, spends over half a second on every new shape.
            self._providers = [(CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}), CPU]
        else:
            self._providers = [CPU]
        available = self._ort.get_available_providers()
        if self._provider not in available:
            raise BackendError(
                f"The installed onnxruntime has no {self._provider}, only "
                f"{', '.join(available)}. Install one that has it: "
                f"{_INSTALL.get(self._provider, 'see onnxruntime.ai')}."
            )
        if provider == CUDA and hasattr(self._ort, "preload_dlls"):
            self._ort.preload_dlls()  # finds CUDA and cuDNN as installed by pip

    def load(self, bundle: Bundle, batch: int) -> OnnxRuntimeGraph:
        """Load the graph of one batch size. See :class:`Backend`."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        name = bundle.manifest.models[batch]
        try:
            session = self._ort.InferenceSession(
                str(bundle.model_path(batch)), options, providers=self._providers
            )
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime cannot load {name!r} of the bundle {bundle.path}: "
                f"{first_line(error)}. Update onnxruntime, or export the bundle again."
            ) from error
        # Without this, ONNX Runtime drops to another provider when one fails, unasked.
        session.disable_fallback()
        if session.get_providers()[0] != self._provider:
            raise BackendError(
                f"ONNX Runtime could not start {self._provider} on this machine. Check that "
                "its driver and libraries are installed (its own message is above), or choose "
                "backend 'onnxruntime-cpu'."
            )
        _check_signature(bundle, batch, session)
        return OnnxRuntimeGraph(session, name)

    def batch_cost(self, batch: int) -> float:
        """The cost of one run at this batch size. See :class:`Backend`."""
        # A GPU answers a small batch in little more time than one image.
        return linear_cost(batch) if self.device == "cpu" else batch + 1.0


class OnnxRuntimeGraph:
    """One loaded graph. See :class:`Graph`."""

    def __init__(self, session: Any, name: str) -> None:
        self._session = session
        self._name = name
        self._outputs = [value.name for value in session.get_outputs()]

    def run(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Every output by name. See :class:`Graph`."""
        try:
            values = self._session.run(self._outputs, dict(feeds))
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed while running {self._name!r}: {first_line(error)}."
            ) from error
        return dict(zip(self._outputs, values, strict=True))


def import_onnxruntime(provider: str = CPU) -> Any:
    """The onnxruntime module.

    :raises BackendError: it is not installed, or does not load.
    """
    try:
        import onnxruntime
    except ImportError as error:
        found = "is not installed" if isinstance(error, ModuleNotFoundError) else "does not load"
        raise BackendError(
            f"ONNX Runtime {found} here, and this backend runs on it. Install it: "
            f"{_INSTALL.get(provider, _INSTALL[CPU])}."
        ) from error
    return onnxruntime


def cuda_problem() -> str | None:
    """Why the CUDA provider is not even listed, as a clause; None when it is.

    A listed provider may still fail to start: the GPU wheel lists it on any machine.
    """
    if CUDA not in import_onnxruntime().get_available_providers():
        return "the installed onnxruntime has no CUDA provider"
    return None


def first_name(providers: list[Any]) -> str:
    """The name of the first execution provider in ONNX Runtime's notation.

    :raises BackendError: there is none.
    """
    if not providers:
        raise BackendError("An empty list of ONNX Runtime providers was given; name one or more.")
    first = providers[0]
    return str(first if isinstance(first, str) else first[0])


def first_line(error: Exception) -> str:
    """The first line of an error's text, without its full stop."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(". ")


def _check_signature(bundle: Bundle, batch: int, session: Any) -> None:
    for what, specs, values in (
        ("inputs", bundle.manifest.inputs[batch], session.get_inputs()),
        ("outputs", bundle.manifest.outputs[batch], session.get_outputs()),
    ):
        said = {(s.name, tuple(s.shape), np.dtype(s.dtype).name) for s in specs}
        found = {(v.name, tuple(v.shape), _NUMPY_TYPES.get(v.type, v.type)) for v in values}
        if said != found:
            raise BackendError(
                f"The graph of batch {batch} in the bundle {bundle.path} has the {what} "
                f"{sorted(found, key=str)}, but its manifest says {sorted(said, key=str)}. "
                "Export the bundle again."
            )
