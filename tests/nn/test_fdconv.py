"""FDConv2d against the published code's tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn import FDConv2d
from fdconv_deploy.nn.spectrum import kernel_spectrum

# Names of the oracle's layer fixtures, so that each is a test of its own even before the
# oracle folder is known. A test below fails if the folder holds others.
CASES = """
attmulti1.5_k3 fbm_empty_cfg fbm_k1 fbm_kernel1 fbm_lowfreq fbm_maxsize32 fbm_on_k1
fbm_sg24_eq_channels fbm_sg65_all_channels fbm_sg8_lowfreq fbm_softmax_sg1 fbm_softmax_sg4
fbm_unsorted_klist globaltanh_k3 k1_branch2_4x4 k1_in32_out48_s1_nobias k1x3_rect k3_128x96_s2
k3_1x1_feature k3_2x3_feature k3_33x65 k3_asym_stride_dil k3_boundary_equal k3_branch2_7x7
k3_branch2_b3_nopad_s2_9x11 k3_d2_branch2_b3_14x14 k3_in32_out48_s1_16 k3_in48_out32_s2_b3_20x28
k3_pad_str_same kn1_pr2_k1 kn64_k1_64to64_branch2 kn64_k1_b3 kn64_k3 kn8_k1_b3 knNone_k3
ksize5_local_in64_k1 linear_mode_converted_k1 linear_mode_k1 localtanh_k3 min18 noconvert_k1_b3
noconvert_k3 noconvert_pr2_k3 nolocal_k1_branch2 nolocal_k3 official_init_k1_kn64 official_init_k3
official_init_pr2_k1 onlykernel_branch2_k3 onlykernel_nolocal_k1 onlykernel_softmax_k3
plain_groups2_c16 plain_k5 plain_k7_s2_stem plain_kin_only3 plain_thr32 pred0.5_k1 pred0.5_pr2_k3
reduction0.9_k3 temp_default_follows_kernel_temp_k3 temps_k3
""".split()
TOLERANCE = 1e-5  # of the largest absolute value, as the fixtures' own note asks


def load_case(oracle: Path, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    index = json.loads((oracle / "layers/index.json").read_text())
    case = next(c for c in index["cases"] if c["file"] == f"{name}.safetensors")
    return case, load_file(oracle / "layers" / case["file"])


def build(case: dict, tensors: dict[str, torch.Tensor], order: str) -> FDConv2d:
    arguments = dict(case["ctor"])
    if order == "given" and "buf.indices" in tensors:
        arguments["frequency_order"] = tensors["buf.indices"].long()
    layer = FDConv2d(**arguments)
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    layer.load_state_dict(state)
    return layer.eval()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert actual.numel() == expected.numel(), name
    error = (actual.reshape(expected.shape) - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"{name}: {error:.2e} of the largest value"


def test_every_fixture_is_listed(oracle):
    index = json.loads((oracle / "layers/index.json").read_text())
    assert sorted(c["file"].removesuffix(".safetensors") for c in index["cases"]) == sorted(CASES)


@pytest.mark.parametrize("order", ["given", "torch"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_layer_equals_published_code(oracle, name, order):
    case, tensors = load_case(oracle, name)
    layer = build(case, tensors, order)
    assert layer.is_dynamic == case["dynamic"]
    x = tensors["x"]
    assert_near(layer(x), tensors["y"], "output")
    if not layer.is_dynamic:
        return
    assert torch.equal(layer.indices, tensors["buf.indices"].long())
    mids = {k.removeprefix("mid."): v for k, v in tensors.items() if k.startswith("mid.")}
    attention, local = layer.attention(x)
    ours = {f"{kind}_attention": getattr(attention, kind) for kind in attention._fields}
    ours["dft_map"] = layer.modulated_spectrum(attention.kernel)
    ours["adaptive_weight_2d"] = layer.kernel_matrix(attention.kernel)
    full = layer.modulates_kernel(*x.shape[-2:])
    ours["aggregate_weight"] = layer.kernels(attention, local, full=full)
    if layer.KSM_Local is not None:
        ours["ksm_local_logit"] = layer.KSM_Local.logits(x.mean((2, 3)))
    if layer.FBM is not None:
        ours["fbm_out"] = layer.FBM(x)
    # A few fixtures store their output alone, to stay small.
    assert sorted(mids) == sorted(case["mids"])
    for kind, expected in mids.items():
        assert_near(ours[kind], expected, kind)


@pytest.mark.parametrize("name", ["k3_in32_out48_s1_16", "kn64_k1_b3", "pred0.5_k1"])
def test_state_dict_keys_are_the_published_ones(oracle, name):
    case, tensors = load_case(oracle, name)
    ours = {k: tuple(v.shape) for k, v in FDConv2d(**case["ctor"]).state_dict().items()}
    theirs = {
        k.removeprefix("state."): tuple(v.shape)
        for k, v in tensors.items()
        if k.startswith("state.")
    }
    assert ours == theirs


@pytest.mark.parametrize("name", ["official_init_k3", "official_init_k1_kn64"])
@torch.no_grad()
def test_conversion_keeps_the_plain_weight(oracle, name):
    """With the filter attention at rest, a converted layer is its plain convolution."""
    case, tensors = load_case(oracle, name)
    layer = build(case, tensors, "torch")
    torch.nn.init.zeros_(layer.KSM_Global.filter_fc.weight)
    # 1e-6 heads move the answer a little: the published note says 1e-4.
    error = (layer(tensors["x"]) - tensors["y_plain"]).abs().max()
    assert error <= 1e-4 * tensors["y_plain"].abs().max()


def test_initial_heads_are_near_zero_but_for_the_filter():
    torch.manual_seed(0)
    heads = FDConv2d(32, 32, 3).KSM_Global
    assert heads.filter_fc.weight.std() > 0.1
    for head in (heads.channel_fc, heads.spatial_fc, heads.kernel_fc):
        assert head.weight.abs().max() < 1e-5


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other():
    torch.manual_seed(1)
    layer = FDConv2d(32, 32, 3, padding=1).double().eval()
    for parameter in layer.parameters():
        parameter.normal_(0, 0.3)
    x = torch.randn(3, 32, 9, 11, dtype=torch.float64)
    single = torch.cat([layer(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(layer(x), single, rtol=1e-12, atol=1e-12)


def test_layer_trains():
    torch.manual_seed(2)
    layer = FDConv2d(32, 32, 3, padding=1)
    layer(torch.randn(2, 32, 8, 8)).square().mean().backward()
    missing = [n for n, p in layer.named_parameters() if p.grad is None]
    assert not missing


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel_size", [1, 3])
@torch.no_grad()
def test_dtype_follows_the_input(dtype, kernel_size):
    torch.manual_seed(3)
    layer = FDConv2d(32, 32, kernel_size, padding=kernel_size // 2).eval()
    x = torch.randn(2, 32, 8, 8)
    expected = layer(x)
    y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    tolerance = {torch.float64: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    assert (y.float() - expected).abs().max() <= tolerance * expected.abs().max()


BAD = [
    (dict(groups=2), "groups=1"),
    (dict(kernel_num=1), "kernel_num ≥ 2"),
    (dict(kernel_num=64), "does not divide"),
    (dict(ksm_global_act="softmax"), "ksm_only_kernel_att"),
    (dict(ksm_global_act="relu"), "sigmoid"),
    (dict(ksm_local_act="softmax"), "ksm_local_act"),
    (dict(spatial_freq_decompose=True), "False"),
    (dict(kernel_temp=None), "kernel_temp"),
    (dict(linear_mode=True, convert_param=False), "1×1"),
    (dict(kernel_size=(3, 1)), "ksm_only_kernel_att"),
    (dict(kernel_size=(3, 5)), "square"),
    (dict(param_reduction=0.5, convert_param=False), "convert_param=True"),
    (dict(fbm_cfg={"spatial_group": 5}), "spatial_group=5"),
    (dict(fbm_cfg={"spatial": "cbam"}), "'conv'"),
    (dict(fbm_cfg={"act": "relu"}), "act"),
    (dict(fbm_cfg={"spatial_kernel": 2}), "odd"),
    (dict(fbm_cfg={"k_list": []}), "k_list"),
    (dict(frequency_order="numpy"), "frequency_order"),
    (dict(frequency_order=torch.zeros(1, 2, 4, 1764, dtype=torch.int64)), "exactly once"),
    (dict(frequency_order=torch.zeros(1, 2, 4, 5, dtype=torch.int64)), "shape"),
]


@pytest.mark.parametrize(("arguments", "hint"), BAD, ids=[str(b[0])[:40] for b in BAD])
def test_what_the_published_code_breaks_on_is_a_sentence(arguments, hint):
    whole = dict(in_channels=32, out_channels=48, kernel_size=3) | arguments
    with pytest.raises(UnsupportedLayerError, match=hint):
        FDConv2d(**whole)


GOOD = [
    dict(out_channels=33, kernel_num=3),
    dict(param_reduction=2.0),
    dict(ksm_global_act="softmax", ksm_only_kernel_att=True),
    dict(spatial_freq_decompose=True, ksm_only_kernel_att=True),
    dict(kernel_num=None, kernel_temp=None),
    dict(kernel_size=(3, 1), ksm_only_kernel_att=True),
    dict(kernel_size=5, use_fdconv_if_k_in=[1, 3, 5], use_fbm_if_k_in=[3, 5]),
    dict(kernel_size=2, use_fdconv_if_k_in=[2]),
    dict(padding_mode="reflect"),
    dict(att_grid=4, use_fdconv_if_stride_in=[2]),
    dict(fbm_cfg={"k_list": [2, 4, 8], "global_selection": True, "fs_feat": "x"}),
    dict(use_fbm_if_k_in=[], use_fbm_for_stride=True, stride=2),
    dict(stride=(2, 1)),
    dict(reduction=0.001),
]


@pytest.mark.parametrize("arguments", GOOD, ids=[str(g)[:40] for g in GOOD])
@torch.no_grad()
def test_what_the_published_code_takes_is_taken(arguments):
    layer = FDConv2d(**(dict(in_channels=32, out_channels=48, kernel_size=3) | arguments)).eval()
    assert layer.is_dynamic
    assert torch.isfinite(layer(torch.randn(2, 32, 12, 14))).all()


def test_planes_store_bins_of_their_own():
    """Of a cut spectrum, each plane's in the order of its own indices."""
    rows, half, kept = 20, 11, 110
    generator = torch.Generator().manual_seed(3)
    flat = torch.stack([torch.randperm(rows * half, generator=generator)[:kept] for _ in range(2)])
    order = torch.stack([flat // half, flat % half], 1)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        weight = nn.Conv2d(20, 20, 1).weight
        torch.manual_seed(4)
        layer = FDConv2d(
            20, 20, 1, kernel_num=5, param_ratio=2, param_reduction=0.5,
            frequency_order=order.reshape(2, 2, 5, -1),
        )  # fmt: skip
    expected = kernel_spectrum(weight).flatten(0, 1)[flat]
    assert torch.equal(layer.dft_weight, expected)


@pytest.mark.parametrize("shape", [(32, 12, 14), (0, 32, 12, 14), (2, 31, 12, 14)])
def test_wrong_input_says_what_was_expected(shape):
    with pytest.raises(ValueError, match=r"\(B, 32, H, W\)"):
        FDConv2d(32, 48, 3)(torch.randn(shape))


def test_unknown_arguments_are_named():
    with pytest.raises(TypeError, match=r"FDConv2d has no kernel_nun\. Beside .* kernel_num, "):
        FDConv2d(32, 48, 3, kernel_nun=8)
