"""The ``conv_cfg`` of a backbone, ``fbm_cfg`` included, from its layers and its config."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import torch

from fdconv_deploy.checkpoints.config_parser import UNSET
from fdconv_deploy.checkpoints.settings import SettingResolver
from fdconv_deploy.checkpoints.state_dict import Layer
from fdconv_deploy.config import AttentionNorm, BandModulationConfig, FDConvConfig
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.nn.band_modulation import SavedMasks

# Reductions people use, tried before any other that fits.
_USUAL_REDUCTIONS = (1 / 16, 1 / 32, 1 / 8, 1 / 4, 1 / 2, 1 / 64)
# What a state dict holds of each normalisation, and what is assumed of those that are not the
# published one.
_STORED: dict[AttentionNorm, str] = {
    "batch": "running statistics",
    "group": "a scale and a shift without running statistics",
    "none": "nothing",
}
_NORM_NOTES: dict[AttentionNorm, str] = {
    "group": "The attention's normalisation has a scale and a shift and no running statistics: "
    "taken for GroupNorm(1, C) with epsilon 1e-5, as public copies of FDConv have it; weights do "
    "not show its number of groups or epsilon.",
    "none": "The attention has no normalisation (nothing under KSM_Global.bn): taken for Identity, "
    "as public copies of FDConv have it; one without weights of its own would look the same.",
}

Conv = SettingResolver[FDConvConfig]
Bands = SettingResolver[BandModulationConfig]


def infer_conv(
    layers: Sequence[Layer],
    settings: SettingResolver[Any],
    strided: Mapping[str, Collection[str]] | None = None,
    styles: Sequence[str] = ("",),
) -> tuple[FDConvConfig | None, set[str]]:
    """A backbone's or head's FDConv config, None if it is plain; and ResNet styles that agree.

    Args:
        layers: those that FDConv may replace in it.
        settings: the backbone's or head's.
        strided: for each ResNet style, the layers with a stride above 1.
        styles: those that are possible: one if the config or the user gives it.
    """
    section, strided = settings.section, strided or {"": ()}
    owner = settings.prefix.removesuffix(".")
    dynamic = [layer for layer in layers if layer.dynamic]
    conv_cfg = section.stated("conv_cfg")
    written = section.section("conv_cfg")
    fdconv = written.type == "FDConv"
    if section and not fdconv and dynamic and conv_cfg is not UNSET:
        raise CheckpointError(
            f"The config's {owner} has conv_cfg={conv_cfg!r}, but the weights have {len(dynamic)} "
            f"FDConv layers, e.g. {dynamic[0].name}. Give the config they were trained with."
        )
    if not dynamic and not fdconv:
        settings.exact("names", conv=None)
        return None, set(strided)
    if not dynamic:
        _check_all_plain(layers, written)
    evidence, fields = settings.evidence, f"{settings.prefix}conv"
    conv = SettingResolver(evidence, FDConvConfig, fields, written)
    _thresholds(conv, layers)
    bands = SettingResolver(
        evidence, BandModulationConfig, f"{fields}.fbm_cfg", written.section("fbm_cfg")
    )
    if not dynamic:  # nothing but the thresholds has an effect
        return conv.build(matters=False, fbm_cfg=bands.build(matters=False)), set(strided)
    agreeing = _band_layers(conv, dynamic, strided, styles)
    _spectrum(conv, dynamic)
    _attention(conv, dynamic)
    if conv.values["ksm_global_norm"] in _NORM_NOTES:
        evidence.notes.append(_NORM_NOTES[conv.values["ksm_global_norm"]])
    given = isinstance(written.get("fbm_cfg"), dict)
    return conv.build(fbm_cfg=_bands(bands, dynamic, given)), agreeing


def _check_all_plain(layers: Sequence[Layer], conv_cfg: Mapping[str, Any]) -> None:
    threshold = conv_cfg.get("use_fdconv_if_c_gt", 16)
    sizes = conv_cfg.get("use_fdconv_if_k_in", (1, 3))
    if not isinstance(threshold, int) or not isinstance(sizes, (list, tuple)):
        return
    for layer in layers:
        if min(layer.in_channels, layer.out_channels) > threshold and layer.kernel[0] in sizes:
            raise CheckpointError(
                f"The config says FDConv, but the weights are of plain layers: {layer.name} "
                "should have KSM_Global and has not. Use the checkpoint trained with this config; "
                "fdconv_deploy.checkpoints.convert_state_dict starts one from plain weights."
            )


def _band_layers(
    settings: Conv,
    dynamic: Sequence[Layer],
    strided: Mapping[str, Collection[str]],
    styles: Sequence[str],
) -> set[str]:
    """Which layers modulate bands: by kernel size, and by stride in one of the styles."""

    def explain(sizes: Iterable[int], strides: Sequence[bool], styles: Sequence[str]) -> bool:
        return any(
            all(
                bool(layer.bands)
                == (layer.kernel[0] in sizes or (by_stride and layer.name in strided[style]))
                for layer in dynamic
            )
            for by_stride, style in product(strides, styles)
        )

    either = (False, True)
    without = {layer.kernel[0] for layer in dynamic if not layer.bands}
    seen = tuple(sorted({layer.kernel[0] for layer in dynamic} - without))
    if not explain(seen, either, styles):
        raise CheckpointError(
            "Which layers modulate bands follows neither kernel size nor stride. Expected FBM on "
            "all layers of a kernel size, or on those with a stride as well; if the network's "
            "strides or style are unusual, give its config."
        )
    because = f"the weights have FBM on kernel sizes {seen} and elsewhere by stride only"
    sizes = settings.resolve(
        "use_fbm_if_k_in",
        accepts=lambda value: explain(value, either, styles),
        derived=seen,
        source="names",
        because=because,
    )
    by_stride = settings.resolve(
        "use_fbm_for_stride",
        accepts=lambda value: explain(sizes, [value], styles),
        derived=True,
        source="names",
        because=because,
    )
    return {style for style in strided if explain(sizes, [by_stride], [style])}


def _thresholds(settings: Conv, layers: Sequence[Layer]) -> None:
    """Which layers are dynamic: by kernel sizes and the channel threshold."""

    def bounds(sizes: Iterable[int]) -> tuple[float, float]:
        """The threshold is at least the first and below the second."""
        widths = {True: [math.inf], False: [0.0]}
        for layer in layers:
            width = min(layer.in_channels, layer.out_channels)
            if layer.kernel[0] in sizes:
                widths[layer.dynamic].append(width)
            elif layer.dynamic:
                return math.inf, 0
        return max(widths[False]), min(widths[True])

    def explain(sizes: Iterable[int]) -> bool:
        low, high = bounds(sizes)
        return low < high

    seen = tuple(sorted({layer.kernel[0] for layer in layers if layer.dynamic}))
    if not explain(seen):
        raise CheckpointError(
            "Which layers are FDConv layers follows no channel threshold: one with fewer channels "
            "is dynamic and one with more, of the same kernel size, is not. Expected all layers "
            "above use_fdconv_if_c_gt; a network changed by hand cannot be inferred."
        )
    sizes = settings.resolve(
        "use_fdconv_if_k_in",
        accepts=explain,
        derived=seen,
        source="names",
        because=f"the FDConv layers of the weights have kernel sizes {seen}",
    )
    low, high = bounds(sizes)
    settings.resolve(
        "use_fdconv_if_c_gt",
        accepts=lambda value: low <= value < high,
        derived=int(low),
        source="names",
        because=f"the weights are plain up to {low:g} channels and FDConv from {high:g}",
    )


def _spectrum(settings: Conv, dynamic: Sequence[Layer]) -> None:
    """How the spectrum is stored and cut into groups."""
    settings.exact("names", convert_param=_same(dynamic, "convert_param"))
    whole = settings.values["convert_param"]
    linear = UNSET if whole else _same(dynamic, "linear_mode")
    settings.resolve("linear_mode", exact=linear, source="names", matters=not whole)
    lengths = {layer.attentions for layer in dynamic}
    entries = f"the kernel attentions have {_few(lengths)} entries"
    ratio = settings.resolve(
        "param_ratio",
        exact=_same(dynamic, "param_ratio"),
        accepts=lambda value: value > 0 and all(length % value == 0 for length in lengths),
        because=entries,
    )
    groups = [layer.attentions // ratio for layer in dynamic]
    halves = [layer.out_channels // 2 for layer in dynamic]
    several = len(set(groups)) > 1
    if several and groups != halves:
        raise _mixed(
            f"kernel_num differs between layers ({_few(groups)}) and is not half their output "
            "channels",
            "one kernel_num, or None,",
        )
    settings.resolve(
        "kernel_num",
        exact=None if several else UNSET,
        accepts=lambda value: value == groups[0] or (value is None and groups == halves),
        derived=groups[0],
        because=f"{entries}, for param_ratio {ratio}",
    )
    cut = [layer for layer in dynamic if len(layer.spectrum) == 3]
    if not cut:
        settings.resolve(
            "param_reduction",
            # Above 1 it only divides alpha, which no shape shows.
            accepts=lambda value: value >= 1,
            because="the weights hold whole spectra",
        )
        return
    if len(cut) < len(dynamic):
        raise _mixed(
            f"{cut[0].name} stores part of its spectrum and other layers all of it",
            "one param_reduction",
        )
    kept = max(layer.kept_bins / layer.bins for layer in cut)
    _reduction(
        settings,
        "param_reduction",
        kept,
        lambda value: 0 < value < 1 and all(int(la.bins * value) == la.kept_bins for la in cut),
        f"the weights store {kept:.1%} of each spectrum",
    )


def _attention(settings: Conv, dynamic: Sequence[Layer]) -> None:
    """Kernel spatial modulation: which branches there are, their sizes, their functions."""
    local = _same(dynamic, "use_ksm_local")
    only_kernel = _same(dynamic, "ksm_only_kernel_att")
    settings.exact("names", use_ksm_local=local, ksm_only_kernel_att=only_kernel)
    _reduction(
        settings,
        "reduction",
        max((la.hidden / la.in_channels for la in dynamic if la.hidden > 16), default=0),
        lambda value: all(max(int(la.in_channels * value), 16) == la.hidden for la in dynamic),
        f"the attentions have {_few({layer.hidden for layer in dynamic})} hidden channels",
    )
    settings.resolve(
        "ksm_global_act",
        accepts=lambda value: value != "softmax" or only_kernel,
        because="softmax needs ksm_only_kernel_att=True, and the weights have the other attentions",
    )
    norm = _same(dynamic, "ksm_global_norm")
    settings.resolve(
        "ksm_global_norm",
        exact=norm,
        source="names",
        because=f"the weights have {_STORED[norm]} under {dynamic[0].name}.KSM_Global.bn",
    )
    settings.resolve("ksm_local_act", matters=local)
    settings.resolve("att_multi", matters=local or not only_kernel)
    # kernel_num=None sets the kernel temperature by itself.
    settings.resolve("kernel_temp", matters=settings.values["kernel_num"] is not None)
    settings.resolve("temp", matters=not only_kernel)


def _bands(settings: Bands, dynamic: Sequence[Layer], given: bool) -> BandModulationConfig:
    """Bands, groups and kernel of Frequency Band Modulation, whose config may be ``given``."""
    banded = [layer for layer in dynamic if layer.bands]
    spatial = settings.section.stated("spatial")
    if spatial not in (UNSET, "conv"):
        raise CheckpointError(
            f"The config's fbm_cfg has spatial={spatial!r}; the published code has 'conv' only. "
            "Remove it, or give the config this checkpoint was trained with."
        )
    if len({(layer.spatial_kernel, layer.bands) for layer in banded}) > 1:
        raise _mixed("Layers differ in their number of bands or in spatial_kernel", "one fbm_cfg")
    if not banded:
        return settings.build(matters=False)
    buffer, saved = _saved_masks(banded)
    k_list = _band_count(settings, banded[0], given, buffer, saved)
    settings.exact("shapes", spatial_kernel=banded[0].spatial_kernel)
    groups = sorted({layer.spatial_group for layer in banded})
    per_channel = all(layer.spatial_group == layer.in_channels for layer in banded)
    if not per_channel and len(groups) > 1:
        raise _mixed(f"spatial_group differs between layers ({groups})", "one spatial_group")
    settings.resolve(
        "spatial_group",
        # Above 64 the published code reads "one group per channel".
        accepts=lambda value: per_channel if value > 64 else groups == [value],
        derived=groups[0] if len(groups) == 1 else 65,
        because=f"the weights' band convolutions have {groups} groups",
    )
    if saved is not None:
        size = saved.size_for(k_list)
        settings.resolve(
            "max_size",
            accepts=lambda value: saved.are_of(k_list, value),
            derived=size,
            source="saved buffers",
            because=f"{buffer} have shape {tuple(saved.masks.shape)}, as masks made at {size}",
        )
        because = f"{buffer} are in the file"
        settings.resolve("masks", exact="cached", source="saved buffers", because=because)
    return settings.build()


def _saved_masks(banded: Sequence[Layer]) -> tuple[str, SavedMasks | None]:
    """The band masks of all layers and the buffer's name; None if the file saves none."""
    masked = [(f"{la.name}.FBM.cached_masks", la.masks) for la in banded if la.masks is not None]
    if not masked:
        return "", None
    name, saved = masked[0]
    for other_name, other in masked:
        if not torch.equal(saved.masks, other.masks):
            raise _mixed(
                f"The saved band masks differ between layers: {_described(name, saved)}, and "
                f"{_described(other_name, other)}",
                "the same fbm_cfg",
            )
    if saved.k_list is None:
        raise CheckpointError(
            f"{name}, {tuple(saved.masks.shape)}, are not the published band masks of any k_list. "
            "Expected, for each band k, all frequencies below 0.5 / k in both directions; a "
            "network with masks of its own cannot be built here."
        )
    return name, saved


