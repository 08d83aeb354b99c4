"""Runs a bundle's graphs: loads them when needed, and chooses how a batch is run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fdconv_deploy.errors import BackendError
from fdconv_deploy.runtime.backends import Backend, Graph, Tensors, feeds_problem
from fdconv_deploy.runtime.batching import least_seconds, linear_cost, measured_cost, plan_batches
from fdconv_deploy.runtime.bundle import Bundle

# Single images side by side must take at most this share of the time of the batch's own graph to
# be preferred: they need a graph of their own in memory, so noise shall not choose them.
_BETTER = 0.98


class Runner(Protocol):
    """What a ``Session`` runs its bundle by.

    Attributes:
        backend: the name of the backend in use.
        choice: why it is, as a sentence.
        ways: how each batch size is run by ``run_batches``, in words; empty where not known.
        batch_cost: what one run costs by its batch size, in any unit; see `plan_batches`.
        closed: whether ``close`` was called.
    """

    backend: str
    choice: str
    ways: dict[int, str]
    batch_cost: Callable[[int], float]
    closed: bool

    @property
    def operators(self) -> str:
        """What runs the ``fdconv`` operators, and why; empty where the backend settles it."""

    def run_batches(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Every output for any number of images, given every input; images along first axes."""

    def run_raw(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Every output of the graph that takes exactly these inputs."""

    def warm_up(self, batch_sizes: Sequence[int] | None = None) -> None:
        """Load the graphs of these batch sizes, all by default, and run each once."""

    def close(self) -> None:
        """Let go of the graphs."""


class GraphRunner:
    """Runs a bundle's graphs in this process. See :class:`Runner`.

    Any method may be called from several threads at once. ``batch_cost`` is in seconds, once
    :meth:`warm_up` has measured them, and what the backend supposes before.

    Args:
        bundle: the bundle.
        backend: what loads its graphs.
        choice: why that backend was chosen, as a sentence.
        graphs: those that are loaded already, by batch size.
        clock: seconds, by which :meth:`warm_up` chooses.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        choice: str = "",
        graphs: Mapping[int, Graph] | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.backend, self.choice = backend.name, choice
        self.ways = dict.fromkeys(bundle.batch_sizes, "its graph")
        self.batch_cost: Callable[[int], float] = linear_cost
        if backend.device == "cuda":  # a few images take little more time than one
            self.batch_cost = partial(linear_cost, call=1.0)
        self.closed = False
        self._bundle, self._backend, self._clock = bundle, backend, clock
        self._graphs = LazyGraphs(self._load, graphs or {})
        self._beside = LazyGraphs(self._load_beside, {})
        self._streams: dict[int, int] = {}  # by batch size: images at a time, side by side
        self._unloaded = set(bundle.batch_sizes) - set(graphs or {})  # never loaded so far
        self._measured = False

    @property
    def operators(self) -> str:
        """What runs the ``fdconv`` operators, and why: a backend decides when it loads a graph."""
        return self._backend.operators

    @property
    def loaded_batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes whose graphs, or what runs in their place, are in memory, ascending."""
        beside = {b for b, streams in self._streams.items() if streams in self._beside.loaded}
        return tuple(sorted({*self._graphs.loaded, *beside}))

    def run_batches(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Run any number of images, divided over the bundle's batch sizes at the least cost.

        A run of several images may be one of the batch's graph or several of the single image's:
        answers differ in their rounding only. Slots left over in the last run hold repeated
        images, whose answers are dropped. See :class:`Runner`.
        """
        count, position = len(next(iter(feeds.values()))), 0
        parts: list[dict[str, npt.NDArray[Any]]] = []
        for size in plan_batches(count, self._bundle.batch_sizes, self.batch_cost):
            part = {}
            for name, given in feeds.items():
                rows = given[position : position + size]
                if len(rows) < size:
                    rows = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
                part[name] = np.ascontiguousarray(rows)
            answers = self._way(size).run(part)
            parts.append({name: rows[: count - position] for name, rows in answers.items()})
            position += size
        self._release()
        return _concatenated(parts)

    def run_raw(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Run a batch's own graph, whatever it costs: :meth:`run_batches` takes the cheapest way.

        Raises:
            BackendError: no graph of the bundle takes these names, shapes and types.
        """
        problems = []
        for batch in self._bundle.batch_sizes:
            problem = feeds_problem(self._bundle.manifest.inputs[batch], feeds)
            if problem is None:
                graph = self._graphs.get(batch)
                self._release()
                return graph.run(feeds)
            problems.append(f"at batch {batch}, {problem}")
        raise BackendError(f"No graph of this bundle takes these inputs: {'; '.join(problems)}.")

    def warm_up(self, batch_sizes: Sequence[int] | None = None) -> None:
        """Load the graphs and run each once.

        The first time that all of several batch sizes are warmed up, they are timed too, beside
        images that share the CPU's threads, and the cheaper way is kept (:attr:`batch_cost`). That
        takes one graph more to load and run, and four seconds, or one run in each way where that
        is longer.

        Raises:
            BackendError: the bundle has no graph of a batch size.
        """
        sizes = self._bundle.batch_sizes
        for batch in batch_sizes or sizes:
            if batch not in sizes:
                raise BackendError(f"The bundle has no graph of batch {batch}, only {list(sizes)}.")
            self._way(batch).run(self._zeros(batch))
        if batch_sizes is None and len(sizes) > 1 and not self._measured:
            self._choose_ways()
        self._release()

    def close(self) -> None:
        """Let go of the graphs and their memory. Runs under way end first."""
        self.closed = True
        self._graphs.close()
        self._beside.close()
        self._bundle.release()

    def _release(self) -> None:
        """Let go of the files' bytes once every graph was loaded: backends keep their own."""
        if not self._unloaded:
            self._bundle.release()

    def _way(self, batch: int) -> Graph:
        """What runs a batch of this size."""
        streams = self._streams.get(batch)
        return self._graphs.get(batch) if streams is None else self._beside.get(streams)

    def _load(self, batch: int) -> Graph:
        graph = self._backend.load(self._bundle, batch)
        self._unloaded.discard(batch)
        return graph

    def _load_beside(self, streams: int) -> Graph:
        share = self._backend.threads // streams
        return SideBySide(self._backend.load(self._bundle, 1, share), streams)

    def _choose_ways(self) -> None:
        """Time every way to run every batch size; keep the cheaper way of each, and its cost."""
        runs = {}
        for batch in self._bundle.batch_sizes:
            feeds = self._zeros(batch)
            runs[batch, 0] = partial(self._graphs.get(batch).run, feeds)
            if (streams := self._most_streams(batch)) > 1:
                runs[batch, streams] = partial(self._beside.get(streams).run, feeds)
                runs[batch, streams]()
        ways: dict[int, tuple[float, int]] = {}
        # A batch's own graph comes first of its ways.
        for (batch, streams), seconds in least_seconds(runs, clock=self._clock).items():
            if batch not in ways or seconds < _BETTER * ways[batch][0]:
                ways[batch] = seconds, streams
        chosen = {batch: streams for batch, (_, streams) in ways.items() if streams}
        self._streams = chosen
        for streams in set(self._beside.loaded) - set(chosen.values()):
            self._beside.drop(streams)
        for batch in chosen:
            self._graphs.drop(batch)
            self.ways[batch] = f"single images, {chosen[batch]} at a time"
        self.batch_cost = measured_cost({batch: seconds for batch, (seconds, _) in ways.items()})
        self._measured = True

    def _most_streams(self, batch: int) -> int:
        """How many images of a batch may run at once, each on the same share of the threads."""
        manifest = self._bundle.manifest
        for specs in (manifest.inputs, manifest.outputs):
            shapes = {spec.name: spec.shape for spec in specs[batch]}
            # Tensors of a batch must be those of single images, one after another.
            if not all(
                spec.shape[:1] == (1,) and shapes.get(spec.name) == (batch, *spec.shape[1:])
                for spec in specs.get(1, ())
            ):
                return 1
        return min(batch, self._backend.threads) if 1 in manifest.models else 1

    def _zeros(self, batch: int) -> Tensors:
        return {s.name: np.zeros(s.shape, s.dtype) for s in self._bundle.manifest.inputs[batch]}


class SizedRunner:
    """Runs a bundle of several input sizes, each by a runner of its own. See :class:`Runner`.

    runners: by (height, width), the bundle's first size first.
    """

    def __init__(self, runners: Mapping[tuple[int, int], Runner]) -> None:
        self.runners = dict(runners)
        self._first = next(iter(self.runners.values()))
        self.backend, self.choice, self.closed = self._first.backend, self._first.choice, False
        # Those of the first size; the others' are measured, and kept to, as well.
        self.ways, self.batch_cost = self._first.ways, self._first.batch_cost

    @property
    def operators(self) -> str:
        """What runs the ``fdconv`` operators, and why; the same at every size."""
        return self._first.operators

    def run_batches(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """See :meth:`GraphRunner.run_batches`."""
        return self._of(feeds).run_batches(feeds)

    def run_raw(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """See :meth:`GraphRunner.run_raw`."""
        return self._of(feeds).run_raw(feeds)

    def warm_up(self, batch_sizes: Sequence[int] | None = None) -> None:
        """See :meth:`GraphRunner.warm_up`."""
        for runner in self.runners.values():
            runner.warm_up(batch_sizes)
        self.ways, self.batch_cost = self._first.ways, self._first.batch_cost

    def close(self) -> None:
        """Let go of the graphs and their memory. Runs under way end first."""
        self.closed = True
        for runner in self.runners.values():
            runner.close()

    def _of(self, feeds: Tensors) -> Runner:
        images = feeds.get("images")
        size = (0, 0) if images is None or images.ndim != 4 else images.shape[2:]
        # Of no size that there is, it is the first's to say what it takes.
        return self.runners.get((size[0], size[1]), self._first)


class SideBySide:
    """Runs any number of images by the graph of one image. See :class:`Graph`.

    On a CPU this may cost less than a graph of the batch: FDConv makes kernels per image, so a
    batch shares next to no work; threads that each have an image of their own do not wait for
    each other after every operator; and a layer's answer is read again while it is still in a
    cache, where that of four images is not. streams: images at a time, over all callers.
    """

    def __init__(self, graph: Graph, streams: int) -> None:
        self._graph = graph
        self._pool = ThreadPoolExecutor(streams, "image")

    def run(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Every output by name. See :class:`Graph`."""
        count = len(next(iter(feeds.values())))
        singles = ({name: rows[i : i + 1] for name, rows in feeds.items()} for i in range(count))
        return _concatenated(list(self._pool.map(self._graph.run, singles)))


class LazyGraphs:
    """Graphs by a number, each loaded once, whichever thread asks first."""

    def __init__(self, load: Callable[[int], Graph], loaded: Mapping[int, Graph]) -> None:
        self._load = load
        self._graphs = dict(loaded)
        self._lock = threading.Lock()
        self.closed = False

    @property
    def loaded(self) -> tuple[int, ...]:
        """The numbers of the graphs in memory, ascending."""
        return tuple(sorted(self._graphs.copy()))  # a copy: others may be loading

    def get(self, number: int) -> Graph:
        """The graph of a number; BackendError where it cannot be loaded or ``close`` was called."""
        graph = self._graphs.get(number)
        if graph is None and not self.closed:
            # Only what is not loaded yet waits for the lock, so that one batch size can
            # load while another answers.
            with self._lock:
                if not self.closed:
                    if number not in self._graphs:
                        self._graphs[number] = self._load(number)
                    graph = self._graphs[number]
        if graph is None or self.closed:
            raise BackendError("The session is closed; open the bundle again.")
        return graph

    def drop(self, number: int) -> None:
        """Let go of a graph; asked for again, it is loaded again."""
        with self._lock:
            self._graphs.pop(number, None)

    def close(self) -> None:
        """Let go of every graph. Runs under way end first."""
        with self._lock:
            self.closed = True
            self._graphs.clear()


def _concatenated(parts: Sequence[dict[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
