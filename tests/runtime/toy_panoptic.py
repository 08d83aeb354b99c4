"""A small bundle that answers with segments and instances, made in a moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fdconv_deploy.config import Mask2FormerHeadConfig, PanopticConfig, SegmentorConfig
from fdconv_deploy.runtime.bundle import Bundle, BundleWriter
from fdconv_deploy.runtime.manifest import TensorSpec
from tests.runtime import toy

QUERIES, CLASSES = 6, 4


def architecture() -> SegmentorConfig:
    """Two things, two kinds of stuff."""
    head = Mask2FormerHeadConfig(
        in_channels=(8, 16, 32, 64),
        in_index=(0, 1, 2, 3),
        channels=32,
        num_classes=CLASSES,
        num_queries=QUERIES,
    )
    rule = PanopticConfig(
        thing_classes=(0, 1),
        instance_on=True,
        object_mask_thr=0.3,
        iou_thr=0.1,
        filter_low_score=True,
        max_per_image=10,
    )
    values = toy.architecture(CLASSES).model_dump() | {"decode_head": head, "panoptic": rule}
    return SegmentorConfig(**values)


def make_bundle(path: Path, height: int = 32, width: int = 48) -> Bundle:
    """Masks are a convolution of the image; classes are the same for every image."""
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(QUERIES, 3, 4, 4)).astype(np.float32)
    classes = generator.normal(size=(1, QUERIES, CLASSES + 1)).astype(np.float32) * 3
    classes[..., -1] -= 4  # hardly ever no object
    tensor = numpy_helper.from_array(kernel, "weight")
    data = tensor.raw_data
    toy.external(tensor, toy.WEIGHTS)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "weight"], ["masks"], strides=[4, 4]),
            helper.make_node("Identity", ["fixed"], ["classes"]),
        ],
        "toy",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, height, width))],
        [
            helper.make_tensor_value_info("classes", TensorProto.FLOAT, classes.shape),
            helper.make_tensor_value_info(
                "masks", TensorProto.FLOAT, (1, QUERIES, height // 4, width // 4)
            ),
        ],
        [tensor, numpy_helper.from_array(classes, "fixed")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    outputs = (
        TensorSpec(name="classes", shape=classes.shape),
        TensorSpec(name="masks", shape=(1, QUERIES, height // 4, width // 4)),
    )
    with BundleWriter(path) as writer:
        (writer.path / toy.WEIGHTS).write_bytes(data)
        onnx.save(model, str(writer.path / "model.b1.onnx"))
        return writer.commit(
            toy.manifest(height, width, (1,), architecture(), outputs={1: outputs}, parity=None)
        )
