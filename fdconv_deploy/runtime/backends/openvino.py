"""OpenVINO on the CPU: float32, or bfloat16 where that is asked for by name.

OpenVINO takes no model-local functions, so that a bundle's graph is inlined when it is loaded; or
the ``fdconv`` nodes stay, and an extension of ours runs them (`fdconv_deploy.ops.native`).
"""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.environment import install, installed_version
from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.ops.native import SWITCH, native_library
from fdconv_deploy.runtime.backends.base import (
    BackendOptions,
    Signature,
    Tensors,
    check_signature,
    differences,
)
from fdconv_deploy.runtime.backends.threads import available_cores
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import TensorSpec
from fdconv_deploy.runtime.native_layers import BANDS, native_graph

# Backend -> OpenVINO's INFERENCE_PRECISION_HINT. Left alone, the plugin takes bfloat16 wherever the
# processor has it.
PRECISIONS = {"openvino": "f32", "openvino-bf16": "bf16"}
log = logging.getLogger("fdconv.openvino")


class OpenVINOBackend:
    """Runs graphs in OpenVINO's CPU plugin; ``name`` is a key of ``PRECISIONS``."""

    device = "cpu"

    def __init__(self, name: str, options: BackendOptions) -> None:
        self.name, self._precision = name, PRECISIONS[name]
        try:
            import onnx.inliner

            openvino = import_openvino()
        except ModuleNotFoundError as error:
            missing = (error.name or "openvino").partition(".")[0]
            raise BackendError(
                f"{missing} is not installed here, and this backend runs on it.",
                f"Install it ({install(missing, extra='openvino')}), or choose 'onnxruntime-cpu'.",
            ) from error
        except Exception as error:  # of a library that is missing, or a protobuf that is too old
            raise BackendError(
                f"openvino or onnx, which this backend needs, does not load ({last_line(error)}).",
                f"Install them again ({install('openvino', 'onnx', extra='openvino')}), or choose "
                "'onnxruntime-cpu'.",
            ) from error
        if options.providers is not None:
            raise BackendError("Execution providers are ONNX Runtime's; OpenVINO takes none.")
        self._inliner, self._onnx, self._core = onnx.inliner, onnx, openvino.Core()
        self._core.set_property({"ENABLE_MMAP": False})  # the files it reads are soon deleted
        if self._precision == "bf16" and "BF16" not in self._core.get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            raise BackendError(
                "This processor has no bfloat16 instructions.", "Choose backend 'openvino'."
            )
        self.threads = options.threads or available_cores()
        library, why = native_library(options.native, openvino=installed_version("openvino"))
        self._native, self._wanted = library is not None, options.native
        self._set_operators(why)
        if library is not None:
            try:
                self._core.add_extension(str(library))
            except RuntimeError as error:
                raise BackendError(
                    f"OpenVINO cannot load the native operators {library}: {last_line(error)}. "
                    f"Build them again with python -m fdconv_deploy.ops.native, or do without: "
                    f"{SWITCH}=0."
                ) from error
        self._error: str | None = None

    def load(self, bundle: Bundle, batch: int, threads: int | None = None) -> OpenVINOGraph:
        """Load the graph of one batch size. See :class:`Backend`."""
        name, manifest = bundle.manifest.models[batch], bundle.manifest
        if self._native and (problem := manifest.older_nodes):
            self._native = native_library(self._wanted, problem)[0] is not None
            self._set_operators(problem)
        bundle.hold()
        content, external = bytes(bundle.content(name)), bundle.external_data(name)
        if self._native:
            content = native_graph(content, external).model.SerializeToString()
        graph = self._onnx.load_model_from_string(content)
        _warn_of_signed_activations(graph, name)
        ours = [
            (DOMAIN, function.name)
            for function in graph.functions
            if self._native and not function.name.startswith(BANDS)
        ]
        graph = self._inliner.inline_selected_functions(graph, ours, exclude=True)
        del graph.functions[:]  # those that the extension's operators stand for
        # OpenVINO takes external data from files only, which it reads as it compiles: from files
        # of its own, that hold what was hashed.
        with tempfile.TemporaryDirectory(prefix="fdconv-openvino-") as folder:
            for called, data in external.items():
                target = Path(folder, called)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            path = Path(folder, Path(name).name)
            path.write_bytes(graph.SerializeToString())
            try:
                model = self._core.read_model(path)
                _check_resizes(model, name)
                compiled = self._compile(model, self._precision, threads or self.threads)
                exact = None
                if self._precision != "f32" and self._error is None:
                    exact = self._compile(model, "f32", self.threads)
            except RuntimeError as error:
                raise BackendError(
                    f"OpenVINO cannot load {name!r} of the bundle {bundle.path}: "
                    f"{last_line(error)}. Choose backend 'onnxruntime-cpu'."
                ) from error
        specs = manifest.specs(batch)
        found = _signature(compiled.inputs, specs[0]), _signature(compiled.outputs, specs[1])
        what = f"The graph of batch {batch} in the bundle {bundle.path}"
        check_signature(what, specs, found, "Export the bundle again.")
        outputs = [_name(port, specs[1]) for port in compiled.outputs]
        loaded = OpenVINOGraph(compiled, name, outputs)
        if exact is not None:
            self._error = _difference(bundle, batch, loaded, OpenVINOGraph(exact, name, outputs))
            self.operators += f"; {self._error}"
            log.warning("%s of the bundle %s: %s", name, bundle.path, self._error)
        return loaded

    def _set_operators(self, why: str) -> None:
        kind = "native operators" if self._native else "portable operators, inlined"
        self.operators = f"{kind}, since {why}"

    def _compile(self, model: Any, precision: str, threads: int) -> Any:
        # Fewer threads than all: several runs at a time, which share them.
        streams = max(1, self.threads // threads)
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads * streams,
            "NUM_STREAMS": streams,
            # Otherwise each stream's threads are bound to cores, whoever else runs there.
            "ENABLE_CPU_PINNING": False,
        }
        return self._core.compile_model(model, "CPU", settings)


