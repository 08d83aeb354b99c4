"""ONNX Runtime, on the CPU or on an NVIDIA GPU through its CUDA provider."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.environment import clashing_runtimes, install
from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.native import cannot_load, kept_layout, lent, native_library
from fdconv_deploy.runtime.backends.base import (
    BackendOptions,
    Graph,
    Phases,
    Specs,
    Tensors,
    check_signature,
    feeds_problem,
)
from fdconv_deploy.runtime.backends.threads import available_cores
from fdconv_deploy.runtime.blocked_graph import RUNTIMES, block_graph, blocked, blocked_kernel
from fdconv_deploy.runtime.bundle import Bundle, Bytes
from fdconv_deploy.runtime.native_layers import NativeGraph, native_graph
from fdconv_deploy.runtime.onnx_graph import make_model, make_node

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# Backend -> its execution provider, and the packages that have it.
PROVIDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnxruntime-cuda": (CUDA, ("onnxruntime-gpu",)),
    "onnxruntime-cpu": (CPU, ("onnxruntime",)),
}
log = logging.getLogger("fdconv.onnxruntime")
_C: Any = ctypes.CDLL(None) if os.name == "posix" else None
_MARK = re.compile(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")
_NO_MEMORY = re.compile(r"bad_?alloc|bad allocation|[Ff]ailed to allocate memory|out of memory")
# Of the runtime's builds for AVX-512, and for AVX2, SSE and some for AArch64.
LENGTHS = (16, 8)
Float32 = npt.NDArray[np.float32]
_NUMPY_TYPES = {"float": "float32", "double": "float64"}  # other types have numpy's names


class OnnxRuntimeBackend:
    """Runs graphs in ONNX Runtime with one execution provider first, `name`'s of ``PROVIDERS``."""

    def __init__(self, name: str, options: BackendOptions) -> None:
        self.name = name
        self._provider, packages = PROVIDERS[name]
        self._ort = import_onnxruntime(packages[0])
        self.device = "cpu" if self._provider == CPU else "cuda"
        self._threads = options.threads or available_cores()
        given = [p if isinstance(p, str) else str(p[0]) for p in options.providers or [CPU]]
        if options.providers is not None:
            if not options.providers:
                raise BackendError(
                    "An empty list of ONNX Runtime providers was given; name one or more."
                )
            self._provider = given[0]
            packages = next((known for p, known in PROVIDERS.values() if p == self._provider), ())
        available = self._ort.get_available_providers()
        if self._provider not in available:
            if clash := clashing_runtimes():
                raise BackendError(f"There is no {self._provider} here, since {clash}.")
            raise BackendError(
                f"The installed onnxruntime has no {self._provider}, only {', '.join(available)}.",
                f"Install one that has it ({install(*packages) or 'see onnxruntime.ai'}), or "
                "choose 'onnxruntime-cpu'.",
            )
        self._given = options.providers
        self._tf32 = options.rounds_to_tf32
        if self.device == "cuda" and hasattr(self._ort, "preload_dlls"):
            self._ort.preload_dlls()  # finds CUDA and cuDNN as installed by pip
        self._native = options.native
        self._library: Path | None = None
        self.operators = ""
        if self.device == "cpu" and given == [CPU]:
            self._library, self._why = native_library(options.native)
            kind = "native" if self._library else "portable"
            self.operators = f"{kind} operators, since {self._why}"
        elif options.native:
            raise BackendError(
                f"The native operators run on {CPU} alone, not with {self._provider}. Leave native "
                "out, or give no other provider."
            )

    @property
    def threads(self) -> int:
        """CPU threads of a run. See :class:`Backend`."""
        return self._threads if self._provider == CPU else 1

    def load(self, bundle: Bundle, batch: int, threads: int | None = None) -> Graph:
        """Load the graph of one batch size; on a GPU, run it once. See :class:`Backend`."""
        name = bundle.manifest.models[batch]
        if self._given is not None or self._provider != CUDA:
            providers = list(self._given or [CPU])
            session, blocked = self._session(bundle, batch, threads, providers)

            def in_nchw(error: Exception) -> Any:
                why = f"ONNX Runtime failed on the graph in blocks ({first_line(error)})"
                log.warning("%s of %s goes on in NCHW, since %s", name, bundle.path, why)
                return self._session(bundle, batch, threads, providers, why)[0]

            return OnnxRuntimeGraph(session, name, in_nchw if blocked else None)
        how = "in one CUDA graph"
        try:
            graph = self._on_gpu(bundle, batch, captured=True)
        except _NotStartedError:
            raise
        except BackendError as error:
            graph = self._on_gpu(bundle, batch, captured=False)
            how = f"without a CUDA graph, since {str(error).rstrip('.')}"
        rounding = "with TF32" if self._tf32 else "without TF32"
        self.operators = f"portable operators, {rounding}, {how}"
        return graph

    def _on_gpu(self, bundle: Bundle, batch: int, *, captured: bool) -> CudaGraph:
        providers = [_cuda(tf32=self._tf32, captured=captured), CPU]
        session, _ = self._session(bundle, batch, None, providers)
        manifest = bundle.manifest
        return CudaGraph(self._ort, session, manifest.models[batch], manifest.specs(batch))

    def _session(
        self,
        bundle: Bundle,
        batch: int,
        threads: int | None,
        providers: list[Any],
        plain: str | None = None,
    ) -> tuple[Any, bool]:
        """A session, and whether its features are in blocks, which ``plain`` tells why not to."""
        if self._library is not None and (problem := bundle.manifest.older_nodes):
            self._library, why = native_library(self._native, problem)
            self.operators = f"portable operators, since {why}"
        threads = threads or self._threads
        name = bundle.manifest.models[batch]
        bundle.hold()  # all at once: a graph loaded later is of the same bundle and needs no file
        graph, files = bytes(bundle.content(name)), bundle.external_data(name)
        try:
            if self._library is not None:
                plain = plain or kept_layout(self._native)
                session, blocked = self._native_session(graph, files, threads, plain)
            else:
                session, blocked = self._open(graph, files, threads, providers), False
        except Exception as error:
            doing = f"loading {name!r} of the bundle {bundle.path}"
            raise _out_of_memory(error, doing) or BackendError(
                f"ONNX Runtime cannot load {name!r} of the bundle {bundle.path}: "
                f"{first_line(error)}. Update onnxruntime, or export the bundle again."
            ) from error
        if hasattr(_C, "malloc_trim"):  # glibc keeps what loading took and let go of: 100 MB
            _C.malloc_trim(0)
        # Without this, ONNX Runtime drops to another provider when one fails, unasked.
        session.disable_fallback()
        if session.get_providers()[0] != self._provider:
            raise _NotStartedError(
                f"ONNX Runtime could not start {self._provider} on this machine. Check that "
                "its driver (`nvidia-smi`) and libraries are installed (its own message is above; "
                f"{install('onnxruntime-gpu')}), or choose backend 'onnxruntime-cpu'."
            )
        found = [
            {(v.name, tuple(v.shape), _numpy_type(v.type)) for v in values}
            for values in (session.get_inputs(), session.get_outputs())
        ]
        what = f"The graph of batch {batch} in the bundle {bundle.path}"
        check_signature(what, bundle.manifest.specs(batch), found, "Export the bundle again.")
        return session, blocked

    def _native_session(
        self, graph: bytes, files: Mapping[str, Bytes], threads: int, why: str | None
    ) -> tuple[Any, bool]:
        if why is None:
            block, why = blocked_layout()
            blocked = block_graph(graph, files, block) if block else None
            if blocked is not None:
                try:
                    return self._open_native(blocked, threads, f"blocks of {block} channels"), True
                except Exception as error:
                    if _out_of_memory(error, ""):
                        raise
                    why = f"ONNX Runtime refused the graph in it ({first_line(error)})"
                    log.warning("the blocked layout is not used, since %s", why)
            elif block:
                why = "no FDConv layer of this graph gains by blocks"
        return self._open_native(native_graph(graph, files), threads, f"NCHW, since {why}"), False

    def _open_native(self, graph: NativeGraph, threads: int, layout: str) -> Any:
        loans = graph.lend_constants()
        assert self._library is not None
        with lent(self._library, loans, blocked_only=not graph.has_functions):
            model = graph.model.SerializeToString()
            session = self._open(model, graph.files, threads, [CPU])
        self.operators = f"native operators, since {self._why}; features in {layout}"
        return session

    def _open(
        self, graph: bytes, files: Mapping[str, Bytes], threads: int, providers: list[Any]
    ) -> Any:
        options = self._session_options(threads)
        # Bytes, not paths: ONNX Runtime would map the files, whoever writes to them. It copies
        # what it keeps as the session is made, and the bytes need not outlive that.
        options.add_external_initializers_from_files_in_memory(
            list(files), list(files.values()), [len(data) for data in files.values()]
        )
        return self._ort.InferenceSession(graph, options, providers=providers)

    def _session_options(self, threads: int) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        # A number, since with none ONNX Runtime counts the machine's cores and pins a thread
        # to each, whatever share of them this process has.
        options.intra_op_num_threads = threads
        # Threads spin within a run, by default; those that go on after it take a core from whatever
        # comes next: postprocessing, or another model's run.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # A memory pattern is a second, contiguous arena block as large as a run's peak, and is
        # taken at the second run only. Without it UPerNet-R50 at 512×512 holds 775 MB rather
        # than 1112 at batch 1, and the run after warm-up is like any later one; the time is the
        # same (benchmarks.session --variants).
        options.enable_mem_pattern = False
        if self.device == "cuda":
            # The CUDA provider computes in floats between DequantizeLinear and QuantizeLinear.
            # Optimisations for integers would only give biases a DequantizeLinear that it has no
            # kernel for, and which then stops the GPU for the CPU.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if self._library is not None:
            try:
                options.register_custom_ops_library(str(self._library))
            except Exception as error:
                raise cannot_load(self._library, first_line(error)) from error
        return options


