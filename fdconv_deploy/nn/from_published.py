"""Copies of the published FDConv class in users' own networks → `FDConv2d`.

A copy is run beside its conversion: the same answers, or refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fdconv_deploy.config import AttentionNorm, BandModulationConfig
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.band_modulation import SavedMasks
from fdconv_deploy.nn.fdconv import FDConv2d

_GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
_ATTENTION = ("fc", "relu", "kernel_fc")
# What copies call the normalisation of the attention's hidden layer; the published class: bn.
_NORMS = ("bn", "norm")
# Argument → a copy's attribute, and the published default where it is missing.
_READ: dict[str, tuple[str, Any]] = {
    "groups": ("groups", 1),
    "kernel_temp": ("KSM_Global.kernel_temp", 1.0),
    "temp": ("KSM_Global.temperature", 1.0),
    "param_reduction": ("param_reduction", 1.0),
    "ksm_global_act": ("KSM_Global.act_type", "sigmoid"),
}
# Largest difference allowed between a copy and its conversion, of the output's largest value.
TOLERANCE = 1e-4
_MISSING: Any = object()


@dataclass(frozen=True, eq=False)
class Conversion:
    """What a layer may be converted to, and what its original did not tell: one phrase each."""

    layer: FDConv2d
    assumed: tuple[str, ...]


def is_published(module: nn.Module) -> bool:
    """Whether a module is a dynamic layer of a copy of the published code, or a variant of one."""
    return (
        not isinstance(module, FDConv2d)
        and isinstance(getattr(module, "KSM_Global", None), nn.Module)
        and any(name in module._parameters for name in ("dft_weight", "weight"))
    )


def from_published(module: nn.Module, name: str = "the layer") -> FDConv2d:
    """The `FDConv2d` that computes what a copy of the published layer does, in its mode.

    Args:
        module: a dynamic layer of the published class: ``KSM_Global``, ``dft_weight`` or
            ``weight``, ``indices`` and so on. Left as it is; the tensors are shared.
        name: of the layer, for errors.

    Raises:
        UnsupportedLayerError: a variant: something is missing or of its own, or it computes
            something else. Each is named.
    """
    tried, x = {name: _candidates(module, name)}, _probe(module)
    try:
        return _compare(module, x, {name: module}, tried)[name].layer
    except UnsupportedLayerError:
        raise
    except Exception as error:
        raise _variant(name, f"its own forward fails on {tuple(x.shape)}: {error}") from error


def convert_published(
    network: nn.Module, example: Tensor, progress: Callable[[str], None] | None = None
) -> tuple[nn.Module, dict[str, tuple[str, ...]]]:
    """A network whose published layers are `FDConv2d` layers; the network itself if it has none.

    Args:
        network: in eval mode. Not changed; what is not converted is copied.
        example: an input; each layer is compared with its original on what reaches it.
        progress: told what was found.

    Returns:
        The network, and of each converted layer what was assumed. Errors are `from_published`'s.
    """
    found = {name: module for name, module in network.named_modules() if is_published(module)}
    if not found:
        return network, {}
    tried = {name: _candidates(module, name or "the network") for name, module in found.items()}
    conversions = _compare(network, example, found, tried)
    if progress is not None:
        progress(_summary(found, conversions))
    # deepcopy takes what is in the memo for what was copied already.
    memo: dict[int, object] = {id(m): conversions[name].layer for name, m in found.items()}
    return copy.deepcopy(network, memo), {n: c.assumed for n, c in conversions.items()}


def _summary(found: Mapping[str, nn.Module], conversions: Mapping[str, Conversion]) -> str:
    kinds = sorted({f"{type(m).__module__}.{type(m).__qualname__}" for m in found.values()})
    said = (
        f"{len(found)} layers of a copy of the published FDConv ({', '.join(kinds)}) taken for "
        "FDConv2d layers, each compared with its original"
    )
    assumed = {phrase for c in conversions.values() for phrase in c.assumed}
    return f"{said}; assumed: {'; '.join(sorted(assumed))}" if assumed else said


def _candidates(module: nn.Module, name: str) -> tuple[Conversion, ...]:
    """What the layer may be, the likeliest first."""
    _check_family(module, name)
    copied = _Copy(module, name)
    arguments = copied.arguments()
    return tuple(
        copied.conversion(arguments | {"fbm_cfg": bands}, phrases)
        for bands, phrases in copied.band_candidates()
    )


def _check_family(module: nn.Module, name: str) -> None:
    attention = getattr(module, "KSM_Global", None)
    missing = [what for what in _GEOMETRY if not hasattr(module, what)]
    missing += [
        f"KSM_Global.{what}" for what in _ATTENTION if getattr(attention, what, None) is None
    ]
    if all(getattr(attention, norm, None) is None for norm in _NORMS):
        missing.append("KSM_Global.bn")
    bands = getattr(module, "FBM", None)
    if bands is not None and not len(getattr(bands, "freq_weight_conv_list", ())):
        missing.append("FBM.freq_weight_conv_list")
    if missing:
        raise _variant(name, f"it has no {', '.join(missing)}")
    size = module.kernel_size
    if not isinstance(module, nn.Conv2d) and (not isinstance(size, tuple) or len(size) != 2):
        raise _variant(name, f"it is no 2-d convolution (kernel_size {size!r})")


def _kind_of_norm(norm: Any, name: str, layer: str) -> AttentionNorm:
    if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        return "batch"
    if isinstance(norm, nn.Identity):
        return "none"
    if isinstance(norm, nn.GroupNorm) and norm.num_groups == 1:
        return "group"
    groups = f" of {norm.num_groups} groups" if isinstance(norm, nn.GroupNorm) else ""
    raise _variant(
        layer,
        f"KSM_Global.{name} is a {type(norm).__name__}{groups}, not a BatchNorm2d (nor "
        "GroupNorm(1, C) nor Identity)",
    )


class _Copy:
    """Constructor arguments, from a copy's attributes."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.attention: Any = module.KSM_Global
        self.local: Any = getattr(module, "KSM_Local", None)
        self.bands: Any = getattr(module, "FBM", None)
        norms = {norm: getattr(self.attention, norm, None) for norm in _NORMS}
        self.norm_name = next(norm for norm, module in norms.items() if module is not None)
        self.norm: Any = norms[self.norm_name]
        self.assumed: list[str] = []

    def get(self, path: str, default: Any) -> Any:
        """The attribute, or the published default, which is then noted."""
        value: Any = self.module
        for part in path.split("."):
            value = getattr(value, part, _MISSING)
        if value is _MISSING:
            self.assumed.append(f"no {path}, so {default!r}")
            return default
        return value

    def arguments(self) -> dict[str, Any]:
        module: Any = self.module
        converted = getattr(module, "dft_weight", None) is not None
        attention, height = self.attention, module.kernel_size[0]
        stored = module.dft_weight if converted else module.weight
        ratio = stored.shape[0] if converted else self.get("param_ratio", 1)
        multiples = {self.get("KSM_Global.att_multi", 2.0)}
        local_act = "sigmoid"
        if self.local is not None:
            multiples.add(self.get("att_multi", 2.0))
            local_act = self.get("ksm_local_act", "sigmoid")
        if len(multiples) > 1:
            raise _variant(
                self.name, f"att_multi differs between its attentions ({sorted(multiples)})"
            )
        indices = self.get("indices", "torch")
        if isinstance(indices, list | tuple):  # the first published version keeps a list
            indices = torch.stack([part.cpu() for part in indices])
        return {
            **{what: getattr(module, what) for what in _GEOMETRY},
            **{what: self.get(*place) for what, place in _READ.items()},
            "bias": module.bias is not None,
            "reduction": (attention.fc.weight.shape[0] + 0.5) / module.in_channels,
            "kernel_num": attention.kernel_fc.weight.shape[0] // ratio,
            "use_fdconv_if_c_gt": 0,
            "use_fdconv_if_k_in": (height,),
            "use_fbm_if_k_in": () if self.bands is None else (height,),
            "att_multi": multiples.pop(),
            "param_ratio": ratio,
            "ksm_only_kernel_att": getattr(attention, "channel_fc", None) is None,
            "use_ksm_local": self.local is not None,
            "ksm_local_act": local_act,
            "convert_param": converted,
            "linear_mode": stored.ndim == 2,
            "ksm_global_norm": _kind_of_norm(self.norm, self.norm_name, self.name),
            "frequency_order": indices,
        }

    def band_candidates(self) -> list[tuple[BandModulationConfig | None, tuple[str, ...]]]:
        """What the band modulation may be, and what of each is assumed."""
        if self.bands is None:
            return [(None, ())]
        kernel = self.bands.freq_weight_conv_list[0]
        buffer = getattr(self.bands, "cached_masks", None)
        try:
            saved = None if buffer is None else SavedMasks.read(buffer)
        except ValueError as error:
            raise _variant(self.name, f"its FBM.cached_masks cannot be read: {error}") from None
        k_list = self._k_list(saved)
        bands = BandModulationConfig(
            k_list=k_list,
            lowfreq_att=self.get("FBM.lowfreq_att", False),
            act=self.get("FBM.act", "sigmoid"),
            spatial_group=kernel.groups,
            spatial_kernel=kernel.kernel_size[0],
        )
        if saved is not None:
            return [(bands.model_copy(update={"max_size": saved.size_for(k_list)}), ())]
        # The first published version has no such buffer, and makes its masks in each call.
        kinds = {
            "per_call": "band masks made per call, as the first published version's",
            "cached": "band masks as the present version's",
        }
        return [
            (bands.model_copy(update={"masks": kind}), (f"no FBM.cached_masks, so {phrase}",))
            for kind, phrase in kinds.items()
        ]

    def conversion(self, arguments: Mapping[str, Any], phrases: tuple[str, ...]) -> Conversion:
        """The layer of these arguments with the copy's tensors."""
        with torch.device("meta"):
            try:
                layer = FDConv2d(**arguments)
            except UnsupportedLayerError as error:
                raise UnsupportedLayerError(f"{self.name}: {error}") from None
        if layer.param_reduction >= 1:
            layer.alpha = float(self.get("alpha", layer.alpha))
        theirs, ours = f"KSM_Global.{self.norm_name}.", "KSM_Global.bn."
        state = {
            ours + name.removeprefix(theirs) if name.startswith(theirs) else name: value
            for name, value in self.module.state_dict().items()
            # Buffers some copies save and others do not.
            if name not in ("indices", "FBM.cached_masks")
        }
        try:
            layer.load_state_dict(state, assign=True)
        except RuntimeError as error:
            problems = (line.strip(". ") for line in str(error).split("\n\t")[1:])
            raise _variant(self.name, "; ".join(problems)) from None
        own_norm: Any = layer.KSM_Global.bn
        if hasattr(own_norm, "eps"):
            own_norm.eps = self.norm.eps
        if layer.KSM_Local is not None:
            layer.KSM_Local.norm.eps = self.local.norm.eps
        return Conversion(layer.train(self.module.training), (*self.assumed, *phrases))

    def _k_list(self, saved: SavedMasks | None) -> tuple[float, ...]:
        if saved is None:
            return tuple(self.get("FBM.k_list", (2, 4, 8)))
        k_list = getattr(self.bands, "k_list", saved.k_list)
        if k_list is None or saved.size_for(tuple(k_list)) is None:
            told = "of no k_list" if saved.k_list is None else f"of k_list {list(saved.k_list)}"
            raise _variant(
                self.name,
                f"its FBM.cached_masks are not the published ones: they are {told}, and its "
                f"FBM.k_list is {getattr(self.bands, 'k_list', 'missing')}",
            )
        return tuple(k_list)


