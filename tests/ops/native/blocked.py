"""One ``fdconv.nchwc`` node as a model, and features in blocks of channels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fdconv_deploy.ops import OPSET

Array = NDArray[Any]


def pack(x: Array, block: int) -> Array:
    """``(N, C, H, W)`` -> ``(N, Cp, H, W)`` whose memory is ``(N, Cp/block, H, W, block)``."""
    images, channels, *size = x.shape
    padded = np.zeros((images, -(-channels // block) * block, *size), x.dtype)
    padded[:, :channels] = x
    blocks = padded.reshape(images, -1, block, *size)
    return np.ascontiguousarray(np.moveaxis(blocks, 2, -1)).reshape(padded.shape)


def unpack(x: Array, block: int, channels: int) -> Array:
    """The opposite of `pack`."""
    images, padded, *size = x.shape
    blocks = x.reshape(images, padded // block, *size, block)
    return np.moveaxis(blocks, -1, 2).reshape(x.shape)[:, :channels]


def run_node(
    op: str,
    x: Array,
    constants: Sequence[Array],
    attributes: dict[str, Any],
    library: Path,
    *,
    outputs: int = 1,
    threads: int = 1,
) -> list[Array]:
    """All outputs of one node, its first input ``x`` and the rest constant."""
    names = [f"c{i}" for i in range(len(constants))]
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, ["x", *names], results, domain="fdconv.nchwc", **attributes)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", *results)]
    graph = helper.make_graph(
        [node], "node", values[:1], values[1:],
        [numpy_helper.from_array(c, n) for n, c in zip(names, constants, strict=True)],
    )  # fmt: skip
    domains = [helper.make_opsetid("", OPSET), helper.make_opsetid("fdconv.nchwc", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, {"x": x}))
