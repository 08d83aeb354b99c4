"""A TensorRT engine's answers beside ONNX Runtime's, before it is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
from fdconv_deploy.export.options import TOLERANCES
from fdconv_deploy.export.tensorrt.builder import BuildOptions
from fdconv_deploy.export.validation.comparison import Rule, compare_all
from fdconv_deploy.export.validation.detections import perturbed
from numpy.typing import NDArray

from fdconv_deploy.errors import ExportError
from fdconv_deploy.runtime.backends import BackendOptions
from fdconv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import OutputParity

# What an engine may differ from ONNX Runtime by. Other kernels round otherwise: twice what the
# export allows; TF32 keeps ten bits of a product.
TF32_TOLERANCE = 2e-2
_MULTIPLE = 2


def tolerance_of(bundle: Bundle, options: BuildOptions, given: float | None) -> float:
    """How far the answers may be apart, if it is not ``given``."""
    if given is not None:
        return given
    allowed = _MULTIPLE * TOLERANCES[bundle.manifest.precision]
    return max(allowed, TF32_TOLERANCE) if options.tf32 else allowed


def prove(bundle: Bundle, batch: int, engine: Any, tolerance: float) -> tuple[OutputParity, ...]:
    """Compare an engine's answers with ONNX Runtime's on the CPU.

    :raises ExportError: they are further apart than ``tolerance``.
    """
    feeds, rule = feeds_of(bundle, batch), rule_of(bundle)
    reference = OnnxRuntimeBackend("onnxruntime-cpu", BackendOptions(native=False)).load(
        bundle, batch
    )
    expected = reference.run(feeds)
    actual = engine.run(feeds)
    try:
        found = compare_all(actual, expected, rule, perturbed(reference.run, feeds))
    except ExportError as error:
        raise ExportError(f"the engine of batch {batch} was not kept: {error}") from error
    by_class = bundle.manifest.precision == "int8"

    def distance(output: OutputParity) -> float:
        if by_class and output.argmax_agreement is not None:
            return 1 - output.argmax_agreement
        return output.max_rel / rule.slack(output.name)

    worst = max(found, key=distance)
    if distance(worst) > tolerance:
        raise ExportError(
            f"the engine of batch {batch} differs from ONNX Runtime by {distance(worst):.1e} in "
            f"output {worst.name!r}, and {tolerance:.0e} is allowed. It was not kept. Build with "
            "--plugins off to see whose fault it is, or raise --tolerance; meanwhile backend "
            "'onnxruntime-cuda' runs this bundle."
        )
    return found


def rule_of(bundle: Bundle) -> Rule:
    """How a bundle's answers are compared."""
    detector = bundle.manifest.detector
    if detector is not None:
        return Rule("detections", detector.test.rcnn.score_thr)
    architecture = bundle.manifest.architecture
    if architecture is None:
        return Rule("values")
    return Rule("classes", threshold=architecture.decode_head.label_threshold)


def feeds_of(bundle: Bundle, batch: int) -> dict[str, NDArray[Any]]:
    """Inputs to compare on: drawn scenes, or random numbers where images are not known."""
    specs = bundle.manifest.inputs[batch]
    if bundle.manifest.kind == "segmentor" and bundle.manifest.architecture is not None:
        from fdconv_deploy.export.validation.sample_inputs import made_up_images

        height, width = specs[0].shape[2:]
        images = made_up_images(batch, (height, width), bundle.manifest.architecture.preprocessing)
        return {specs[0].name: images.numpy()}
    if bundle.manifest.detector is not None:
        from fdconv_deploy.export.validation.detector_inputs import made_up_detector_inputs

        size = specs[0].shape[2], specs[0].shape[3]
        made_up = made_up_detector_inputs(batch, size, bundle.manifest.detector.preprocessing)
        return {s.name: tensor.numpy() for s, tensor in zip(specs, made_up, strict=True)}
    generator = np.random.default_rng(0)
    return {
        spec.name: generator.normal(size=spec.shape).astype(np.dtype(spec.dtype)) for spec in specs
    }
