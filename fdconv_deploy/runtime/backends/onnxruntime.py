"""ONNX Runtime, on the CPU or on an NVIDIA GPU through its CUDA provider."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy.typing as npt

from fdconv_deploy.environment import install
from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.native import SWITCH, native_library
from fdconv_deploy.runtime.backends.base import BackendOptions, Tensors, check_signature
from fdconv_deploy.runtime.backends.threads import available_cores
from fdconv_deploy.runtime.batching import linear_cost
from fdconv_deploy.runtime.bundle import Bundle

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
# Backend -> its execution provider, and the packages that have it.
PROVIDERS = {
    "onnxruntime-tensorrt": (TENSORRT, ("onnxruntime-gpu", "tensorrt")),
    "onnxruntime-cuda": (CUDA, ("onnxruntime-gpu",)),
    "onnxruntime-cpu": (CPU, ("onnxruntime",)),
}
_MARK = re.compile(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")
_NO_MEMORY = re.compile(r"bad_?alloc|bad allocation|[Ff]ailed to allocate memory|out of memory")
_NUMPY_TYPES = {"float": "float32", "double": "float64"}  # other types have numpy's names


class OnnxRuntimeBackend:
    """Runs graphs in ONNX Runtime with one execution provider first.

    With TensorRT's provider, loading a graph builds an engine, which takes minutes.

    Args:
        name: of the backend, a key of ``PROVIDERS``.
        options: what the caller set.

    Raises:
        BackendError: onnxruntime is not installed, or lacks the provider.
    """

    def __init__(self, name: str, options: BackendOptions) -> None:
        self.name = name
        self._provider, packages = PROVIDERS[name]
        self._ort = import_onnxruntime(packages[0])
        self.device = "cpu" if self._provider == CPU else "cuda"
        self._threads = options.threads or available_cores()
        self._spinning = options.spinning
        if options.providers is not None:
            self._provider = first_name(list(options.providers))
            packages = next((known for p, known in PROVIDERS.values() if p == self._provider), ())
        available = self._ort.get_available_providers()
        if self._provider not in available:
            raise BackendError(
                f"The installed onnxruntime has no {self._provider}, only {', '.join(available)}.",
                f"Install one that has it ({install(*packages) or 'see onnxruntime.ai'}), or "
                "choose 'onnxruntime-cpu'.",
            )
        self._providers = list(options.providers or _default_providers(self._provider))
        if self.device == "cuda" and hasattr(self._ort, "preload_dlls"):
            self._ort.preload_dlls()  # finds CUDA and cuDNN as installed by pip
        self._native = options.native
        self._library: Path | None = None
        self.operators = ""
        if self.device == "cpu" and [first_name([p]) for p in self._providers] == [CPU]:
            self._library, why = native_library(options.native)
            self.operators = f"{'native' if self._library else 'portable'} operators, since {why}"
        elif options.native:
            raise BackendError(
                f"The native operators run on {CPU} alone, not with {self._provider}. Leave native "
                "out, or give no other provider."
            )

    @property
    def threads(self) -> int:
        """CPU threads of a run. See :class:`Backend`."""
        return self._threads if self._provider == CPU else 1

    def load(self, bundle: Bundle, batch: int, threads: int | None = None) -> OnnxRuntimeGraph:
        """Load the graph of one batch size. See :class:`Backend`."""
        if self._library is not None and (problem := bundle.manifest.older_nodes):
            self._library, why = native_library(self._native, problem)
            self.operators = f"portable operators, since {why}"
        options = self._session_options(threads or self._threads)
        name = bundle.manifest.models[batch]
        bundle.hold()  # all at once: a graph loaded later is of the same bundle and needs no file
        graph, weights = bytes(bundle.content(name)), bundle.external_data(name)
        try:
            # Bytes, not paths: ONNX Runtime would map the files, whoever writes to them. It copies
            # what it keeps as the session is made, and the bytes need not outlive that.
            options.add_external_initializers_from_files_in_memory(
                list(weights), list(weights.values()), [len(data) for data in weights.values()]
            )
            session = self._ort.InferenceSession(graph, options, providers=self._providers)
        except Exception as error:
            doing = f"loading {name!r} of the bundle {bundle.path}"
            raise _out_of_memory(error, doing) or BackendError(
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
        check_signature(
            bundle,
            batch,
            *(
                {(v.name, tuple(v.shape), _numpy_type(v.type)) for v in values}
                for values in (session.get_inputs(), session.get_outputs())
            ),
        )
        return OnnxRuntimeGraph(session, name)

    def _session_options(self, threads: int) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        # A number, since with none ONNX Runtime counts the machine's cores and pins a thread
        # to each, whatever share of them this process has.
        options.intra_op_num_threads = threads
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "1" if self._spinning else "0"
        )
        # Threads that go on spinning after a run take a core from whatever comes next:
        # postprocessing, or another model's run.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # A memory pattern is a second, contiguous arena block as large as a run's peak, and is
        # taken at the second run only. Without it UPerNet-R50 at 512×512 holds 775 MB rather
        # than 1112 at batch 1, and the run after warm-up is like any later one; the time is the
        # same (benchmarks.session --variants).
        options.enable_mem_pattern = False
        if self._library is not None:
            try:
                options.register_custom_ops_library(str(self._library))
            except Exception as error:
                raise BackendError(
                    f"ONNX Runtime cannot load the native operators {self._library}: "
                    f"{first_line(error)}. Build them again with python -m "
                    f"fdconv_deploy.ops.native, or do without: {SWITCH}=0."
                ) from error
        return options

    def batch_cost(self, batch: int) -> float:
        """The cost of one run at this batch size. See :class:`Backend`."""
        # A GPU answers a small batch in little more time than one image.
        return linear_cost(batch) if self.device == "cpu" else batch + 1.0


class OnnxRuntimeGraph:
    """One loaded graph. See :class:`Graph`.

    No IO binding: ONNX Runtime reads contiguous numpy inputs where they lie, and binding an
    output to a caller's fresh array instead of copying it there saves less than a millisecond
    of a run (benchmarks.session --binding). Outputs kept for reuse would have to be copied
    anyway, since answers belong to their callers.
    """

    def __init__(self, session: Any, name: str) -> None:
        self._session = session
        self._name = name
        self._outputs = [value.name for value in session.get_outputs()]

    def run(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Every output by name. See :class:`Graph`."""
        try:
            values = self._session.run(self._outputs, dict(feeds))
        except Exception as error:
            raise _out_of_memory(error, f"running {self._name!r}") or BackendError(
                f"ONNX Runtime failed while running {self._name!r}: {first_line(error)}. If it "
                "fails again, update onnxruntime, or export the bundle again."
            ) from error
        return dict(zip(self._outputs, values, strict=True))


