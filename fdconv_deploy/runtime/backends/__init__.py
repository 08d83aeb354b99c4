"""The inference backends, one file each, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fdconv_deploy.errors import BackendError, FDConvError
from fdconv_deploy.runtime.backends.base import (
    Backend,
    BackendOptions,
    Graph,
    Tensors,
    feeds_problem,
)
from fdconv_deploy.runtime.backends.onnxruntime import PROVIDERS, OnnxRuntimeBackend, cuda_problem
from fdconv_deploy.runtime.backends.openvino import PRECISIONS, OpenVINOBackend
from fdconv_deploy.runtime.backends.tensorrt import TensorRTBackend
from fdconv_deploy.runtime.backends.tensorrt_engines import has_engines
from fdconv_deploy.runtime.bundle import Bundle

__all__ = [
    "BACKENDS",
    "NATIVE_BACKENDS",
    "Backend",
    "BackendOptions",
    "Graph",
    "Tensors",
    "feeds_problem",
    "select",
]

# Name -> maker, in the order in which they are listed. Making one is cheap and loads no graph.
BACKENDS: dict[str, Callable[[BackendOptions], Backend]] = {
    "tensorrt": TensorRTBackend,
    **{name: partial(OnnxRuntimeBackend, name) for name in PROVIDERS},
    **{name: partial(OpenVINOBackend, name) for name in PRECISIONS},
}
# Those that native operators run in.
NATIVE_BACKENDS = ("onnxruntime-cpu", *PRECISIONS)


def select(
    bundle: Bundle, name: str, options: BackendOptions
) -> tuple[Backend, str, dict[int, Graph]]:
    """Choose and make a backend; ``BackendError`` where there is none that can be used here.

    ``name`` is a key of ``BACKENDS``, or "auto": TensorRT where the bundle has an engine for this
    machine, else CUDA where it really runs, else CPU. OpenVINO must be named.

    Returns:
        The backend, a sentence on why it was chosen, and graphs already loaded in finding out, by
        batch size.
    """
    if options.native and name not in ("auto", *NATIVE_BACKENDS):
        raise BackendError(
            f"The native operators run in the backends {', '.join(NATIVE_BACKENDS)}, not in "
            f"{name!r}. Choose one of them, or leave native out."
        )
    if name != "auto":
        if name not in BACKENDS:
            raise BackendError(
                f"There is no backend {name!r}; there are auto, {', '.join(BACKENDS)}."
            )
        return BACKENDS[name](options), f"{name} was asked for.", {}
    cpu = "onnxruntime-cpu"
    if options.providers is not None:
        return BACKENDS[cpu](options), "The ONNX Runtime providers were given.", {}
    if options.native:
        return BACKENDS[cpu](options), f"{cpu}, since native operators were asked for.", {}
    first, engines = min(bundle.manifest.models), ""
    if has_engines(bundle):
        try:
            fast = TensorRTBackend(options)
            for view in [bundle.at(size) for size in bundle.manifest.sizes] or [bundle]:
                for batch in view.manifest.models:
                    fast.find(view, batch)
            graph: Graph = fast.load(bundle, first)
        except FDConvError as error:
            engines = f"; its TensorRT engines cannot be used: {str(error).rstrip('.')}"
        else:
            return fast, "tensorrt, since the bundle has engines for this machine.", {first: graph}
    reason = cuda_problem()
    if reason is None:
        try:
            # Only loading and running a graph shows whether a GPU, its driver, CUDA's libraries
            # and cuDNN are there; loading runs it.
            backend = BACKENDS["onnxruntime-cuda"](options)
            graph = backend.load(bundle, first)
        except BackendError as error:
            reason = f"CUDA did not run ({error})"
        else:
            choice = f"onnxruntime-cuda, since its CUDA provider runs{engines}."
            return backend, choice, {first: graph}
    return BACKENDS[cpu](options), f"{cpu}, since {reason.rstrip('.')}{engines}.", {}
