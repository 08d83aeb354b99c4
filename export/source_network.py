"""What to export, and the network's own answers to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fdconv_deploy.export.options import TOLERANCES, Activations, PrecisionName, check_size
from fdconv_deploy.export.quantization.agreement import Evaluation
from fdconv_deploy.export.validation.comparison import Rule
from numpy.typing import NDArray
from torch import Tensor, nn

from fdconv_deploy.checkpoints import LoadedDetector, LoadedSegmentor
from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.network import Example, tensors_of
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.runtime.manifest import OutputParity

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Precision:
    """In which numbers the graphs compute, and what it takes to get there.

    calibration: inputs ``(1, …)`` float32, for int8. It may be read more than once.
    """

    name: PrecisionName = "fp32"
    tolerance: float = TOLERANCES["fp32"]
    keep_fp32: tuple[str, ...] = ()
    activations: Activations = "unsigned"
    calibration: Iterable[NDArray[np.float32]] = ()
    evaluation: Evaluation | None = None

    def counts_classes(self, output: OutputParity) -> bool:
        """Whether the tolerance is about classes, not about errors."""
        return self.name == "int8" and output.argmax_agreement is not None

    def distance(self, output: OutputParity) -> float:
        """What the tolerance is held against."""
        if self.name == "int8" and output.argmax_agreement is not None:
            return 1 - output.argmax_agreement
        return output.max_rel


@dataclass(frozen=True, eq=False)
class Source:
    """Inputs to compare a graph with its network on.

    ``rows(batch)`` gives the network's inputs, batch first; of a larger batch, the first rows
    are a smaller one's.
    """

    said: str
    rows: Callable[[int], tuple[Tensor, ...]]


@dataclass
class Recipe:
    """What to export: filled in by the public functions, carried out by `produce`.

    spares: other inputs, where the source's cannot tell whether a graph is the network.
    """

    network: nn.Module
    source: Source
    batches: list[int]
    input_names: list[str]
    output_names: list[str]
    rule: Rule
    manifest: dict[str, Any]
    precision: Precision
    spares: Sequence[Source] = ()
    progress: Progress = field(default=lambda _: None)

    def feed(self, batch: int) -> dict[str, NDArray]:
        """The example of a batch size, by input name."""
        tensors = zip(self.input_names, self.source.rows(batch), strict=True)
        return {name: tensor.numpy() for name, tensor in tensors}


def graph_size(network: Segmentor, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the graphs: those given, or the crop of a sliding network.

    Raises:
        ExportError: there are none, or they do not suit the network.
    """
    test = network.architecture.test
    crop = test.crop_size if test.mode == "slide" else None
    if size is None:
        if crop is None:
            raise ExportError(
                "a network tested on whole images has no size of its own: give the graph's, "
                "e.g. --size 512x512."
            )
        return crop
    check_size(size)
    if crop is not None and size != crop:
        raise ExportError(
            f"this network was tested by sliding a {crop[0]}x{crop[1]} crop (height x width), "
            f"and its answers depend on the crop, but --size is {size[0]}x{size[1]}. Leave "
            "--size out, or say --mode whole to run it on whole images at that size."
        )
    smallest = _stride(network)
    if min(size) < smallest:
        raise ExportError(
            f"this network shrinks its input {smallest} times, so that of {size[0]}x{size[1]} "
            f"pixels (height x width) nothing would be left to tell apart. Give {smallest} or "
            "more each way; networks do best near the size they were trained at."
        )
    return size


def _stride(network: Segmentor) -> int:
    """How many pixels of the input one position of the deepest feature map used covers."""
    backbone, head = network.architecture.backbone, network.architecture.decode_head
    deepest = max(backbone.out_indices[i] for i in head.in_index)
    return 4 * int(np.prod(backbone.strides[: deepest + 1]))


def choices_entry(network: nn.Module) -> dict[str, str]:
    """What was chosen on reading a checkpoint, for the manifest's ``graph``: order and weights."""
    if not isinstance(network, LoadedSegmentor | LoadedDetector):
        return {}
    chosen = {} if network.weights is None else {"weights": network.weights}
    return {"frequency_order": network.order.name, **chosen}


def refuse_training(network: nn.Module) -> None:
    """Raise an `ExportError` for a network in training mode."""
    if network.training:
        raise ExportError("the network is in training mode; call .eval() before exporting.")


def answer_of(network: nn.Module, example: Example) -> Any:
    """Whatever the network answers.

    Raises:
        ExportError: it does not take the example.
    """
    inputs = tensors_of(example)
    try:
        with torch.no_grad():
            return network(*inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise ExportError(f"the network does not take inputs of shape {shapes}: {error}") from error


def outputs_of(network: nn.Module, example: Example) -> list[Tensor]:
    """The outputs of a network that gives a tensor, or several in a tuple or list.

    Raises:
        ExportError: it does not take the example.
    """
    answer = answer_of(network, example)
    return [answer] if isinstance(answer, Tensor) else list(answer)


def output_names(count: int, given: Sequence[str]) -> list[str]:
    """The names given for ``count`` outputs.

    Raises:
        ExportError: there are more or fewer names than outputs.
    """
    names = list(given)
    if len(names) != count:
        raise ExportError(f"the module has {count} outputs, output_names names {len(names)}.")
    return names
