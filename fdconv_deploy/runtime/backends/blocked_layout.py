"""Whether, and in what blocks, this machine's ONNX Runtime convolves: found by trying."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.runtime.blocked_graph import RUNTIMES
from fdconv_deploy.runtime.onnx_messages import make_model, make_node

# Of its builds for AVX-512, and for AVX2, SSE and some for AArch64.
LENGTHS = (16, 8)
_SIZE, _KERNEL = 5, 3
Float32 = NDArray[np.float32]


@lru_cache(maxsize=1)
def blocked_layout() -> tuple[int, str]:
    """The length of ONNX Runtime's blocks of channels on this machine; 0 and why, as a clause.

    The runtime does not tell, and a kernel in blocks of another length would be taken all the
    same: so features are reordered and looked at, and a convolution with a kernel that is no
    constant is compared with its definition.
    """
    import onnxruntime

    x = np.random.default_rng(0).standard_normal((1, 32, _SIZE, _SIZE), np.float32)
    try:
        reordered = _run(onnxruntime, [_reorder("x", "y")], {"x": x})
        block = next((b for b in LENGTHS if np.array_equal(reordered, blocked(x, b))), 0)
        if not block:
            return 0, "its blocks are not of 8 or 16 channels here"
        known = _convolves(onnxruntime, x, block)
    except Exception as error:  # other versions' operators may differ in any way
        lines = str(error).splitlines() or [type(error).__name__]
        return 0, f"this ONNX Runtime has no such operators ({lines[0][:120]})"
    return (block, "") if known else (0, "this ONNX Runtime's operators answer otherwise")


def blocked(x: NDArray[Any], block: int) -> NDArray[Any]:
    """(N, C, H, W) in blocks, C a multiple of their length; the shape is kept."""
    images, channels, *size = x.shape
    split = x.reshape(images, channels // block, block, *size)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 4, 2)).reshape(x.shape)


def _reorder(x: str, y: str) -> Any:
    return make_node("ReorderInput", [x], [y], RUNTIMES, channels_last=0)


def _convolves(onnxruntime: Any, x: Float32, block: int) -> bool:
    """Convolution, sum, activation, pooling and interpolation as the blocked graph has them."""
    random = np.random.default_rng(1)
    channels = x.shape[1]
    kernel = random.standard_normal((channels, channels, _KERNEL, _KERNEL), np.float32)
    bias = random.standard_normal((channels,), np.float32)
    b, count = block, channels // block
    ordered = kernel.reshape(count, b, count, b, _KERNEL, _KERNEL).transpose(0, 2, 4, 5, 3, 1)
    ordered = np.ascontiguousarray(ordered).reshape(kernel.shape)
    square: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1]}
    nodes = [
        _reorder("x", "in"),
        make_node("Conv", ["in", "kernel", "bias", "in"], ["sum"], RUNTIMES, activation="Relu",
                  dilations=[1, 1], group=1, **square),
        make_node("MaxPool", ["sum"], ["most"], RUNTIMES, **square),
        make_node("Upsample", ["most"], ["large"], RUNTIMES, scales=[1, 1, 2, 2], mode="linear",
                  coordinate_transformation_mode="half_pixel"),
        make_node("ReorderOutput", ["large"], ["y"], RUNTIMES, channels=channels, channels_last=0),
    ]  # fmt: skip
    found = _run(onnxruntime, nodes, {"x": x, "kernel": ordered, "bias": bias})

    def windows(values: NDArray[Any], fill: float) -> NDArray[Any]:
        padded = np.pad(values, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=fill)
        return np.lib.stride_tricks.sliding_window_view(padded, (_KERNEL, _KERNEL), axis=(2, 3))

    answer: NDArray[Any] = np.einsum("nihwuv,oiuv->nohw", windows(x, 0), kernel)
    answer = np.maximum(answer + bias[None, :, None, None] + x, 0)
    most = windows(answer, -np.inf).max((4, 5))
    places = np.maximum((np.arange(2 * _SIZE) + 0.5) / 2 - 0.5, 0)
    distance = np.abs(np.minimum(places, _SIZE - 1)[:, None] - np.arange(_SIZE))
    weights = np.maximum(1 - distance, 0)
    expected = np.einsum("nchw,yh,xw->ncyx", most, weights, weights)
    return bool(np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max())


def _run(onnxruntime: Any, nodes: list[Any], feeds: dict[str, Float32]) -> Float32:
    """The output "y" of a graph of these nodes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a refusal is an answer
    options.intra_op_num_threads = 1
    model = make_model(nodes, {name: value.shape for name, value in feeds.items()}, ["y"])
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found: Float32 = session.run(["y"], feeds)[0]
    return found