class OnnxRuntimeGraph:
    """One loaded graph. See :class:`Graph`.

    No IO binding: ONNX Runtime reads contiguous numpy inputs where they lie, and binding an
    output to a caller's fresh array instead of copying it there saves less than a millisecond
    of a run (benchmarks.session --binding). ``instead`` makes the session that runs go on in once
    one has failed, other than for memory.
    """

    def __init__(
        self, session: Any, name: str, instead: Callable[[Exception], Any] | None = None
    ) -> None:
        self._session, self._name, self._instead = session, name, instead
        self._changing = threading.Lock()
        self._outputs = [value.name for value in session.get_outputs()]

    def run(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Every output by name. See :class:`Graph`."""
        session = self._session
        try:
            values = session.run(self._outputs, dict(feeds))
        except Exception as error:
            with self._changing:  # of several runs that fail at once, one makes the other session
                if self._session is session:
                    if self._instead is None or _out_of_memory(error, ""):
                        raise _failed(error, self._name) from error
                    self._session, self._instead = self._instead(error), None
            return self.run(feeds)
        return dict(zip(self._outputs, values, strict=True))


class CudaGraph:
    """One loaded graph on a GPU, between buffers that stay where they are. See :class:`Graph`.

    Where the session captures, its first run records a CUDA graph, which every other run replays:
    of thousands of kernels that start one by one, none waits for the CPU. All runs are of one
    thread, since the provider records one graph for each that runs it.
    """

    def __init__(self, ort: Any, session: Any, name: str, specs: Specs) -> None:
        inputs, outputs = specs
        self._session, self._name, self._specs = session, name, inputs
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime-cuda")
        self._binding = session.io_binding()
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        feeds = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in inputs}
        try:
            for key, zeros in feeds.items():
                value = ort.OrtValue.ortvalue_from_numpy(zeros, "cuda", 0)
                self._inputs[key] = value
                self._binding.bind_ortvalue_input(key, value)
            for spec in outputs:
                kind = np.dtype(spec.dtype).type
                value = ort.OrtValue.ortvalue_from_shape_and_type(spec.shape, kind, "cuda", 0)
                self._outputs[spec.name] = value
                self._binding.bind_ortvalue_output(spec.name, value)
        except Exception as error:
            raise _failed(error, name) from error
        # A provider that has started may still lack what its first convolution loads.
        self.run(feeds)

    def run(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Every output by name. See :class:`Graph`."""
        problem = feeds_problem(self._specs, feeds)
        if problem is not None:
            raise BackendError(f"The graph {self._name!r} does not take these inputs: {problem}.")
        return self._thread.submit(self._run, feeds).result()

    def _run(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        try:
            self._copy_in(feeds)
            self._compute()
            return self._copy_out()
        except Exception as error:
            raise _failed(error, self._name) from error

    def phases(self, feeds: Tensors) -> Phases:
        """Seconds of one run by phase, for inputs that `run` takes, by the clock: each waits."""
        return self._thread.submit(self._phases, feeds).result()

    def _phases(self, feeds: Tensors) -> Phases:
        steps = (lambda: self._copy_in(feeds), self._compute, self._copy_out, self._compute)
        times = []
        for step in steps:
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return Phases(*times)

    def _copy_in(self, feeds: Tensors) -> None:
        for name, value in feeds.items():
            self._inputs[name].update_inplace(np.ascontiguousarray(value))

    def _compute(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def _copy_out(self) -> dict[str, npt.NDArray[Any]]:
        return {name: value.numpy() for name, value in self._outputs.items()}


class _NotStartedError(BackendError):
    """A provider is not there at all, however a session is asked for."""


def import_onnxruntime(package: str = "onnxruntime") -> Any:
    """The onnxruntime module; BackendError where it is not installed, or does not load."""
    try:
        import onnxruntime
    except ImportError as error:
        found = "is not installed" if isinstance(error, ModuleNotFoundError) else "does not load"
        raise BackendError(
            f"ONNX Runtime {found} here, and this backend runs on it.",
            f"Install it ({install(package)}).",
        ) from error
    return onnxruntime


def _cuda(*, tf32: bool, captured: bool) -> tuple[str, dict[str, str]]:
    """The CUDA provider and its options, in ONNX Runtime's notation."""
    return CUDA, {
        # The default, EXHAUSTIVE, spends over half a second on every new shape.
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": str(int(tf32)),  # 1 by default
        "enable_cuda_graph": str(int(captured)),
    }


def cuda_problem() -> str | None:
    """Why the CUDA provider is not even listed, as a clause; None when it is.

    It may still fail to start, or to run: the GPU wheel lists it on any machine.
    """
    if CUDA not in import_onnxruntime().get_available_providers():
        return clashing_runtimes() or "the installed onnxruntime has no CUDA provider"
    return None


def first_line(error: Exception) -> str:
    """The first line of an error's text, without ONNX Runtime's mark and the full stop."""
    lines = _MARK.sub("", str(error).strip()).splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(". ")


def _failed(error: Exception, name: str) -> BackendError:
    if re.search(r"cudnn.*(unavailable|dlopen|cannot open)", str(error), re.IGNORECASE | re.DOTALL):
        return BackendError(
            f"ONNX Runtime's CUDA provider found no cuDNN when it came to run {name!r}. Install it "
            f"({install('onnxruntime-gpu')}), or choose backend 'onnxruntime-cpu'."
        )
    return _out_of_memory(error, f"running {name!r}") or BackendError(
        f"ONNX Runtime failed while running {name!r}: {first_line(error)}. If it "
        "fails again, update onnxruntime, or export the bundle again."
    )


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


@lru_cache(maxsize=1)
def blocked_layout() -> tuple[int, str]:
    """The length of ONNX Runtime's blocks of channels on this machine; 0 and why, as a clause.

    The runtime does not tell, and a kernel in blocks of another length would be taken all the
    same: so features are reordered and looked at, and answers in blocks compared with others.
    """
    x = np.random.default_rng(0).standard_normal((1, 32, 5, 5), np.float32)
    try:
        reordered = _run([_reorder("x", "y")], {"x": x})
        block = next((b for b in LENGTHS if np.array_equal(reordered, blocked(x, b))), 0)
        if not block:
            return 0, "its blocks are not of 8 or 16 channels here"
        known = _convolves(x, block)
    except Exception as error:  # other versions' operators may differ in any way
        lines = str(error).splitlines() or [type(error).__name__]
        return 0, f"this ONNX Runtime has no such operators ({lines[0][:120]})"
    return (block, "") if known else (0, "this ONNX Runtime's operators answer otherwise")


def _reorder(x: str, y: str) -> Any:
    return make_node("ReorderInput", [x], [y], RUNTIMES, channels_last=0)


def _convolves(x: Float32, block: int) -> bool:
    """Whether what the blocked graph consists of gives in blocks what it does in NCHW."""
    random = np.random.default_rng(1)
    channels = x.shape[1]
    kernel = random.standard_normal((channels, channels, 3, 3), np.float32)
    bias = random.standard_normal((channels,), np.float32)
    square: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1]}
    linear: dict[str, Any] = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    nodes = [
        _reorder("x", "in"),
        make_node("Conv", ["in", "kernel", "bias", "in"], ["sum"], RUNTIMES, activation="Relu",
                  dilations=[1, 1], group=1, **square),
        make_node("MaxPool", ["sum"], ["most"], RUNTIMES, **square),
        make_node("Upsample", ["most"], ["large"], RUNTIMES, scales=[1, 1, 2, 2], **linear),
        make_node("ReorderOutput", ["large"], ["y"], RUNTIMES, channels=channels, channels_last=0),
    ]  # fmt: skip
    plain = [
        make_node("Conv", ["x", "kernel", "bias"], ["conv"], **square),
        make_node("Add", ["conv", "x"], ["sum"]),
        make_node("Relu", ["sum"], ["positive"]),
        make_node("MaxPool", ["positive"], ["most"], **square),
        make_node("Resize", ["most", "", "scales"], ["y"], **linear),
    ]
    feeds = {"x": x, "kernel": kernel, "bias": bias, "scales": np.array([1, 1, 2, 2], np.float32)}
    expected = _run(plain, feeds)
    found = _run(nodes, {"x": x, "kernel": blocked_kernel(kernel, block), "bias": bias})
    return bool(np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max())


def _run(nodes: list[Any], feeds: dict[str, Float32]) -> Float32:
    """The output "y" of a graph of these nodes."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a refusal is an answer
    options.intra_op_num_threads = 1
    model = make_model(nodes, {name: value.shape for name, value in feeds.items()}, ["y"])
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found: Float32 = session.run(["y"], feeds)[0]
    return found
