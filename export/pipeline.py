"""The whole way from a network to a bundle that is proved equal to it."""

from __future__ import annotations

import copy
import os
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

import fdconv_deploy
from export.capture import capture
from export.graph import build_graph, check_model
from export.inputs import Picture, made_up_images, normalised
from export.parity import measure
from export.weights import WeightsFile
from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.network import dynamic_layers, input_sizes
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.runtime.bundle import Bundle, BundleWriter, sha256_of
from fdconv_deploy.runtime.manifest import (
    CheckpointInfo,
    InputSize,
    Manifest,
    OutputParity,
    ParityReport,
    TensorSpec,
)

# A graph further from its network than this, relative to the largest value, is not kept.
TOLERANCE = 1e-4
Progress = Callable[[str], None]


@dataclass
class _Recipe:
    """What to export: filled in by the public functions, carried out by `_export`."""

    network: nn.Module
    examples: dict[int, Tensor]
    input_name: str
    output_names: list[str]
    classes: bool
    manifest: dict[str, Any]
    inputs_said: str
    tolerance: float
    progress: Progress = field(default=lambda _: None)


def export_checkpoint(
    checkpoint: str | Path,
    destination: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    batches: Sequence[int] = (1,),
    config: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    fit: Literal["stretch", "pad"] = "stretch",
    pictures: Sequence[Picture] = (),
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export a trained segmentor's checkpoint.

    Args:
        checkpoint: see `fdconv_deploy.checkpoints.load_checkpoint`, as are ``config`` and
            ``overrides``.
        destination: the bundle's folder.
        size: height and width of the graphs, in pixels; if not given, the crop size of a
            network tested in ``slide`` mode.
        batches: one graph each.
        fit: how images of another shape are brought to ``size``.
        pictures: HxWx3 uint8 RGB images of any size to compare the graphs with the network
            on; drawn street scenes if none are given.
        tolerance: the largest error, relative to the largest logit, that is kept.
        overwrite: replace a bundle that is there.
        progress: told of each step as it begins.

    Raises:
        CheckpointError: the checkpoint is not of a segmentor with FDConv layers.
        ExportError: the size does not suit the network, or the graph is not equal to it.
        BundleError: ``destination`` is in the way.
    """
    say = progress or (lambda _: None)
    say("reading the checkpoint")
    network = load_checkpoint(checkpoint, config=config, overrides=overrides)
    assumed = {fact.field: fact.value for fact in network.inference.assumed}
    source = CheckpointInfo(name=Path(checkpoint).name, sha256=sha256_of(Path(checkpoint)))
    return export_segmentor(
        network,
        destination,
        size=size,
        batches=batches,
        fit=fit,
        pictures=pictures,
        tolerance=tolerance,
        overwrite=overwrite,
        progress=progress,
        checkpoint=source,
        assumed=assumed,
    )


def export_segmentor(
    network: Segmentor,
    destination: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    batches: Sequence[int] = (1,),
    fit: Literal["stretch", "pad"] = "stretch",
    pictures: Sequence[Picture] = (),
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    progress: Progress | None = None,
    checkpoint: CheckpointInfo | None = None,
    assumed: Mapping[str, Any] | None = None,
) -> Bundle:
    """Export a segmentor; arguments as `export_checkpoint`'s.

    ``assumed``: fields of the architecture that nothing told, for the manifest.
    """
    _refuse_training(network)
    architecture = network.architecture
    size = _graph_size(network, size)
    if not dynamic_layers(network):
        # A plain twin is exported all the same: benchmarks need both sides.
        (progress or (lambda _: None))("note: this network has no FDConv layer")
    channels = architecture.backbone.in_channels
    if pictures:
        said = f"{len(pictures)} pictures given"
        given = normalised(pictures, size, architecture.preprocessing)
        examples = {b: given[torch.arange(b) % len(given)] for b in _batch_sizes(batches)}
    else:
        said = "drawn street scenes"
        examples = {
            batch: made_up_images(batch, size, architecture.preprocessing, channels=channels)
            for batch in _batch_sizes(batches)
        }
    manifest = {
        "kind": "segmentor",
        "architecture": architecture,
        "input": InputSize(height=size[0], width=size[1]),
        "fit": fit,
        "checkpoint": checkpoint,
        "graph": {"assumed": {k: str(v) for k, v in (assumed or {}).items()}},
    }
    recipe = _Recipe(network, examples, "images", ["logits"], True, manifest, said, tolerance)
    if progress is not None:
        recipe.progress = progress
    return _export(recipe, destination, overwrite)


def export_module(
    module: nn.Module,
    example: Tensor,
    destination: str | os.PathLike[str],
    *,
    batches: Sequence[int] | None = None,
    input_name: str = "input",
    output_names: Sequence[str] | None = None,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Export any module with `FDConv2d` layers in it.

    Args:
        module: in eval mode, taking one tensor and giving a tensor or a tuple or list of
            tensors, batch first.
        example: an input; its shape past the batch is the graphs', its values are what the
            graphs are checked on.
        batches: one graph each; if not given, the example's own batch size.
        output_names: one per output; ``output`` or ``output0``, ``output1``… if not given.

    Raises:
        ExportError: the module cannot be exported, or the graph is not equal to it.
    """
    _refuse_training(module)
    if not isinstance(example, Tensor) or example.dtype != torch.float32:
        found = f"a tensor of {example.dtype}" if isinstance(example, Tensor) else type(example)
        raise ExportError(
            f"the example must be one float32 torch tensor, got {found}. Convert it, and the "
            "module, with .float(); a module of several inputs needs a wrapper of one."
        )
    count = len(_answers(module, example))
    names = list(output_names or (["output"] if count == 1 else _numbered(count)))
    if len(names) != count:
        raise ExportError(f"the module has {count} outputs, output_names names {len(names)}.")
    sizes = _batch_sizes(batches if batches is not None else [example.shape[0]])
    examples = {
        batch: example[torch.arange(batch) % example.shape[0]].contiguous() for batch in sizes
    }
    recipe = _Recipe(
        module, examples, input_name, names, False, {"kind": "module"}, "the example given",
        tolerance,
    )  # fmt: skip
    if progress is not None:
        recipe.progress = progress
    return _export(recipe, destination, overwrite)


def _numbered(count: int) -> list[str]:
    return [f"output{i}" for i in range(count)]


def _batch_sizes(batches: Sequence[int]) -> list[int]:
    unique = sorted(set(batches))
    if not unique or unique[0] < 1:
        raise ExportError(f"batch sizes must be 1 or more, got {list(batches)}.")
    return unique


def _graph_size(network: Segmentor, size: tuple[int, int] | None) -> tuple[int, int]:
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
    if min(size) < 1 or max(size) > 16384:
        raise ExportError(f"height and width must be 1 to 16384 pixels, got {size[0]}x{size[1]}.")
    return size


def _refuse_training(network: nn.Module) -> None:
    if network.training:
        raise ExportError("the network is in training mode; call .eval() before exporting.")


def _answers(network: nn.Module, example: Tensor) -> list[Tensor]:
    """The network's outputs, one or several."""
    try:
        with torch.no_grad():
            answer = network(example)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ExportError(
            f"the network does not take inputs of shape {tuple(example.shape)}: {error}"
        ) from error
    outputs = [answer] if isinstance(answer, Tensor) else answer
    if not isinstance(outputs, list | tuple) or not all(isinstance(o, Tensor) for o in outputs):
        raise ExportError(
            f"the network must give a tensor, or a tuple or list of tensors, and gave "
            f"{type(answer).__name__}. Wrap it in a module that does."
        )
    return list(outputs)


def _run(recipe: _Recipe, example: Tensor) -> dict[str, np.ndarray]:
    outputs = _answers(recipe.network, example)
    for name, output in zip(recipe.output_names, outputs, strict=True):
        if not torch.isfinite(output).all():
            raise ExportError(
                f"the PyTorch network's own output {name!r} on {recipe.inputs_said} holds values "
                "that are not finite, so there is nothing to compare a graph with. Check the "
                "checkpoint, or give pictures of the kind it was trained on (--image)."
            )
    return {n: o.numpy() for n, o in zip(recipe.output_names, outputs, strict=True)}


def _export(recipe: _Recipe, destination: str | os.PathLike[str], overwrite: bool) -> Bundle:
    started = time.perf_counter()
    network = recipe.network
    parity: dict[int, tuple[OutputParity, ...]] = {}
    inputs: dict[int, tuple[TensorSpec, ...]] = {}
    outputs: dict[int, tuple[TensorSpec, ...]] = {}
    models: dict[int, str] = {}
    group_maps: dict[str, str] = {}
    nodes: dict[str, int] = {}
    sizes: dict[str, tuple[int, int]] | None = None
    with (
        BundleWriter(destination, overwrite=overwrite) as writer,
        tempfile.TemporaryDirectory(prefix="fdconv-export-") as scratch,
    ):
        answers: dict[int, dict[str, np.ndarray]] = {}
        with WeightsFile(writer.path / "weights.bin") as weights:
            for batch, example in recipe.examples.items():
                recipe.progress(f"batch {batch}: running the network")
                answers[batch] = _run(recipe, example)
                recipe.progress(f"batch {batch}: writing the graph")
                captured = capture(
                    network,
                    example,
                    input_names=[recipe.input_name],
                    output_names=recipe.output_names,
                )
                if sizes is None:  # the same for every batch size
                    sizes = input_sizes(network, example[:1])
                graph = build_graph(captured, network, sizes, batch)
                del captured
                weights.take(graph.model)
                models[batch] = f"model.b{batch}.onnx"
                onnx.save(graph.model, str(writer.path / models[batch]))
                group_maps |= graph.group_maps
                nodes[f"nodes.b{batch}"] = len(graph.model.graph.node)
                inputs[batch] = (_spec(recipe.input_name, example.numpy()),)
                outputs[batch] = tuple(_spec(n, a) for n, a in answers[batch].items())
        for batch, example in recipe.examples.items():
            recipe.progress(f"batch {batch}: checking it against the network")
            check_model(str(writer.path / models[batch]))
            parity[batch] = measure(
                writer.path / models[batch],
                {recipe.input_name: example.numpy()},
                answers[batch],
                Path(scratch),
                classes=recipe.classes,
            )
            _refuse_if_far(recipe, batch, parity[batch], answers[batch])
        manifest = Manifest(
            created_by=f"fdconv-deploy {fdconv_deploy.__version__}",
            created_at=datetime.now(timezone.utc),
            models=models,
            weights="weights.bin",
            inputs=inputs,
            outputs=outputs,
            group_maps=group_maps,
            parity=ParityReport(
                batches=parity,
                reference=f"PyTorch {torch.__version__}, float32, CPU",
                backend=f"ONNX Runtime {_version('onnxruntime')}, CPU",
                inputs=recipe.inputs_said,
            ),
            graph={
                **recipe.manifest.get("graph", {}),
                **nodes,
                "fdconv_layers": len(dynamic_layers(network)),
                "export_seconds": round(time.perf_counter() - started, 1),
                "export_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            },
            versions={n: _version(n) for n in ("torch", "onnx", "onnxruntime", "numpy")},
            **{k: v for k, v in recipe.manifest.items() if k != "graph"},
        )
        return writer.commit(manifest)


def _refuse_if_far(
    recipe: _Recipe, batch: int, outputs: tuple[OutputParity, ...], answers: dict[str, np.ndarray]
) -> None:
    far = [output for output in outputs if output.max_rel > recipe.tolerance]
    if not far:
        return
    worst = max(far, key=lambda output: output.max_rel)
    # Whose fault it is: what rounding alone does to the network on these inputs.
    double = copy.deepcopy(recipe.network).double()
    exact = _answers(double, recipe.examples[batch].double())
    reference = exact[recipe.output_names.index(worst.name)].numpy()
    own = float(np.abs(answers[worst.name] - reference).max() / np.abs(reference).max())
    raise ExportError(
        f"the exported graph of batch {batch} is not equal to the network: output "
        f"{worst.name!r} differs by {worst.max_rel:.1e} of its largest value, "
        f"{recipe.tolerance:.0e} is allowed. Nothing was kept. The PyTorch network's own rounding "
        f"error on these inputs ({recipe.inputs_said}) is {own:.1e}: if that is much, compare on "
        "pictures of the kind it was trained on (--image), or raise the tolerance."
    )


def _spec(name: str, array: np.ndarray) -> TensorSpec:
    return TensorSpec(name=name, shape=array.shape, dtype=str(array.dtype))


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
