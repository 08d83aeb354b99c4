"""What a backend is: something that loads a bundle's graphs and runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import TensorSpec

Tensors = Mapping[str, npt.NDArray[Any]]


class Graph(Protocol):
    """One loaded graph. ``run`` may be called from several threads at once."""

    def run(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Every output by name, for every input by name; the arrays are the caller's own.

        :raises BackendError: the backend failed.
        """


class Backend(Protocol):
    """A way to run a bundle on a device.

    ``threads``: CPU threads of a run; 1 where a device other than the CPU does the work.
    ``operators``: what runs the ``fdconv`` operators, and why, as a clause; empty where that
    goes without saying.
    """

    name: str
    device: str
    operators: str

    @property
    def threads(self) -> int:
        """CPU threads of a run."""

    def load(self, bundle: Bundle, batch: int, threads: int | None = None) -> Graph:
        """Load the graph of one batch size, whose files the bundle has checked.

        :param threads: in place of all those a run takes.
        :raises BackendError: the backend cannot run this graph.
        """

    def batch_cost(self, batch: int) -> float:
        """The cost of one run at this batch size, in any unit, as long as none was measured."""


@dataclass(frozen=True)
class BackendOptions:
    """What a caller may set. ``None`` leaves it to the backend.

    ``threads``: CPU threads per run. ``providers``: ONNX Runtime execution providers, in
    its own notation, in place of those the backend stands for. ``spinning``: threads wait
    busily within a run. ``native``: ONNX Runtime's CPU provider uses the ``fdconv`` operators
    in C, see ``fdconv_deploy.ops.native``.
    """

    threads: int | None = None
    providers: tuple[Any, ...] | None = None
    spinning: bool = True
    native: bool | None = None


def feeds_problem(specs: tuple[TensorSpec, ...], feeds: Tensors) -> str | None:
    """Why ``feeds`` are not the inputs ``specs`` ask for, as a clause; None when they are."""
    expected = {spec.name: spec for spec in specs}
    if set(feeds) != set(expected):
        return f"the inputs are {sorted(expected)}, given were {sorted(feeds)}"
    for name, spec in expected.items():
        value = feeds[name]
        if tuple(value.shape) != spec.shape or value.dtype != np.dtype(spec.dtype):
            return (
                f"{name} must be {spec.shape} {spec.dtype}, given was "
                f"{tuple(value.shape)} {value.dtype}"
            )
    return None
