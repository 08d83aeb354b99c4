"""One ONNX file to one serialized TensorRT engine: TensorRT build flags, timing cache, progress."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from fdconv_deploy.atomic_write import write_atomically
from fdconv_deploy.errors import BackendError
from fdconv_deploy.export.tensorrt.roi_align import without_roi_align
from fdconv_deploy.runtime.backends.tensorrt import Messages, standard_plugins
from fdconv_deploy.runtime.backends.tensorrt_engines import Hardware

ROI_ALIGN = "ROIAlign_TRT"  # the plugin that TensorRT's parser imports ONNX's operator as


@dataclass(frozen=True)
class BuildOptions:
    """TensorRT build flags.

    hardware: which GPUs the engine shall run on: this model, any of this compute capability, or
    any from Ampere on. version_compatible: later TensorRT of the same major version runs it, too.
    tf32: float32 products may round to ten bits. workspace_mb: most memory a layer may take while
    it runs; TensorRT's own limit if not given. effort: TensorRT's optimization level, 0 to 5.
    """

    hardware: Hardware = "none"
    version_compatible: bool = False
    tf32: bool = False
    workspace_mb: int | None = None
    effort: int | None = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Those by which an engine fits or not, as fields of a `Fingerprint`."""
        names = "hardware", "version_compatible", "tf32"
        return {name: getattr(self, name) for name in names}


def build_plan(
    trt: Any,
    graph: Path,
    options: BuildOptions,
    timing_cache: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> bytes:
    """Parse and build; the engine's bytes.

    Args:
        trt: the module ``tensorrt``, or ``tensorrt_rtx``.
        graph: the ONNX file; its external data lies beside it.
        options: TensorRT's.
        timing_cache: what earlier builds on this machine measured; read, and written again.
        progress: called with a line for each phase of the build.

    Raises:
        BackendError: TensorRT does not take the graph, cannot build it, or runs out of memory.
    """
    messages = Messages()
    logger = messages.logger(trt)
    standard_plugins(trt, logger)
    builder = trt.Builder(logger)
    # Strongly typed: the types are the graph's. TensorRT 11 has no other networks, and no flag.
    names = "STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS"
    kinds = [getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in names]
    network = builder.create_network(sum(1 << int(kind) for kind in kinds if kind is not None))
    parser = trt.OnnxParser(network, logger)
    folder = tempfile.TemporaryDirectory(prefix="fdconv-build-")  # as long as the network is read
    graph = _with_known_operators(trt, graph, Path(folder.name))
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        first = f"{errors[0].desc()} (node {errors[0].node_name()})" if errors else messages.last
        raise BackendError(
            f"TensorRT {trt.__version__} does not take the graph: {first.strip()}. Update "
            "TensorRT, or build with --plugins off; backend 'onnxruntime-cuda' runs this bundle."
        )
    config = builder.create_builder_config()
    _configure(trt, config, options)
    cache = _read_cache(config, timing_cache)
    config.progress_monitor = monitor = _monitor(trt, progress)
    serialized = builder.build_serialized_network(network, config)
    del monitor
    folder.cleanup()
    if serialized is None:
        raise _not_built(trt, messages, options)
    if cache is not None and timing_cache is not None:
        write_atomically(timing_cache, bytes(config.get_timing_cache().serialize()))
    return bytes(serialized)


def _with_known_operators(trt: Any, graph: Path, folder: Path) -> Path:
    """The graph, or one of the same meaning in ``folder`` where TensorRT has no RoiAlign."""
    registry = trt.get_plugin_registry() if hasattr(trt, "get_plugin_registry") else None
    if registry is None or ROI_ALIGN in {creator.name for creator in registry.all_creators}:
        return graph
    try:
        nodes = onnx.load(str(graph), load_external_data=False).graph.node
    except DecodeError:
        return graph  # the parser says what it is
    if not any(node.op_type == "RoiAlign" and not node.domain for node in nodes):
        return graph
    path = folder / "graph.onnx"
    onnx.save(
        without_roi_align(onnx.load(str(graph))), str(path), save_as_external_data=True,
        location="graph.bin", size_threshold=1024,
    )  # fmt: skip
    return path


def _not_built(trt: Any, messages: Messages, options: BuildOptions) -> BackendError:
    if messages.no_memory:
        limit = "" if options.workspace_mb is None else f" (of at most {options.workspace_mb} MB)"
        return BackendError(
            f"memory ran out while TensorRT {trt.__version__} built the engine{limit}: "
            f"{messages.last}. Free GPU memory (see `nvidia-smi`), give --workspace a smaller "
            "number of MB, or build a smaller batch size; backend 'onnxruntime-cuda' or "
            "'onnxruntime-cpu' runs this bundle meanwhile."
        )
    return BackendError(
        f"TensorRT {trt.__version__} could not build the engine: {messages.last}. Try --plugins "
        "off, or update TensorRT; backend 'onnxruntime-cuda' runs this bundle meanwhile."
    )


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    (config.set_flag if options.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware != "none":
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware.upper(), None)
        if level is None:
            raise BackendError(
                f"TensorRT {trt.__version__} knows no compatibility level "
                f"{options.hardware!r}. Update it, or leave --hardware out."
            )
        config.hardware_compatibility_level = level
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if options.effort is not None:
        config.builder_optimization_level = options.effort


def _read_cache(config: Any, path: Path | None) -> Any:
    """The timing cache in use, or None where there is no such thing (TensorRT-RTX)."""
    if path is None:
        return None
    data = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(data)
    if cache is None and data:  # damaged, or another version's: begin anew
        cache = config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _monitor(trt: Any, progress: Callable[[str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined,unused-ignore]
        """Passes phases of the build on; TensorRT calls it from threads of its own."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            if parent_phase is None or num_steps > 1:
                progress(f"{phase_name.lower()}, {num_steps} steps")

        def step_complete(self, phase_name: str, step: int) -> bool:
            of = self.steps.get(phase_name, 0)
            if of >= 20 and step and step % max(1, of // 10) == 0:
                progress(f"{phase_name.lower()}, step {step} of {of}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()
