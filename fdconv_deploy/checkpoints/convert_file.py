"""A plain network's checkpoint file → the start of an FDConv network, as a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fdconv_deploy.checkpoints.config_parser import Config
from fdconv_deploy.checkpoints.config_writer import format_config
from fdconv_deploy.checkpoints.convert import (
    PUBLISHED_THRESHOLD,
    Conversion,
    convert_state_dict,
    describe_conversion,
    equivalent_state_dict,
)
from fdconv_deploy.checkpoints.infer_detector import infer_detector_config
from fdconv_deploy.checkpoints.infer_layers import kind_of
from fdconv_deploy.checkpoints.infer_segmentor import infer_backbone_only, infer_segmentor_config
from fdconv_deploy.checkpoints.loading import config_for
from fdconv_deploy.checkpoints.reading import Checkpoint, read_checkpoint
from fdconv_deploy.checkpoints.write import write_checkpoint
from fdconv_deploy.config import BackboneConfig, FDConvConfig
from fdconv_deploy.errors import CheckpointError, in_the_way


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
        source: any file :func:`read_checkpoint` takes, of a ResNet alone or in a network
            (``backbone.`` names), or of a ViT.
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
    destination = Path(destination)
    if destination.exists() and not overwrite:
        raise in_the_way(CheckpointError, f"{destination} is there already.")
    conv = _conv(arguments or {})
    checkpoint = read_checkpoint(source, weights=weights)
    state = checkpoint.state_dict
    try:
        settings = config_for(checkpoint, config)
        backbone, text = _described(checkpoint, settings, conv)
        if equivalent:
            if backbone is None:
                raise CheckpointError(f"Expected a ResNet for an equivalent network. {text}")
            made = equivalent_state_dict(state, backbone)
        else:
            given = "use_fdconv_if_c_gt" in (arguments or {})
            made = convert_state_dict(
                state,
                use_fdconv_if_c_gt=conv.use_fdconv_if_c_gt if given else PUBLISHED_THRESHOLD,
                use_fdconv_if_k_in=conv.use_fdconv_if_k_in,
                param_ratio=conv.param_ratio,
            )
        report = describe_conversion(state, made, conv, "equivalent" if equivalent else "published")
        if not report.converted and report.unrecognised:
            raise CheckpointError(
                f"Nothing in it is converted: {len(report.unrecognised)} layers of a size that "
                f"FDConv replaces have names that the published converter does not know "
                f"({', '.join(report.unrecognised[:3])}…), so that it writes the same weights "
                "again. Expected a ResNet's layer1.0.conv1.weight… or a ViT's "
                "layers.0.ffn.layers.0.0.weight…; in Python, "
                "fdconv_deploy.nn.replace_convolutions takes any network."
            )
        if not report.converted:
            names = ", ".join(list(state)[:3])
            raise CheckpointError(
                "Nothing in it is to be converted: expected a ResNet's layer1.0.conv1.weight… or "
                f"a ViT's layers.0.ffn.layers.0.0.weight… of more channels than the limit, found "
                f"{names}…. Lower the limit (--channels-above), or give a ResNet's checkpoint."
            )
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    meta = {k: v for k, v in checkpoint.meta.items() if k not in ("config", "cfg")}
    meta |= {"cfg": text} if backbone is not None else {}
    meta |= {"converted_from": Path(source).name, "conversion": report.method}
    write_checkpoint(destination, made, meta)
    return report


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


def _described(
    checkpoint: Checkpoint, config: Config | None, conv: FDConvConfig
) -> tuple[BackboneConfig | None, str]:
    """The FDConv backbone and its config's text; None and the reason if it is no ResNet."""
    state = checkpoint.state_dict
    if kind_of(state) == "unknown":
        return None, f"None of its names is of one: {', '.join(list(state)[:3])}…"
    if kind_of(state) == "segmentor":
        inference = infer_segmentor_config(state, config=config, meta=checkpoint.meta)
        architecture = inference.architecture
        backbone = architecture.backbone.model_copy(update={"conv": conv})
        return backbone, format_config(architecture.model_copy(update={"backbone": backbone}))
    try:
        if kind_of(state) == "detector":
            detector = infer_detector_config(
                state, config=config, meta=checkpoint.meta
            ).architecture
            backbone = detector.backbone.model_copy(update={"conv": conv})
            return backbone, format_config(detector.model_copy(update={"backbone": backbone}))
        plain = infer_backbone_only(state, config=config).architecture
    except CheckpointError as error:
        return None, str(error)
    backbone = plain.model_copy(update={"conv": conv})
    return backbone, format_config(backbone)
