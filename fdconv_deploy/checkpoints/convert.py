"""Weights of a plain network, as an ImageNet ResNet's → the start of an FDConv network.

An FDConv layer stores its kernel as a half spectrum. Before training, that is the
transform of the plain layer's weights, as the published converter writes it.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fdconv_deploy.checkpoints.config_parser import Config
from fdconv_deploy.checkpoints.config_writer import format_config
from fdconv_deploy.checkpoints.infer_backbone import FEED_FORWARD, backbone_type
from fdconv_deploy.checkpoints.infer_config import infer_config
from fdconv_deploy.checkpoints.loading import config_for
from fdconv_deploy.checkpoints.reading import Checkpoint, read_checkpoint
from fdconv_deploy.checkpoints.save import write_checkpoint
from fdconv_deploy.checkpoints.state_dict import (
    backbone_prefix,
    dynamic_names,
    framework_of,
    kind_of,
    part,
)
from fdconv_deploy.config import BackboneConfig, FDConvConfig
from fdconv_deploy.errors import CheckpointError, UnsupportedLayerError, in_the_way
from fdconv_deploy.nn.backbones import build_backbone
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.nn.replace import set_equivalent
from fdconv_deploy.nn.spectrum import kernel_spectrum

# What FDConv and FDLinear replace: block and stem convolutions of a ResNet, and the two
# linear layers of a ViT block's feed-forward network.
_BLOCK = re.compile(r"((?:.*\.)?)layer(\d+)\.(\d+)\.conv(\d)\.weight")
_STEM = re.compile(r"((?:.*\.)?)stem\.(\d+)\.weight")
_FIRST = re.compile(r"((?:.*\.)?)conv1\.weight")
_LINEAR = re.compile(r"(?:^|\.)layers\.\d+\.ffn\.layers\.(?:0\.0|1)\.weight$")
# What stays plain in every FDConv network: shortcuts, a transformer's attention, necks and heads.
# The names that the published converter's patterns for transformers meet, wherever they stand.
_PUBLISHED_LINEAR = re.compile(r"\.ffn\.layers\.(?:0\.0|1)\.weight$")
_PLAIN = re.compile(r"(?:^|\.)(?:downsample|attn|neck|\w*head\w*|fc|classifier)\.")

# The published converter takes layers of 32 channels or more. (The published layer's own
# default is dynamic above 16: a layer between the two starts from random weights.)
PUBLISHED_THRESHOLD = 31


class Conversion(BaseModel):
    """What was done to a plain network's weights; names of layers, in the file's order.

    Attributes:
        method: ``published``, the published converter's: spectra in place of kernels, attentions
            left to training. ``equivalent``: a whole FDConv network that computes the same.
        conv: the FDConv arguments the weights are meant for.
        converted: layers that have a spectrum now.
        left_random: layers that an FDConv network of ``conv`` makes dynamic and that have no
            spectrum, so that it starts them from random weights.
        grouped: grouped convolutions among those that would be converted by name. No FDConv layer
            can be one, so they stay plain.
        beyond_published: layers among the converted that the published converter leaves as they
            are: its patterns meet none of a MiT's or a ConvNeXt's.
        left_in_heads: feed-forward layers outside the backbone, of a Mask2Former's decoders, which
            the published converter converts as well. Here they stay plain.
        unrecognised: layers of a size that FDConv replaces whose names are none known here, so
            that they are as they were: other networks' blocks.
    """

    model_config = ConfigDict(frozen=True)

    method: Literal["published", "equivalent"]
    conv: FDConvConfig
    converted: tuple[str, ...]
    left_random: tuple[str, ...] = ()
    grouped: tuple[str, ...] = ()
    beyond_published: tuple[str, ...] = ()
    left_in_heads: tuple[str, ...] = ()
    unrecognised: tuple[str, ...] = ()


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    equivalent: bool = False,
    arguments: Mapping[str, Any] | None = None,
    config: str | Path | Config | None = None,
    weights: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert a plain checkpoint for an FDConv network to start from.

    Args:
        source: any file :func:`read_checkpoint` takes, of a ResNet, MiT, Swin or ConvNeXt alone or
            in a network (``backbone.`` names), under OpenMMLab's names, or of a ViT.
        destination: where to write: a ``.safetensors`` file by that name, else a PyTorch one.
        equivalent: write a whole FDConv network that computes what the plain one does. Without
            it, what the published converter writes: spectra, and no attentions.
        arguments: of the FDConv layers, as ``{"kernel_num": 64}``: fields of
            :class:`FDConvConfig`. They go into the config the file carries. If
            ``use_fdconv_if_c_gt`` is among them, all layers above it are converted; if not,
            the published converter's own limit holds unless ``equivalent``.
        config: the plain network's config, if the file has none.
        weights: the entry to take weights from, see :func:`read_checkpoint`.
        overwrite: replace a file that is there.

    Returns:
        What was converted and what was not.

    Raises:
        CheckpointError: ``source`` can't be read or has nothing to convert, an argument is
            unknown, or ``destination`` is in the way.
        UnsupportedLayerError: an argument does not suit a layer.
    """
    destination, arguments = Path(destination), arguments or {}
    if destination.exists() and not overwrite:
        raise in_the_way(CheckpointError, f"{destination} is there already.")
    conv = _conv(arguments)
    checkpoint = read_checkpoint(source, weights=weights)
    state = checkpoint.state_dict
    try:
        if framework_of(state) == "detectron2":
            raise CheckpointError(
                f"its tensors are named as detectron2's ({next(iter(state))}…). Expected "
                "OpenMMLab's names: there is no FDConv network of detectron2's to start from them. "
                "In Python, fdconv_deploy.nn.replace_convolutions takes any network."
            )
        backbone, text = _described(checkpoint, config_for(checkpoint, config), conv)
        # Of no number in particular, what the published converter writes will do.
        if equivalent or "kernel_num" in arguments:
            _check_groups(state, conv)
        if not equivalent:
            given = "use_fdconv_if_c_gt" in arguments
            made = convert_state_dict(
                state,
                use_fdconv_if_c_gt=conv.use_fdconv_if_c_gt if given else PUBLISHED_THRESHOLD,
                use_fdconv_if_k_in=conv.use_fdconv_if_k_in,
                param_ratio=conv.param_ratio,
            )
        elif backbone is None:
            raise CheckpointError(
                f"Expected a ResNet, MiT, Swin or ConvNeXt for an equivalent network. {text}"
            )
        else:
            made = equivalent_state_dict(state, backbone)
        report = describe_conversion(state, made, conv, "equivalent" if equivalent else "published")
        if not report.converted:
            raise _nothing_converted(state, report)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    meta = {k: v for k, v in checkpoint.meta.items() if k not in ("config", "cfg")}
    meta |= {"cfg": text} if backbone is not None else {}
    meta |= {"converted_from": Path(source).name, "conversion": report.method}
    write_checkpoint(destination, made, meta)
    return report


