"""A session's graphs, one per batch size, each loaded when it is first asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from fdconv_deploy.errors import BackendError
from fdconv_deploy.runtime.backends import Graph


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
