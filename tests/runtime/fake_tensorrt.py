"""TensorRT and the CUDA runtime, played by ONNX Runtime and numpy.

A fake engine is the ONNX file it was built from; "device" memory is host memory. What matters
stays as it is on a GPU: nothing runs before its stream is synchronised, a captured graph replays
what was put on the stream during capture, addresses are checked, every allocation is counted.
"""

from __future__ import annotations

import ctypes
import enum
import json
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

FLOAT, HALF, INT32 = "FLOAT", "HALF", "INT32"
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}

_FOLDERS: list[Any] = []  # of engines; removed when the process ends


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class FakeCuda(ModuleType):
    """The module ``cuda.bindings.runtime``."""

    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0
    cudaMemcpyKind = enum.Enum("Kind", ["cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"])
    cudaStreamCaptureMode = enum.Enum("Mode", ["cudaStreamCaptureModeThreadLocal"])

    def __init__(
        self,
        gpu: str = "NVIDIA H200",
        capability: tuple[int, int] = (9, 0),
        devices: int = 1,
        memory: int = 1 << 40,
        capture: bool = True,
    ) -> None:
        super().__init__("cuda.bindings.runtime")
        self.gpu, self.capability, self.devices = gpu, capability, devices
        self.memory, self.capture = memory, capture
        self.buffers: dict[int, Any] = {}
        self.streams: dict[int, dict[str, Any]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.launches = 0
        self.events: dict[int, float | None] = {}
        self.now = 0.0  # milliseconds
        self._next, self._lock = 1, threading.Lock()

    def _number(self) -> int:
        with self._lock:
            self._next += 1
            return self._next

    def cudaGetDeviceCount(self):
        if self.devices == 0:
            return (Status.cudaErrorNoDevice, 0)
        return Status.cudaSuccess, self.devices

    def cudaGetDeviceProperties(self, device):
        major, minor = self.capability
        name = self.gpu.encode() + b"\0" * 8
        return Status.cudaSuccess, SimpleNamespace(name=name, major=major, minor=minor)

    def cudaDriverGetVersion(self):
        return Status.cudaSuccess, 13000

    def _allocate(self, size):
        if size > self.memory:
            return Status.cudaErrorMemoryAllocation, 0
        buffer = (ctypes.c_byte * size)()
        address = ctypes.addressof(buffer)
        self.buffers[address] = buffer
        return Status.cudaSuccess, address

    def cudaHostAlloc(self, size, flags):
        return self._allocate(size)

    def cudaMalloc(self, size):
        return self._allocate(size)

    def cudaFree(self, address):
        del self.buffers[address]
        return (Status.cudaSuccess,)

    cudaFreeHost = cudaFree

    def cudaStreamCreateWithFlags(self, flags):
        number = self._number()
        self.streams[number] = {"queue": [], "capturing": None}
        return Status.cudaSuccess, number

    def cudaStreamDestroy(self, stream):
        del self.streams[stream]
        return (Status.cudaSuccess,)

    def put(self, stream: int, work: Callable[[], None]) -> None:
        state = self.streams[stream]
        target = state["queue"] if state["capturing"] is None else state["capturing"]
        target.append(work)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        for address in (to, source):
            assert address in self.buffers, "copies are between whole allocations"
            assert size <= len(self.buffers[address])

        def copy() -> None:
            ctypes.memmove(to, source, size)
            self.now += {"cudaMemcpyHostToDevice": 1.0, "cudaMemcpyDeviceToHost": 2.0}[kind.name]

        self.put(stream, copy)
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        state = self.streams[stream]
        assert state["capturing"] is None, "a stream that captures cannot be waited for"
        for work in state["queue"]:
            work()
        state["queue"].clear()
        return (Status.cudaSuccess,)

    # Events, by a clock that the copies and engines on a stream move.

    def cudaEventCreate(self):
        number = self._number()
        self.events[number] = None
        return Status.cudaSuccess, number

    def cudaEventRecord(self, event, stream):
        self.put(stream, lambda: self.events.__setitem__(event, self.now))
        return (Status.cudaSuccess,)

    def cudaEventElapsedTime(self, start, end):
        return Status.cudaSuccess, self.events[end] - self.events[start]

    def cudaEventDestroy(self, event):
        del self.events[event]
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.streams[stream]["capturing"] = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        recorded, self.streams[stream]["capturing"] = self.streams[stream]["capturing"], None
        if not self.capture:
            return Status.cudaErrorStreamCaptureUnsupported, None
        number = self._number()
        self.graphs[number] = recorded
        return Status.cudaSuccess, number

    def cudaGraphInstantiate(self, graph, flags):
        number = self._number()
        self.graphs[number] = self.graphs[graph]
        return Status.cudaSuccess, number

    def cudaGraphDestroy(self, graph):
        del self.graphs[graph]
        return (Status.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph, stream):
        self.launches += 1
        for work in self.graphs[graph]:
            self.put(stream, work)
        return (Status.cudaSuccess,)


class FakeTensorRT(ModuleType):
    """The module ``tensorrt``; ``error``: what building fails with; ``noise``: engines' error."""

    def __init__(self, cuda: FakeCuda, version: str = "11.4.0.106") -> None:
        super().__init__("fake_tensorrt")
        self.__version__ = version
        self.cuda = cuda
        self.error: str | None = None
        self.parse_error: str | None = None
        self.noise = 0.0
        self.flags: set[str] = set()
        self.built: list[str] = []
        self.caches: list[bytes] = []
        self.contexts = 0
        self.plugins: set[str] = set()  # there are none until they are asked for
        self.available = {"ROIAlign_TRT"}
        self._add_types()

    def init_libnvinfer_plugins(self, logger: Any, namespace: str) -> bool:
        assert namespace == ""
        self.plugins |= self.available
        return True

    def get_plugin_registry(self) -> Any:
        return SimpleNamespace(all_creators=[SimpleNamespace(name=n) for n in self.plugins])

    def _add_types(self) -> None:
        self.float32, self.float16, self.int32 = FLOAT, HALF, INT32
        severity = enum.IntEnum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)
        self.ILogger = type("ILogger", (), {"Severity": severity, "__init__": lambda s: None})
        self.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda s: None})
        names = "STRONGLY_TYPED PREFER_AOT_PYTHON_PLUGINS"
        self.NetworkDefinitionCreationFlag = enum.IntEnum("Flag", names, start=0)
        self.BuilderFlag = enum.Enum("BuilderFlag", "TF32 VERSION_COMPATIBLE")
        self.ProfilingVerbosity = enum.Enum("Verbosity", "DETAILED")
        levels = "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY"
        self.HardwareCompatibilityLevel = enum.Enum("Level", levels)
        self.MemoryPoolType = enum.Enum("Pool", "WORKSPACE")
        self.TensorIOMode = enum.Enum("Mode", "INPUT OUTPUT")
        self.LayerInformationFormat = enum.Enum("Format", "JSON ONELINE")
        self.Builder = lambda logger: _Builder(self, logger)
        self.OnnxParser = lambda network, logger: _Parser(self, network)
        self.Runtime = lambda logger: _Runtime(self, logger)
        self.nptype = lambda kind: kind


