"""Activations and sums join a batch's convolutions, as they join a single image's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_deploy.export import export_module
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.ops.native import native_library


class Blocks(nn.Module):
    """Two residual blocks; the second's shortcut is what the first one gives."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            FDConv2d(32, 32, size, padding=size // 2, bias=False, kernel_num=4) for _ in range(4)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for first in (0, 2):
            y = F.relu(self.norms[first](self.convs[first](x)))
            x = F.relu(self.norms[first + 1](self.convs[first + 1](y)) + x)
        return x


class Stages(nn.Module):
    """A stem and two bottlenecks, the second of stride 2, with convolutions as shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "first": FDConv2d(width, 32, 1, bias=False, kernel_num=4),
                    "middle": FDConv2d(
                        32, 32, 3, stride=stride, padding=1, bias=False, kernel_num=4
                    ),
                    "last": FDConv2d(32, 64, 1, bias=False, kernel_num=4),
                    "shortcut": FDConv2d(width, 64, 1, stride=stride, bias=False, kernel_num=4),
                    "norm": nn.BatchNorm2d(64),
                    "shortcut_norm": nn.BatchNorm2d(64),
                }
            )
            for width, stride in ((32, 1), (64, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            y = F.relu(block["middle"](F.relu(block["first"](x))))
            shortcut = block["shortcut_norm"](block["shortcut"](x))
            x = F.relu(block["norm"](block["last"](y)) + shortcut)
        return x


class Twice(nn.Module):
    """An answer that two others read, and one that is the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FDConv2d(32, 32, 1, bias=False, kernel_num=4)
        self.second = FDConv2d(32, 32, 1, bias=False, kernel_num=4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        z = self.second(F.relu(y) + y)
        return z + z, y


def operators(model: Path, folder: Path, library: Path | None = None) -> Counter[str]:
    """Operators of what ONNX Runtime makes of a graph, with a library of operators or without."""
    options = ort.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.optimized_model_filepath = str(folder / f"optimised-{model.name}")
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return Counter(node.op_type for node in optimised.graph.node)


def library(native: bool) -> Path | None:
    """The native operators: what they give ONNX Runtime knows the shape of from the graph alone."""
    if not native:
        return None
    found, why = native_library()
    if found is None:
        pytest.skip(f"no native operators: {why}")
    return found


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_fuses_what_one_image_does(size, native, tmp_path):
    torch.manual_seed(0)
    network = Blocks(size).eval()
    # Larger than its kernels, so that no layer convolves by kernel rows.
    bundle = export_module(network, torch.randn(2, 32, 32, 32), tmp_path / "bundle", batches=(1, 2))
    one, two = (operators(bundle.model_path(batch), tmp_path, library(native)) for batch in (1, 2))
    assert two["FusedConv"] == one["FusedConv"] >= 4
    assert (two["Add"], two["Relu"]) == (one["Add"], one["Relu"])


@pytest.mark.parametrize("native", [False, True])
def test_a_strided_shortcut_joins_too(native, tmp_path):
    torch.manual_seed(0)
    bundle = export_module(
        Stages().eval(), torch.randn(2, 32, 32, 32), tmp_path / "bundle", batches=(1, 2)
    )
    one, two = (operators(bundle.model_path(batch), tmp_path, library(native)) for batch in (1, 2))
    assert two["FusedConv"] == one["FusedConv"] >= 4
    assert (two["Add"], two["Relu"]) == (one["Add"], one["Relu"])


def test_answers_that_others_read_stay_as_they_are(tmp_path):
    torch.manual_seed(0)
    bundle = export_module(Twice().eval(), torch.randn(3, 32, 8, 8), tmp_path / "bundle")
    assert max(output.max_rel for output in bundle.manifest.parity.batches[3]) <= 2e-6
