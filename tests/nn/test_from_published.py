"""Copies of the published class are known by their structure, and converted exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file
from torch import nn

from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn import FDConv2d, FDLinear, from_published
from fdconv_deploy.nn.from_published import convert_published, is_published
from tests.reference.arguments import layer_arguments
from tests.reference.lively import enliven, error, lively_input
from tests.reference.networks import Wired
from tests.reference.published import FDConv


def copy_of(seed: int = 0, **arguments: Any) -> Any:
    """A lively layer of a user's class."""
    torch.manual_seed(seed)
    given = dict(in_channels=18, out_channels=20, kernel_size=3, padding=1, kernel_num=5)
    layer: Any = FDConv(**(given | arguments))
    layer.is_dynamic = True  # for enliven alone
    enliven(layer, seed)
    del layer.is_dynamic
    return layer


@torch.no_grad()
def test_every_published_fixture(oracle: Path) -> None:
    """The stand-in's structure with the published code's tensors gives the published outputs."""
    converted = 0
    for case in json.loads((oracle / "layers/index.json").read_text())["cases"]:
        tensors = load_file(oracle / "layers" / case["file"])
        layer = FDConv(**case["ctor"]).eval()
        layer.load_state_dict(
            {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
        )
        assert is_published(layer) == case["dynamic"], case["file"]
        if case["dynamic"]:
            ours = from_published(layer)
            assert torch.equal(ours.indices, tensors["buf.indices"].long())
            assert error(ours(tensors["x"]), tensors["y"].reshape(ours(tensors["x"]).shape)) <= 1e-5
            converted += 1
    assert converted > 50


@settings(deadline=None, max_examples=25)
@given(layer_arguments())
@torch.no_grad()
def test_any_arguments(case: tuple[dict[str, Any], tuple[int, int], int]) -> None:
    arguments, size, seed = case
    arguments = arguments | {"fbm_cfg": arguments["fbm_cfg"] or {"k_list": [2, 4]}}
    layer = copy_of(seed, **arguments)
    x = lively_input((2, arguments["in_channels"], *size), seed)
    assert error(from_published(layer)(x), layer(x)) <= 1e-5


@torch.no_grad()
def test_order_is_the_layers_own() -> None:
    order = torch.randperm(60 * 28, generator=torch.Generator().manual_seed(0))
    layer = copy_of(order=order)
    x = lively_input((2, 18, 9, 11))
    ours = from_published(layer)
    assert error(ours(x), layer(x)) <= 1e-5
    other = copy_of()
    assert error(from_published(other)(x), layer(x)) > 1e-2
    # The first published version keeps a list.
    rows = list(layer.indices)
    del layer.indices
    layer.indices = rows
    assert torch.equal(from_published(layer).indices, ours.indices)


def test_tensors_are_shared_and_modes_kept() -> None:
    layer = copy_of()
    ours = from_published(layer)
    assert ours.dft_weight.data_ptr() == layer.dft_weight.data_ptr()
    assert not ours.training
    assert not layer.training
    assert from_published(layer.train()).training
    assert layer.training


def test_epsilons_are_the_layers_own() -> None:
    layer = copy_of()
    layer.KSM_Global.bn.eps = 1e-3
    with pytest.raises(UnsupportedLayerError, match="differs"):
        from_published(layer)  # the stand-in's arithmetic has 1e-5, so the copy contradicts itself


def low_passed(x: torch.Tensor) -> torch.Tensor:
    """``x`` within a circle of frequencies."""
    radius = torch.fft.fftfreq(x.shape[2])[:, None].hypot(torch.fft.rfftfreq(x.shape[3]))
    return torch.fft.irfft2(torch.fft.rfft2(x) * (radius < 0.3), s=x.shape[2:])


def _use_global(layer: Any) -> None:
    layer.KSM_Local.complex_weight = nn.Parameter(torch.zeros(1, 10, 2))


def _no_norm(layer: Any) -> None:
    del layer.KSM_Global.bn


def _several_groups(layer: Any) -> None:
    layer.KSM_Global.bn = nn.GroupNorm(4, 16)


def _instance_norm(layer: Any) -> None:
    del layer.KSM_Global.bn
    layer.KSM_Global.norm = nn.InstanceNorm2d(16)


def _group_norm_in_name_only(layer: Any) -> None:
    """Its arithmetic is that of no normalisation."""
    layer.KSM_Global.bn = nn.GroupNorm(1, 16)
    layer.options["ksm_global_norm"] = "none"


def _no_relu(layer: Any) -> None:
    del layer.KSM_Global.relu


def _no_kernel_heads(layer: Any) -> None:
    del layer.KSM_Global.kernel_fc


def _other_masks(layer: Any) -> None:
    layer.FBM.cached_masks = ~layer.FBM.cached_masks


def _masks_of_other_bands(layer: Any) -> None:
    layer.FBM.k_list = [2, 4, 16]


def _masks_of_parts(layer: Any) -> None:
    layer.FBM.cached_masks = layer.FBM.cached_masks * 0.5


def _own_size_masks_of_radius(layer: Any) -> None:
    """Made per call, but round: neither version's."""
    del layer.FBM.cached_masks
    layer.forward = lambda x: FDConv.forward(layer, low_passed(x))


def _no_spectrum(layer: Any) -> None:
    layer.dft_weight = nn.Parameter(layer.dft_weight.detach()[:, :-1])


def _other_gates(layer: Any) -> None:
    layer.att_multi = 3.0


def _other_arithmetic(layer: Any) -> None:
    del layer.KSM_Global.act_type
    layer.options["ksm_global_act"] = "tanh"


def _other_shape(layer: Any) -> None:
    layer.forward = lambda x: FDConv.forward(layer, x)[:, :5]


def _failing(layer: Any) -> None:
    layer.forward = lambda x: x @ x.flatten()


VARIANTS: list[tuple[Callable[[Any], None], str]] = [
    (
        _use_global,
        r"""converted: Unexpected key\(s\) in state_dict: "KSM_Local\.complex_weight"\. Exp""",
    ),
    (_no_norm, r"has no KSM_Global\.bn"),
    (_several_groups, r"KSM_Global\.bn is a GroupNorm of 4 groups, not a BatchNorm2d"),
    (_instance_norm, r"KSM_Global\.norm is a InstanceNorm2d, not a BatchNorm2d"),
    (_group_norm_in_name_only, "output differs"),
    (_no_relu, r"has no KSM_Global\.relu"),
    (_no_kernel_heads, r"has no KSM_Global\.kernel_fc"),
    (_other_masks, "cached_masks are not the published ones: they are of no k_list"),
    (_masks_of_other_bands, r"they are of k_list \[2\.0, 4\.0, 8\.0\], .* is \[2, 4, 16\]"),
    (_masks_of_parts, "cached_masks cannot be read: it holds other numbers than zeros and ones"),
    (_own_size_masks_of_radius, r"output differs.*suspects: no FBM\.cached_masks"),
    (_no_spectrum, r"size mismatch for dft_weight: .*59, 28, 2.*60, 28, 2"),
    (_other_gates, "att_multi differs"),
    (_other_arithmetic, r"output differs.*no KSM_Global\.act_type, so 'sigmoid'"),
    (_other_shape, r"gives \(2, 5, 9, 11\) where the published layer gives \(2, 20"),
    (_failing, "own forward fails"),
]


@pytest.mark.parametrize(("change", "hint"), VARIANTS, ids=[v[0].__name__ for v in VARIANTS])
def test_variants_are_named(change: Callable[[Any], None], hint: str) -> None:
    layer = copy_of()
    change(layer)
    with pytest.raises(UnsupportedLayerError, match=rf"stem\.conv looks like.*{hint}"):
        from_published(layer, "stem.conv")


@pytest.mark.parametrize("module", [nn.Conv2d(18, 18, 3), nn.Linear(18, 18)])
def test_a_layer_without_attentions_is_refused(module: nn.Module) -> None:
    with pytest.raises(
        UnsupportedLayerError, match=r"it has no .*KSM_Global\.fc, .*KSM_Global\.bn"
    ):
        from_published(module)


def test_a_volume_is_no_image() -> None:
    layer: Any = nn.Conv3d(18, 18, 3)
    layer.KSM_Global = copy_of().KSM_Global
    with pytest.raises(UnsupportedLayerError, match="no 2-d convolution"):
        from_published(layer)


def test_other_layers_are_not_taken_for_it() -> None:
    for module in (FDConv2d(18, 18, 3), FDLinear(18, 18), FDConv(8, 8, 3), nn.Conv2d(18, 18, 3)):
        assert not is_published(module)
    network = nn.Sequential(FDConv2d(18, 18, 3), FDConv(8, 8, 3))
    assert convert_published(network, torch.zeros(1, 18, 5, 5)) == (network, {})


@torch.no_grad()
def test_a_network_is_copied_with_its_layers_converted() -> None:
    kind = dict(out_channels=18, kernel_num=4)
    shared = copy_of(0, **kind)
    network = Wired(
        lambda s, x: s.twin(s.a(x).tanh()) + s.norm(s.block(x)),
        a=shared,
        twin=shared,
        block=nn.Sequential(copy_of(1, **kind, kernel_size=1, padding=0), nn.ReLU()),
        norm=nn.BatchNorm2d(18),
    ).eval()
    said: list[str] = []
    x = lively_input((2, 18, 9, 11))
    converted, assumed = convert_published(network, x, said.append)
    assert assumed == {"a": (), "block.0": ()}
    assert "2 layers of a copy of the published FDConv" in said[0]
    assert "tests.reference.published.FDConv" in said[0]
    assert isinstance(network.a, FDConv)
    assert isinstance(converted.a, FDConv2d)
    assert converted.a is converted.twin
    assert not converted.training
    assert error(converted(x), network(x)) <= 1e-5


FIRST_VERSION = {"k_list": [2, 4, 8], "masks": "per_call"}
COPIES: dict[str, dict[str, Any]] = {
    # C3k2_FDConv blocks of YOLO11 forks, among them one that collects plug-in modules: band
    # modulation of the first published version, masks made in each call from freq.max.
    "first version": {"fbm_cfg": FIRST_VERSION},
    # A fork for small objects: the same, one band and one weight map per channel.
    "first version, a map per channel": {"fbm_cfg": FIRST_VERSION | {"spatial_group": 65}},
    # The same in a network with the low band weighed, too.
    "first version, low band": {"fbm_cfg": {"k_list": [3], "lowfreq_att": True} | FIRST_VERSION},
    # The collection's attention, which trains with one image a batch: GroupNorm(1, C) as bn.
    "GroupNorm as bn": {"ksm_global_norm": "group"},
    # The same as ODConv's forks name it.
    "GroupNorm as norm": {"ksm_global_norm": "group", "norm_name": "norm"},
    # What the published class has in a comment beside its BatchNorm.
    "Identity as bn": {"ksm_global_norm": "none"},
    "both, as the collection has them": {"fbm_cfg": FIRST_VERSION, "ksm_global_norm": "group"},
    # A fork that gives irfft2 s=(d1*k1, d2*k2), so that any number of channels works.
    "odd columns, 3×3": {"in_channels": 17, "kernel_num": 3},
    "odd columns, 1×1": {"in_channels": 33, "kernel_size": 1, "padding": 0, "kernel_num": 4},
    "odd columns, 1×3": {"in_channels": 21, "kernel_size": (1, 3), "padding": 0, "kernel_num": 4},
}


@pytest.mark.parametrize("name", COPIES)
@torch.no_grad()
def test_variants_of_public_copies_are_taken(name: str) -> None:
    """Each as a kind of public copy has it (see ``COPIES``), written anew by the reference."""
    arguments = COPIES[name]
    layer = copy_of(**arguments)
    ours = from_published(layer)
    for size in ((9, 11), (16, 16), (40, 30)):
        x = lively_input((2, layer.in_channels, *size))
        assert error(ours(x), layer(x)) <= 1e-5
    bands = arguments.get("fbm_cfg", {})
    assert ours.FBM is None or ours.FBM.config.masks == bands.get("masks", "cached")
    other = FDConv2d(
        18, 20, 3, kernel_num=5, ksm_global_norm=arguments.get("ksm_global_norm", "batch")
    )
    assert type(ours.KSM_Global.bn) is type(other.KSM_Global.bn)


def test_epsilon_of_a_group_norm_is_the_copys() -> None:
    layer = copy_of(ksm_global_norm="group")
    layer.KSM_Global.bn.eps = 1e-2
    with pytest.raises(UnsupportedLayerError, match="differs"):
        from_published(layer)  # the stand-in's arithmetic has 1e-5


@torch.no_grad()
def test_masks_are_told_where_the_example_cannot() -> None:
    """On a flat image all masks do the same; noise of its size tells them apart."""
    for bands in (FIRST_VERSION, {"k_list": [2, 4, 8]}):
        layer = copy_of(fbm_cfg=bands)
        if "masks" not in bands:
            del layer.FBM.cached_masks
        network = nn.Sequential(layer).eval()
        flat = torch.ones(1, 18, 12, 16) * torch.linspace(-1, 1, 18)[:, None, None]
        converted, assumed = convert_published(network, flat)
        x = lively_input((2, 18, 12, 16))
        assert error(converted(x), network(x)) <= 1e-5
        assert len(assumed["0"]) == 1


def test_what_a_copy_does_not_tell_is_assumed_and_said() -> None:
    layer = copy_of()
    del layer.indices, layer.FBM.cached_masks
    said: list[str] = []
    _, assumed = convert_published(nn.Sequential(layer), lively_input((2, 18, 9, 11)), said.append)
    masks = "no FBM.cached_masks, so band masks as the present version's"
    assert sorted(assumed["0"]) == [masks, "no indices, so 'torch'"]
    assert f"assumed: {masks}; no indices, so 'torch'" in said[0]
