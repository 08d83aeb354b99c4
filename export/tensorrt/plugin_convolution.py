"""A convolution that was written by kernel rows, put together again.

GPUs convolve with a whole kernel at once; `layers.convolution` says why CPUs do not.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs
from fdconv_deploy.export.layers.nodes import Nodes
from fdconv_deploy.export.tensorrt.plugin_nodes import constant_of, unknown


def kernel_shape(node: gs.Node) -> tuple[int, int, int, int, int]:
    """Batch (0 or -1), output and input channels, height and width of a node's kernels."""
    shape = [int(n) for n in node.attrs["kernel_shape"]]
    rows = int(node.attrs["matrix_shape"][1])
    if "_ByRows" not in node.op:
        _, ins, height, width = shape
        return shape[0], rows // height, ins, height, width
    batch, out, height, columns = shape
    width = int(_rows(node)[0][1].attrs["kernel_shape"][1])
    return batch, out, columns // width, height, width


def _rows(node: gs.Node) -> list[tuple[int, gs.Node]]:
    """The convolutions of a node's kernel rows, with the row's number."""
    prefix = node.name.removesuffix("assembly") + "row"
    found: dict[int, gs.Node] = {}
    waiting = list(node.outputs[0].outputs)
    while waiting:
        reader = waiting.pop()
        if reader.op == "Conv" and reader.name.startswith(prefix):
            found[int(reader.name.removeprefix(prefix).partition(".")[0])] = reader
        elif reader.op in ("Split", "Reshape", "Cast"):
            waiting += [n for t in reader.outputs for n in t.outputs]
    if not found:
        raise unknown(node.name)
    return sorted(found.items())


def whole_convolution(
    nodes: Nodes, node: gs.Node, weight: gs.Variable, kernel: tuple[int, int]
) -> None:
    """Convolve once with ``weight``, in place of the sum over a node's kernel rows."""
    rows = _rows(node)
    row, first = rows[0]
    stride, dilation = first.attrs["strides"], first.attrs["dilations"]
    x, begin = _seen(first)
    _, left, _, right = first.attrs["pads"]
    top = row * dilation[0] - (begin - first.attrs["pads"][0])
    # The last row's reach past the input; one that meets nothing but padding is not there.
    last, final = rows[-1]
    bottom = final.attrs["pads"][2] + (kernel[0] - 1 - last) * dilation[0]
    bias = [conv.inputs[2] for _, conv in rows if len(conv.inputs) > 2]
    output = _sum([conv for _, conv in rows])
    attributes = {"strides": stride, "dilations": dilation, "group": first.attrs["group"]}
    result = nodes(
        "Conv", "whole", x, weight, *bias,
        kernel_shape=list(kernel), pads=[top, left, bottom, right], **attributes,
    )  # fmt: skip
    old = output.inputs[0]
    old.outputs.clear()
    producer = result.inputs[0]
    producer.outputs[0] = output
    node.outputs.clear()
    node.inputs.clear()


def _seen(conv: gs.Node) -> tuple[gs.Tensor, int]:
    """The whole input of a row's convolution, and the first of its rows that it sees."""
    x = conv.inputs[0]
    producer = x.inputs[0] if x.inputs else None
    name = conv.name.removesuffix("convolution") + "input"
    if producer is not None and producer.op == "Slice" and producer.name == name:
        return producer.inputs[0], int(constant_of(producer.inputs[1])[0])
    return x, 0


def _sum(convs: list[gs.Node]) -> gs.Tensor:
    total = convs[0].outputs[0]
    for conv in convs[1:]:
        (reader,) = conv.outputs[0].outputs
        if reader.op != "Add" or not any(t is total for t in reader.inputs):
            raise unknown(conv.name)
        total = reader.outputs[0]
    return total