class OpenVINOGraph:
    """One loaded graph. See :class:`Graph`."""

    def __init__(self, compiled: Any, name: str, outputs: list[str]) -> None:
        self._compiled = compiled
        self._name = name
        self._outputs = outputs
        self._idle: list[Any] = []  # a request serves one run at a time

    def run(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Every output by name. See :class:`Graph`."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            # Inputs are read where they lie; outputs are copied, as they are the caller's own.
            found = request.infer(dict(feeds), share_inputs=True, share_outputs=False)
        except RuntimeError as error:
            raise BackendError(
                f"OpenVINO failed while running {self._name!r}: {last_line(error)}. Choose backend "
                "'onnxruntime-cpu'."
            ) from error
        self._idle.append(request)
        return {name: found[number] for number, name in enumerate(self._outputs)}


def import_openvino() -> Any:
    """The openvino module, kept from telling Google Analytics that it was imported.

    It does where the package openvino_telemetry, which it requires, is found; whoever has imported
    it before has decided for himself.
    """
    telemetry = "openvino_telemetry"
    hides = not {"openvino", telemetry} & set(sys.modules)
    if hides:
        sys.modules[telemetry] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    finally:
        if hides:
            del sys.modules[telemetry]


def last_line(error: Exception) -> str:
    """What an error of OpenVINO's says, without the places in its source that it came by."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(". ")


def _name(port: Any, specs: Sequence[TensorSpec]) -> str:
    """What the manifest calls a port, which has the names of all that is equal to it."""
    names = port.get_names()
    found: str = next((spec.name for spec in specs if spec.name in names), port.get_any_name())
    return found


def _signature(ports: Any, specs: Sequence[TensorSpec]) -> set[Signature]:
    """Of a compiled graph; a length that OpenVINO finds at run time only is what it should be."""
    shapes = {spec.name: spec.shape for spec in specs}
    found = set()
    for port in ports:
        name, shape = _name(port, specs), port.get_partial_shape()
        lengths = [None if length.is_dynamic else length.get_length() for length in shape]
        said = shapes.get(name, ())
        if len(said) == len(lengths):
            lengths = [s if n is None else n for n, s in zip(lengths, said, strict=True)]
        found.add((name, tuple(lengths), np.dtype(port.get_element_type().to_dtype()).name))
    return found


def _difference(bundle: Bundle, batch: int, graph: OpenVINOGraph, exact: OpenVINOGraph) -> str:
    """What the precision costs on packaged pictures, as a clause."""
    # Here: the pictures are read by the package that this module is of.
    from fdconv_deploy.sample_images import manifest_feeds

    feeds = manifest_feeds(bundle.manifest, batch)
    found = differences(graph.run(feeds), exact.run(feeds))
    parts = [f"{name} {error:.1e}" for name, error in found.items()]
    return (
        "bfloat16 differs from float32 on a packaged picture by, of the largest value, "
        + ", ".join(parts)
    )


def _check_resizes(model: Any, name: str) -> None:
    """Refuse a Resize that OpenVINO 2026.4.1 computes otherwise than ONNX defines it.

    Its CPU plugin takes no notice of ``antialias``, nor of a scale under which a length stays as it
    was (8 by 1.09) while another changes.
    """
    for node in model.get_ops():
        if node.get_type_name() != "Interpolate":
            continue
        constants = [port.get_node() for port in node.input_values()[1:]]
        known = all(constant.get_type_name() == "Constant" for constant in constants)
        if not known or not node.get_output_partial_shape(0).is_static:
            continue
        scales, *axes = [constant.get_data() for constant in constants]
        how, before, after = (
            node.get_attributes(),
            node.get_input_shape(0),
            node.get_output_shape(0),
        )
        # With corners aligned, and sizes given, positions are told by the lengths alone.
        by_scale = how["shape_calculation_mode"] == "scales" and (
            how["coordinate_transformation_mode"] != "align_corners"
        )
        ignored = "antialias" if how["antialias"] else ""
        for axis, scale in zip(axes[0] if axes else range(len(before)), scales, strict=True):
            if by_scale and scale != 1 and before[axis] == after[axis] > 1:
                ignored = "the scale of a length that stays equal"
        if ignored and before != after:
            raise BackendError(
                f"OpenVINO 2026.4.1 ignores {ignored} in {name!r} (Resize "
                f"{node.get_friendly_name()!r}), and its answers would be wrong.",
                "Choose backend 'onnxruntime-cpu'.",
            )


def _warn_of_signed_activations(graph: Any, name: str) -> None:
    """OpenVINO 2026.4.1 rounds signed 8-bit activations behind a Concat to whole numbers."""
    signed = {i.name for i in graph.graph.initializer if i.data_type == 3}  # TensorProto.INT8
    if any(
        node.op_type == "QuantizeLinear" and len(node.input) > 2 and node.input[2] in signed
        for node in graph.graph.node
    ):
        log.warning(
            "%s has signed 8-bit activations, which OpenVINO 2026.4.1 rounds to whole numbers "
            "behind a Concat: compare its answers (fdconv evaluate --against) before you use them",
            name,
        )
