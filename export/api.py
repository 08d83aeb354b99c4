"""Export of a checkpoint, a network or any module to a bundle that is proved equal to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.checkpoints.reading import digest_of
from fdconv_deploy.export.options import ExportOptions
from fdconv_deploy.export.source_network import module_to_export, network_to_export
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import CheckpointInfo


def export_checkpoint(
    checkpoint: str | Path,
    output: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    config: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: str | None = None,
    frequency_order: Literal["auto", "torch", "stable"] = "auto",
    require_fdconv: bool = True,
    **fields: Any,
) -> Bundle:
    """Export a trained segmentor's or detector's checkpoint; its names tell which it is.

    Args:
        checkpoint: see `fdconv_deploy.checkpoints.load_checkpoint`, as are ``config``,
            ``overrides``, ``weights``, ``frequency_order`` and
            ``require_fdconv``.
        output: the bundle's folder.
        options: how it is exported.
        fields: fields of `ExportOptions`, in place of those of ``options``.

    Raises:
        CheckpointError: the checkpoint is not of a network known here with FDConv layers, or not
            of one known here at all.
        ExportError: the options do not suit the network, or a graph is not equal to it.
        BundleError: ``output`` is in the way.
    """
    chosen = ExportOptions.of(options, fields)
    chosen.say("reading the checkpoint")
    network = load_checkpoint(
        checkpoint,
        config=config,
        overrides=overrides,
        weights=weights,
        frequency_order=frequency_order,
        require_fdconv=require_fdconv,
    )
    source = CheckpointInfo(name=Path(checkpoint).name, sha256=digest_of(Path(checkpoint)))
    return export_network(network, output, chosen, checkpoint=source)


def export_network(
    network: Segmentor | Detector,
    output: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    checkpoint: CheckpointInfo | None = None,
    **fields: Any,
) -> Bundle:
    """Export a segmentor or detector that is in memory, in eval mode.

    Args:
        network: left as it is.
        output: the bundle's folder.
        options: how it is exported.
        checkpoint: where the network comes from, for the manifest.
        fields: fields of `ExportOptions`, in place of those of ``options``.

    Raises:
        ExportError: the options do not suit the network, or a graph is not equal to it.
        BundleError: ``output`` is in the way.
    """
    chosen = ExportOptions.of(options, fields)
    sources = network_to_export(network, chosen, checkpoint)
    # What writes graphs takes half a second to import: after what is quickly refused.
    from fdconv_deploy.export.exporter import write_bundle

    return write_bundle(sources, output, chosen)


def export_module(
    module: nn.Module,
    example: Tensor,
    output: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    input_name: str = "input",
    outputs: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    **fields: Any,
) -> Bundle:
    """Export any module with FDConv layers in it.

    Args:
        module: in eval mode, taking one tensor and giving tensors, batch first: one, or several
            in tuples, lists and dicts, nested at will. Its layers may be `FDConv2d` layers or
            those of a copy of the published class: those are recognised by their structure,
            converted in a copy of the module, and compared with their originals on the example.
        example: a float32 input; its shape past the batch is the graphs', its values are what
            the graphs are checked on.
        output: the bundle's folder.
        options: how it is exported. No class is chosen, so that the tolerance is about errors in
            int8, too.
        input_name: what to call the input in the graphs.
        outputs: names of the outputs to export, in this order; all of them if not given. An
            output is called by where it stands in the module's answer: ``output`` where it is
            the only one, else ``output0``, ``boxes``, ``output1.feats.2``.
        output_names: what to call them in the graphs instead, one per output.
        fields: fields of `ExportOptions`, in place of those of ``options``.

    Raises:
        ExportError: the module cannot be exported, or a graph is not equal to it.
        UnsupportedLayerError: a layer is a variant of the published one, with what differs.
        BundleError: ``output`` is in the way.
    """
    chosen = ExportOptions.of(options, fields)
    source = module_to_export(
        module, example, chosen, input_name=input_name, outputs=outputs, output_names=output_names
    )
    from fdconv_deploy.export.exporter import write_bundle

    return write_bundle([source], output, chosen)
