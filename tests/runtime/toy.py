"""Small ONNX bundles, made in a moment: what the runtime and the service are tested on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fdconv_deploy.config import (
    FCNHeadConfig,
    Preprocessing,
    ResNetConfig,
    SegmentorConfig,
    TestMode,
)
from fdconv_deploy.runtime import GraphRunner, Session
from fdconv_deploy.runtime.bundle import Bundle, BundleWriter
from fdconv_deploy.runtime.manifest import (
    InputSize,
    Manifest,
    OutputParity,
    ParityReport,
    SizedGraphs,
    TensorSpec,
)

WEIGHTS = "weights.bin"


def architecture(
    classes: int = 5,
    *,
    align_corners: bool = False,
    test: TestMode | None = None,
    preprocessing: Preprocessing | None = None,
    palette: tuple[tuple[int, int, int], ...] = (),
    named: bool = True,
    threshold: float | None = None,
) -> SegmentorConfig:
    """With a ``threshold``, the head has one output."""
    how = preprocessing or Preprocessing()
    return SegmentorConfig(
        backbone=ResNetConfig(depth=18, base_channels=8, in_channels=how.channels),
        decode_head=FCNHeadConfig(
            in_channels=(64,),
            in_index=(3,),
            channels=8,
            num_classes=classes,
            align_corners=align_corners,
            out_channels=1 if threshold is not None and classes > 1 else None,
            threshold=threshold,
        ),
        test=test or TestMode(),
        preprocessing=how,
        classes=tuple(f"class {i}" for i in range(classes)) if named else (),
        palette=palette,
    )


def weight(classes: int, seed: int = 0, bands: int = 3) -> np.ndarray:
    """(classes, bands, 4, 4) float32, the toy network's one convolution."""
    return np.random.default_rng(seed).normal(size=(classes, bands, 4, 4)).astype(np.float32)


def reference_logits(images: np.ndarray, seed: int = 0, classes: int = 5) -> np.ndarray:
    """What the toy network answers: (B, C, H, W) float32 -> (B, classes, H/4, W/4).

    Conv 4×4 with stride 4, plus each image's own mean, so that padding an image changes its
    answer everywhere, as it does in an FDConv network.
    """
    b, c, h, w = images.shape
    patches = images.reshape(b, c, h // 4, 4, w // 4, 4).astype(np.float64)
    out = np.einsum("bcyixj,ocij->boyx", patches, weight(classes, seed, c).astype(np.float64))
    return (out + images.astype(np.float64).mean(axis=(1, 2, 3))[:, None, None, None]).astype(
        np.float32
    )


def segmentor_model(
    batch: int, height: int, width: int, classes: int, *, seed: int = 0, bands: int = 3
):
    """The toy network as a ModelProto whose weight lies in ``weights.bin``."""
    tensor = numpy_helper.from_array(weight(classes, seed, bands), "weight")
    external(tensor, WEIGHTS)
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["local"], strides=[4, 4]),
        helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=1),
        helper.make_node("Add", ["local", "mean"], ["logits"]),
    ]
    axes = numpy_helper.from_array(np.array([1, 2, 3], dtype=np.int64), "axes")
    shapes = (batch, bands, height, width), (batch, classes, height // 4, width // 4)
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shapes[0])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shapes[1])],
        [tensor, axes],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def external(tensor: TensorProto, location: str) -> None:
    """Say that a tensor's data lies at the start of the file ``location``."""
    length = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def manifest(
    height: int, width: int, batches: tuple[int, ...], arch: SegmentorConfig, **changes: object
) -> Manifest:
    classes, bands = arch.decode_head.outputs, arch.backbone.in_channels
    values: dict[str, object] = {
        "created_by": "tests",
        "created_at": datetime(2026, 1, 1, tzinfo=timezone.utc),
        "kind": "segmentor",
        "architecture": arch,
        "input": InputSize(height=height, width=width),
        "models": {b: f"model.b{b}.onnx" for b in batches},
        "weights": WEIGHTS,
        "inputs": {
            b: (TensorSpec(name="images", shape=(b, bands, height, width)),) for b in batches
        },
        "outputs": {
            b: (TensorSpec(name="logits", shape=(b, classes, height // 4, width // 4)),)
            for b in batches
        },
        "parity": ParityReport(
            batches={
                b: (OutputParity(name="logits", max_abs=1e-6, max_rel=1e-7, argmax_agreement=1),)
                for b in batches
            }
        ),
    }
    return Manifest.model_validate({**values, **changes})


def make_bundle(
    path: Path,
    *,
    height: int = 32,
    width: int = 48,
    batches: tuple[int, ...] = (1, 4),
    arch: SegmentorConfig | None = None,
    seed: int = 0,
    overwrite: bool = False,
    other_sizes: tuple[tuple[int, int], ...] = (),
    **changes: object,
) -> Bundle:
    """Write a toy segmentor's bundle to ``path``."""
    arch = arch or architecture()
    classes, bands = arch.decode_head.outputs, arch.backbone.in_channels
    with BundleWriter(path, overwrite=overwrite) as writer:
        (writer.path / WEIGHTS).write_bytes(weight(classes, seed, bands).tobytes())
        sized = []
        for size in ((height, width), *other_sizes):
            listed = manifest(*size, batches, arch, **changes)
            if size in other_sizes:
                names = {b: f"model.{size[0]}x{size[1]}.b{b}.onnx" for b in batches}
                fields = {name: getattr(listed, name) for name in SizedGraphs.model_fields}
                sized.append(SizedGraphs(**fields | {"models": names}))
            else:
                names, first = listed.models, listed
            for batch, name in names.items():
                model = segmentor_model(batch, *size, classes, seed=seed, bands=bands)
                onnx.save(model, str(writer.path / name))
        return writer.commit(first.model_copy(update={"other_sizes": tuple(sized)}))


Shapes = dict[str, tuple[int, ...]]


def make_module_bundle(path: Path) -> Bundle:
    """A bundle of kind "module": total, product = a + b, a · b over (2, 3) float32."""
    nodes = [
        helper.make_node("Add", ["a", "b"], ["total"]),
        helper.make_node("Mul", ["a", "b"], ["product"]),
    ]
    inputs, outputs = (dict.fromkeys(names, (2, 3)) for names in ("ab", ("total", "product")))
    return write_module(path, nodes, inputs, outputs)


def write_module(
    path: Path,
    nodes: Sequence[NodeProto],
    inputs: Shapes,
    outputs: Shapes,
    constants: Sequence[TensorProto] = (),
) -> Bundle:
    """A bundle of kind "module" of these nodes; everything in and out is float32."""
    values = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in side.items()]
        for side in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "module", *values, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with BundleWriter(path) as writer:
        onnx.save(model, str(writer.path / "model.b1.onnx"))
        return writer.commit(
            Manifest(
                created_by="tests",
                created_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
                kind="module",
                models={1: "model.b1.onnx"},
                inputs={1: tuple(TensorSpec(name=n, shape=at) for n, at in inputs.items())},
                outputs={1: tuple(TensorSpec(name=n, shape=at) for n, at in outputs.items())},
            )
        )


def session(bundle: Bundle, backend: Any, **options: Any) -> Session:
    """A session whose graphs a test's own backend loads; see `GraphRunner` for options."""
    return Session(bundle, GraphRunner(bundle, backend, **options))
