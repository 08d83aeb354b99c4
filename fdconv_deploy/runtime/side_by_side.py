"""A batch as runs of single images that go on at once."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.runtime.backends import Graph
from fdconv_deploy.runtime.backends.base import Tensors
from fdconv_deploy.runtime.manifest import TensorSpec


class SideBySide:
    """Runs any number of images by the graph of one. See :class:`Graph`.

    On a CPU this may cost less than a graph of the batch: FDConv makes kernels per image, so a
    batch shares next to no work; threads that each have an image of their own do not wait for
    each other after every operator; and a layer's answer is read again while it is still in a
    cache, where that of four images is not.

    :param graph: takes one image, on its share of the threads.
    :param streams: images at a time, over all callers.
    """

    def __init__(self, graph: Graph, streams: int) -> None:
        self._graph = graph
        self._pool = ThreadPoolExecutor(streams, "image")

    def run(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Every output by name. See :class:`Graph`."""
        count = len(next(iter(feeds.values())))
        singles = ({name: rows[i : i + 1] for name, rows in feeds.items()} for i in range(count))
        parts = list(self._pool.map(self._graph.run, singles))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def divides(batch: int, one: Iterable[TensorSpec], many: Iterable[TensorSpec]) -> bool:
    """Whether tensors of a batch are those of single images, one after another."""
    shapes = {spec.name: spec.shape for spec in many}
    return all(
        spec.shape[:1] == (1,) and shapes.get(spec.name) == (batch, *spec.shape[1:]) for spec in one
    )
