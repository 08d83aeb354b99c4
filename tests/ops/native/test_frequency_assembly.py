"""``fdconv::FrequencyAssembly`` in C: every form against float64, the body, and the layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import NodeProto, helper, numpy_helper

from fdconv_deploy.folding.layer import FoldedConv, fold_layer
from fdconv_deploy.nn import FDConv2d, FDTokenConv
from fdconv_deploy.ops.frequency_assembly.function import AssemblyForm
from tests.ops.single import cut_constant, fdconv_node, inputs_of, layer_model, refusal, run
from tests.ops.test_frequency_assembly import (
    CHANNELS,
    FORMS,
    KERNELS,
    by_reference,
    folded_in,
    stages,
)
from tests.reference.lively import enliven, error, lively_input

ROOT = Path(__file__).resolve().parents[3]


def check(folded: FoldedConv, layer: FDConv2d, batch: int, library: Path, threads: int = 2) -> None:
    """The node in C against float64 from its own inputs; the layer it is in against the layer."""
    x = lively_input((batch, layer.in_channels, 7, 9))
    model = layer_model(folded, batch)
    node = fdconv_node(model, "FrequencyAssembly")
    portable, native = run(model, x.numpy()), run(model, x.numpy(), library, threads)
    name = node.output[0]
    expected = by_reference(folded, inputs_of(model, node, native))
    assert native[name].shape == portable[name].shape == expected.shape
    assert np.abs(native[name] - expected).max() <= 1e-6 * np.abs(expected).max()
    # Not the body, whose roundings differ.
    assert not np.array_equal(native[name], portable[name])
    with torch.no_grad():
        y = layer.double()(x.double())
    if folded.output_scale is not None:
        scale, shift = np.random.default_rng(0).normal(size=(2, layer.out_channels))
        y = y * torch.from_numpy(scale)[:, None, None] + torch.from_numpy(shift)[:, None, None]
    assert error(torch.from_numpy(native["y"]), y) <= 2e-6


def layer_of(channels: int, filters: int, kernel: int) -> tuple[FDConv2d, FoldedConv]:
    """A layer with every part, of the fewest groups that its bins divide into."""
    form = AssemblyForm(
        stages(channels, filters, kernel), False, True, True, True, spatial_kernel=kernel > 1
    )
    bins = filters * kernel * (channels * kernel // 2 + 1)
    groups = next(n for n in range(2, bins) if bins % n == 0)
    return folded_in(form, kernel, channels, filters, kernel_num=groups)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form(form: AssemblyForm, library: Path) -> None:
    layer, folded = folded_in(form)
    check(folded, layer, 2, library)


@pytest.mark.parametrize(
    ("channels", "filters", "kernel"),
    [
        (16, 16, 3),  # full tiles: the second half works in place
        (32, 48, 3),  # in place, and a tile without a partner
        (64, 32, 1),
        (14, 22, 3),  # lengths 42 and 66: radices 7 and 11 have no butterfly of their own
        (26, 34, 1),
        (20, 58, 1),
        (36, 17, 3),  # 108 and 51
        (24, 25, 5),  # 120 and 125
        (64, 96, 3),
        (17, 20, 3),  # odd columns, 51: no middle column
        (33, 48, 1),
        (29, 29, 1),  # prime both ways
        (27, 18, 5),  # 135
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_sizes(channels: int, filters: int, kernel: int, batch: int, library: Path) -> None:
    layer, folded = layer_of(channels, filters, kernel)
    check(folded, layer, batch, library)


def check_tokens(channels: int, filters: int, tokens: int, library: Path) -> None:
    """A feed-forward network's layer at the authors' kernel_num, as `check` does."""
    layer = enliven(FDTokenConv(channels, filters, kernel_num=64))
    folded = fold_layer(layer, (tokens, 1), name="layer")
    assert folded.spectrum is not None
    model = layer_model(folded, 1)
    node = fdconv_node(model, "FrequencyAssembly")
    x = lively_input((1, channels, tokens, 1)).flatten(2).transpose(1, 2).contiguous()
    native = run(model, x.numpy(), library, 2)
    expected = by_reference(folded, inputs_of(model, node, native))
    name = node.output[0]
    assert np.abs(native[name] - expected).max() <= 1e-6 * np.abs(expected).max()
    with torch.no_grad():
        assert error(torch.from_numpy(native["y"]), layer.double()(x.double())) <= 2e-6


@pytest.mark.parametrize(
    ("channels", "filters", "tokens"), [(192, 768, 2000), (192, 768, 9), (768, 192, 9)]
)
def test_feed_forward_layers(channels: int, filters: int, tokens: int, library: Path) -> None:
    """Gates on kernels where there are many tokens, on tokens where there are few."""
    check_tokens(channels, filters, tokens, library)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "filters"), [(1536, 6144), (6144, 1536)])
def test_largest_feed_forward_layers(channels: int, filters: int, library: Path) -> None:
    """Those of Swin-L's last stage."""
    check_tokens(channels, filters, 400, library)


