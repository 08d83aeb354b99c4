"""A bundle's graphs, run: what sessions of every kind of bundle share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fdconv_deploy.errors import BackendError, BundleError
from fdconv_deploy.runtime.backends import Backend, Graph, feeds_problem
from fdconv_deploy.runtime.backends.base import Tensors
from fdconv_deploy.runtime.batching import least_seconds, measured_cost, plan_batches
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import TensorSpec

if TYPE_CHECKING:
    from typing_extensions import Self


class LazyGraphs:
    """Loads every graph once, whichever thread asks first. Closed, it refuses.

    :param load: loads the graph of a batch size.
    :param loaded: graphs there are already.
    """

    def __init__(self, load: Callable[[int], Graph], loaded: Mapping[int, Graph]) -> None:
        self._load = load
        self._graphs = dict(loaded)
        self._lock = threading.Lock()
        self.closed = False

    @property
    def loaded(self) -> tuple[int, ...]:
        """The batch sizes whose graphs are in memory, ascending."""
        return tuple(sorted(self._graphs.copy()))  # a copy: others may be loading

    def get(self, batch: int) -> Graph:
        """The graph of a batch size.

        :raises BackendError: it cannot be loaded, or the session is closed.
        """
        graph = self._graphs.get(batch)
        if graph is None and not self.closed:
            # Only what is not loaded yet waits for the lock, so that one batch size can
            # load while another answers.
            with self._lock:
                if not self.closed:
                    if batch not in self._graphs:
                        self._graphs[batch] = self._load(batch)
                    graph = self._graphs[batch]
        if graph is None or self.closed:
            raise BackendError("The session is closed; open the bundle again.")
        return graph

    def drop(self, batch: int) -> None:
        """Let go of a graph; asked for again, it is loaded again."""
        with self._lock:
            self._graphs.pop(batch, None)

    def close(self) -> None:
        """Let go of every graph. Runs under way end first."""
        with self._lock:
            self.closed = True
            self._graphs.clear()


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


# Of what a batch's graph takes, the most that images side by side may take to be preferred: they
# need a graph of their own in memory, so more than noise.
_BETTER = 0.98


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
        self._beside = LazyGraphs(self._load_beside, {})
        self._streams: dict[int, int] = {}  # by batch size: images at a time, side by side
        self._measured: Callable[[int], float] | None = None

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
        """The batch sizes whose graphs, or what runs in their place, are in memory, ascending."""
        beside = {b for b, streams in self._streams.items() if streams in self._beside.loaded}
        return tuple(sorted({*self._graphs.loaded, *beside}))

    @property
    def ways(self) -> dict[int, str]:
        """How each batch size is run by :meth:`run_batches`, in words."""
        beside = {b: f"single images, {streams} at a time" for b, streams in self._streams.items()}
        return {batch: beside.get(batch, "its graph") for batch in self.batch_sizes}

    @property
    def batch_cost(self) -> Callable[[int], float]:
        """What one run costs by its batch size, in any unit; see ``plan_batches``.

        Seconds, once :meth:`warm_up` has measured them; what the backend supposes before.
        """
        return self._measured or self._backend.batch_cost

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images a segmentor or detector takes."""
        size = self.bundle.manifest.input
        if size is None:
            raise self._is_not("segmentor")
        return size.height, size.width

    @property
    def channels(self) -> int:
        """Number of bands of the images a segmentor or detector takes."""
        raise NotImplementedError

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What the network answers to a batch; see ``Session.run``."""
        raise NotImplementedError

    def run_batches(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Tensors:
        """Run any number of images, divided over the bundle's batch sizes at the least cost.

        By what :meth:`warm_up` has measured, if it has. A run of several images may be one of the
        batch's graph or several of the single image's: answers differ in their rounding only.
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
            answers = self._way(size).run(part)
            parts.append({name: rows[: count - position] for name, rows in answers.items()})
            position += size
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def run_raw(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run a graph on exactly its inputs, by name; which batch size, their shapes tell.

        That graph and no other, whatever it costs: where the same images would be answered sooner
        in another way, :meth:`run_batches` takes it.

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

        A segmentor's or detector's pre- and postprocessing run once as well. The first time that
        all of several batch sizes are warmed up, they are timed too, beside images that share the
        CPU's threads, and the cheaper way is kept (:attr:`batch_cost`). That takes one graph more
        to load and run, and four seconds, or one run in each way where that is longer.

        :param batch_sizes: those to warm up; all when not given.
        :returns: the seconds it took.
        """
        start = time.perf_counter()
        for batch in batch_sizes or self.batch_sizes:
            if batch not in self.batch_sizes:
                raise BackendError(
                    f"The bundle has no graph of batch {batch}, only {list(self.batch_sizes)}."
                )
            answers = self._way(batch).run(self._zeros(batch))
        if batch_sizes is None and len(self.batch_sizes) > 1 and self._measured is None:
            self._choose_ways()
        self._rehearse(answers)
        return time.perf_counter() - start

    def _way(self, batch: int) -> Graph:
        """What runs a batch of this size."""
        streams = self._streams.get(batch)
        return self._graphs.get(batch) if streams is None else self._beside.get(streams)

    def _load_beside(self, streams: int) -> Graph:
        share = self._backend.threads // streams
        return SideBySide(self._backend.load(self.bundle, 1, share), streams)

    def _choose_ways(self) -> None:
        """Time every way to run every batch size; keep the cheaper way of each, and its cost."""
        runs = {}
        for batch in self.batch_sizes:
            feeds = self._zeros(batch)
            runs[batch, 0] = partial(self._graphs.get(batch).run, feeds)
            if (streams := self._most_streams(batch)) > 1:
                runs[batch, streams] = partial(self._beside.get(streams).run, feeds)
                runs[batch, streams]()
        ways: dict[int, tuple[float, int]] = {}
        # A batch's own graph comes first of its ways.
        for (batch, streams), seconds in least_seconds(runs).items():
            if batch not in ways or seconds < _BETTER * ways[batch][0]:
                ways[batch] = seconds, streams
        chosen = {batch: streams for batch, (_, streams) in ways.items() if streams}
        self._streams = chosen
        for streams in set(self._beside.loaded) - set(chosen.values()):
            self._beside.drop(streams)
        for batch in chosen:
            self._graphs.drop(batch)
        self._measured = measured_cost({batch: seconds for batch, (seconds, _) in ways.items()})

    def _most_streams(self, batch: int) -> int:
        """How many images of a batch may run at once, each on the same share of the threads."""
        manifest = self.bundle.manifest
        if 1 not in self.batch_sizes or not all(
            divides(batch, specs[1], specs[batch]) for specs in (manifest.inputs, manifest.outputs)
        ):
            return 1
        return min(batch, self._backend.threads)

    def _zeros(self, batch: int) -> Tensors:
        return {s.name: np.zeros(s.shape, s.dtype) for s in self.bundle.manifest.inputs[batch]}

    def _rehearse(self, answers: Tensors) -> None:
        """Go once through what is done before and after a run, which gave ``answers``."""

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._graphs.closed

    def close(self) -> None:
        """Let go of the graphs and their memory. Runs under way end first."""
        self._graphs.close()
        self._beside.close()

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
