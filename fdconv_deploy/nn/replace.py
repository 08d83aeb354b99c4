"""Plain convolutions of any network → FDConv layers, which start as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.fdconv import FDConv2d
from fdconv_deploy.nn.from_published import is_published
from fdconv_deploy.nn.spectrum import kernel_spectrum

Where = str | Sequence[str] | Callable[[str, nn.Conv2d], bool] | None
Weights = Literal["equivalent", "published", "new"]


def replace_convolutions(
    model: nn.Module,
    *,
    where: Where = None,
    weights: Weights = "equivalent",
    **arguments: Any,
) -> list[str]:
    """Put `FDConv2d` layers in the place of a network's plain convolutions, in the network itself.

    Replaced are convolutions that the arguments make dynamic (``use_fdconv_if_c_gt``,
    ``use_fdconv_if_k_in``) and that FDConv can stand for: one group, padded with zeros, with
    ``nn.Conv2d``'s own forward. All others stay as they are.

    Args:
        model: any network. If an argument does not suit a layer, none is replaced.
        where: which of them: a shell pattern of their names (``"layer3.*"``), several, or a
            function of name and convolution. All, if not given.
        weights: how the layers start. ``"equivalent"``: the network computes what it did.
            ``"published"``: with the convolution's spectrum and attentions as the published
            layer starts with them, which changes what the network computes. ``"new"``: as
            `FDConv2d` does.
        arguments: of `FDConv2d`, as ``kernel_num=16``. Channels, kernel size, stride, padding,
            dilation and bias are the convolution's.

    Returns:
        The names of the layers replaced, in the network's order.

    Raises:
        UnsupportedLayerError: nothing would be replaced, or an argument does not suit a layer.
    """
    if isinstance(model, nn.Conv2d):
        raise UnsupportedLayerError(
            "replace_convolutions changes a network's layers in place, and was given a single "
            "convolution. Put it into one (torch.nn.Sequential(conv)), or build an FDConv2d."
        )
    if weights not in ("equivalent", "published", "new"):
        raise UnsupportedLayerError(
            f"weights must be 'equivalent', 'published' or 'new', got {weights!r}."
        )
    made: dict[int, FDConv2d | None] = {}
    places: list[tuple[str, nn.Module, str, FDConv2d]] = []
    for name, parent, child, conv in _convolutions(model):
        if not _wanted(where, name, conv):
            continue
        if id(conv) not in made:
            made[id(conv)] = _replacement(name, conv, weights, arguments)
        layer = made[id(conv)]
        if layer is not None:
            places.append((name, parent, child, layer))
    if not places:
        names = [name for name, *_ in _convolutions(model)]
        raise UnsupportedLayerError(
            f"no convolution of this {type(model).__name__} is to be replaced: expected one with "
            "more channels than use_fdconv_if_c_gt, a kernel size in use_fdconv_if_k_in, one group "
            f"and zero padding{'' if where is None else ', that `where` names'}. It has "
            f"{len(names)} convolutions{': ' if names else ''}{', '.join(names[:5])}"
            f"{'…' if len(names) > 5 else ''}."
        )
    for _, parent, child, layer in places:
        setattr(parent, child, layer)
    return [name for name, *_ in places]


def _convolutions(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Conv2d]]:
    """Every place of every plain convolution: name, parent, name in it, layer."""
    found = []
    inside: tuple[str, ...] = ()  # the convolutions of an FDConv layer's attentions are no places
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FDConv2d) or is_published(module):
            inside += (f"{name}.",)
        elif isinstance(module, nn.Conv2d) and not (inside and name.startswith(inside)):
            parent, _, child = name.rpartition(".")
            found.append((name, model.get_submodule(parent), child, module))
    return found


def _wanted(where: Where, name: str, conv: nn.Conv2d) -> bool:
    if where is None:
        return True
    if callable(where):
        return bool(where(name, conv))
    patterns = [where] if isinstance(where, str) else where
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _replacement(
    name: str, conv: nn.Conv2d, weights: Weights, arguments: dict[str, Any]
) -> FDConv2d | None:
    """The layer for a convolution, or None where FDConv has no place."""
    own = type(conv).forward is nn.Conv2d.forward
    own = own and type(conv)._conv_forward is nn.Conv2d._conv_forward
    if conv.groups != 1 or conv.padding_mode != "zeros" or not own:
        return None
    try:
        layer = FDConv2d(
            conv.in_channels,
            conv.out_channels,
            _pair(conv.kernel_size),
            _pair(conv.stride),
            conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),
            _pair(conv.dilation),
            bias=conv.bias is not None,
            **arguments,
        )
        if not layer.is_dynamic:
            return None
        if weights == "equivalent":
            set_equivalent(layer, conv.weight.detach().cpu(), _on_cpu(conv.bias))
        elif weights == "published":
            set_spectrum(layer, conv.weight.detach().cpu(), _on_cpu(conv.bias))
    except UnsupportedLayerError as error:
        raise UnsupportedLayerError(
            f"{name}: {error} Or leave this layer out by `where`. Nothing was replaced."
        ) from None
    layer.to(conv.weight.device, conv.weight.dtype)
    return layer.train(conv.training)


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]


def _on_cpu(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().cpu()


@torch.no_grad()
def set_spectrum(layer: FDConv2d, weight: Tensor, bias: Tensor | None = None) -> None:
    """Store a plain kernel as the published layer and converter do, attentions as they are.

    Args:
        layer: dynamic or plain.
        weight: ``(O, I, kh, kw)``.
        bias: ``(O,)`` if the layer has one.
    """
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(bias)
    if not (layer.is_dynamic and layer.convert_param):
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        return
    spectrum = kernel_spectrum(weight)
    if layer.param_reduction < 1:
        for p, (rows, columns) in enumerate(layer.indices.flatten(2).to(spectrum.device)):
            layer.dft_weight[p] = spectrum[rows, columns]
    else:
        layer.dft_weight.copy_(spectrum.expand_as(layer.dft_weight))


@torch.no_grad()
def set_equivalent(layer: FDConv2d, weight: Tensor, bias: Tensor | None = None) -> None:
    """Make a layer compute what the plain convolution of ``weight`` does; it can still learn.

    The attentions' heads are set to zero (their hidden layer is left as it is, so that
    gradients reach them), and with ``param_ratio`` P each spectrum holds a P-th.

    Args:
        layer, weight, bias: as `set_spectrum`'s.

    Raises:
        UnsupportedLayerError: ``param_reduction`` below 1 keeps part of the spectrum only.
    """
    if not layer.is_dynamic:
        set_spectrum(layer, weight, bias)
        return
    if layer.param_reduction < 1:
        raise UnsupportedLayerError(
            f"param_reduction={layer.param_reduction} keeps part of the spectrum only, so this "
            "layer cannot equal a plain convolution. Use param_reduction=1, or start from the "
            "cut spectrum without equivalence."
        )
    _rest(layer)
    # alpha undoes spectrum_scale and kernel attention's 1/(P·G); P spectra are added.
    gain = layer.param_ratio / max(layer.param_reduction, 1.0)
    heads = layer.KSM_Global
    if heads.act == "sigmoid":
        gates = (heads.channel_fc, heads.filter_fc, heads.spatial_fc)
        gain *= (heads.att_multi / 2) ** sum(gate is not None for gate in gates)
    if layer.KSM_Local is not None and layer.KSM_Local.act == "sigmoid":
        gain *= layer.KSM_Local.att_multi / 2
    set_spectrum(layer, weight / gain, bias)


def _rest(layer: FDConv2d) -> None:
    heads = layer.KSM_Global
    still: list[nn.Module | None] = [
        heads.kernel_fc,
        heads.channel_fc,
        heads.filter_fc,
        heads.spatial_fc,
    ]
    if layer.KSM_Local is not None:
        still.append(layer.KSM_Local.conv)
    if layer.FBM is not None:
        still.extend(layer.FBM.freq_weight_conv_list)
    for module in still:
        for parameter in module.parameters() if module is not None else ():
            parameter.zero_()
