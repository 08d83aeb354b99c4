"""``fdconv.nchwc::FrequencyAssembly``: kernels in blocks, for every form and length of block."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.ops.frequency_assembly.function import AssemblyForm
from fdconv_deploy.ops.native import lent
from fdconv_deploy.runtime.blocked_graph import block_graph
from fdconv_deploy.runtime.native_layers import NativeGraph, fuse_layers
from tests.ops.native.test_frequency_assembly import ROOT, layer_of
from tests.ops.single import layer_model, refusal, run
from tests.ops.test_frequency_assembly import KINDS, folded_in, stages
from tests.reference.lively import lively_input

# Channels that leave a block of either length unfilled, on both sides.
CHANNELS, FILTERS = 22, 28
FORMS = [
    AssemblyForm(stages(CHANNELS, FILTERS, 3 if kind["spatial_kernel"] else 1), *flags, **kind)
    for flags in product([False, True], repeat=4)
    for kind in KINDS
]


def assembly_of(rewritten: NativeGraph | None) -> ModelProto:
    """A rewritten graph up to its kernels: of what follows, this machine knows one block alone."""
    assert rewritten is not None
    model = onnx.load_model_from_string(rewritten.model.SerializeToString())
    (node,) = (n for n in model.graph.node if n.op_type.startswith("FrequencyAssembly"))
    (name,) = node.output
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, list("oiuv")))
    leading, needed = [], {name}
    for each in reversed(model.graph.node):
        if needed & set(each.output):
            needed |= set(each.input)
            leading.append(each)
    del model.graph.node[:]
    model.graph.node.extend(reversed(leading))
    for tensor in list(model.graph.initializer):
        if tensor.name not in needed:
            model.graph.initializer.remove(tensor)
    return model


def exported(folded: FoldedConv, batch: int) -> bytes:
    """A layer's graph, without what it shows of the inside."""
    model = layer_model(folded, batch)
    del model.graph.output[1:]
    return model.SerializeToString()


def kernels_of(
    folded: FoldedConv, x: NDArray, block: int, library: Path, threads: int = 2
) -> NDArray:
    """The kernels (B, O, I, kh, kw) that the rewritten graph's operator makes."""
    model = assembly_of(block_graph(exported(folded, len(x)), {}, block))
    (made,) = run(model, x, library, threads).values()
    filters, channels, *kernel = made.shape
    assert channels % block == 0
    assert filters % (len(x) * block) == 0
    split = made.reshape(filters // block, channels // block, *kernel, block, block)
    whole = split.transpose(0, 5, 1, 4, 2, 3).reshape(len(x), -1, channels, *kernel)
    o, i = folded.out_channels, folded.in_channels
    assert not whole[:, o:].any()
    assert not whole[:, :, i:].any()
    return whole[:, :o, :i]


def check(folded: FoldedConv, layer: FDConv2d, batch: int, block: int, library: Path) -> None:
    """A convolution in float64 with the kernels against the layer in float64."""
    x = lively_input((batch, layer.in_channels, 7, 9))
    kernels = torch.from_numpy(kernels_of(folded, x.numpy(), block, library)).double()
    top, left, bottom, right = folded.padding
    padded = torch.nn.functional.pad(x.double(), (left, right, top, bottom))
    y = torch.cat(
        [
            torch.nn.functional.conv2d(image[None], kernel)
            for image, kernel in zip(padded, kernels, strict=True)
        ]
    )
    if folded.bias is not None:
        y = y + torch.from_numpy(folded.bias).double()[:, None, None]
    with torch.no_grad():
        expected = layer.double()(x.double())
    if folded.output_scale is not None:
        scale, shift = np.random.default_rng(0).normal(size=(2, layer.out_channels))
        expected = expected * torch.from_numpy(scale)[:, None, None]
        expected = expected + torch.from_numpy(shift)[:, None, None]
    assert (y - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form(form: AssemblyForm, block: int, library: Path) -> None:
    kernel = 3 if form.spatial_kernel else 1
    bins = FILTERS * kernel * (CHANNELS * kernel // 2 + 1)
    groups = next(n for n in range(2, bins) if bins % n == 0)
    layer, folded = folded_in(form, kernel, CHANNELS, FILTERS, kernel_num=groups)
    check(folded, layer, 1, block, library)


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "batch"),
    [
        (16, 16, 3, 3),  # full tiles: the second half works in place
        (32, 48, 3, 2),  # in place, and a tile without a partner
        (64, 32, 1, 1),
        (48, 24, 3, 1),  # half a tile of sixteen
        (24, 40, 1, 1),
        (29, 31, 3, 1),  # prime both ways
        (24, 25, 5, 1),
        (64, 128, 3, 1),
    ],
)
def test_sizes(
    channels: int, filters: int, kernel: int, batch: int, block: int, library: Path
) -> None:
    if batch > 1 and (channels % block or filters % block):
        pytest.skip("images are joined where their channels are whole blocks")
    layer, folded = layer_of(channels, filters, kernel)
    check(folded, layer, batch, block, library)


@pytest.mark.parametrize("block", [8, 16])
def test_threads_change_no_bit(block: int, library: Path) -> None:
    _, folded = layer_of(48, 64, 3)
    x = lively_input((1, 48, 7, 9)).numpy()
    first = kernels_of(folded, x, block, library, 1)
    for threads in (2, 5):
        assert np.array_equal(first, kernels_of(folded, x, block, library, threads))


@pytest.mark.parametrize("layout", ["blocked", "of the export"])
def test_lent_constants(layout: str, library: Path) -> None:
    """The same kernels; and without a loan, or with one of other tensors, a refusal."""
    model = exported(layer_of(48, 64, 3)[1], 1)
    held, found = (
        block_graph(model, {}, 16) if layout == "blocked" else fuse_layers(model, {})
        for _ in range(2)
    )
    assert held is not None
    assert found is not None
    loans = found.lend_constants()
    ((number, arrays),) = loans.items()
    assert found.model.ByteSize() < held.model.ByteSize() - arrays[0].nbytes
    x = lively_input((1, 48, 7, 9)).numpy()
    model = assembly_of(found)
    assert "nobody lends its constants" in refusal(model, x, library)
    with lent(library, {number: [arrays[0][1:], *arrays[1:]]}):
        assert "its constants are not laid out" in refusal(model, x, library)
    with lent(library, loans):
        (kernels,) = run(model, x, library).values()
    (expected,) = run(assembly_of(held), x, library).values()
    assert np.array_equal(kernels, expected)
    assert "nobody lends its constants" in refusal(model, x, library)


def test_a_blocked_graph_takes_no_functions(library: Path) -> None:
    """Functions' operators are there, but while a graph without any is opened."""
    model = onnx.load_model_from_string(exported(layer_of(16, 16, 3)[1], 1))
    del model.functions[:]

    def opened() -> None:
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(library))
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    opened()
    with lent(library, {}, blocked_only=True), pytest.raises(Exception, match="fdconv"):
        opened()
    opened()