def _described(name: str, saved: SavedMasks) -> str:
    k_list = None if saved.k_list is None else list(saved.k_list)
    return f"{name}, of shape {tuple(saved.masks.shape)}, those of k_list {k_list}"


def _band_count(
    settings: Bands, layer: Layer, given: bool, buffer: str, saved: SavedMasks | None
) -> tuple[float, ...]:
    """``k_list`` and ``lowfreq_att``, of which shapes give the sum.

    Which of a layer's convolutions is the low band's comes from the band masks, if the file saves
    them, else from the config, or from the published defaults.
    """
    count = layer.bands
    because = (
        f"the weights have {count} band convolutions a layer, which is one per band and one more "
        "with lowfreq_att"
    )

    def explains(value: tuple[float, ...]) -> bool:
        return len(value) >= 1 and count - len(value) in (0, 1)

    derived = UNSET
    if saved is not None and saved.k_list is not None:
        derived = saved.k_list
        because = f"{buffer} are the masks of k_list {list(derived)}"
        if not explains(derived):
            raise CheckpointError(
                f"{because}, {len(derived)} bands, and {layer.name} has {count} band convolutions."
                " Expected one per band, and one more with lowfreq_att; the file mixes two "
                "networks."
            )
    bands = settings.resolve(
        "k_list",
        # The published code reads an fbm_cfg without k_list as one band, [2].
        default=(2.0,) if given or count == 1 else BandModulationConfig().k_list,
        # Bands of the same masks are as good as those that were saved.
        accepts=explains if saved is None else lambda value: saved.size_for(value) is not None,
        derived=derived,
        source="shapes" if derived is UNSET else "saved buffers",
        because=because,
        note=f"{count} convolutions a layer: {count} bands, or {count - 1} and lowfreq_att"
        if count > 1
        else "",
    )
    settings.resolve(
        "lowfreq_att",
        exact=count == len(bands) + 1,
        because=f"{because}; with k_list {list(bands)} that leaves {count - len(bands)} for it",
    )
    return tuple(bands)


