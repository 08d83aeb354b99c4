"""Copies of the published FDConv class in users' own networks → `FDConv2d`.

They are known by what they hold, not by where they were imported from: every repository has
its own copy. What a copy's ``forward`` does cannot be read off its attributes, so each
converted layer is run beside its original before it is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fdconv_deploy.architecture import BandModulationConfig
from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.band_modulation import band_masks
from fdconv_deploy.nn.fdconv import FDConv2d
from fdconv_deploy.nn.fdlinear import FDLinear
from fdconv_deploy.nn.published_check import (
    Conversion,
    compare_inside,
    compare_on_random,
    variant,
)

_GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
_ATTENTION = ("fc", "bn", "relu")
_MISSING: Any = object()


def is_published(module: nn.Module) -> bool:
    """Whether a module is a dynamic layer of a copy of the published code, or a variant of one."""
    if isinstance(module, FDConv2d | FDLinear) or not isinstance(
        getattr(module, "KSM_Global", None), nn.Module
    ):
        return False
    return any(name in module._parameters for name in ("dft_weight", "weight"))


def from_published(module: nn.Module, name: str = "the layer") -> FDConv2d:
    """The `FDConv2d` that computes what a copy of the published layer does.

    Args:
        module: a dynamic layer of the published class: ``KSM_Global``, ``dft_weight`` or
            ``weight``, ``indices`` and so on. Left as it is; the tensors are shared.
        name: of the layer, for errors.

    Returns:
        The layer, in the mode of ``module``. Its group order is the module's own ``indices``.

    Raises:
        UnsupportedLayerError: a variant: something is missing or of its own, or it computes
            something else. Each is named.
    """
    conversion = convert(module, name)
    compare_on_random(module, conversion, name)
    return conversion.layer


def convert_published(
    network: nn.Module,
    example: Tensor | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[nn.Module, dict[str, tuple[str, ...]]]:
    """A network whose published layers are `FDConv2d` layers; the network itself if it has none.

    Args:
        network: in eval mode. Not changed; what is not converted is copied.
        example: an input; each layer is compared with its original on what reaches it. On
            random numbers if not given.
        progress: told what was found.

    Returns:
        The network, and of each converted layer what was assumed.

    Raises:
        UnsupportedLayerError: as `from_published`.
    """
    found = {name: module for name, module in network.named_modules() if is_published(module)}
    if not found:
        return network, {}
    conversions = {name: convert(module, name or "the network") for name, module in found.items()}
    if example is None:
        for name, module in found.items():
            compare_on_random(module, conversions[name], name)
    else:
        compare_inside(network, example, found, conversions)
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


def convert(module: nn.Module, name: str) -> Conversion:
    """`from_published` without the comparison."""
    _check_family(module, name)
    told = _Told(module, name)
    with torch.device("meta"):
        try:
            layer = FDConv2d(**told.arguments())
        except UnsupportedLayerError as error:
            raise UnsupportedLayerError(f"{name}: {error}") from None
    if layer.param_reduction >= 1:
        layer.alpha = float(told.get("alpha", layer.alpha))
    state = module.state_dict()
    expected = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    own = {key: tuple(value.shape) for key, value in state.items()}
    # Buffers some copies save and others do not.
    own = {k: s for k, s in own.items() if k not in ("indices", "FBM.cached_masks")}
    if own != expected:
        raise variant(name, _difference(own, expected))
    layer.load_state_dict({key: state[key] for key in expected}, strict=True, assign=True)
    layer.KSM_Global.bn.eps = told.attention.bn.eps
    if layer.KSM_Local is not None:
        layer.KSM_Local.norm.eps = told.local.norm.eps
    return Conversion(layer.train(module.training), tuple(told.assumed))


def _check_family(module: nn.Module, name: str) -> None:
    missing = [what for what in _GEOMETRY if not hasattr(module, what)]
    attention = getattr(module, "KSM_Global", None)
    missing += [f"KSM_Global.{what}" for what in _ATTENTION if not hasattr(attention, what)]
    if missing:
        raise variant(name, f"it has no {', '.join(missing)}")
    size = module.kernel_size
    if not isinstance(module, nn.Conv2d) and (not isinstance(size, tuple) or len(size) != 2):
        raise variant(name, f"it is no 2-d convolution (kernel_size {size!r})")
    bn: Any = attention.bn if attention is not None else None
    if not isinstance(bn, nn.BatchNorm2d | nn.SyncBatchNorm):
        raise variant(name, f"KSM_Global.bn is a {type(bn).__name__}, not a BatchNorm2d")


class _Told:
    """Constructor arguments, from a copy's attributes."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.attention: Any = module.KSM_Global
        self.local: Any = getattr(module, "KSM_Local", None)
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
        heads = getattr(attention, "kernel_fc", None)
        if heads is None:
            raise variant(self.name, "it has no KSM_Global.kernel_fc (kernel_num=1)")
        groups = heads.weight.shape[0] // ratio
        reduction = self.get("param_reduction", 1.0)
        multiples = {self.get("KSM_Global.att_multi", 2.0)}
        if self.local is not None:
            multiples.add(self.get("att_multi", 2.0))
        if len(multiples) > 1:
            raise variant(
                self.name, f"att_multi differs between its attentions ({sorted(multiples)})"
            )
        hidden = attention.fc.weight.shape[0]
        bands = getattr(module, "FBM", None)
        return {
            **{what: getattr(module, what) for what in _GEOMETRY},
            "groups": self.get("groups", 1),
            "bias": module.bias is not None,
            "reduction": (hidden + 0.5) / module.in_channels,
            "kernel_num": groups,
            "use_fdconv_if_c_gt": 0,
            "use_fdconv_if_k_in": (height,),
            "use_fbm_if_k_in": (height,) if bands is not None else (),
            "kernel_temp": self.get("KSM_Global.kernel_temp", 1.0),
            "temp": self.get("KSM_Global.temperature", 1.0),
            "att_multi": multiples.pop(),
            "param_ratio": ratio,
            "param_reduction": reduction,
            "ksm_only_kernel_att": getattr(attention, "channel_fc", None) is None,
            "use_ksm_local": self.local is not None,
            "ksm_local_act": self.get("ksm_local_act", "sigmoid")
            if self.local is not None
            else "sigmoid",
            "ksm_global_act": self.get("KSM_Global.act_type", "sigmoid"),
            "convert_param": converted,
            "linear_mode": stored.ndim == 2,
            "fbm_cfg": self._bands() if bands is not None else None,
            "frequency_order": self._order(),
        }

    def _order(self) -> Any:
        indices = self.get("indices", "torch")
        if isinstance(indices, list | tuple):  # the first published version keeps a list
            indices = torch.stack([part.cpu() for part in indices])
        return indices

    def _bands(self) -> BandModulationConfig:
        kernel = self.get("FBM.freq_weight_conv_list", ())
        if not len(kernel):
            raise variant(self.name, "it has no FBM.freq_weight_conv_list")
        k_list = tuple(self.get("FBM.k_list", (2, 4, 8)))
        masks = getattr(self.module.FBM, "cached_masks", None)
        size = (64, 64)
        if masks is None:  # the first published version makes them anew each time
            self.assumed.append("no FBM.cached_masks, so band masks as the present version's")
        else:
            size = (masks.shape[-2], 2 * (masks.shape[-1] - 1))
            ours = band_masks(k_list, *size, size).to(masks.device)
            if masks.numel() != ours.numel() or not torch.equal(
                masks.reshape(ours.shape).float(), ours
            ):
                raise variant(self.name, "its FBM.cached_masks are not the published ones")
        return BandModulationConfig(
            k_list=k_list,
            lowfreq_att=self.get("FBM.lowfreq_att", False),
            act=self.get("FBM.act", "sigmoid"),
            spatial_group=kernel[0].groups,
            spatial_kernel=kernel[0].kernel_size[0],
            max_size=size,
        )


def _difference(own: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    missing = [key for key in expected if key not in own]
    extra = [key for key in own if key not in expected]
    shapes = [
        f"{key} {own[key]} for {shape}"
        for key, shape in expected.items()
        if key in own and own[key] != shape
    ]
    kinds = (("it has no", missing), ("it has beside", extra), ("of another shape are", shapes))
    return "; ".join(f"{what} {', '.join(keys[:6])}" for what, keys in kinds if keys)
