"""A network to be exported or verified, and the inputs that graphs are compared with it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.export.options import Picture, Pictures
from fdconv_deploy.export.validation.comparison import Comparison
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.runtime.preprocessing import prepare_image
from fdconv_deploy.sample_images import (
    prepared_batch,
    sample_batch,
    sample_detector_batch,
)

# How many sets of packaged pictures are tried until one can tell a graph from its network.
SETS = 4


@dataclass(frozen=True, eq=False)
class InputSource:
    """Inputs to compare a graph with its network on, and what to call them.

    ``rows(batch)`` gives the network's inputs, batch first; of a larger batch, the first rows
    are a smaller one's.
    """

    name: str
    rows: Callable[[int], tuple[Tensor, ...]]


def sample_tensor(
    batch: int, size: tuple[int, int], preprocessing: Preprocessing | None = None, *, seed: int = 0
) -> Tensor:
    """Packaged pictures ``(batch, channels, height, width)`` float32, see `sample_batch`."""
    return torch.from_numpy(sample_batch(batch, size, preprocessing, seed=seed))


def sample_sources(network: Segmentor | Detector, size: tuple[int, int]) -> list[InputSource]:
    """Sets of packaged pictures as a segmentor's or detector's inputs of ``(height, width)``."""
    how = network.architecture.preprocessing

    def rows(seed: int, batch: int) -> tuple[Tensor, ...]:
        if isinstance(network, Detector):
            return tuple(map(torch.from_numpy, sample_detector_batch(batch, size, how, seed=seed)))
        return (sample_tensor(batch, size, how, seed=seed),)

    name = "packaged pictures"
    names = [f"{name}, set {n + 1}" if n else name for n in range(SETS)]
    return [InputSource(name, partial(rows, seed)) for seed, name in enumerate(names)]


def picture_source(
    network: Segmentor | Detector, pictures: Sequence[Picture], size: tuple[int, int]
) -> InputSource:
    """Pictures of any size as a network's inputs, resized as the runtime resizes them."""
    how = network.architecture.preprocessing
    pictures = decoded_for(pictures, how)
    if isinstance(network, Detector):
        prepared = [prepare_image(picture, how, [size], None) for picture in pictures]
        images = np.stack([one.inputs["images"] for one in prepared])
        covered = np.array([one.covered for one in prepared], np.float32)
        tensors: tuple[Tensor, ...] = (torch.from_numpy(images), torch.from_numpy(covered))
    else:
        tensors = (torch.from_numpy(prepared_batch(pictures, size, how)),)

    def rows(batch: int) -> tuple[Tensor, ...]:
        index = torch.arange(batch) % len(pictures)
        return tuple(tensor[index] for tensor in tensors)

    return InputSource(f"{len(pictures)} pictures given", rows)


class CalibrationImages(Protocol):
    """Inputs ``(1, …)`` float32 for int8, each made when it is indexed."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class PreparedPictures:
    """Pictures as a segmentor's inputs ``(1, C, H, W)``: `CalibrationImages`."""

    pictures: Sequence[Picture]
    size: tuple[int, int]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        return prepared_batch([self.pictures[index]], self.size, self.preprocessing)


def decoded_for(pictures: Sequence[Picture], preprocessing: Preprocessing) -> Sequence[Picture]:
    """Pictures as a network takes them: files are decoded accordingly, arrays are already."""
    return pictures.for_network(preprocessing) if isinstance(pictures, Pictures) else pictures


def example_sources(example: Tensor) -> list[InputSource]:
    """A module's example, and images also from right to left and upside down."""

    def rows(flipped: tuple[int, ...], batch: int) -> tuple[Tensor, ...]:
        return (example[torch.arange(batch) % len(example)].flip(flipped).contiguous(),)

    kinds: dict[str, tuple[int, ...]] = {"the example given": ()}
    if example.ndim == 4:
        kinds |= {"the example, mirrored": (-1,), "the example, upside down": (-2,)}
    return [InputSource(name, partial(rows, flipped)) for name, flipped in kinds.items()]


@dataclass(frozen=True, eq=False)
class SourceNetwork:
    """A network, with all that an export or a comparison needs to know about it.

    Attributes:
        module: in eval mode.
        inputs: to compare on. Graphs are traced on the first; the others are tried where those
            before cannot tell whether a graph is the network.
        batches: batch sizes to export.
        calibration: inputs ``(1, …)`` float32 for int8.
        manifest: entries of the bundle's manifest that say what the network is.
    """

    module: nn.Module
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    comparison: Comparison
    inputs: Sequence[InputSource]
    batches: tuple[int, ...] = (1,)
    calibration: CalibrationImages = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def feed(self, batch: int) -> dict[str, NDArray]:
        """The inputs that graphs of a batch size are traced on, by name."""
        tensors = zip(self.input_names, self.inputs[0].rows(batch), strict=True)
        return {name: tensor.numpy() for name, tensor in tensors}


def network_of(network: Segmentor | Detector, size: tuple[int, int]) -> SourceNetwork:
    """A segmentor or detector at a height and width, to be compared on packaged pictures."""
    detects = isinstance(network, Detector)
    return SourceNetwork(
        network,
        ("images", "sizes") if detects else ("images",),
        tuple(network.output_names),
        Comparison.of(network.architecture),
        sample_sources(network, size),
    )