def _variant(name: str, what: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"{name} looks like a copy of the published FDConv layer, but is a variant that cannot be "
        f"converted: {what}. Expected the published class (its attributes and tensors); put "
        "fdconv_deploy.nn.FDConv2d in its place, or open an issue with the variant's source."
    )


def _equal(
    candidates: tuple[Conversion, ...], name: str, x: Tensor, expected: Any
) -> tuple[Conversion, ...]:
    """Those candidates that give what the original gave; an error where there is none."""
    errors = {}
    for candidate in candidates:
        found = candidate.layer(x)
        gives = tuple(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
        if gives != tuple(found.shape):
            raise _variant(
                name, f"it gives {gives} where the published layer gives {tuple(found.shape)}"
            )
        largest = float(expected.abs().max()) or 1.0
        errors[candidate] = float((found - expected).abs().max()) / largest
    equal = tuple(candidate for candidate, error in errors.items() if error <= TOLERANCE)
    if equal:
        return equal
    nearest = min(errors, key=lambda candidate: errors[candidate])
    suspects = f" (suspects: {'; '.join(nearest.assumed)})" if nearest.assumed else ""
    raise _variant(
        name,
        f"its output differs from the published layer's by {errors[nearest]:.1e} of the largest "
        f"value, {TOLERANCE:.0e} is allowed{suspects}",
    )


def _compare(
    network: nn.Module,
    x: Tensor,
    found: Mapping[str, nn.Module],
    candidates: Mapping[str, tuple[Conversion, ...]],
) -> dict[str, Conversion]:
    """Of each layer found in a network the first candidate that is equal.

    The network is run on ``x``, and each layer's candidates on what the original is given.
    """
    left = dict(candidates)

    def compare(name: str, module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        left[name] = _equal(left[name], name, inputs[0], output)
        if len(left[name]) > 1:
            # What cannot tell two candidates apart, as a flat image, may be all the example
            # has; noise of its size can. The layer's own forward calls no hook.
            noise = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0))
            noise = noise.to(inputs[0])
            left[name] = _equal(left[name], name, noise, module.forward(noise))

    hooks = [m.register_forward_hook(partial(compare, name)) for name, m in found.items()]
    try:
        with _evaluating(network, *(c.layer for several in left.values() for c in several)):
            network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: several[0] for name, several in left.items()}


def _probe(module: nn.Module) -> Tensor:
    """Random images whose averages differ, large enough for any kernel."""
    conv: Any = module
    generator = torch.Generator().manual_seed(0)
    reach = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    shape = (2, conv.in_channels, max(9, reach[0]), max(11, reach[1]))
    offsets = torch.randn(*shape[:2], 1, 1, generator=generator)
    values = torch.randn(shape, generator=generator) + offsets
    first = next(module.parameters())
    return values.to(first.device, first.dtype)


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in before:
            part.training = training