def _nothing_converted(state: Mapping[str, Tensor], report: Conversion) -> CheckpointError:
    if report.unrecognised:
        return CheckpointError(
            f"Nothing in it is converted: {len(report.unrecognised)} layers of a size that FDConv "
            "replaces have names that the published converter does not know "
            f"({', '.join(report.unrecognised[:3])}…), so that it writes the same weights again. "
            "Expected a ResNet's layer1.0.conv1.weight…, a ViT's layers.0.ffn.layers.0.0.weight…, "
            "or a whole MiT, Swin or ConvNeXt; in Python, fdconv_deploy.nn.replace_convolutions "
            "takes any network."
        )
    return CheckpointError(
        "Nothing in it is to be converted: expected a ResNet's layer1.0.conv1.weight… or a ViT's "
        "layers.0.ffn.layers.0.0.weight… of more channels than the limit, found "
        f"{', '.join(list(state)[:3])}…. Lower the limit (--channels-above), or give a ResNet's "
        "checkpoint."
    )


def _conv(arguments: Mapping[str, Any]) -> FDConvConfig:
    try:
        return FDConvConfig(**arguments)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"FDConv argument {field}: {first['msg']}, got {first['input']!r}. Expected the "
            f"published layer's: {', '.join(FDConvConfig.model_fields)}."
        ) from None


