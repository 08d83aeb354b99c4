"""TensorRT: a bundle's engines, built for this machine's GPU by ``fdconv build``."""

from __future__ import annotations

import ctypes
import importlib
import queue
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.environment import install
from fdconv_deploy.errors import BackendError, FDConvError
from fdconv_deploy.runtime.backends.base import (
    BackendOptions,
    Phases,
    Signature,
    Specs,
    Tensors,
    check_signature,
    feeds_problem,
)
from fdconv_deploy.runtime.backends.tensorrt_engines import (
    EngineRecord,
    Machine,
    find_engine,
    read_engine,
)
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import TensorSpec

# Runs at a time, each with its own stream and buffers; further callers wait.
CONTEXTS = 2
OLDEST = (10, 9)
LEAN = "tensorrt_lean"
_OTHERS = "Backend 'onnxruntime-cpu' runs this bundle now, 'onnxruntime-cuda' where it starts."


class Cuda:
    """The little of the CUDA runtime that TensorRT's buffers need, on the first visible GPU."""

    def __init__(self, runtime: Any = None) -> None:
        if runtime is None:
            try:
                runtime = importlib.import_module("cuda.bindings.runtime")
            except ImportError as error:
                raise BackendError(
                    "TensorRT's buffers need cuda-bindings, which is not installed.",
                    f"Install it ({install('cuda.bindings')}). {_OTHERS}",
                ) from error
        self.rt: Any = runtime
        status, *rest = self.rt.cudaGetDeviceCount()
        if int(status) or not rest or rest[0] < 1:
            raise BackendError(
                f"TensorRT needs an NVIDIA GPU and its driver, and CUDA sees none ({status.name}).",
                f"Check `nvidia-smi`; in a container, start it with --gpus all. {_OTHERS}",
            )

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime; what it returns beside its status."""
        status, *rest = getattr(self.rt, name)(*arguments)
        if int(status):
            if status.name == "cudaErrorMemoryAllocation":
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
        """The driver's version; where only CUDA's is known, e.g. ``CUDA 13.0``."""
        try:
            text = (root / "proc/driver/nvidia/version").read_text()
        except OSError:
            text = ""
        match = re.search(r"\b(\d{3}\.\d+(\.\d+)?)\b", text)
        if match is not None:
            return match[1]
        version = int(self.call("cudaDriverGetVersion"))
        return f"CUDA {version // 1000}.{version % 1000 // 10}"


def import_tensorrt() -> Any:
    """The module ``tensorrt``; BackendError where it is not installed, too old or does not load."""
    try:
        import tensorrt  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        found = "is not installed"
        if not isinstance(error, ModuleNotFoundError):
            found = f"does not load ({str(error).splitlines()[0]})"
        raise BackendError(
            f"TensorRT {found}.",
            f"It needs an NVIDIA GPU ({install('tensorrt', 'cuda.bindings')}). {_OTHERS}",
        ) from error
    version = tuple(int(n) for n in str(tensorrt.__version__).split(".")[:2])
    if version < OLDEST:
        raise BackendError(
            f"TensorRT {tensorrt.__version__} is installed, and 11 is needed (10.9 at the least).",
            f"Update it ({install('tensorrt')}). {_OTHERS}",
        )
    return tensorrt


def import_runtime() -> Any:
    """The module ``tensorrt``, else ``tensorrt_lean``.

    That is a hundredth in size, builds nothing, and runs engines built version-compatible.
    """
    try:
        return import_tensorrt()
    except BackendError:
        try:
            return importlib.import_module(LEAN)
        except ImportError:
            pass
        raise


def standard_plugins(trt: Any, logger: Any) -> None:
    """Register TensorRT's own plugins, such as a detector's RoiAlign, where it has any."""
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(logger, "")


class Messages:
    """What TensorRT said last; made into its logger by `logger`."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=20)

    def logger(self, trt: Any) -> Any:
        """An object of TensorRT's that collects errors here and prints nothing."""
        errors = self.errors
        serious = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

        class Collector(trt.ILogger):  # type: ignore[misc,name-defined,unused-ignore]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in serious:
                    errors.append(message)

        return Collector()

    @property
    def last(self) -> str:
        """The last error, as the end of a sentence."""
        return self.errors[-1].strip().rstrip(".") if self.errors else "it gave no reason"

    @property
    def no_memory(self) -> bool:
        """Whether memory ran out."""
        text = " ".join(self.errors).lower()
        return "out of memory" in text or "outofmemory" in text or "memory allocation" in text