class _Builder:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def create_network(self, flags: int) -> Any:
        assert flags == 0b11, "strongly typed, ahead-of-time plugins first"
        return SimpleNamespace(path=None)

    def create_builder_config(self) -> Any:
        return _Config(self.trt)

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        trt = self.trt
        trt.flags = {flag.name for flag in config.flags}
        trt.config = config
        monitor = config.progress_monitor
        monitor.phase_start("Building Engine", None, 40)
        for step in range(40):
            assert monitor.step_complete("Building Engine", step)
        monitor.phase_finish("Building Engine")
        if trt.error is not None:
            self.logger.log(trt.ILogger.Severity.INFO, "this is no error")
            self.logger.log(trt.ILogger.Severity.ERROR, trt.error)
            return None
        trt.built.append(network.path)
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="fake-engine-"))
        folder = _FOLDERS[-1].name
        for file in Path(network.path).parent.iterdir():
            if file.suffix in (".onnx", ".bin"):
                shutil.copy(file, folder)
        name = Path(network.path).name
        return json.dumps({"path": f"{folder}/{name}", "version": trt.__version__}).encode()


class _Config:
    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt
        self.flags = {trt.BuilderFlag.TF32}  # as TensorRT has it
        self.cache: Any = None

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def create_timing_cache(self, data: bytes) -> Any:
        if data and not data.startswith(b"timing"):
            return None
        self.trt.caches.append(data)
        return SimpleNamespace(serialize=lambda: data + b"timing")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> None:
        self.cache = cache

    def get_timing_cache(self) -> Any:
        return self.cache

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.workspace = size


class _Parser:
    def __init__(self, trt: FakeTensorRT, network: Any) -> None:
        self.trt, self.network = trt, network

    def parse_from_file(self, path: str) -> bool:
        self.network.path = path
        return self.trt.parse_error is None

    @property
    def num_errors(self) -> int:
        return 0 if self.trt.parse_error is None else 1

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(desc=lambda: self.trt.parse_error, node_name=lambda: "conv1")


class _Runtime:
    engine_host_code_allowed = False

    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        told = json.loads(plan)
        if told["version"] != self.trt.__version__ and not self.engine_host_code_allowed:
            self.logger.log(
                self.trt.ILogger.Severity.ERROR, f"the engine is of version {told['version']}"
            )
            return None
        return _Engine(self.trt, told["path"])


class _Engine:
    def __init__(self, trt: FakeTensorRT, path: str) -> None:
        self.trt = trt
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {v.name: v for v in self.session.get_inputs()}
        self.outputs = {v.name: v for v in self.session.get_outputs()}
        self.all = self.inputs | self.outputs
        self.num_io_tensors = len(self.all)

    def get_tensor_name(self, index: int) -> str:
        return list(self.all)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> Any:
        return tuple(self.all[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        return _TYPES[self.all[name].type]

    def create_execution_context(self) -> Any:
        self.trt.contexts += 1
        return _Context(self)

    def create_engine_inspector(self) -> Any:
        text = json.dumps({"Layers": list(self.all)})
        return SimpleNamespace(get_engine_information=lambda kind: text)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine, self.addresses = engine, {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert set(self.addresses) == set(self.engine.all)
        self.engine.trt.cuda.put(stream, self._run)
        return True

    def _array(self, name: str) -> Any:
        engine = self.engine
        shape, kind = engine.get_tensor_shape(name), engine.get_tensor_dtype(name)
        buffer = engine.trt.cuda.buffers[self.addresses[name]]
        return np.frombuffer(buffer, kind, int(np.prod(shape))).reshape(shape)

    def _run(self) -> None:
        engine = self.engine
        engine.trt.cuda.now += 5.0
        feeds = {name: self._array(name) for name in engine.inputs}
        values = engine.session.run(list(engine.outputs), feeds)
        for name, value in zip(engine.outputs, values, strict=True):
            self._array(name)[...] = value + engine.trt.noise * np.abs(value).max()
