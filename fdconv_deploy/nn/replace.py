"""Plain convolutions and linear layers of any network → FDConv layers, which start as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fdconv_deploy.errors import UnsupportedLayerError
from fdconv_deploy.nn.fdconv import FDConv2d, FDTokenConv
from fdconv_deploy.nn.from_published import is_published

PlainLayer = TypeVar("PlainLayer", nn.Conv2d, nn.Linear)
Chosen = str | Sequence[str] | Callable[[str, PlainLayer], bool]
Weights = Literal["equivalent", "published", "new"]

_GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")


def replace_convolutions(
    model: nn.Module,
    *,
    where: Chosen[nn.Conv2d] | None = None,
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

    def make(conv: nn.Conv2d) -> FDConv2d | None:
        own = type(conv)
        plain = own.forward is nn.Conv2d.forward and own._conv_forward is nn.Conv2d._conv_forward
        if conv.groups != 1 or conv.padding_mode != "zeros" or not plain:
            return None
        same: dict[str, Any] = {name: getattr(conv, name) for name in _GEOMETRY}
        return FDConv2d(**same, bias=conv.bias is not None, **arguments)

    expected = (
        "more channels than use_fdconv_if_c_gt, a kernel size in use_fdconv_if_k_in, one group and "
        "zero padding"
    )
    return _replace(model, nn.Conv2d, "convolution", make, where, weights, expected)


def replace_linears(
    model: nn.Module, *, where: Chosen[nn.Linear], weights: Weights = "equivalent", **arguments: Any
) -> list[str]:
    """Put `FDTokenConv` layers in the place of a network's linear layers, in the network itself.

    The authors replace both linear layers of a transformer's feed-forward networks; names differ
    from network to network, so ``where`` must be given. A layer's attentions are of the mean of all
    tokens between the first axis and the last, so its input must be ``(B, …, C)``: not windows
    or vectors. Layers of ``nn.MultiheadAttention``, which never calls them, stay as they are.

    Args:
        model, weights: as `replace_convolutions` has them.
        where: which of them, as there, e.g. ``"*.mlp.fc?"``.
        arguments: of `FDConv2d`, as ``kernel_num=16``. Features and bias are the layer's.

    Returns:
        The names of the layers replaced, in the network's order.

    Raises:
        UnsupportedLayerError: nothing would be replaced, or an argument does not suit a layer.
    """

    def make(linear: nn.Linear) -> FDConv2d | None:
        if type(linear).forward is not nn.Linear.forward:
            return None
        features = linear.in_features, linear.out_features
        return FDTokenConv(*features, bias=linear.bias is not None, **arguments)

    expected = "more features than use_fdconv_if_c_gt"
    return _replace(model, nn.Linear, "linear layer", make, where, weights, expected)


def _replace(
    model: nn.Module,
    kind: type[PlainLayer],
    noun: str,
    make: Callable[[PlainLayer], FDConv2d | None],
    where: Chosen[PlainLayer] | None,
    weights: Weights,
    expected: str,
) -> list[str]:
    """Replace layers of a kind by what ``make`` gives for them; None, or a plain one: they stay."""
    if isinstance(model, kind):
        raise UnsupportedLayerError(
            f"layers are replaced within a network, in place, and a single {noun} was given. Put "
            "it into one (torch.nn.Sequential(layer)), or build the FDConv layer."
        )
    if weights not in ("equivalent", "published", "new"):
        raise UnsupportedLayerError(
            f"weights must be 'equivalent', 'published' or 'new', got {weights!r}."
        )
    places = _places(model, kind)
    chosen = {name: plain for name, plain in places.items() if _wanted(where, name, plain)}
    made: dict[int, FDConv2d | None] = {}
    layers: dict[str, FDConv2d] = {}
    for name, plain in chosen.items():
        if id(plain) not in made:
            made[id(plain)] = _replacement(name, plain, make, weights)
        if (layer := made[id(plain)]) is not None:
            layers[name] = layer
    if not layers:
        names = list(places)
        raise UnsupportedLayerError(
            f"no {noun} of this {type(model).__name__} is to be replaced: expected one with "
            f"{expected}{'' if where is None else ', that `where` names'}. It has {len(names)} "
            f"{noun}s{': ' if names else ''}{', '.join(names[:5])}{'…' if len(names) > 5 else ''}."
        )
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return list(layers)


def _places(model: nn.Module, kind: type[PlainLayer]) -> dict[str, PlainLayer]:
    """Every plain layer by each of its names."""
    found: dict[str, PlainLayer] = {}
    inside: tuple[str, ...] = ()  # the layers of an FDConv layer's attentions are no places
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FDConv2d | nn.MultiheadAttention) or is_published(module):
            inside += (f"{name}.",)
        elif isinstance(module, kind) and not (inside and name.startswith(inside)):
            found[name] = module
    return found


def _wanted(where: Chosen[PlainLayer] | None, name: str, layer: PlainLayer) -> bool:
    if where is None:
        return True
    if callable(where):
        return bool(where(name, layer))
    patterns = [where] if isinstance(where, str) else where
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _replacement(
    name: str, plain: PlainLayer, make: Callable[[PlainLayer], FDConv2d | None], weights: Weights
) -> FDConv2d | None:
    """The layer for a plain one, or None where FDConv has no place."""
    try:
        layer = make(plain)
        if layer is None or not layer.is_dynamic:
            return None
        weight = plain.weight.detach().cpu()
        weight = weight.reshape(layer.out_channels, layer.in_channels, *layer.kernel_size)
        bias = None if plain.bias is None else plain.bias.detach().cpu()
        if weights == "equivalent":
            set_equivalent(layer, weight, bias)
        elif weights == "published":
            _set_spectrum(layer, weight, bias)
    except UnsupportedLayerError as error:
        raise UnsupportedLayerError(
            f"{name}: {error} Or leave this layer out by `where`. Nothing was replaced."
        ) from None
    layer.to(plain.weight.device, plain.weight.dtype)
    return layer.train(plain.training)


@torch.no_grad()
def _set_spectrum(layer: FDConv2d, weight: Tensor, bias: Tensor | None) -> None:
    """Store a plain kernel as the published layer and converter do, attentions as they are."""
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(bias)
    if layer.convert_param:
        layer.dft_weight.copy_(layer.stored_spectrum(weight))
    else:
        layer.weight.copy_(weight.reshape(layer.weight.shape))


@torch.no_grad()
def set_equivalent(layer: FDConv2d, weight: Tensor, bias: Tensor | None = None) -> None:
    """Make a dynamic layer compute what the convolution of ``weight`` does; it can still learn.

    The attentions' heads are set to zero (their hidden layer is left as it is, so that gradients
    reach them), and with ``param_ratio`` P each spectrum holds a P-th. ``weight``: ``(O, I, kh,
    kw)``; ``bias``: ``(O,)`` if the layer has one.

    Raises:
        UnsupportedLayerError: ``param_reduction`` below 1 keeps part of the spectrum only.
    """
    if layer.param_reduction < 1:
        raise UnsupportedLayerError(
            f"param_reduction={layer.param_reduction} keeps part of the spectrum only, so this "
            "layer cannot equal a plain convolution. Use param_reduction=1, or start from the "
            "cut spectrum without equivalence."
        )
    still: list[nn.Module] = [m for n, m in layer.KSM_Global.named_children() if n.endswith("_fc")]
    if layer.KSM_Local is not None:
        still.append(layer.KSM_Local.conv)
    if layer.FBM is not None:
        still.append(layer.FBM.freq_weight_conv_list)
    for parameter in nn.ModuleList(still).parameters():
        parameter.zero_()
    # alpha undoes spectrum_scale and kernel attention's 1/(P·G); P spectra are added.
    gain = layer.param_ratio / max(layer.param_reduction, 1.0)
    heads = layer.KSM_Global
    if heads.act == "sigmoid":
        gates = (heads.channel_fc, heads.filter_fc, heads.spatial_fc)
        gain *= (heads.att_multi / 2) ** sum(gate is not None for gate in gates)
    if layer.KSM_Local is not None and layer.KSM_Local.act == "sigmoid":
        gain *= layer.KSM_Local.att_multi / 2
    _set_spectrum(layer, weight / gain, bias)