class TensorRTBackend:
    """Runs engines. See :class:`Backend`; needs a GPU, its driver and TensorRT."""

    name = "tensorrt"
    device = "cuda"
    operators = ""
    threads = 1

    def __init__(self, options: BackendOptions, trt: Any = None, cuda: Cuda | None = None) -> None:
        self.trt = import_runtime() if trt is None else trt
        self.cuda = Cuda() if cuda is None else cuda
        self.messages = Messages()
        self._logger = self.messages.logger(self.trt)
        standard_plugins(self.trt, self._logger)
        gpu, capability = self.cuda.device()
        version = str(self.trt.__version__)
        self.machine = Machine(
            gpu=gpu, capability=capability, driver=self.cuda.driver(), tensorrt=version
        )
        self._held: dict[str, tuple[EngineRecord, bytes]] = {}  # by the graph's name
        self.tf32 = options.rounds_to_tf32
        # Of threads and providers nothing applies.

    def load(self, bundle: Bundle, batch: int, threads: int | None = None) -> TensorRTGraph:
        """Load the engine of one batch size. See :class:`Backend`."""
        del threads  # the GPU does the work
        models = bundle.manifest.models
        if models[batch] not in self._held:
            # All at once: an engine loaded later is of the same bundle and needs no file.
            for other in set(models) - {batch}:
                with suppress(FDConvError):  # said when it is asked for
                    self._held[models[other]] = self._read(bundle, other)
            self._held[models[batch]] = self._read(bundle, batch)
        record, plan = self._held.pop(models[batch])
        return self.load_plan(plan, record, bundle.manifest.specs(batch))

    def find(self, bundle: Bundle, batch: int) -> EngineRecord:
        """The engine of a batch size that is to run here. Raises as `find_engine`."""
        lean = self.trt.__name__ == LEAN
        return find_engine(bundle, batch, self.machine, tf32=self.tf32, lean=lean)

    def _read(self, bundle: Bundle, batch: int) -> tuple[EngineRecord, bytes]:
        record = self.find(bundle, batch)
        return record, read_engine(bundle, record)

    def load_plan(self, plan: bytes, record: EngineRecord, specs: Specs) -> TensorRTGraph:
        """An engine from its bytes, which the caller has checked."""
        self.messages.errors.clear()
        runtime = self.trt.Runtime(self._logger)
        if record.fingerprint.version_compatible:
            runtime.engine_host_code_allowed = True  # the lean runtime that it carries
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            if self.messages.no_memory:
                raise BackendError(
                    f"The GPU has no memory left for the engine {record.name}. Free some (see "
                    f"`nvidia-smi`), or use a smaller batch size. {_OTHERS}"
                )
            raise BackendError(
                f"TensorRT {self.machine.tensorrt} does not take the engine {record.name}: "
                f"{self.messages.last}. Build it again: `fdconv build --force`. {_OTHERS}"
            )
        return TensorRTGraph(self, runtime, engine, record, specs)


