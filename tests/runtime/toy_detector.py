"""Small detectors' bundles, made in a moment: what instances are tested on."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fdconv_deploy.config import (
    BoxHeadConfig,
    DetectorConfig,
    DetectorTestConfig,
    MaskHeadConfig,
    Preprocessing,
    RCNNTestConfig,
    ResNetConfig,
)
from fdconv_deploy.runtime.bundle import Bundle, BundleWriter
from fdconv_deploy.runtime.manifest import (
    InputSize,
    Manifest,
    OutputParity,
    ParityReport,
    TensorSpec,
)

MOST = 7  # boxes per image
CLASSES = ("person", "car", "sign")
SIDE = 28
TYPES = {"labels": TensorProto.INT64, "count": TensorProto.INT64}


def architecture(
    *,
    masks: bool = True,
    preprocessing: Preprocessing | None = None,
    palette: tuple[tuple[int, int, int], ...] = (),
    classes: tuple[str, ...] = CLASSES,
    threshold: float = 0.5,
) -> DetectorConfig:
    return DetectorConfig(
        backbone=ResNetConfig(depth=18, base_channels=8),
        bbox_head=BoxHeadConfig(num_classes=len(CLASSES)),
        mask_head=MaskHeadConfig(num_classes=len(CLASSES)) if masks else None,
        test=DetectorTestConfig(
            rcnn=RCNNTestConfig(max_per_img=MOST, mask_thr_binary=threshold),
        ),
        preprocessing=preprocessing or Preprocessing(scale=(96, 64)),
        classes=classes,
        palette=palette,
    )


def constants() -> dict[str, np.ndarray]:
    """What the toy answers with: boxes as shares of the image, scores, labels, masks."""
    rng = np.random.default_rng(5)
    corner = rng.uniform(0, 0.6, (MOST, 2))
    shares = np.concatenate([corner, corner + rng.uniform(0.2, 0.4, (MOST, 2))], axis=1)
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE - 0.5
    discs = [1 / (1 + np.exp(20 * (np.hypot(y, x * s) - 0.4))) for s in np.linspace(0.8, 2, MOST)]
    return {
        "shares": shares.astype(np.float32),
        "base": np.linspace(0.9, 0.2, MOST, dtype=np.float32),
        "classes": rng.integers(0, len(CLASSES), MOST),
        "discs": np.array(discs, np.float32),
    }


def reference(images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """What the toy answers: scores move with an image's mean, padding included."""
    told = constants()
    scores = told["base"] + np.float32(0.1) * images.mean(axis=(1, 2, 3), dtype=np.float32)[:, None]
    kept = scores >= 0.3
    extent = np.concatenate([sizes[:, ::-1], sizes[:, ::-1]], axis=1)
    return {
        "boxes": told["shares"] * extent[:, None] * kept[..., None],
        "scores": scores * kept,
        "labels": told["classes"] * kept,
        "count": kept.sum(axis=1),
        "masks": told["discs"] * kept[..., None, None],
    }


def model(batch: int, height: int, width: int, *, masks: bool = True) -> onnx.ModelProto:
    told = {**constants(), "tenth": np.float32(0.1), "least": np.float32(0.3)}
    told |= {
        "all": np.array([1, 2, 3]),
        "rows": np.array([1]),
        "flip": np.array([1, 0, 1, 0]),
        "last": np.array([-1]),
        "two": np.array([-1, -2]),
    }
    node = helper.make_node
    nodes = [
        node("ReduceMean", ["images", "all"], ["level"], keepdims=0),
        node("Unsqueeze", ["level", "last"], ["column"]),
        node("Mul", ["column", "tenth"], ["shift"]),
        node("Add", ["base", "shift"], ["raw"]),
        node("GreaterOrEqual", ["raw", "least"], ["keeps"]),
        node("Cast", ["keeps"], ["kept"], to=TensorProto.FLOAT),
        node("Cast", ["keeps"], ["chosen"], to=TensorProto.INT64),
        node("ReduceSum", ["chosen", "rows"], ["count"], keepdims=0),
        node("Mul", ["raw", "kept"], ["scores"]),
        node("Mul", ["classes", "chosen"], ["labels"]),
        node("Gather", ["sizes", "flip"], ["extent"], axis=1),
        node("Unsqueeze", ["extent", "rows"], ["extents"]),
        node("Mul", ["shares", "extents"], ["placed"]),
        node("Unsqueeze", ["kept", "last"], ["kept3"]),
        node("Mul", ["placed", "kept3"], ["boxes"]),
    ]
    if masks:
        nodes += [
            node("Unsqueeze", ["kept", "two"], ["kept4"]),
            node("Mul", ["discs", "kept4"], ["masks"]),
        ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [_value(s) for s in inputs(batch, height, width)],
        [_value(s) for s in outputs(batch, masks=masks)],
        [
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in told.items()
            if masks or name not in ("discs", "two")
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def inputs(batch: int, height: int, width: int) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="images", shape=(batch, 3, height, width)),
        TensorSpec(name="sizes", shape=(batch, 2)),
    )


def outputs(batch: int, *, masks: bool = True) -> tuple[TensorSpec, ...]:
    found = (
        TensorSpec(name="boxes", shape=(batch, MOST, 4)),
        TensorSpec(name="scores", shape=(batch, MOST)),
        TensorSpec(name="labels", shape=(batch, MOST), dtype="int64"),
        TensorSpec(name="count", shape=(batch,), dtype="int64"),
    )
    return (*found, TensorSpec(name="masks", shape=(batch, MOST, SIDE, SIDE))) if masks else found


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    kind = TYPES.get(spec.name, TensorProto.FLOAT)
    return helper.make_tensor_value_info(spec.name, kind, spec.shape)


def manifest(
    height: int, width: int, batches: tuple[int, ...], arch: DetectorConfig, **changes: object
) -> Manifest:
    masks = arch.mask_head is not None
    values: dict[str, object] = {
        "created_by": "tests",
        "created_at": datetime(2026, 1, 1, tzinfo=timezone.utc),
        "kind": "detector",
        "detector": arch,
        "input": InputSize(height=height, width=width),
        "models": {b: f"model.b{b}.onnx" for b in batches},
        "inputs": {b: inputs(b, height, width) for b in batches},
        "outputs": {b: outputs(b, masks=masks) for b in batches},
        "parity": ParityReport(
            batches={b: (OutputParity(name="scores", max_abs=1e-6, max_rel=1e-7),) for b in batches}
        ),
    }
    return Manifest.model_validate({**values, **changes})


def make_bundle(
    path: Path,
    *,
    height: int = 64,
    width: int = 96,
    batches: tuple[int, ...] = (1, 4),
    arch: DetectorConfig | None = None,
    **changes: object,
) -> Bundle:
    """Write a toy detector's bundle to ``path``."""
    arch = arch or architecture()
    with BundleWriter(path) as writer:
        for batch in batches:
            made = model(batch, height, width, masks=arch.mask_head is not None)
            onnx.save(made, str(writer.path / f"model.b{batch}.onnx"))
        return writer.commit(manifest(height, width, batches, arch, **changes))


def picture(height: int = 50, width: int = 70, seed: int = 7) -> np.ndarray:
    """(height, width, 3) uint8 RGB."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
