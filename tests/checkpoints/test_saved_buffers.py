"""Buffers that some copies of the published class save, and variants that a state dict shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fdconv_deploy.checkpoints import inspect_checkpoint, load_checkpoint, read_checkpoint
from fdconv_deploy.checkpoints.config_writer import format_config
from fdconv_deploy.config import BandModulationConfig, FDConvConfig
from fdconv_deploy.demo import packaged_checkpoint
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.nn import Segmentor
from fdconv_deploy.nn.fdconv import dynamic_layers
from tests.checkpoints.small import small_architecture, weights_of
from tests.checkpoints.test_loading import logits
from tests.reference.spectrum import band_mask

CONV = FDConvConfig(kernel_num=4)
MASKS = ".FBM.cached_masks"


def masks_of(k_list: tuple[float, ...] = (2, 4, 8), size: tuple[int, int] = (64, 64)) -> Tensor:
    """The published buffer, by the reference: ``(bands, 1, height, width // 2 + 1)`` bool."""
    return torch.stack([torch.from_numpy(band_mask(k, *size, size)) for k in k_list])[:, None]


def small_network(**conv: Any) -> Segmentor:
    """A small segmentor with weights that do something."""
    architecture = small_architecture(conv=CONV.model_copy(update=conv), base_channels=18)
    network = Segmentor(architecture)
    state = weights_of(architecture)
    network.load_state_dict({key: state[key] for key in network.state_dict()})
    return network.eval()


def with_masks(network: Segmentor, masks: Tensor) -> dict[str, Tensor]:
    banded = [n for n, layer in dynamic_layers(network).items() if layer.FBM is not None]
    assert len(banded) > 3
    return dict(network.state_dict()) | {f"{name}{MASKS}": masks.clone() for name in banded}


def saved(path: Path, state: dict[str, Tensor], config: str | None = None) -> Path:
    meta = {} if config is None else {"cfg": config}
    torch.save({"state_dict": state, "meta": meta}, path)
    return path


def test_packaged_checkpoint_with_saved_masks_is_the_same_network(tmp_path: Path) -> None:
    """As of copies that register ``cached_masks`` as a persistent buffer."""
    checkpoint = read_checkpoint(packaged_checkpoint())
    state = dict(checkpoint.state_dict)
    for key in [k for k in state if k.endswith("FBM.freq_weight_conv_list.0.weight")]:
        state[key.replace(".FBM.freq_weight_conv_list.0.weight", MASKS)] = masks_of()
    torch.save({"state_dict": state, "meta": checkpoint.meta}, tmp_path / "masks.pth")
    network, plain = load_checkpoint(tmp_path / "masks.pth"), load_checkpoint(packaged_checkpoint())
    assert network.architecture == plain.architecture
    assert torch.equal(logits(network), logits(plain))
    report = inspect_checkpoint(tmp_path / "masks.pth")
    assert report.problem is report.refusal is None
    told = {fact.field: fact for fact in report.found}
    for field in ("k_list", "max_size", "masks"):
        assert told[f"backbone.conv.fbm_cfg.{field}"].source == "saved buffers"
    before = inspect_checkpoint(packaged_checkpoint())
    assert report.parameters == before.parameters


@pytest.mark.parametrize(
    "kind", [torch.bool, torch.float32, torch.float16, torch.uint8, torch.complex64], ids=str
)
def test_saved_masks_of_any_type_tell_bands_and_size(tmp_path: Path, kind: torch.dtype) -> None:
    """Three convolutions a layer, but neither the published bands nor their size."""
    bands = BandModulationConfig(k_list=(2, 3, 16), max_size=(32, 48))
    network = small_network(fbm_cfg=bands)
    state = with_masks(network, masks_of((2, 3, 16), (32, 48)).to(kind))
    loaded = load_checkpoint(saved(tmp_path / "a.pth", state))
    assert loaded.architecture.backbone.conv is not None
    assert loaded.architecture.backbone.conv.fbm_cfg == bands
    assert torch.equal(logits(loaded), logits(network))


def test_saved_masks_tell_how_many_bands_there_are(tmp_path: Path) -> None:
    """Of three convolutions a layer, one is the low band's."""
    bands = BandModulationConfig(k_list=(4, 8), lowfreq_att=True)
    network = small_network(fbm_cfg=bands)
    state = with_masks(network, masks_of((4, 8)))
    loaded = load_checkpoint(saved(tmp_path / "a.pth", state))
    assert torch.equal(logits(loaded), logits(network))
    without = load_checkpoint(saved(tmp_path / "b.pth", dict(network.state_dict())))
    assert without.architecture.backbone.conv is not None
    assert without.architecture.backbone.conv.fbm_cfg.k_list == (2, 4, 8)


def _one_layer_differs(state: dict[str, Tensor]) -> None:
    last = [key for key in state if key.endswith(MASKS)][-1]
    state[last] = masks_of((2, 4, 16))


def _every(value: Any) -> Any:
    def change(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if key.endswith(MASKS)]:
            state[key] = value(state[key]) if callable(value) else value.clone()

    return change


CONTRADICTIONS: dict[str, tuple[Any, str]] = {
    "other bands": (
        _every(masks_of((2, 4, 16))),
        r"fbm_cfg\.k_list: the config says \(2\.0, 4\.0, 8\.0\), but .*conv\d\.FBM\.cached_masks "
        r"are the masks of k_list \[2\.0, 4\.0, 16\.0\]",
    ),
    "another size": (
        _every(masks_of((2, 4, 8), (32, 32))),
        r"fbm_cfg\.max_size: the config says \(64, 64\), but .*cached_masks have shape "
        r"\(3, 32, 17\), as masks made at \(32, 32\)",
    ),
    "another number of bands": (
        _every(masks_of((2,))),
        r"cached_masks are the masks of k_list \[2\.0\], 1 bands, and .* has 3 band convolutions",
    ),
    "no bands' masks": (_every(lambda m: ~m), "are not the published band masks of any k_list"),
    "parts of masks": (_every(lambda m: m * 0.5), "other numbers than zeros and ones"),
    "complex masks": (_every(lambda m: m * 1j), "holds complex numbers"),
    "flat": (_every(lambda m: m.flatten()), r"has shape \(6336,\); expected \(bands, 1, height"),
    "one layer's": (
        _one_layer_differs,
        r"differ between layers: .*cached_masks, of shape \(3, 64, 33\), those of k_list "
        r"\[2\.0, 4\.0, 8\.0\], and .*those of k_list \[2\.0, 4\.0, 16\.0\]",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_masks_that_contradict_are_refused_with_what_was_expected(
    tmp_path: Path, name: str
) -> None:
    change, says = CONTRADICTIONS[name]
    network = small_network()
    state = with_masks(network, masks_of())
    change(state)
    path = saved(tmp_path / "a.pth", state, format_config(network.architecture))
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(path)
    assert inspect_checkpoint(path).problem is not None


def indices_of(network: Segmentor, order: str) -> dict[str, Tensor]:
    """Every layer's indices in an order; ``random`` is one of its own."""
    result, generator = {}, torch.Generator().manual_seed(0)
    if order == "random":
        for name, layer in dynamic_layers(network).items():
            _, _, groups, size = layer.indices.shape
            mixed = torch.randperm(groups * size, generator=generator)
            flat = layer.indices.flatten(2)[:, :, mixed]
            result[name] = flat.unflatten(2, (groups, size))
        return result
    from fdconv_deploy.nn.spectrum import frequency_indices

    for name, layer in dynamic_layers(network).items():
        result[name] = frequency_indices(
            layer.rows,
            layer.columns,
            layer.kernel_num,
            order=order,  # type: ignore[arg-type]
        )
    return result


@pytest.mark.parametrize("order", ["torch", "stable", "random"])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.float32], ids=str)
def test_saved_indices_decide_the_order(tmp_path: Path, order: str, kind: torch.dtype) -> None:
    network = small_network()
    indices = indices_of(network, order)
    state = dict(network.state_dict())
    state |= {f"{name}.indices": value.to(kind) for name, value in indices.items()}
    loaded = load_checkpoint(saved(tmp_path / "a.pth", state))
    for name, layer in dynamic_layers(network).items():
        layer.indices = indices[name]
        assert torch.equal(dynamic_layers(loaded)[name].indices, indices[name])
    assert torch.equal(logits(loaded), logits(network))
    assert loaded.order.name == ("saved" if order == "random" else order)
    assert not loaded.order.assumed
    report = inspect_checkpoint(tmp_path / "a.pth")
    assert report.problem is None
    assert report.frequency_order is not None
    assert report.frequency_order.order == (None if order == "random" else order)
    assert "The file holds the indices of" in report.frequency_order.reasons[0]


def test_an_order_that_contradicts_saved_indices_is_refused(tmp_path: Path) -> None:
    network = small_network()
    state = dict(network.state_dict())
    state |= {f"{name}.indices": i for name, i in indices_of(network, "stable").items()}
    path = saved(tmp_path / "a.pth", state)
    with pytest.raises(CheckpointError, match=r"'torch', but the file saves another.*'stable'"):
        load_checkpoint(path, frequency_order="torch")
    assert load_checkpoint(path, frequency_order="stable").order.name == "stable"


def _repeated(indices: Tensor) -> Tensor:
    indices = indices.clone()
    indices[..., -1] = indices[..., 0]
    return indices


BAD_INDICES: dict[str, tuple[Any, str]] = {
    "a bin twice": (_repeated, "They must name each kept frequency bin exactly once"),
    "too few": (lambda i: i[..., :-1], r"torch\.int64 \(1, 2, 4, \d+\), are no frequency indices"),
    "one plane": (lambda i: i[0], r"torch\.int64 \(2, 4, \d+\), are no frequency indices"),
    "parts": (lambda i: i + 0.5, r"torch\.float32 .* are no frequency indices"),
    "beyond the spectrum": (lambda i: i + 1000, "exactly once"),
    "complex": (lambda i: i * (1 + 0j), "are no frequency indices"),
    "other groups": (lambda i: i.reshape(1, 2, 2, -1), r"They must have shape \(1, 2, 4, \d+\)"),
}


@pytest.mark.parametrize("name", BAD_INDICES)
def test_indices_that_are_none_are_refused_by_layer(tmp_path: Path, name: str) -> None:
    change, says = BAD_INDICES[name]
    network = small_network()
    state = dict(network.state_dict())
    state |= {f"{n}.indices": change(i) for n, i in indices_of(network, "torch").items()}
    path = saved(tmp_path / "a.pth", state)
    with pytest.raises(CheckpointError, match=rf"backbone\.layer\d.*\.indices.*{says}"):
        load_checkpoint(path)
    assert inspect_checkpoint(path).problem is not None


def test_buffers_of_no_layer_are_left_over(tmp_path: Path) -> None:
    network = small_network()
    state = dict(network.state_dict()) | {"backbone.conv1.indices": torch.zeros(1, 2, 4, 9)}
    with pytest.raises(CheckpointError, match=r"left over: backbone\.conv1\.indices"):
        load_checkpoint(saved(tmp_path / "a.pth", state))


VARIANTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "GroupNorm": ({"ksm_global_norm": "group"}, 18, "taken for GroupNorm(1, C)"),
    "no normalisation": ({"ksm_global_norm": "none"}, 18, "taken for Identity"),
    "odd columns": ({"kernel_num": 2}, 17, ""),
    "odd columns, 1×1 too": ({"kernel_num": 19, "ksm_global_norm": "group"}, 19, "GroupNorm"),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("called", ["bn", "norm"])
def test_variants_that_a_state_dict_shows_are_built(tmp_path: Path, name: str, called: str) -> None:
    """Copies that put GroupNorm(1, C) or Identity in BatchNorm's place, as ``bn`` or ``norm``,
    and copies that give ``irfft2`` its size."""
    conv, base, note = VARIANTS[name]
    architecture = small_architecture(
        depth=50 if "1×1" in name else 18,
        conv=FDConvConfig(**({"kernel_num": 4} | conv)),
        base_channels=base,
        num_stages=2,
        out_indices=(0, 1),
    )
    network = Segmentor(architecture).eval()
    weights = weights_of(architecture)
    network.load_state_dict(weights)
    state = {k.replace("KSM_Global.bn.", f"KSM_Global.{called}."): v for k, v in weights.items()}
    loaded = load_checkpoint(saved(tmp_path / "a.pth", state))
    assert loaded.architecture.backbone.conv == architecture.backbone.conv
    assert torch.equal(logits(loaded), logits(network))
    assert any(note in said for said in loaded.inference.notes) or not note
    told = load_checkpoint(saved(tmp_path / "b.pth", state, format_config(architecture)))
    assert told.architecture.backbone == architecture.backbone


def test_a_normalisation_that_contradicts_the_config_is_refused(tmp_path: Path) -> None:
    network = small_network(ksm_global_norm="group")
    with pytest.raises(
        CheckpointError,
        match=r"ksm_global_norm: the command line says 'batch', but the weights have a scale and a "
        r"shift without running statistics under layer\d.*KSM_Global\.bn",
    ):
        load_checkpoint(
            saved(tmp_path / "a.pth", dict(network.state_dict())),
            overrides={"backbone.conv.ksm_global_norm": "batch"},
        )


def test_masks_made_per_call_are_told_by_the_user(tmp_path: Path) -> None:
    """The first published version saves no masks, so that a file cannot tell it."""
    network = small_network(fbm_cfg=BandModulationConfig(masks="per_call"))
    path = saved(tmp_path / "a.pth", dict(network.state_dict()))
    assumed = load_checkpoint(path)
    field = "backbone.conv.fbm_cfg.masks"
    assert field in {fact.field for fact in assumed.inference.assumed}
    assert not torch.equal(logits(assumed), logits(network))
    told = load_checkpoint(path, overrides={field: "per_call"})
    assert torch.equal(logits(told), logits(network))
    masked = saved(tmp_path / "b.pth", with_masks(network, masks_of()))
    with pytest.raises(CheckpointError, match=r"says 'per_call', but .*cached_masks are in the f"):
        load_checkpoint(masked, overrides={field: "per_call"})


def test_complex_spectra_are_the_same_numbers(tmp_path: Path) -> None:
    network = small_network()
    state = {
        key: torch.view_as_complex(value) if key.endswith(".dft_weight") else value
        for key, value in network.state_dict().items()
    }
    assert torch.equal(logits(load_checkpoint(saved(tmp_path / "a.pth", state))), logits(network))
    name = next(key for key in state if key.endswith("KSM_Global.fc.weight"))
    state[name] = state[name] + 0j
    with pytest.raises(CheckpointError, match=r"fc\.weight holds complex numbers"):
        load_checkpoint(saved(tmp_path / "b.pth", state))