class TensorRTGraph:
    """One engine and a pool of contexts to run it in. See :class:`Graph`."""

    def __init__(
        self,
        backend: TensorRTBackend,
        runtime: Any,
        engine: Any,
        record: EngineRecord,
        specs: Specs,
    ) -> None:
        self._runtime, self._engine, self.name = runtime, engine, record.name
        self._tf32 = record.fingerprint.tf32
        self._specs = specs
        self._trt, self._cuda, self._messages = backend.trt, backend.cuda, backend.messages
        self._check_signature()
        # Idle contexts, the last used on top; None is one that is not made yet.
        self._idle: queue.LifoQueue[_Run | None] = queue.LifoQueue()
        for _ in range(CONTEXTS - 1):
            self._idle.put(None)
        # The first at once: memory that is missing is missed at loading.
        self._idle.put(self._new_run())

    def inspect(self) -> str:
        """What TensorRT says of the engine's layers, JSON."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def run(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Every output by name. See :class:`Graph`."""
        problem = feeds_problem(self._specs[0], feeds)
        if problem is not None:
            raise BackendError(f"The engine {self.name} does not take these inputs: {problem}.")
        with self._context() as run:
            return run(feeds)

    def phases(self, feeds: Tensors) -> Phases:
        """Seconds of one run by phase, for inputs that `run` takes."""
        with self._context() as run:
            return run.phases(feeds)

    @property
    def manner(self) -> str:
        """How it runs, for a benchmark's report."""
        run = self._idle.get()
        self._idle.put(run)
        graph = "one CUDA graph" if run is not None and run.graph is not None else "no CUDA graph"
        return (
            f"TF32 {'on' if self._tf32 else 'off'}; {graph} a run, on a stream of its own, of "
            f"which {CONTEXTS} at the most; waited for after every run"
        )

    @contextmanager
    def _context(self) -> Iterator[_Run]:
        run = self._idle.get()
        try:
            run = run or self._new_run()
            yield run
        except BaseException:
            self._idle.put(None)  # its stream may be in any state
            raise
        self._idle.put(run)

    def _new_run(self) -> _Run:
        self._messages.errors.clear()
        context = self._engine.create_execution_context()
        if context is None:
            raise BackendError(
                f"TensorRT made no execution context for the engine {self.name}"
                + (": the GPU has no memory left" if self._messages.no_memory else "")
                + f" ({self._messages.last}). Free memory (see `nvidia-smi`), or use a smaller "
                f"batch size. {_OTHERS}"
            )
        return _Run(self._cuda, context, self.name, self._specs)

    def _check_signature(self) -> None:
        engine, mode = self._engine, self._trt.TensorIOMode
        found: dict[bool, set[Signature]] = {True: set(), False: set()}
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            dtype = np.dtype(self._trt.nptype(engine.get_tensor_dtype(name))).name
            signature = name, tuple(engine.get_tensor_shape(name)), dtype
            found[engine.get_tensor_mode(name) == mode.INPUT].add(signature)
        advice = "Build it again: `fdconv build --force`."
        check_signature(f"The engine {self.name}", self._specs, (found[True], found[False]), advice)


