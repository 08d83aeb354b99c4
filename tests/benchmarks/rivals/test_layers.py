"""The rivals' layers against their definitions, and through ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from benchmarks.rivals.condconv import CondConv2d
from benchmarks.rivals.decomposition import DecomposedConv2d
from benchmarks.rivals.dynamic_convolution import DynamicConv2d
from benchmarks.rivals.kernel_warehouse import stock
from benchmarks.rivals.layer import RivalConv2d
from benchmarks.rivals.omni_dimensional import OmniDimensionalConv2d
from tests.benchmarks.rivals import references

MAKERS = {
    "condconv": CondConv2d,
    "dyconv": DynamicConv2d,
    "dcd": DecomposedConv2d,
    "odconv": OmniDimensionalConv2d,
    "warehouse": None,
}
# I, O, k, stride, padding, dilation
GEOMETRIES = [(32, 24, 1, 1, 0, 1), (16, 24, 3, 2, 1, 1), (24, 16, 3, 1, 2, 2)]


def made(name: str, geometry: tuple[int, ...]) -> RivalConv2d:
    """A layer with random weights and statistics, in eval mode."""
    torch.manual_seed(3)
    if name == "warehouse":
        conv = nn.Conv2d(*geometry, bias=False)
        sibling = nn.Conv2d(48, 40, 1, bias=False)  # cells are 8 wide in common
        layer: RivalConv2d = stock({"a": conv, "b": sibling}, budget=2)["a"]
    else:
        layer = MAKERS[name](*geometry)
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 2)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_(0, 0.3)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0, 0.5)  # so that attention differs between images
    return layer.eval()


def images(count: int, channels: int) -> torch.Tensor:
    torch.manual_seed(4)
    # Averages far enough apart that a kernel of one image is wrong for another.
    return torch.randn(count, channels, 9, 12) + torch.randn(count, channels, 1, 1)


def reference(name: str, layer: RivalConv2d, image: np.ndarray) -> np.ndarray:
    tensors = references.numbers(layer)
    where = layer.stride, layer.padding, layer.dilation
    if name == "dcd":
        return references.dcd(image, tensors, *where)
    if name == "warehouse":
        shape = layer.out_channels, layer.in_channels, layer.kernel_size
        kernel = references.warehouse(image, tensors, *shape)
    else:
        kernel = getattr(references, name)(image, tensors)
    return references.convolve(image, kernel, *where)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_equals_its_definition_image_by_image(name, geometry):
    layer, x = made(name, geometry), images(3, geometry[0])
    with torch.no_grad():
        y = layer(x).numpy()
    plain = nn.Conv2d(*geometry, bias=False)
    assert y.shape == plain(x).shape
    for image, answer in zip(x.double().numpy(), y, strict=True):
        expected = reference(name, layer, image)
        assert np.abs(answer - expected).max() <= 3e-6 * np.abs(expected).max()


@pytest.mark.parametrize("name", MAKERS)
def test_kernels_follow_the_image_and_no_other(name):
    layer, x = made(name, GEOMETRIES[1]), images(3, 16)
    with torch.no_grad():
        together, alone = layer(x), torch.cat([layer(image[None]) for image in x])
        scale = together.abs().max()
        assert (together - alone).abs().max() <= 1e-6 * scale
        # A plain convolution is additive; these are not, as the kernel changes with the image.
        doubled = layer(x[:1] + x[1:2])
        assert (doubled - together[:1] - together[1:2]).abs().max() > 0.05 * scale


@pytest.mark.parametrize("name", MAKERS)
def test_export_answers_as_pytorch(name, tmp_path: Path):
    layer, x = made(name, GEOMETRIES[1]), images(1, 16)
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    program.save(tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "layer.onnx", providers=["CPUExecutionProvider"]
    )
    (name_in,) = [i.name for i in session.get_inputs()]
    (answer,) = session.run(None, {name_in: x.numpy()})
    with torch.no_grad():
        expected = layer(x).numpy()
    assert np.abs(answer - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3, groups=2, bias=False),
        nn.Conv2d(8, 8, (1, 3), bias=False),
        nn.Conv2d(8, 8, 1),
    ],
    ids=["groups", "oblong", "bias"],
)
def test_other_convolutions_are_refused(conv):
    with pytest.raises(ValueError, match="square convolution without groups and bias"):
        CondConv2d.like(conv)
