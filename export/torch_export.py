"""PyTorch network -> ONNX graph in which each FDConv layer is one placeholder node.

torch's exporter never sees a layer's inside: its time grows with every node, and the folded
layers are written directly (`fdconv_deploy.export.layers`) instead.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import onnxscript
import torch
from fdconv_deploy.export.detection_ops import TRANSLATIONS, stand_in
from torch import Tensor, nn

from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.network import Example, replace_layers, tensors_of
from fdconv_deploy.nn.fdconv import FDConv2d
from fdconv_deploy.ops import OPSET

PLACEHOLDER_DOMAIN = "fdconv.export"
PLACEHOLDER = "FoldedLayer"


@torch.library.custom_op("fdconv_deploy::folded_layer", mutates_args=())
def _folded_layer(x: Tensor, layer: str, channels: int, height: int, width: int) -> Tensor:
    return x.new_zeros(x.shape[0], channels, height, width)


@_folded_layer.register_fake
def _(x: Tensor, layer: str, channels: int, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape[0], channels, height, width)


class _Placeholder(nn.Module):
    """Stands for an FDConv layer while the network is exported."""

    def __init__(self, name: str, layer: FDConv2d) -> None:
        super().__init__()
        self.name = name
        self.geometry = [getattr(layer, a) for a in ("kernel_size", "stride", "dilation")]
        self.padding, self.channels = layer.padding, layer.out_channels

    def _size(self, axis: int, length: int) -> int:
        kernel, stride, dilation = (g[axis] for g in self.geometry)
        reach = dilation * (kernel - 1)
        if isinstance(self.padding, str):
            padding = reach if self.padding == "same" else 0
        else:
            padding = 2 * self.padding[axis]
        return (length + padding - reach - 1) // stride + 1

    def forward(self, x: Tensor) -> Tensor:
        height, width = self._size(0, x.shape[-2]), self._size(1, x.shape[-1])
        return _folded_layer(x, self.name, self.channels, height, width)


def _register_schema() -> None:
    schema = onnx.defs.OpSchema
    if onnx.defs.has(PLACEHOLDER, PLACEHOLDER_DOMAIN):
        return
    onnx.defs.register_schema(
        schema(
            PLACEHOLDER,
            PLACEHOLDER_DOMAIN,
            1,
            inputs=[schema.FormalParameter("x", "T")],
            outputs=[schema.FormalParameter("y", "T")],
            type_constraints=[("T", ["tensor(float)"], "features")],
            attributes=[
                schema.Attribute("layer", schema.AttrType.STRING, "name of the layer"),
                *(
                    schema.Attribute(name, schema.AttrType.INT, "of the output")
                    for name in ("channels", "height", "width")
                ),
            ],
        )
    )


_opset = onnxscript.values.Opset(PLACEHOLDER_DOMAIN, 1)


def _translate(x: Any, layer: str, channels: int, height: int, width: int) -> Any:
    return _opset.FoldedLayer(x, layer=layer, channels=channels, height=height, width=width)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's chatter; its errors still reach the caller."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def capture(
    network: nn.Module,
    example: Example,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> onnx.ModelProto:
    """Export a network with a placeholder for each of its dynamic layers.

    Args:
        network: in eval mode; not changed.
        example: one input or several; their shapes, batch size included, are the graph's.

    Raises:
        ExportError: torch's exporter does not take the rest of the network.
    """
    stripped = replace_layers(network, _Placeholder)
    for name, module in list(stripped.named_modules()):
        replacement = stand_in(module)
        if replacement is not None:
            parent, _, child = name.rpartition(".")
            setattr(stripped.get_submodule(parent), child, replacement)
    stripped.eval()
    _register_schema()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                stripped,
                tensors_of(example),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(input_names),
                output_names=list(output_names),
                custom_translation_table={
                    torch.ops.fdconv_deploy.folded_layer.default: _translate,
                    **TRANSLATIONS,
                },
                verbose=False,
            )
    except Exception as error:
        # The exporter wraps what went wrong; the innermost error says it best.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().splitlines()
        raise ExportError(
            "torch's ONNX exporter does not take this network (the FDConv layers were left out "
            f"of it, so the reason lies elsewhere): {reason[0] if reason else type(cause).__name__}"
        ) from error
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:  # source paths and line numbers of this machine
        del node.metadata_props[:]
    return model