class _Run:
    """One context with its stream and buffers; a CUDA graph of copies and engine together.

    Called by one thread at a time. Host buffers are page-locked: copies from and to them need
    no further copy, and can be part of a graph.
    """

    def __init__(self, cuda: Cuda, context: Any, name: str, specs: Specs) -> None:
        self._cuda, self._context, self._name = cuda, context, name
        self._inputs, self._outputs = ([spec.name for spec in each] for each in specs)
        self._host: dict[str, npt.NDArray[Any]] = {}
        self._device: dict[str, int] = {}
        self.graph: Any = None  # a run's, where it is captured
        self._engine_graph: Any = None  # without copies, for `phases`
        self._events: list[Any] = []
        self._cleanup = ExitStack()  # whatever fails in that is past helping
        try:
            self._stream = cuda.call("cudaStreamCreateWithFlags", cuda.rt.cudaStreamNonBlocking)
            self._cleanup.callback(cuda.rt.cudaStreamDestroy, self._stream)
            for spec in chain(*specs):
                self._allocate(spec)
            self._warm_up()
        except BaseException:
            self.close()
            raise

    def _allocate(self, spec: TensorSpec) -> None:
        dtype = np.dtype(spec.dtype)
        count = int(np.prod(spec.shape, dtype=np.int64))
        size = max(1, count * dtype.itemsize)
        pinned = int(self._cuda.call("cudaHostAlloc", size, self._cuda.rt.cudaHostAllocDefault))
        self._cleanup.callback(self._cuda.rt.cudaFreeHost, pinned)
        memory: Any = (ctypes.c_byte * size).from_address(pinned)
        self._host[spec.name] = np.frombuffer(memory, dtype, count).reshape(spec.shape)
        self._device[spec.name] = int(self._cuda.call("cudaMalloc", size))
        self._cleanup.callback(self._cuda.rt.cudaFree, self._device[spec.name])
        self._context.set_tensor_address(spec.name, self._device[spec.name])

    def _fill(self, feeds: Tensors) -> None:
        for name in self._inputs:
            np.copyto(self._host[name], feeds[name])

    def _work(self) -> None:
        """Copy inputs, run, copy outputs: put on the stream."""
        self._copy_inputs()
        self._execute()
        self._copy_outputs()

    def _execute(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise BackendError(
                f"TensorRT failed to run the engine {self._name}. Build it again: `fdconv build "
                f"--force`. {_OTHERS}"
            )

    def _copy_inputs(self) -> None:
        for name in self._inputs:
            self._copy(self._device[name], self._host[name].ctypes.data, name, "HostToDevice")

    def _copy_outputs(self) -> None:
        for name in self._outputs:
            self._copy(self._host[name].ctypes.data, self._device[name], name, "DeviceToHost")

    def _copy(self, to: int, source: int, name: str, way: str) -> None:
        kind = getattr(self._cuda.rt.cudaMemcpyKind, f"cudaMemcpy{way}")
        size = self._host[name].nbytes
        self._cuda.call("cudaMemcpyAsync", to, source, size, kind, self._stream)

    def _launch(self, graph: Any, work: Callable[[], None]) -> None:
        """Put a CUDA graph on the stream, or what it would hold where there is none."""
        if graph is None:
            work()
        else:
            self._cuda.call("cudaGraphLaunch", graph, self._stream)

    def _wait(self) -> None:
        self._cuda.call("cudaStreamSynchronize", self._stream)

    def _warm_up(self) -> None:
        """Run once, as TensorRT asks for before a capture, then record a CUDA graph."""
        for name in self._inputs:
            self._host[name].fill(0)
        self._work()
        self._wait()
        self.graph = self._captured(self._work)

    def _captured(self, work: Callable[[], None]) -> Any:
        """A CUDA graph of what ``work`` puts on the stream; None where it cannot be captured."""
        rt = self._cuda.rt
        mode = rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            self._cuda.call("cudaStreamBeginCapture", self._stream, mode)
            try:
                work()
            finally:
                graph = self._cuda.call("cudaStreamEndCapture", self._stream)
            made = self._cuda.call("cudaGraphInstantiate", graph, 0)
            self._cleanup.callback(rt.cudaGraphExecDestroy, made)
            self._cuda.call("cudaGraphDestroy", graph)
        except BackendError:
            # Some engines cannot be captured (a shape that is read on the host, say).
            return None
        return made

    def phases(self, feeds: Tensors) -> Phases:
        """Run with an event between copies and engine, then the engine again by the clock."""
        call = self._cuda.call
        if not self._events:
            if self.graph is not None:
                self._engine_graph = self._captured(self._execute)
            for _ in range(4):
                self._events.append(call("cudaEventCreate"))
                self._cleanup.callback(self._cuda.rt.cudaEventDestroy, self._events[-1])
        self._fill(feeds)

        def run_engine() -> None:
            self._launch(self._engine_graph, self._execute)

        call("cudaEventRecord", self._events[0], self._stream)
        steps = (self._copy_inputs, run_engine, self._copy_outputs)
        for step, event in zip(steps, self._events[1:], strict=True):
            step()
            call("cudaEventRecord", event, self._stream)
        self._wait()
        spans = (call("cudaEventElapsedTime", *pair) / 1e3 for pair in pairwise(self._events))
        h2d, compute, d2h = spans
        start = time.perf_counter()
        run_engine()
        self._wait()
        return Phases(h2d, compute, d2h, time.perf_counter() - start)

    def __call__(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        self._fill(feeds)
        self._launch(self.graph, self._work)
        self._wait()
        return {name: self._host[name].copy() for name in self._outputs}

    def close(self) -> None:
        """Free everything."""
        self.graph = self._engine_graph = None
        self._host.clear()
        self._cleanup.close()

    def __del__(self) -> None:
        if hasattr(self, "_cleanup"):
            self.close()