def import_onnxruntime(package: str = "onnxruntime") -> Any:
    """The onnxruntime module.

    Raises:
        BackendError: it is not installed, or does not load.
    """
    try:
        import onnxruntime
    except ImportError as error:
        found = "is not installed" if isinstance(error, ModuleNotFoundError) else "does not load"
        raise BackendError(
            f"ONNX Runtime {found} here, and this backend runs on it.",
            f"Install it ({install(package)}).",
        ) from error
    return onnxruntime


def _default_providers(provider: str) -> list[Any]:
    """In ONNX Runtime's notation, those that a backend tries in turn."""
    # The default, EXHAUSTIVE, spends over half a second on every new shape.
    cuda = (CUDA, {"cudnn_conv_algo_search": "HEURISTIC"})
    if provider != TENSORRT:
        return [CPU] if provider == CPU else [cuda, CPU]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root, "fdconv-deploy", "onnxruntime-tensorrt")
    folder.mkdir(parents=True, exist_ok=True)
    # Measurements of earlier builds are kept, and no engines: those are code, and ONNX Runtime's
    # own store of them knows no hashes.
    timing = {"trt_timing_cache_enable": True, "trt_timing_cache_path": str(folder)}
    return [(TENSORRT, timing), cuda, CPU]


def cuda_problem() -> str | None:
    """Why the CUDA provider is not even listed, as a clause; None when it is.

    A listed provider may still fail to start: the GPU wheel lists it on any machine.
    """
    if CUDA not in import_onnxruntime().get_available_providers():
        return "the installed onnxruntime has no CUDA provider"
    return None


def first_name(providers: list[Any]) -> str:
    """The name of the first execution provider in ONNX Runtime's notation.

    Raises:
        BackendError: there is none.
    """
    if not providers:
        raise BackendError("An empty list of ONNX Runtime providers was given; name one or more.")
    first = providers[0]
    return str(first if isinstance(first, str) else first[0])


def first_line(error: Exception) -> str:
    """The first line of an error's text, without ONNX Runtime's mark and the full stop."""
    lines = _MARK.sub("", str(error).strip()).splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(". ")


def _out_of_memory(error: Exception, doing: str) -> BackendError | None:
    text = str(error)
    if not isinstance(error, MemoryError) and not _NO_MEMORY.search(text):
        return None
    asked = re.search(r"buffer of size (\d+)", text)
    found = f" It asked for {int(asked[1]) / 1e6:,.0f} MB more." if asked else ""
    return BackendError(
        f"ONNX Runtime ran out of memory while {doing}.{found} Free some, or use a bundle of a "
        "smaller batch size or input."
    )


def _numpy_type(kind: str) -> str:
    """ONNX Runtime's ``tensor(float)`` as numpy's ``float32``."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return _NUMPY_TYPES.get(name, name)
