"""Export of a checkpoint, a network or any module to a bundle that is proved equal to it."""

from __future__ import annotations

import copy
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fdconv_deploy.checkpoints import LoadedDetector, LoadedSegmentor, load_checkpoint
from fdconv_deploy.checkpoints.reading import digest_of
from fdconv_deploy.config import SIZE_DIVISOR
from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.options import ExportOptions
from fdconv_deploy.export.validation.comparison import Comparison
from fdconv_deploy.export.validation.reference import answer_of
from fdconv_deploy.export.validation.sample_inputs import (
    PreparedPictures,
    SourceNetwork,
    decoded_for,
    example_sources,
    network_of,
    picture_source,
)
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.fdconv import dynamic_layers
from fdconv_deploy.nn.from_published import convert_published
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import CheckpointInfo, InputSize


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
    # What torch.compile gives traces a second time; the module in it is the same network.
    module = getattr(module, "_orig_mod", module)
    _refuse_training(module)
    if not isinstance(example, Tensor) or example.dtype != torch.float32:
        found = f"a tensor of {example.dtype}" if isinstance(example, Tensor) else type(example)
        raise ExportError(
            f"the example must be one float32 torch tensor, got {found}. Convert it, and the "
            "module, with .float(); a module of several inputs needs a wrapper of one."
        )
    if chosen.size is not None or chosen.fit != "stretch" or len(chosen.pictures):
        raise ExportError(
            "size, fit and pictures are for checkpoints: a module is exported at its example's "
            "shape and compared on the example. Leave them out."
        )
    for tensor in chosen.calibration:
        if tensor.shape[1:] != example.shape[1:] or tensor.dtype != torch.float32:
            raise ExportError(
                f"calibration inputs must be float32 of the example's shape past the batch, "
                f"{tuple(example.shape[1:])}, got {tensor.dtype} {tuple(tensor.shape)}."
            )
    module, names = flatten_outputs(
        module, example, chosen=outputs, given=output_names, progress=chosen.say
    )
    if input_name in names:
        raise ExportError(
            f"an output is called {input_name!r} as the input is: give another input_name, or "
            "output_names=[...]."
        )
    module, assumed = convert_published(module, example, chosen.progress)
    manifest: dict[str, Any] = {"kind": "module"}
    if assumed:
        phrases = {name: "; ".join(found) for name, found in assumed.items() if found}
        manifest["graph"] = {"converted_layers": sorted(assumed), "assumed": phrases}
    source = SourceNetwork(
        module,
        (input_name,),
        tuple(names),
        Comparison.of(None),
        example_sources(example),
        tuple(chosen.batches or (example.shape[0],)),
        [image[None].numpy() for tensor in chosen.calibration for image in tensor],
        manifest,
    )
    from fdconv_deploy.export.exporter import write_bundle

    return write_bundle([source], output, chosen)


def network_to_export(
    network: Segmentor | Detector, options: ExportOptions, checkpoint: CheckpointInfo | None = None
) -> list[SourceNetwork]:
    """A segmentor or detector, ready to be exported at each of its sizes.

    Raises:
        ExportError: the network or the options do not allow it.
    """
    _refuse_training(network)
    if not dynamic_layers(network):
        # A plain baseline is exported all the same: benchmarks compare with it.
        options.say("note: this network has no FDConv layer")
    detects = isinstance(network, Detector)
    how = network.architecture.preprocessing
    manifest = {
        "kind": "detector" if detects else "segmentor",
        "detector" if detects else "architecture": network.architecture,
        "fit": "pad" if detects else options.fit,
        "checkpoint": checkpoint,
        "graph": _how_it_was_read(network),
    }
    sources = []
    for given in options.sizes or (None,):
        if isinstance(network, Detector):
            size = _detector_size(network, options, given)
        else:
            size = _segmentor_size(network, given)
        source = network_of(network, size)
        inputs = list(source.inputs)
        if len(options.pictures):
            inputs.insert(0, picture_source(network, options.pictures, size))
        source = replace(
            source,
            inputs=inputs,
            batches=tuple(options.batches or (1,)),
            calibration=PreparedPictures(decoded_for(options.calibration, how), size, how),
            manifest={**manifest, "input": InputSize(height=size[0], width=size[1])},
        )
        sources.append(source)
    return sources


def _refuse_training(network: nn.Module) -> None:
    if network.training:
        raise ExportError("the network is in training mode; call .eval() before exporting.")


