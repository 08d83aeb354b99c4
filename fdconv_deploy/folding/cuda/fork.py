"""Work on a stream beside the current one, whose next work does not wait for it."""

from __future__ import annotations

from contextlib import ExitStack
from functools import lru_cache

import torch


class Fork:
    """The context of work that runs beside what comes after it, until `join`.

    Captured, it is a branch of the CUDA graph. Tensors made inside may be read only after `join`,
    and be given up only then; so no memory is taken while the other stream still reads it. Without
    a GPU nothing runs beside anything.

    active: whether such work is being called at the moment.
    """

    active = False

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._stack = ExitStack()

    def __enter__(self) -> Fork:
        Fork.active = True
        if self._main is not None:
            beside = _stream_beside(self._main)
            beside.wait_stream(self._main)
            self._stack.enter_context(torch.cuda.stream(beside))
        return self

    def __exit__(self, *error: object) -> None:
        Fork.active = False
        self._stack.close()

    def join(self) -> None:
        """Let what comes next wait for the work inside."""
        if self._main is not None:
            self._main.wait_stream(_stream_beside(self._main))


@lru_cache
def _stream_beside(main: torch.cuda.Stream) -> torch.cuda.Stream:
    """One for each stream, so that threads that use streams of their own do not meet."""
    return torch.cuda.Stream(main.device)
