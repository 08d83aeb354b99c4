"""A small network of every kind of bundle, exported; and the kinds of nodes in a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import GraphProto, TensorProto
from onnx.inliner import inline_local_functions
from torch import nn

from fdconv_deploy.config import SegformerHeadConfig, SegmentorConfig
from fdconv_deploy.demo import packaged_checkpoint, packaged_detector
from fdconv_deploy.export import export_checkpoint, export_network
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.sample_images import sample_image
from tests.nn.backbones.published import FAMILIES
from tests.nn.query_heads import detectron2, openmmlab
from tests.reference.lively import enliven

SIZE = 96, 128
PICTURES = [sample_image(number, SIZE) for number in range(2)]


def _segmentor(folder: Path, **options: Any) -> Bundle:
    return export_checkpoint(packaged_checkpoint(), folder, size=SIZE, **options)


def _lively(architecture: SegmentorConfig) -> nn.Module:
    torch.manual_seed(0)
    network = Segmentor(architecture).eval()
    for module in network.modules():
        if hasattr(module, "KSM_Global"):
            enliven(module)
    return network


def _query_head(architecture: SegmentorConfig) -> Callable[[Path], Bundle]:
    return lambda folder: export_network(_lively(architecture), folder, size=SIZE)


def _tokens(folder: Path) -> Bundle:
    backbone = FAMILIES["segformer_mit"]
    head = SegformerHeadConfig(
        in_channels=backbone.output_widths, in_index=(0, 1, 2, 3), channels=32, num_classes=7
    )
    architecture = SegmentorConfig(backbone=backbone, decode_head=head)
    return export_network(_lively(architecture), folder, size=SIZE)


KINDS: dict[str, Callable[[Path], Bundle]] = {
    "segmentor fp32": lambda folder: _segmentor(folder, batches=(1, 4)),
    "segmentor fp16": lambda folder: _segmentor(folder, precision="fp16"),
    "segmentor int8": lambda folder: _segmentor(
        folder, precision="int8", calibration=PICTURES, tolerance=0.5
    ),
    "segmentor int8 signed": lambda folder: _segmentor(
        folder, precision="int8", activations="signed", calibration=PICTURES, tolerance=0.5
    ),
    "detector": lambda folder: export_checkpoint(packaged_detector(), folder, size=SIZE),
    "Mask2Former": _query_head(openmmlab("mask2former_r50")),
    "MaskDINO": _query_head(detectron2("maskdino_r50")),
    "tokens (SegFormer)": _tokens,
}


def node_kinds(path: Path) -> set[str]:
    """Every kind of node in a graph: operator, types of inputs, names of attributes.

    ONNX Runtime finds a kernel by these. Functions are inlined, as it does before placing nodes.
    """
    model = onnx.load(str(path), load_external_data=False)
    model = onnx.shape_inference.infer_shapes(inline_local_functions(model))
    return set(_kinds(model.graph))


def _kinds(graph: GraphProto) -> Iterator[str]:
    types = {one.name: one.data_type for one in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    for node in graph.node:
        inputs = [TensorProto.DataType.Name(types[n]) if n in types else "?" for n in node.input]
        attributes = sorted(one.name for one in node.attribute)
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        yield f"{name}({', '.join(inputs)}) {' '.join(attributes)}".strip()
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _kinds(attribute.g)