def _same(dynamic: Sequence[Layer], field: str) -> Any:
    """The one value of a field that all layers must have; UNSET where they don't show it."""
    first = getattr(dynamic[0], field)
    for layer in dynamic:
        if getattr(layer, field) != first:
            raise _mixed(
                f"{field} differs between layers: {dynamic[0].name} has {first!r}, {layer.name} "
                f"{getattr(layer, field)!r}",
                "one value",
            )
    return UNSET if first is None else first


def _mixed(found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{found}. Expected {expected} for all FDConv layers; the file mixes two networks."
    )


def _reduction(
    settings: Conv, name: str, low: float, explains: Callable[[float], bool], because: str
) -> None:
    """A ratio that shapes bound: the number of fewest digits, not below ``low``, explains them."""
    rounded = (math.ceil(low * 10**digits) / 10**digits for digits in range(1, 12))
    near = (low * (1 + step * 1e-12) for step in range(1, 10))
    candidates = (*_USUAL_REDUCTIONS, *rounded, low, *near)
    simplest = next((value for value in candidates if explains(value)), None)
    if simplest is None:
        raise CheckpointError(
            f"No single {name} explains the shapes of the FDConv layers. Expected one for all "
            "layers; the file may mix two networks."
        )
    settings.resolve(name, accepts=explains, derived=simplest, because=because)


def _few(values: Iterable[int]) -> str:
    ordered = sorted(set(values))
    return ", ".join(map(str, ordered[:4])) + ("…" if len(ordered) > 4 else "")
