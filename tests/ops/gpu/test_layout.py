"""Constants and launch shapes of the GPU kernels, without Triton."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from benchmarks.gpu.shapes import RESNET50, layer_sizes
from benchmarks.networks import backbone
from fdconv_deploy.folding.layer import fold_layer
from fdconv_deploy.folding.network import input_sizes
from fdconv_deploy.nn import FDConv2d, ResNet
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.ops.attention.launch import PARTS, GateSizes, Pooling
from fdconv_deploy.ops.frequency_assembly.launch import (
    AssemblySizes,
    assembly_sizes,
    attend_rows_launch,
    column_launch,
    column_transform,
    half_shape,
    kernel_spectrum,
    root_table,
    row_launch,
    transform_of,
)
from tests.reference.arguments import layer_arguments
from tests.reference.lively import enliven
from tests.reference.operators import frequency_assembly


@settings(deadline=None, max_examples=40)
@given(layer_arguments())
def test_the_layout_holds_the_same_spectrum(case):
    """Inverted with numpy as the kernels invert it, it is the folded spectrum's matrix."""
    arguments, size, seed = case
    folded = fold_layer(enliven(FDConv2d(**arguments), seed), size)
    assert folded.spectrum is not None
    gates = np.random.default_rng(seed).random((2, folded.modulation.kernel))
    spectrum = kernel_spectrum(*folded.spectrum.by_frequency())
    values = spectrum.values[:, :, 0] + 1j * spectrum.values[:, :, 1].astype(np.float64)
    total = (values * gates[:, spectrum.groups]).sum(2)  # (B, tiles, R, width)
    rows, columns = folded.spectrum.rows, folded.spectrum.columns
    half = total.transpose(0, 2, 1, 3).reshape(2, rows, -1)
    assert not half[:, :, columns // 2 + 1 :].any()
    half = np.fft.ifft(half[:, :, : columns // 2 + 1], axis=1) * rows
    matrix = np.fft.irfft(half, n=columns, axis=2) * columns
    expected = frequency_assembly(gates, folded.spectrum)
    assert np.abs(matrix - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("length", [1, 2, 3, 17, 29, 54, 60, 64, 96, 1536, 2048, 6144, 58 * 3])
def test_a_transform_is_its_length(length):
    transform = transform_of(length)
    assert (transform is None) == (length // (length & -length) > 27)
    table = root_table(length, transform)
    assert table.dtype == np.float32
    assert table.shape[1] % 4 == 0
    if transform is not None:
        assert transform.odd * transform.power == length
        assert transform.odd * min(transform.limit, transform.power) <= 64


@pytest.mark.parametrize(
    ("odd", "few", "many"), [(1, 1, 1), (3, 1, 3), (5, 5, 5), (9, 3, 9), (27, 9, 27)]
)
def test_few_programs_share_the_odd_outputs_among_more(odd, few, many):
    transform = transform_of(32 * odd)
    assert transform is not None
    assert transform.outputs(100) == few
    assert transform.outputs(10_000) == many


def test_a_kernel_wider_than_the_odd_part_divides_is_dense():
    assert column_transform(36, 2) is None
    assert column_transform(36, 4) is None
    assert column_transform(36, 3) is not None
    assert column_transform(36, 1) is not None


SIZES: list[dict[str, Any]] = [
    dict(out_channels=512, in_channels=512, kernel_size=(3, 3)),
    dict(out_channels=2048, in_channels=2048, kernel_size=(3, 3)),
    dict(out_channels=64, in_channels=256, kernel_size=(1, 1)),
    dict(out_channels=29, in_channels=58, kernel_size=(3, 3)),
    dict(out_channels=21, in_channels=18, kernel_size=(5, 5)),
]


def sizes_of(out_channels: int, in_channels: int, kernel_size: tuple[int, int]) -> AssemblySizes:
    layer = FDConv2d(
        in_channels, out_channels, kernel_size, kernel_num=1, param_ratio=2, use_fbm_if_k_in=[],
        use_fdconv_if_k_in=[1, 3, 5],
    )  # fmt: skip
    folded = fold_layer(enliven(layer), (9, 9))
    assert folded.spectrum is not None
    return assembly_sizes(folded, kernel_spectrum(*folded.spectrum.by_frequency()))


@pytest.mark.parametrize("given", SIZES[2:], ids=str)
def test_sizes_pass_through_a_flat_list(given):
    sizes = sizes_of(**given)
    assert AssemblySizes.of(sizes.numbers()) == sizes


@pytest.mark.parametrize("given", SIZES[2:], ids=str)
@pytest.mark.parametrize("batch", [1, 7])
def test_launches_cover_every_row_and_column(given, batch):
    sizes = sizes_of(**given)
    blocks, _, stored_columns, row_block = half_shape(sizes)
    assert sizes.rows <= blocks * row_block < sizes.rows + row_block
    assert sizes.columns // 2 + 1 <= stored_columns
    for launch in (row_launch(sizes), column_launch(sizes)):
        assert launch.grid(batch)[0] == batch
        assert launch.threads in (32, 64, 128, 256, 512)
        assert max(launch.blocks) < 65536
    first, second = row_launch(sizes), column_launch(sizes, dtype="float16")
    assert first.blocks[0] == sizes.tiles
    assert second.blocks[0] == blocks
    assert dict(second.arguments)["weight"] == "*fp16"
    assert dict(second.arguments)["half"] == "*fp32"


def test_attentions_that_every_program_should_not_make_have_a_kernel_of_their_own():
    sizes = sizes_of(64, 256, (1, 1))
    pooling = Pooling(256, 1024, 16)
    gates = GateSizes(400, False, False, 0.0, True, True, True, 1e-5)
    launch = attend_rows_launch(pooling, gates, 64, sizes)
    assert launch is not None
    programs = sizes.tiles * launch.blocks[1]
    assert launch.constants["each"] * programs >= 400 - 64
    assert launch.blocks[0] == sizes.tiles + 1
    assert attend_rows_launch(pooling, replace(gates, sigmoid=False), 64, sizes) is None
    assert attend_rows_launch(pooling, gates, 4096, sizes) is None
    wide = Pooling(64 * 256, 64, 1024)
    assert wide.parts * wide.units > PARTS
    assert attend_rows_launch(wide, gates, 4, sizes) is None
    dense = sizes_of(29, 58, (1, 1))
    assert transform_of(dense.rows) is None
    assert attend_rows_launch(pooling, gates, 64, dense) is None


@pytest.mark.parametrize("pixels", [1, 30, 256, 4096, 40000])
@pytest.mark.parametrize("channels", [24, 64, 1024, 4096])
@pytest.mark.parametrize("units", [0, 16, 256])
def test_pooling_covers_its_input_in_few_parts(channels, pixels, units):
    pooling = Pooling(channels, pixels, units)
    assert pooling.blocks * pooling.channel_block >= channels
    assert pooling.splits * pooling.steps * pooling.pixel_block >= pixels
    assert pooling.warps in (4, 8, 16)
    if units:
        assert pooling.parts * units <= PARTS or pooling.splits == 1


def test_the_benchmarks_shapes_are_the_networks():
    network = ResNet(backbone()).eval()
    sizes = input_sizes(network, torch.zeros(1, 3, 64, 64))
    found: Counter[tuple[int, ...]] = Counter()
    for name, layer in dynamic_layers(network).items():
        key = layer.in_channels, layer.out_channels, layer.kernel_size[0]
        found[(*key, sizes[name][0] * 8, layer.stride[0])] += 1
    listed: Counter[tuple[int, ...]] = Counter()
    for s in RESNET50:
        listed[s.in_channels, s.out_channels, s.kernel, s.feature, s.stride] += s.count
    assert found == listed
    # And what is compiled for them is what such a layer is launched with.
    layer = next(m for m in network.modules() if isinstance(m, FDConv2d) and m.is_dynamic)
    folded = fold_layer(enliven(layer), (8, 8))
    assert folded.spectrum is not None
    made = assembly_sizes(folded, kernel_spectrum(*folded.spectrum.by_frequency()))
    named = layer_sizes(layer.out_channels, layer.in_channels, layer.kernel_size[0])
    # A small feature map: its gates scale that, not the kernel.
    assert made == replace(named, filter_at=made.filter_at, channel_at=made.channel_at)
