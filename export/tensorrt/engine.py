"""TensorRT engines for a bundle, on the machine that will run them.

Each is built, run, compared with ONNX Runtime and only then kept, in the bundle's folder
``engines`` (`fdconv_deploy.runtime.backends.tensorrt_engines`). Where Triton and a recent TensorRT
are there, FDConv layers run in this package's kernels, which go into the engine as code.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any, Literal

import onnx

from fdconv_deploy.errors import BackendError, ExportError
from fdconv_deploy.export.tensorrt.builder import BuildOptions, build_plan
from fdconv_deploy.export.tensorrt.plugin_pass import ask_for_plugins
from fdconv_deploy.export.validation.comparison import Comparison, perturbed
from fdconv_deploy.export.validation.tolerance import engine_tolerance
from fdconv_deploy.ops.compile_kernels import oldest_ptx, precompile, target_for
from fdconv_deploy.ops.tensorrt_plugins import plugin_module, register_plugins, set_target
from fdconv_deploy.runtime.backends import BackendOptions
from fdconv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from fdconv_deploy.runtime.backends.tensorrt import Cuda, TensorRTBackend, import_tensorrt
from fdconv_deploy.runtime.backends.tensorrt_engines import (
    FOLDER,
    EngineRecord,
    Fingerprint,
    engine_name,
    engines_folder,
    find_engine,
    graph_hash,
    keep_engine,
)
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import FileInfo, OutputParity
from fdconv_deploy.sample_images import sample_feeds

Progress = Callable[[str], None]
PluginChoice = Literal["auto", "on", "off"]
OLDEST_CAPABILITY = 75


@dataclass(frozen=True)
class BuiltEngine:
    """What came of one batch size. new: False where a fitting engine was there already."""

    record: EngineRecord
    new: bool
    reason: str


def build_engines(
    bundle: Bundle,
    *,
    batches: Sequence[int] | None = None,
    plugins: PluginChoice = "auto",
    options: BuildOptions | None = None,
    tolerance: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> list[BuiltEngine]:
    """Build the engines of a bundle that this machine lacks.

    Args:
        batches: all of the bundle's if not given.
        plugins: whether FDConv layers run in this package's kernels; ``auto``: where they can,
            else a progress line gives the reason.
        options: compatibility levels, memory, TF32.
        tolerance: the largest error kept, relative to the largest value, against ONNX Runtime on
            the CPU; in int8 the largest share of positions of another class.
        force: build also where a fitting engine is there.
        progress: called with a line for each step.

    Raises:
        BackendError: no GPU or TensorRT, or TensorRT cannot build, with what would work now.
        ExportError: an engine differs from ONNX Runtime; nothing of it is kept.
        BundleError: the bundle cannot hold engines.
    """
    say = progress or (lambda _: None)
    options = options or BuildOptions()
    trt = import_tensorrt()
    backend = TensorRTBackend(BackendOptions(), trt, Cuda())
    machine = backend.machine
    if machine.capability < OLDEST_CAPABILITY:
        raise BackendError(
            f"{machine.gpu} is of compute capability {machine.capability / 10:.1f}, and TensorRT "
            f"{machine.tensorrt} needs 7.5 (Turing) or later. Backend 'onnxruntime-cpu' runs this "
            "bundle here."
        )
    chosen = list(bundle.batch_sizes) if batches is None else sorted(set(batches))
    unknown = [b for b in chosen if b not in bundle.batch_sizes]
    if unknown:
        raise ExportError(
            f"the bundle has graphs of batch {', '.join(map(str, bundle.batch_sizes))}, not of "
            f"{', '.join(map(str, unknown))}. Export it with --batch {unknown[0]}."
        )
    _refuse_unsigned(bundle)
    trtp, why_not = _plugin_layer(trt, plugins, bundle)
    if why_not is not None:
        say(f"note: FDConv layers run in TensorRT's own operators, since {why_not}")
    results = []
    views = [bundle.at(size) for size in bundle.manifest.sizes] or [bundle]
    for view, batch in product(views, chosen):
        reason = "it was asked for"
        if not force:
            try:
                record = find_engine(view, batch, machine, tf32=options.tf32)
            except BackendError as error:
                reason = str(error)
            else:
                mark = {"plugins": trtp is not None, **options.fingerprint}
                if all(getattr(record.fingerprint, name) == mark[name] for name in mark):
                    results.append(BuiltEngine(record, False, "it fits this machine"))
                    say(f"batch {batch}: {record.name} fits this machine")
                    continue
                reason = f"{record.name} was built with other options"
        record = _build_one(view, batch, backend, trtp, options, tolerance, say)
        results.append(BuiltEngine(record, True, reason))
    return results


def _refuse_unsigned(bundle: Bundle) -> None:
    """Raise for a bundle in int8 whose activations are unsigned: TensorRT's parser has no uint8."""
    how = bundle.manifest.graph.get("precision", {})
    if bundle.manifest.precision == "int8" and how.get("activations") != "signed":
        known = bundle.manifest.checkpoint
        checkpoint = "CHECKPOINT" if known is None else known.name
        raise BackendError(
            "the bundle's int8 activations are unsigned, as ONNX Runtime computes fastest, and "
            "TensorRT takes signed ones only. Export it again for TensorRT: fdconv export "
            f"{checkpoint} -o BUNDLE --precision int8 --activations signed --calibrate PICTURES. "
            "Backend 'onnxruntime-cuda' runs this bundle as it is."
        )


