"""The ``fbm_cfg`` of an FDConv network, from its layers' shapes and its config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, Literal

import torch

from fdconv_deploy.checkpoints.evidence import UNSET, Evidence, stated
from fdconv_deploy.checkpoints.infer_layers import Layer
from fdconv_deploy.config import Act, BandModulationConfig, FDConvConfig
from fdconv_deploy.errors import CheckpointError

_DEFAULTS = BandModulationConfig()


def infer_bands(
    dynamic: Sequence[Layer], conv_section: Mapping[str, Any], evidence: Evidence
) -> BandModulationConfig:
    """Bands, groups and kernel of Frequency Band Modulation.

    A layer has one convolution per band, and one more with ``lowfreq_att``: shapes tell
    their sum. Which of the two it is comes from the band masks, if the file saves them, else from
    the config, or from the published defaults.

    Raises:
        CheckpointError: layers differ, neither config nor default explains the sum, or saved
            masks are not those of the bands.
    """
    with_bands = [layer for layer in dynamic if layer.bands]
    there = bool(with_bands)
    section = conv_section.get("fbm_cfg", UNSET)
    given = isinstance(section, Mapping)
    section = dict(section) if given else {}
    if stated(section, "spatial") not in (UNSET, "conv"):
        raise CheckpointError(
            f"The config's fbm_cfg says spatial={section['spatial']!r}; the published code has "
            "'conv' only. Remove it, or give the config this checkpoint was trained with."
        )

    def settle(name: str, kind: Any, **knowledge: Any) -> Any:
        knowledge.setdefault("config", stated(section, name))
        knowledge.setdefault("default", getattr(_DEFAULTS, name))
        return evidence.settle("backbone.conv.fbm_cfg." + name, kind, matters=there, **knowledge)

    kernels = {layer.spatial_kernel for layer in with_bands}
    counts = {layer.bands for layer in with_bands}
    if len(kernels) > 1 or len(counts) > 1:
        raise CheckpointError(
            "Layers differ in their number of bands or in spatial_kernel. Expected one fbm_cfg for "
            "all layers; the file mixes two networks."
        )
    values: dict[str, Any] = {}
    masked = _with_masks(with_bands)
    if there:
        values |= _counted(counts.pop(), given, masked, settle)
    else:
        values = {
            "k_list": settle("k_list", tuple[float, ...]),
            "lowfreq_att": settle("lowfreq_att", bool),
        }
    values["spatial_kernel"] = settle(
        "spatial_kernel", int, exact=kernels.pop() if there else UNSET
    )
    values["spatial_group"] = _groups(with_bands, settle)
    values["act"] = settle("act", Act)
    values |= _made_at(masked, values["k_list"], settle)
    return BandModulationConfig(**values)


def _with_masks(with_bands: Sequence[Layer]) -> Layer | None:
    """A layer whose masks the file saves, if it saves any."""
    masked = [layer for layer in with_bands if layer.masks is not None]
    if not masked:
        return None
    first = masked[0].masks
    assert first is not None
    for layer in masked:
        assert layer.masks is not None
        if not torch.equal(first.masks, layer.masks.masks):
            raise CheckpointError(
                f"The saved band masks differ between layers: {masked[0].name}.FBM.cached_masks, "
                f"{_described(masked[0])}, and {layer.name}.FBM.cached_masks, {_described(layer)}. "
                "Expected the same fbm_cfg for all layers; the file mixes two networks."
            )
    if first.k_list is None:
        raise CheckpointError(
            f"{masked[0].name}.FBM.cached_masks, {tuple(first.masks.shape)}, are not the published "
            "band masks of any k_list. Expected, for each band k, all frequencies below 0.5 / k "
            "in both directions; a network with masks of its own cannot be built here."
        )
    return masked[0]


def _described(layer: Layer) -> str:
    assert layer.masks is not None
    return f"of shape {tuple(layer.masks.masks.shape)}, those of k_list {_listed(layer)}"


def _listed(layer: Layer) -> list[float] | None:
    assert layer.masks is not None
    return None if layer.masks.k_list is None else list(layer.masks.k_list)


def _made_at(masked: Layer | None, k_list: tuple[float, ...], settle: Any) -> dict[str, Any]:
    """``max_size`` and ``masks``."""
    if masked is None or masked.masks is None:
        return {
            "max_size": settle("max_size", tuple[int, int]),
            "masks": settle("masks", Literal["cached", "per_call"]),
        }
    saved, shape = masked.masks, tuple(masked.masks.masks.shape)
    size = settle(
        "max_size",
        tuple[int, int],
        accepts=lambda value: saved.are_of(k_list, value),
        derived=saved.size_for(k_list),
        source="saved buffers",
        tells=f"{masked.name}.FBM.cached_masks have shape {shape}, as masks made at "
        f"{saved.size_for(k_list)}",
    )
    kind = settle(
        "masks",
        Literal["cached", "per_call"],
        exact="cached",
        source="saved buffers",
        tells=f"{masked.name}.FBM.cached_masks are in the file",
    )
    return {"max_size": size, "masks": kind}


def _counted(count: int, given: bool, masked: Layer | None, settle: Any) -> dict[str, Any]:
    tells = (
        f"the weights have {count} band convolutions a layer, which is one per band and one more "
        "with lowfreq_att"
    )
    knowledge: dict[str, Any] = {"default": _DEFAULTS.k_list if count > 1 else (2.0,)}
    if given:
        # The published code reads an fbm_cfg without k_list as one band, [2].
        knowledge["default"] = (2.0,)

    def explains(value: tuple[float, ...]) -> bool:
        return len(value) >= 1 and count - len(value) in (0, 1)

    accepts = explains
    if masked is not None and masked.masks is not None and masked.masks.k_list is not None:
        saved, told = masked.masks, masked.masks.k_list
        tells = f"{masked.name}.FBM.cached_masks are the masks of k_list {list(told)}"
        if not explains(told):
            raise CheckpointError(
                f"{tells}, {len(told)} bands, and {masked.name} has {count} band convolutions. "
                "Expected one per band, and one more with lowfreq_att; the file mixes two networks."
            )
        # Bands that have the same masks are the same network.
        knowledge |= {"derived": told, "source": "saved buffers"}

        def accepts(value: tuple[float, ...]) -> bool:
            return saved.size_for(value) is not None

    bands = settle(
        "k_list",
        tuple[float, ...],
        accepts=accepts,
        tells=tells,
        note=f"{count} convolutions a layer: {count} bands, or {count - 1} and lowfreq_att"
        if count > 1
        else "",
        **knowledge,
    )
    low = settle(
        "lowfreq_att",
        bool,
        exact=count == len(bands) + 1,
        tells=f"{tells}; with k_list {list(bands)} that leaves {count - len(bands)} for it",
    )
    return {"k_list": bands, "lowfreq_att": low}


def _groups(with_bands: Sequence[Layer], settle: Any) -> int:
    groups = {layer.spatial_group for layer in with_bands}
    per_channel = all(layer.spatial_group == layer.in_channels for layer in with_bands)

    def explains(value: int) -> bool:
        # Above 64 the published code reads "one group per channel".
        return per_channel if value > 64 else groups <= {value}

    if not per_channel and len(groups) > 1:
        raise CheckpointError(
            f"spatial_group differs between layers ({sorted(groups)}). Expected one for all layers."
        )
    derived = UNSET
    if with_bands:
        derived = next(iter(groups)) if len(groups) == 1 else 65
    result: int = settle(
        "spatial_group",
        int,
        accepts=explains,
        derived=derived,
        tells=f"the weights' band convolutions have {sorted(groups)} groups",
    )
    return result


def places_of_bands(
    layers: Sequence[Layer],
    strided: Mapping[str, frozenset[str]],
    styles: Sequence[str],
    section: Mapping[str, Any],
    evidence: Evidence,
) -> tuple[tuple[int, ...], bool, set[str]]:
    """Which layers modulate bands → ``use_fbm_if_k_in``, ``use_fbm_for_stride``, styles.

    Args:
        layers: the convolutions ``conv_cfg`` applies to.
        strided: for each ResNet style, the layers with a stride above 1.
        styles: the styles that may be: one if the config or the user says so.
        section: the config's ``conv_cfg``.
        evidence: takes the facts.

    Raises:
        CheckpointError: no rule by kernel size and stride explains the weights.
    """
    dynamic = [layer for layer in layers if layer.dynamic]

    def explain(sizes: Iterable[int], by_stride: bool, style: str) -> bool:
        return all(
            bool(layer.bands)
            == (layer.kernel[0] in sizes or (by_stride and layer.name in strided[style]))
            for layer in dynamic
        )

    sizes_seen = sorted({layer.kernel[0] for layer in dynamic})
    seen = tuple(k for k in sizes_seen if all(la.bands for la in dynamic if la.kernel[0] == k))
    if not any(explain(seen, *rule) for rule in product((False, True), styles)):
        raise CheckpointError(
            "Which layers modulate bands follows neither kernel size nor stride. Expected FBM on "
            "all layers of a kernel size, or on those with a stride as well; if the network's "
            "strides or style are unusual, give its config."
        )
    tells = f"the weights have FBM on kernel sizes {seen} and elsewhere by stride only"
    sizes = evidence.settle(
        "backbone.conv.use_fbm_if_k_in",
        tuple[int, ...],
        config=stated(section, "use_fbm_if_k_in"),
        default=FDConvConfig().use_fbm_if_k_in,
        accepts=lambda value: any(explain(value, *r) for r in product((False, True), styles)),
        derived=seen,
        source="names",
        tells=tells,
        matters=bool(dynamic),
    )
    by_stride = evidence.settle(
        "backbone.conv.use_fbm_for_stride",
        bool,
        config=stated(section, "use_fbm_for_stride"),
        default=False,
        accepts=lambda value: any(explain(sizes, value, style) for style in styles),
        derived=True,
        source="names",
        tells=tells,
        matters=bool(dynamic),
    )
    return sizes, by_stride, {style for style in strided if explain(sizes, by_stride, style)}
