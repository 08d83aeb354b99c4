"""The ``conv_cfg`` of a backbone, from its layers' names and shapes and its config."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fdconv_deploy.checkpoints.evidence import UNSET, Evidence, stated
from fdconv_deploy.checkpoints.infer_bands import infer_bands
from fdconv_deploy.checkpoints.infer_layers import Layer
from fdconv_deploy.config import Act, AttentionNorm, FDConvConfig
from fdconv_deploy.errors import CheckpointError

_DEFAULTS = FDConvConfig()
# Reductions people use, tried before any other that fits.
_USUAL_REDUCTIONS = (1 / 16, 1 / 32, 1 / 8, 1 / 4, 1 / 2, 1 / 64)


def infer_conv(
    layers: Sequence[Layer], section: Mapping[str, Any], evidence: Evidence
) -> FDConvConfig:
    """All fields but where bands are modulated and by which of them.

    Args:
        layers: the convolutions ``conv_cfg`` applies to; with no dynamic one among them,
            the config must explain that.
        section: the config's ``conv_cfg``.
        evidence: takes the facts.

    Raises:
        CheckpointError: no ``conv_cfg`` explains these layers.
    """
    dynamic = [layer for layer in layers if layer.dynamic]

    def settle(name: str, kind: Any, **knowledge: Any) -> Any:
        knowledge.setdefault("config", stated(section, name))
        knowledge.setdefault("default", getattr(_DEFAULTS, name))
        return evidence.settle("backbone.conv." + name, kind, **knowledge)

    values: dict[str, Any] = {}
    values |= _thresholds(layers, settle)
    values |= _spectrum(dynamic, settle)
    values |= _attention(dynamic, values, settle)
    if values["ksm_global_norm"] in _NORM_NOTES:
        evidence.notes.append(_NORM_NOTES[values["ksm_global_norm"]])
    bands = infer_bands(dynamic, section, evidence)
    return FDConvConfig(**values, fbm_cfg=bands)


Settle = Callable[..., Any]

# What a state dict holds of each normalisation, and what it does not tell of those that are not
# the published one.
_STORED: dict[AttentionNorm, str] = {
    "batch": "running statistics",
    "group": "a scale and a shift without running statistics",
    "none": "nothing",
}
_NORM_NOTES: dict[AttentionNorm, str] = {
    "group": "The attention's normalisation has a scale and a shift and no running statistics: "
    "taken for GroupNorm(1, C) with epsilon 1e-5, as public copies of FDConv have it; weights do "
    "not tell its number of groups or epsilon.",
    "none": "The attention has no normalisation (nothing under KSM_Global.bn): taken for Identity, "
    "as public copies of FDConv have it; one without weights of its own would look the same.",
}


def _thresholds(layers: Sequence[Layer], settle: Settle) -> dict[str, Any]:
    """Which layers are dynamic → kernel sizes and the channel threshold."""

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
            "above use_fdconv_if_c_gt; a network changed by hand cannot be told from its weights."
        )
    sizes = settle(
        "use_fdconv_if_k_in",
        tuple[int, ...],
        accepts=explain,
        derived=seen,
        source="names",
        tells=f"the FDConv layers of the weights have kernel sizes {seen}",
    )
    low, high = bounds(sizes)
    threshold = settle(
        "use_fdconv_if_c_gt",
        int,
        accepts=lambda value: low <= value < high,
        derived=int(low),
        source="names",
        tells=f"the weights are plain up to {low:g} channels and FDConv from {high:g}",
    )
    return {"use_fdconv_if_k_in": sizes, "use_fdconv_if_c_gt": threshold}


def _spectrum(dynamic: Sequence[Layer], settle: Settle) -> dict[str, Any]:
    """How the spectrum is stored and cut into groups."""
    converted = _same(dynamic, "convert_param", [layer.converted for layer in dynamic])
    ratio = _same(dynamic, "param_ratio", [layer.ratio for layer in dynamic])
    lengths = {layer.attentions for layer in dynamic}
    values: dict[str, Any] = {}
    values["convert_param"] = settle(
        "convert_param", bool, exact=UNSET if converted is None else converted, source="names"
    )
    linear = _same(dynamic, "linear_mode", [layer.linear for layer in dynamic])
    values["linear_mode"] = settle(
        "linear_mode", bool, exact=linear if converted is False else UNSET, matters=not converted
    )
    values["param_ratio"] = settle(
        "param_ratio",
        int,
        exact=UNSET if ratio is None else ratio,
        accepts=lambda value: value > 0 and all(length % value == 0 for length in lengths),
        tells=f"the kernel attentions have {_few(lengths)} entries",
    )
    groups = [layer.attentions // values["param_ratio"] for layer in dynamic]
    halves = [layer.out_channels // 2 for layer in dynamic]
    if len(set(groups)) > 1 and groups != halves:
        raise CheckpointError(
            f"kernel_num differs between layers ({_few(groups)}) and is not half their output "
            "channels. Expected one kernel_num for all layers, or None."
        )
    several = len(set(groups)) > 1
    values["kernel_num"] = settle(
        "kernel_num",
        int | None,
        exact=None if several else UNSET,
        accepts=lambda value: (
            not groups or value == groups[0] or (value is None and groups == halves)
        ),
        derived=groups[0] if groups else UNSET,
        tells=f"the kernel attentions have {_few(lengths)} entries, for param_ratio "
        f"{values['param_ratio']}",
    )
    values["param_reduction"] = _reduction_of_bins(dynamic, settle)
    return values


def _reduction_of_bins(dynamic: Sequence[Layer], settle: Settle) -> Any:
    cut = [layer for layer in dynamic if len(layer.spectrum) == 3]
    if not cut:
        # Above 1 it only divides alpha, which no shape shows.
        return settle(
            "param_reduction",
            float,
            accepts=lambda value: value >= 1 or not dynamic,
            tells="the weights hold whole spectra",
        )
    if len(cut) < len(dynamic):
        raise CheckpointError(
            f"{cut[0].name} stores part of its spectrum and other layers all of it. Expected one "
            "param_reduction for all layers."
        )

    def explains(value: float) -> bool:
        return 0 < value < 1 and all(int(la.bins * value) == la.kept_bins for la in cut)

    low = max(layer.kept_bins / layer.bins for layer in cut)
    return settle(
        "param_reduction",
        float,
        accepts=explains,
        derived=_simplest(low, explains, "param_reduction"),
        tells=f"the weights store {low:.1%} of each spectrum",
    )


def _attention(
    dynamic: Sequence[Layer], known: Mapping[str, Any], settle: Settle
) -> dict[str, Any]:
    """Kernel spatial modulation: which parts there are, their sizes, their functions."""
    local = _same(dynamic, "use_ksm_local", [layer.local for layer in dynamic])
    only = _same(dynamic, "ksm_only_kernel_att", [layer.only_kernel for layer in dynamic])

    def explains(value: float) -> bool:
        return all(max(int(la.in_channels * value), 16) == la.hidden for la in dynamic)

    low = max(
        (layer.hidden / layer.in_channels for layer in dynamic if layer.hidden > 16), default=0
    )
    values: dict[str, Any] = {}
    for name, exact in (("use_ksm_local", local), ("ksm_only_kernel_att", only)):
        values[name] = settle(name, bool, exact=UNSET if exact is None else exact, source="names")
    values["reduction"] = settle(
        "reduction",
        float,
        accepts=explains,
        derived=_simplest(low, explains, "reduction"),
        tells=f"the attentions have {_few({layer.hidden for layer in dynamic})} hidden channels",
    )
    plain = not dynamic
    values["ksm_global_act"] = settle(
        "ksm_global_act",
        Act,
        accepts=lambda value: value != "softmax" or only or plain,
        tells="softmax needs ksm_only_kernel_att=True, and the weights have the other attentions",
        matters=not plain,
    )
    norm = _same(dynamic, "ksm_global_norm", [layer.norm for layer in dynamic])
    values["ksm_global_norm"] = settle(
        "ksm_global_norm",
        AttentionNorm,
        exact=UNSET if norm is None else norm,
        source="names",
        tells=f"the weights have {_STORED[norm]} under {dynamic[0].name}.KSM_Global.bn"
        if norm is not None
        else "",
        matters=bool(dynamic),
    )
    values["ksm_local_act"] = settle("ksm_local_act", Act, matters=bool(local))
    values["att_multi"] = settle("att_multi", float, matters=bool(local) or only is False)
    # kernel_num=None sets the kernel temperature by itself.
    own = known["kernel_num"] is not None
    values["kernel_temp"] = settle("kernel_temp", float | None, matters=own and not plain)
    values["temp"] = settle("temp", float | None, matters=only is False)
    return values


def _same(dynamic: Sequence[Layer], field: str, values: Sequence[Any]) -> Any:
    """The one value all layers have; None if there are no layers.

    Raises:
        CheckpointError: layers differ.
    """
    for layer, value in zip(dynamic, values, strict=True):
        if value != values[0]:
            raise CheckpointError(
                f"{field} differs between layers: {dynamic[0].name} tells {values[0]!r}, "
                f"{layer.name} {value!r}. Expected one value for all FDConv layers; the file mixes "
                "two networks."
            )
    return values[0] if values else None


def _simplest(low: float, explains: Callable[[float], bool], field: str) -> float:
    """The number of fewest digits that explains the shapes, not below ``low``."""
    rounded = (math.ceil(low * 10**digits) / 10**digits for digits in range(1, 12))
    near = (low * (1 + step * 1e-12) for step in range(1, 10))
    for value in (*_USUAL_REDUCTIONS, *rounded, low, *near):
        if explains(value):
            return value
    raise CheckpointError(
        f"No single {field} explains the shapes of the FDConv layers. Expected one for all layers; "
        "the file may mix two networks."
    )


def _few(values: Iterable[int]) -> str:
    ordered = sorted(set(values))
    return ", ".join(map(str, ordered[:4])) + ("…" if len(ordered) > 4 else "")