def _segmentor_size(network: Segmentor, size: tuple[int, int] | None) -> tuple[int, int]:
    """The height and width given, or the crop of a sliding network."""
    test = network.architecture.test
    crop = test.crop_size if test.mode == "slide" else None
    if size is None:
        if crop is None:
            raise ExportError(
                "a network tested on whole images has no size of its own: give the graph's, "
                "e.g. --size 512x512."
            )
        return crop
    if crop is not None and size != crop:
        raise ExportError(
            f"this network was tested by sliding a {crop[0]}x{crop[1]} crop (height x width), "
            f"and its answers depend on the crop, but --size is {size[0]}x{size[1]}. Leave "
            "--size out, or say --mode whole to run it on whole images at that size."
        )
    divisor = network.architecture.preprocessing.size_divisor
    if any(side % divisor for side in size):
        nearest = "x".join(str(-(-side // divisor) * divisor) for side in size)
        raise ExportError(
            f"this network was tested on images padded to multiples of {divisor} pixels, and "
            f"{size[0]}x{size[1]} (height x width) is none. Give {nearest}."
        )
    backbone, head = network.architecture.backbone, network.architecture.decode_head
    deepest = max(backbone.out_indices[i] for i in head.in_index)
    smallest = backbone.smallest_side(deepest)
    if min(size) < smallest:
        raise ExportError(
            f"this network shrinks its input so far that of {size[0]}x{size[1]} pixels (height x "
            f"width) nothing would be left to tell apart. Give {smallest} or more each way; "
            "networks do best near the size they were trained at."
        )
    return size


def _detector_size(
    network: Detector, options: ExportOptions, size: tuple[int, int] | None
) -> tuple[int, int]:
    """The height and width given, or the padded size of a landscape image as published."""
    size = size or network.architecture.published_size
    if any(side % SIZE_DIVISOR for side in size):
        nearest = "x".join(str(-(-side // SIZE_DIVISOR) * SIZE_DIVISOR) for side in size)
        raise ExportError(
            f"a detector's height and width must be multiples of {SIZE_DIVISOR}, as its published "
            f"pipeline pads them; got {size[0]}x{size[1]}. Give {nearest}."
        )
    if options.precision != "fp32":
        raise ExportError(
            f"detectors are exported in float32 only so far, not in {options.precision}: "
            "coordinates of boxes need float32. Leave --precision out."
        )
    return size


def _how_it_was_read(network: nn.Module) -> dict[str, Any]:
    """For the manifest: which weights and order a checkpoint was read with, what was assumed."""
    if not isinstance(network, LoadedSegmentor | LoadedDetector):
        return {"assumed": {}}
    assumed = {fact.field: str(fact.value) for fact in network.inference.assumed}
    if network.order.assumed:
        assumed["frequency_order"] = network.order.name
    weights = {} if network.weights is None else {"weights": network.weights}
    return {"assumed": assumed, "frequency_order": network.order.name, **weights}


def flatten_outputs(
    module: nn.Module,
    example: Tensor,
    *,
    chosen: Sequence[str] | None = None,
    given: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[nn.Module, list[str]]:
    """The module with its answer as a flat tuple of tensors, and a name for each.

    Args:
        module: gives a tensor, or tensors in tuples, lists, dicts, named tuples and whatever
            else PyTorch's pytree knows, nested at will; ``None`` in them is left out.
        example: what it is run on.
        chosen: names of the outputs to keep, in this order; all of them if not given.
        given: names for the outputs, in place of their own: see `export_module`.
        progress: called with a sentence for each ``None``.

    Returns:
        The module itself where its answer is flat already, else a shallow copy of it, of the
        same submodules.

    Raises:
        ExportError: the module does not run on the example, an output is not a tensor, or names
            are unknown, ambiguous, or more or fewer than outputs.
    """
    answer = answer_of(module, example)
    paths = pytree.tree_flatten_with_path(answer)[0]
    own, leaves = [_name(path) for path, _ in paths], [leaf for _, leaf in paths]
    if len(own) == 1 and all(isinstance(key, pytree.SequenceKey) for key in paths[0][0]):
        own = ["output"]
    pairs = list(zip(own, leaves, strict=True))
    tensors = ", ".join(repr(name) for name, leaf in pairs if isinstance(leaf, Tensor))
    choice = "Wrap the module in one that gives tensors."
    if tensors:
        choice = f"Choose with outputs=[...]; its tensors are {tensors}."
    if chosen is None:
        for name in (name for name, leaf in pairs if leaf is None):
            progress(f"note: the module's output {name!r} is None, and left out")
        places = [place for place, leaf in enumerate(leaves) if leaf is not None]
        if not places:
            raise ExportError("the module has no output: there is no tensor in its answer.")
    else:
        places = _places(own, chosen, choice)
    for name, leaf in ((own[place], leaves[place]) for place in places):
        if not isinstance(leaf, Tensor):
            kind = type(leaf).__name__
            plain = isinstance(leaf, bool | int | float)
            found = f"{kind} {leaf!r}" if plain else f"of type {kind}"
            raise ExportError(
                f"a module's outputs must be tensors, and its output {name!r} is {found}. {choice}"
            )
    names = [own[place] for place in places] if given is None else list(given)
    if len(names) != len(places):
        raise ExportError(f"the module has {len(places)} outputs, output_names names {len(names)}.")
    if "" in names or max(Counter(names).values()) > 1:
        raise ExportError(
            f"outputs need names of their own, and these are {names}. Give output_names=[...], one "
            "for each."
        )
    if isinstance(answer, Tensor) or (
        isinstance(answer, list | tuple)
        and places == list(range(len(answer)))
        and all(isinstance(leaf, Tensor) for leaf in answer)
    ):
        return module, names

    def flat(_module: nn.Module, _inputs: Any, answer: Any) -> tuple[Tensor, ...]:
        found = pytree.tree_leaves(answer)
        return tuple(found[place] for place in places)

    # A hook, not a wrapper: layers keep the names that users know them by.
    hooked = copy.copy(module)
    hooked._forward_hooks = OrderedDict(module._forward_hooks)
    hooked.register_forward_hook(flat)
    return hooked, names


def _name(path: Sequence[Any]) -> str:
    """Where a leaf stands: keys and places, joined by dots."""
    # A place in a sequence, a dict's key, or a named tuple's field.
    parts = [
        str(next(getattr(key, n) for n in ("idx", "key", "name") if hasattr(key, n)))
        for key in path
    ]
    if path and isinstance(path[0], pytree.SequenceKey):
        parts[0] = f"output{parts[0]}"
    return ".".join(parts)


def _places(own: list[str], chosen: Sequence[str], choice: str) -> list[int]:
    """Where outputs of these names stand among all."""
    if not chosen:
        raise ExportError(f"outputs must name one or more. {choice}")
    for name in chosen:
        if own.count(name) != 1:
            found = "several outputs" if name in own else "no output"
            raise ExportError(f"the module has {found} called {name!r}. {choice}")
    return [own.index(name) for name in chosen]