@pytest.mark.parametrize(("kernel", "arguments"), KERNELS, ids=str)
@pytest.mark.parametrize("use_ksm_local", [True, False])
def test_other_kernels(
    kernel: Any, arguments: dict[str, Any], use_ksm_local: bool, library: Path
) -> None:
    arguments = {k: v for k, v in arguments.items() if k != "channel_side"}
    layer = FDConv2d(
        CHANNELS, 20, kernel, padding=1, kernel_num=5, use_fbm_if_k_in=[],
        use_fdconv_if_k_in=[1, 2, 3, 5], use_ksm_local=use_ksm_local, **arguments,
    )  # fmt: skip
    folded = fold_layer(enliven(layer), (7, 9), name="layer")
    check(folded, layer, 2, library)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(kernel_num=64, param_ratio=5),  # 320 attentions: group numbers of two bytes
        dict(kernel_num=4, param_reduction=0.5),  # half of the bins dropped
        dict(kernel_num=4, convert_param=False),
        dict(kernel_num=4, ksm_only_kernel_att=True, ksm_global_act="softmax"),
    ],
    ids=str,
)
def test_other_spectra(arguments: dict[str, Any], library: Path) -> None:
    layer = enliven(FDConv2d(62, 64, 1, **arguments))
    check(fold_layer(layer, (7, 9), name="layer"), layer, 2, library)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(threads: int, library: Path) -> None:
    layer, folded = layer_of(48, 64, 3)
    check(folded, layer, 3, library, threads)


def test_runs_repeat_and_do_not_share(library: Path) -> None:
    """Answers do not depend on what a workspace held, nor images on their neighbours."""
    _, folded = layer_of(32, 32, 3)
    x = lively_input((3, 32, 7, 9)).numpy()
    together = run(layer_model(folded, 3), x, library)["y"]
    assert np.array_equal(together, run(layer_model(folded, 3), x, library)["y"])
    for image in range(3):
        alone = run(layer_model(folded, 1), x[image : image + 1], library)["y"]
        assert np.abs(alone - together[image]).max() <= 1e-6 * np.abs(alone).max()


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    (old,) = (each for each in node.attribute if each.name == name)
    node.attribute.remove(old)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))


WRONG = [
    ("kernel_size", [0, 3]), ("kernel_size", [3, 0]), ("kernel_size", [-1, 3]),
    ("kernel_size", [2**40, 3]), ("kernel_size", [1 << 24, 1 << 24]), ("kernel_size", [5, 3]),
    ("out_channels", 13), ("in_channels", 2**40), ("taps", 9), ("taps", 0), ("taps", -1),
    ("row_frequencies", [0, 1]), ("row_frequencies", [1 << 20] * 24),
    ("column_frequencies", [0]), ("column_frequencies", [-1] * 3 * CHANNELS),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_attributes_that_do_not_fit_are_refused(name: str, value: Any, library: Path) -> None:
    model = layer_model(layer_of(CHANNELS, 12, 3)[1], 1)
    set_attribute(fdconv_node(model, "FrequencyAssembly"), name, value)
    x = lively_input((1, CHANNELS, 7, 9)).numpy()
    assert "its constants are not" in refusal(model, x, library)


@pytest.mark.parametrize("name", ["kernel_size", "by_rows", "row_frequencies"])
def test_a_node_of_an_older_format_is_refused(name: str, library: Path) -> None:
    model = layer_model(layer_of(CHANNELS, 12, 3)[1], 1)
    set_attribute(fdconv_node(model, "FrequencyAssembly"), name, None)
    x = lively_input((1, CHANNELS, 7, 9)).numpy()
    assert "export the bundle again" in refusal(model, x, library)


@pytest.mark.parametrize("kept", [slice(0, 0), slice(0, -1)], ids=["empty", "shorter"])
@pytest.mark.parametrize("axis", [0, -1])
def test_constants_that_do_not_fit_are_refused(axis: int, kept: slice, library: Path) -> None:
    folded = layer_of(CHANNELS, 12, 3)[1]
    whole = layer_model(folded, 1)
    constants = {tensor.name for tensor in whole.graph.initializer}
    for name in fdconv_node(whole, "FrequencyAssembly").input[1:4]:  # spectrum, patterns, places
        assert name in constants
        model = layer_model(folded, 1)
        cut_constant(model, name, axis, kept)
        refusal(model, lively_input((1, CHANNELS, 7, 9)).numpy(), library)


def test_places_beyond_the_patterns_are_refused(library: Path) -> None:
    model = layer_model(layer_of(CHANNELS, 12, 3)[1], 1)
    name = fdconv_node(model, "FrequencyAssembly").input[3]
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    places = numpy_helper.to_array(tensor).copy()
    for wrong in (-1, 1 << 30):
        places.flat[-1] = wrong
        tensor.CopyFrom(numpy_helper.from_array(places, name))
        x = lively_input((1, CHANNELS, 7, 9)).numpy()
        assert "its constants are not" in refusal(model, x, library)


def test_the_runtime_says_it_ran(library: Path, tmp_path: Path) -> None:
    _, folded = folded_in(FORMS[0])
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    options.register_custom_ops_library(str(library))
    model = layer_model(folded, 1).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": lively_input((1, CHANNELS, 7, 9)).numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    assert FORMS[0].name in {event.get("args", {}).get("op_name") for event in events}


@pytest.mark.parametrize("instructions", ["baseline", "avx2"])
def test_other_instruction_sets(instructions: str, library: Path) -> None:
    """A process decides once, so others do."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.native.instructions", str(library)],
        cwd=ROOT,
        env=os.environ | {"FDCONV_NATIVE_ISA": instructions},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