class Allocated(ctypes.Structure):
    """``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks "
        "keepcost".split()
    )


def test_equal_layers_share_their_constants(library: Path) -> None:
    """A second layer takes less memory by its map and values, which stay until the last is gone."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("the C library does not tell how much is allocated")
    mallinfo.restype = Allocated
    channels, filters, kernel = 256, 128, 3
    rewritten = block_graph(exported(layer_of(channels, filters, kernel)[1], 1), {}, 16)
    assert rewritten is not None
    loans = rewritten.lend_constants()
    model = assembly_of(rewritten).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    sessions: list[onnxruntime.InferenceSession] = []
    sizes = []
    with lent(library, loans):
        for _ in range(4):
            before = mallinfo()
            sessions.append(
                onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            )
            after = mallinfo()
            sizes.append(after.uordblks + after.hblkhd - before.uordblks - before.hblkhd)
            if len(sizes) == 1:  # the runtime's own: what a process takes once
                sessions.clear()
    x = {"x": lively_input((1, channels, 7, 9)).numpy()}
    (expected,) = sessions[0].run(None, x)
    shared = filters * kernel * channels * kernel // 2 * 9  # a group and a complex number each
    assert sizes[1] - sizes[2] > 0.9 * shared
    assert sizes[1] - sizes[3] > 0.9 * shared
    while sessions:
        assert np.array_equal(sessions[-1].run(None, x)[0], expected)
        del sessions[0]


@pytest.mark.parametrize("instructions", ["baseline", "avx2"])
def test_other_instruction_sets(instructions: str, library: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.native.test_blocked_assembly", str(library)],
        cwd=ROOT,
        env=os.environ | {"FDCONV_NATIVE_ISA": instructions},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    for length in (8, 16):
        for each in (FORMS[0], *FORMS[-6:]):
            test_every_form(each, length, Path(sys.argv[1]))
        for sizes in ((16, 16, 3, 3), (48, 24, 3, 1), (29, 31, 3, 1)):
            if sizes[3] == 1 or length == 16:
                test_sizes(*sizes, length, Path(sys.argv[1]))
