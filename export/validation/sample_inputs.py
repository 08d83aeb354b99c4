"""Inputs that graphs are compared with their networks on: pictures given, or packaged ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fdconv_deploy.config import Preprocessing
from fdconv_deploy.export.image_folders import Pictures
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.runtime.preprocessing import prepare_image
from fdconv_deploy.sample_images import (
    prepared_batch,
    sample_batch,
    sample_detector_batch,
)

Picture = NDArray[Any]
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

    def rows(seed: int) -> Callable[[int], tuple[Tensor, ...]]:
        def make(batch: int) -> tuple[Tensor, ...]:
            if isinstance(network, Detector):
                return tuple(
                    map(torch.from_numpy, sample_detector_batch(batch, size, how, seed=seed))
                )
            return (sample_tensor(batch, size, how, seed=seed),)

        return make

    name = "packaged pictures"
    return [InputSource(f"{name}, set {n + 1}" if n else name, rows(n)) for n in range(SETS)]


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

    def rows(*flipped: int) -> Callable[[int], tuple[Tensor, ...]]:
        def make(batch: int) -> tuple[Tensor, ...]:
            return (example[torch.arange(batch) % len(example)].flip(flipped).contiguous(),)

        return make

    found = [InputSource("the example given", rows())]
    if example.ndim == 4:
        found.append(InputSource("the example, mirrored", rows(-1)))
        found.append(InputSource("the example, upside down", rows(-2)))
    return found