def _plugin_layer(trt: Any, choice: PluginChoice, bundle: Bundle) -> tuple[Any, str | None]:
    """TensorRT's plugin module, or None and why the bundle's layers are not built with it."""
    if choice == "off":
        return None, "--plugins is off"
    trtp, problem = plugin_module(trt)
    problem = problem or bundle.manifest.older_nodes
    if problem is None:
        return trtp, None
    if choice == "on":
        raise BackendError(f"the plugins cannot be built: {problem}. Or say --plugins off.")
    return None, problem


def _build_one(
    bundle: Bundle,
    batch: int,
    backend: TensorRTBackend,
    trtp: Any,
    options: BuildOptions,
    tolerance: float | None,
    say: Progress,
) -> EngineRecord:
    started = time.perf_counter()
    trt, machine = backend.trt, backend.machine
    folder, name = engines_folder(bundle), engine_name(bundle, batch, machine)
    fingerprint = Fingerprint(
        machine=machine, graph=graph_hash(bundle, batch), plugins=trtp is not None,
        **options.fingerprint,
    )  # fmt: skip
    kernels: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="fdconv-build-") as scratch:
        graph = bundle.copy_to(Path(scratch) / "bundle").model_path(batch)
        if trtp is not None:
            say(f"batch {batch}: asking for plugins")
            # Code for the oldest GPU the engine shall run on is translated for any later one.
            aimed = 80 if options.hardware == "ampere_plus" else target_for(machine.capability)
            if options.hardware != "ampere_plus" and aimed != machine.capability:
                say(
                    f"note: Triton's compiler does not know sm_{machine.capability} "
                    f"({machine.gpu}); kernels are compiled for sm_{aimed}, which it runs, too"
                )
            asking = ask_for_plugins(onnx.load(str(graph)))
            kernels = asking.plugins
            graph = Path(scratch) / "plugins.onnx"
            onnx.save(
                asking.model, str(graph), save_as_external_data=True, location="plugins.bin",
                size_threshold=1024,
            )  # fmt: skip
            set_target(aimed)
            register_plugins(trt, trtp, kernels)
            precompile(
                asking.launches, aimed, lambda n, of: say(f"compiling kernels: {n} of {of}"),
                ptx_version=oldest_ptx(aimed),
            )  # fmt: skip
            del asking  # as large as the weights
        cache = folder / f"{name.rpartition('-b')[0]}.timing"
        say(f"batch {batch}: TensorRT {machine.tensorrt} builds for {machine.gpu}")
        plan = build_plan(trt, graph, options, cache, lambda step: say(f"batch {batch}: {step}"))
    record = EngineRecord(
        name=name, batch=batch, precision=bundle.manifest.precision,
        file=FileInfo(sha256=hashlib.sha256(plan).hexdigest(), bytes=len(plan)),
        fingerprint=fingerprint, built_at=datetime.now(timezone.utc), build_seconds=0,
        kernels=kernels,
    )  # fmt: skip
    say(f"batch {batch}: comparing it with ONNX Runtime")
    engine = backend.load_plan(plan, record, bundle.manifest.specs(batch))
    parity = _validate(bundle, batch, engine, options, tolerance)
    seconds = round(time.perf_counter() - started, 1)
    record = record.model_copy(update={"parity": parity, "build_seconds": seconds})
    keep_engine(bundle, record, plan, engine.inspect())
    say(f"batch {batch}: kept {FOLDER}/{name}.plan, {len(plan) / 1e6:.0f} MB")
    return record


def _validate(
    bundle: Bundle, batch: int, engine: Any, options: BuildOptions, tolerance: float | None
) -> tuple[OutputParity, ...]:
    """Compare an engine's answers with ONNX Runtime's; an ExportError where they are too far."""
    manifest = bundle.manifest
    network = manifest.architecture or manifest.detector
    comparison = Comparison.of(network)
    feeds = sample_feeds(
        manifest.inputs[batch], network.preprocessing if network else None, vary_sizes=True
    )
    backend = OnnxRuntimeBackend("onnxruntime-cpu", BackendOptions(native=False))
    reference = backend.load(bundle, batch)
    expected, actual = reference.run(feeds), engine.run(feeds)
    try:
        found = comparison.compare(actual, expected, perturbed(reference.run, feeds))
    except ExportError as error:
        raise ExportError(f"the engine of batch {batch} was not kept: {error}") from error
    own = engine_tolerance(manifest.precision, tf32=options.tf32)
    allowed = own if tolerance is None else tolerance
    errors = {output.name: comparison.error(output, manifest.precision) for output in found}
    worst = max(errors, key=errors.__getitem__)
    if errors[worst] > allowed:
        raise ExportError(
            f"the engine of batch {batch} differs from ONNX Runtime by {errors[worst]:.1e} in "
            f"output {worst!r}, and {allowed:.0e} is allowed. It was not kept. Build with "
            "--plugins off to see whose fault it is, or raise --tolerance; meanwhile backend "
            "'onnxruntime-cuda' runs this bundle."
        )
    return found