def _check_groups(state: Mapping[str, Tensor], conv: FDConvConfig) -> None:
    """Refuse a number of groups that a layer's frequency bins do not divide by."""
    bins: dict[str, tuple[int, int]] = {}
    known = _known_to(state)
    for key, weight in state.items():
        if key in known and _is_large(weight, conv.use_fdconv_if_c_gt, conv.use_fdconv_if_k_in):
            height, width = weight.shape[2:] if weight.ndim == 4 else (1, 1)
            kept = weight.shape[0] * height * (weight.shape[1] * width // 2 + 1)
            kept = int(kept * min(conv.param_reduction, 1))
            groups = weight.shape[0] // 2 if conv.kernel_num is None else conv.kernel_num
            bins[key.removesuffix(".weight")] = kept, groups
    wrong = [name for name, (kept, groups) in bins.items() if groups > 0 and kept % groups]
    if not wrong:
        return
    kept, groups = bins[wrong[0]]
    usable = math.gcd(*(count for count, _ in bins.values()))
    best = next(number for number in range(groups, 0, -1) if usable % number == 0)
    others = f", nor those of {len(wrong) - 1} other layers" if len(wrong) > 1 else ""
    raise UnsupportedLayerError(
        f"kernel_num={groups} does not divide the {kept} frequency bins of {wrong[0]}{others}. "
        f"Give one that divides those of every layer (the next lower is {best}), or leave layers "
        "plain by a higher use_fdconv_if_c_gt."
    )


def _described(
    checkpoint: Checkpoint, config: Config | None, conv: FDConvConfig
) -> tuple[BackboneConfig | None, str]:
    """The FDConv backbone and its config's text; None and the reason if it is no ResNet."""
    state = checkpoint.state_dict
    try:
        network = infer_config(state, config=config, meta=checkpoint.meta).architecture
    except CheckpointError as error:
        if kind_of(state) == "segmentor":
            raise
        return None, str(error)
    if isinstance(network, BackboneConfig):
        backbone = network.model_copy(update={"conv": conv})
        return backbone, format_config(backbone)
    backbone = network.backbone.model_copy(update={"conv": conv})
    return backbone, format_config(network.model_copy(update={"backbone": backbone}))


def convert_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    use_fdconv_if_c_gt: int = PUBLISHED_THRESHOLD,
    use_fdconv_if_k_in: Collection[int] = (1, 3),
    param_ratio: int = 1,
) -> dict[str, Tensor]:
    """Replace the ``weight`` of the layers FDConv makes dynamic by its ``dft_weight``.

    Args:
        state_dict: a plain ResNet's (torchvision or mmsegmentation names), ViT's, MiT's, Swin's
            or ConvNeXt's tensors, with or without a ``backbone.`` prefix. Left as it is. Of the
            last three both layers of every feed-forward network in the backbone are converted.
        use_fdconv_if_c_gt: layers with more input and output channels than this are dynamic.
        use_fdconv_if_k_in: kernel sizes that are.
        param_ratio: how many copies of the spectrum a layer has.

    Returns:
        All tensors; for a converted layer ``dft_weight``, ``(P, O·k, I·k/2 + 1, 2)`` float32,
        in place of ``weight``. The attentions are not in it: they start as a new network's.

    Raises:
        CheckpointError: the weights already are of an FDConv network.
    """
    _refuse_fdconv(state_dict)
    known = _known_to(state_dict)
    result: dict[str, Tensor] = {}
    for key, weight in state_dict.items():
        if key in known and _is_large(weight, use_fdconv_if_c_gt, use_fdconv_if_k_in):
            name = key.removesuffix("weight") + "dft_weight"
            kernel = weight if weight.ndim == 4 else weight[:, :, None, None]
            result[name] = kernel_spectrum(kernel.detach()).repeat(param_ratio, 1, 1, 1)
        else:
            result[key] = weight
    return result


def describe_conversion(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    conv: FDConvConfig,
    method: Literal["published", "equivalent"] = "published",
) -> Conversion:
    """What :func:`convert_state_dict` or :func:`equivalent_state_dict` did and did not do."""
    grouped, known, families = _grouped(before), _known_to(before), _feed_forward(before)
    spectra = {key.removesuffix(".dft_weight") for key in after if key.endswith(".dft_weight")}
    changed = spectra | set(dynamic_names(after))
    lists: dict[str, list[str]] = defaultdict(list)
    for key, weight in before.items():
        name = key.removesuffix(".weight")
        published = _PUBLISHED_LINEAR.search(key) is not None
        if name in changed:
            lists["converted"].append(name)
            if key in families and not published:
                lists["beyond_published"].append(name)
        elif key in grouped:
            lists["grouped"].append(name)
        elif not _is_large(weight, conv.use_fdconv_if_c_gt, conv.use_fdconv_if_k_in):
            continue
        elif key in known:
            lists["left_random"].append(name)
        elif families:  # a whole MiT, Swin or ConvNeXt has no further ones
            if published:
                lists["left_in_heads"].append(name)
        elif key.endswith(".weight") and not _PLAIN.search(key):
            lists["unrecognised"].append(name)
    found = {"converted": (), **{kind: tuple(names) for kind, names in lists.items()}}
    return Conversion(method=method, conv=conv, **found)


