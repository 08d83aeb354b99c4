"""A bundle's graphs, run: what sessions of every kind of bundle share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.errors import BackendError, BundleError

from .backends import Backend, Graph, feeds_problem
from .batching import plan_batches
from .bundle import Bundle
from .graphs import LazyGraphs

if TYPE_CHECKING:
    from typing_extensions import Self

Tensors = dict[str, npt.NDArray[Any]]


class Runner:
    """Runs a bundle's graphs. Any method may be called from several threads at once.

    Graphs are loaded at their first use, or by :meth:`warm_up`. A context manager; after
    :meth:`close` every use is a ``BackendError``.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend, choice: str, graphs: Mapping[int, Graph]
    ) -> None:
        self.bundle = bundle
        self.choice = choice
        self._backend = backend
        self._graphs = LazyGraphs(lambda batch: backend.load(bundle, batch), graphs)

    @property
    def backend(self) -> str:
        """The name of the backend in use; ``choice`` says why it is."""
        return self._backend.name

    @property
    def operators(self) -> str:
        """What runs the ``fdconv`` operators, and why; empty where that goes without saying."""
        return self._backend.operators

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes there is a graph for, ascending."""
        return self.bundle.batch_sizes

    @property
    def loaded_batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes whose graphs are in memory, ascending."""
        return self._graphs.loaded

    @property
    def batch_cost(self) -> Callable[[int], float]:
        """What one run costs by its batch size, in any unit; see ``plan_batches``."""
        return self._backend.batch_cost

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images a segmentor or detector takes."""
        size = self.bundle.manifest.input
        if size is None:
            raise self._is_not("segmentor")
        return size.height, size.width

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What the network answers to a batch; see ``Session.run``."""
        raise NotImplementedError

    def run_batches(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Tensors:
        """Run any number of images, divided over the bundle's batch sizes.

        Slots left over in the last run hold repeated images, whose answers are dropped.

        :param feeds: every input by name, each with the images along its first axis.
        :returns: every output by name, likewise.
        """
        count, position = len(next(iter(feeds.values()))), 0
        parts: list[Tensors] = []
        for size in plan_batches(count, self.batch_sizes, self.batch_cost):
            part = {}
            for name, given in feeds.items():
                rows = given[position : position + size]
                if len(rows) < size:
                    rows = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
                part[name] = np.ascontiguousarray(rows)
            answers = self._graphs.get(size).run(part)
            parts.append({name: rows[: count - position] for name, rows in answers.items()})
            position += size
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def run_raw(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run a graph on exactly its inputs, by name; which batch size, their shapes tell.

        :raises BackendError: no graph of the bundle takes these names, shapes and types.
        """
        problems = []
        for batch in self.batch_sizes:
            problem = feeds_problem(self.bundle.manifest.inputs[batch], feeds)
            if problem is None:
                return self._graphs.get(batch).run(feeds)
            problems.append(f"at batch {batch}, {problem}")
        raise BackendError(f"No graph of this bundle takes these inputs: {'; '.join(problems)}.")

    def warm_up(self, batch_sizes: Sequence[int] | None = None) -> float:
        """Load the graphs and run each once, so that the first request is as fast as any.

        A segmentor's or detector's pre- and postprocessing run once as well.

        :param batch_sizes: those to warm up; all when not given.
        :returns: the seconds it took.
        """
        start = time.perf_counter()
        for batch in batch_sizes or self.batch_sizes:
            specs = self.bundle.manifest.inputs.get(batch)
            if specs is None:
                raise BackendError(
                    f"The bundle has no graph of batch {batch}, only {list(self.batch_sizes)}."
                )
            feeds = {s.name: np.zeros(s.shape, dtype=s.dtype) for s in specs}
            answers = self._graphs.get(batch).run(feeds)
        self._rehearse(answers)
        return time.perf_counter() - start

    def _rehearse(self, answers: Tensors) -> None:
        """Go once through what is done before and after a run, which gave ``answers``."""

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._graphs.closed

    def close(self) -> None:
        """Let go of the graphs and their memory. Runs under way end first."""
        self._graphs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _is_not(self, kind: str) -> BundleError:
        """What to raise where a bundle of another ``kind`` is needed."""
        found = self.bundle.manifest.kind
        does = {"segmentor": "segment images", "detector": "detect objects"}
        uses = {"segmentor": "segment(image)", "detector": "detect(image)"}
        return BundleError(
            f"The bundle {self.bundle.path} is of a {found}, which does not {does[kind]}. Use "
            f"{uses.get(found, 'run_raw with its own inputs')}."
        )
