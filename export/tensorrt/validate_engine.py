"""A TensorRT engine's answers beside ONNX Runtime's, before it is kept."""

from __future__ import annotations

from typing import Any

from fdconv_deploy.export.tensorrt.builder import BuildOptions
from fdconv_deploy.export.validation.comparison import Comparison, perturbed
from fdconv_deploy.export.validation.tolerance import engine_tolerance

from fdconv_deploy.errors import ExportError
from fdconv_deploy.runtime.backends import BackendOptions
from fdconv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import OutputParity
from fdconv_deploy.sample_images.inputs import sample_feeds


def validate_engine(
    bundle: Bundle, batch: int, engine: Any, options: BuildOptions, tolerance: float | None
) -> tuple[OutputParity, ...]:
    """Compare an engine's answers with ONNX Runtime's on the CPU.

    Args:
        bundle: the engine was built from.
        batch: its batch size.
        engine: runs it.
        options: it was built with.
        tolerance: what `engine_tolerance` allows if not given.

    Raises:
        ExportError: they are further apart than the tolerance.
    """
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
    allowed = tolerance
    if allowed is None:
        allowed = engine_tolerance(manifest.precision, tf32=options.tf32)
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