def equivalent_state_dict(
    state_dict: Mapping[str, Tensor], backbone: BackboneConfig, *, seed: int = 0
) -> dict[str, Tensor]:
    """All tensors of an FDConv network that computes what a plain one does.

    Its attentions are at rest, see :func:`set_equivalent`, and training wakes them.

    Args:
        state_dict: a plain backbone's tensors, with or without a ``backbone.`` prefix; what
            else it holds (heads, a classifier) is kept.
        backbone: of the FDConv network; its ``conv`` says which layers are dynamic.
        seed: for the attentions' hidden layers, the only numbers drawn.

    Raises:
        CheckpointError: the weights are not those of this backbone.
        UnsupportedLayerError: ``conv`` does not suit a layer, or cannot be at rest.
    """
    _refuse_fdconv(state_dict)
    prefix = backbone_prefix(state_dict)
    plain = part(state_dict, prefix)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_backbone(backbone)
    dynamic = dynamic_layers(network)
    own = {f"{name}.{key}" for name, layer in dynamic.items() for key in layer.state_dict()}
    expected = network.state_dict()
    state: dict[str, Tensor] = {}
    for key, value in expected.items():
        if key in own:
            continue
        given = plain.get(key)
        if given is not None and given.ndim == 2 and value.shape == (*given.shape, 1, 1):
            given = given[:, :, None, None]  # a linear layer that is too narrow for FDConv
        if given is None and key.endswith(".num_batches_tracked"):
            given = value
        if given is None or given.shape != value.shape:
            found = "nothing" if given is None else f"{tuple(given.shape)}"
            raise CheckpointError(
                f"Expected the weights of a {backbone.type}, with {prefix}{key} "
                f"{tuple(value.shape)}; found {found}. Give the checkpoint's config (--config)."
            )
        state[key] = given
    network.load_state_dict(state, strict=False)
    for name, layer in dynamic.items():
        weight, bias = plain.get(f"{name}.weight"), plain.get(f"{name}.bias")
        if weight is None or (bias is None) != (layer.bias is None):
            raise CheckpointError(
                f"Expected the weights of a {backbone.type}; {prefix}{name} lacks a weight or a "
                "bias. The file may be cut."
            )
        weight = weight.detach().float()
        weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        set_equivalent(layer, weight, None if bias is None else bias.detach().float())
    taken = {f"{prefix}{name}.weight" for name in dynamic}
    made = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
    return made | {k: v for k, v in state_dict.items() if k not in taken and k not in made}


def _refuse_fdconv(state_dict: Mapping[str, Tensor]) -> None:
    spectra = [key for key in state_dict if key.endswith(".dft_weight")]
    dynamic = [*spectra, *dynamic_names(state_dict)]
    if dynamic:
        raise CheckpointError(
            f"These weights are of an FDConv network already ({dynamic[0]}). Expected plain ones."
        )


def _is_large(weight: Tensor, threshold: int, kernels: Collection[int]) -> bool:
    """Whether FDConv or FDLinear replaces a layer of this weight."""
    if weight.ndim == 4:
        return weight.shape[2] in kernels and min(weight.shape[:2]) > threshold
    return weight.ndim == 2 and min(weight.shape) > threshold


def _feed_forward(state_dict: Mapping[str, Tensor]) -> frozenset[str]:
    """Weights of the feed-forward networks of a MiT, Swin or ConvNeXt that is all there."""
    prefix = backbone_prefix(state_dict)
    pattern = FEED_FORWARD.get(backbone_type(part(state_dict, prefix)))
    if pattern is None:
        return frozenset()
    named = re.compile(rf"{re.escape(prefix)}(?:{pattern.pattern})\.weight")
    return frozenset(filter(named.fullmatch, state_dict))


def _known_to(state_dict: Mapping[str, Tensor]) -> frozenset[str]:
    """Weights that are converted if they are large enough: those the published converter names."""

    def is_known(key: str, weight: Tensor) -> bool:
        if weight.ndim == 4:
            return bool(_BLOCK.fullmatch(key) or _STEM.fullmatch(key))
        return bool(_LINEAR.search(key))

    own = _feed_forward(state_dict)
    known = {key for key, weight in state_dict.items() if is_known(key, weight)}
    return own or frozenset(known.difference(_grouped(state_dict)))


def _grouped(state_dict: Mapping[str, Tensor]) -> set[str]:
    """The known convolutions that are grouped: each filter sees a part of the input channels.

    A weight does not show its number of groups; the channels of the convolution before it do.
    """
    placed: dict[str, list[tuple[tuple[int, ...], str]]] = defaultdict(list)
    for key, weight in state_dict.items():
        match = _BLOCK.fullmatch(key) or _STEM.fullmatch(key) or _FIRST.fullmatch(key)
        if match and weight.ndim == 4:
            prefix, *place = match.groups()
            # In the network's order: a deep stem's, or the one conv1, then the blocks'.
            numbers = tuple(int(number) for number in place)
            order = {0: (0,), 1: (-1, *numbers), 3: numbers}[len(numbers)]
            placed[prefix].append((order, key))
    found = set()
    for convolutions in placed.values():
        for (_, before), (_, key) in pairwise(sorted(convolutions)):
            entering, taken = state_dict[before].shape[0], state_dict[key].shape[1]
            if entering > taken > 0 and entering % taken == 0:
                found.add(key)
    return found
