"""What a backend is: something that loads a bundle's graphs and runs them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.native import Native
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import TensorSpec

# Asks for TF32 where no argument does, with 1, and does not with 0.
TF32 = "FDCONV_TF32"
Tensors = Mapping[str, npt.NDArray[Any]]
# A tensor's name, shape and type.
Signature = tuple[str, tuple[Any, ...], str]
Specs = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
"""A graph's inputs and outputs."""


@dataclass(frozen=True)
class Phases:
    """Seconds of one run on a GPU by phase, each waited for before the next begins.

    h2d, compute, d2h: copies of inputs to the GPU, the GPU's work, copies of outputs back.
    no_copies: by the clock, a run whose inputs lie on the GPU and whose outputs stay there.
    """

    h2d: float
    compute: float
    d2h: float
    no_copies: float


class Graph(Protocol):
    """One loaded graph. ``run`` may be called from several threads at once."""

    def run(self, feeds: Tensors) -> dict[str, npt.NDArray[Any]]:
        """Every output by name, for every input by name; ``BackendError`` where that fails.

        The arrays are the caller's own.
        """


class Backend(Protocol):
    """A way to run a bundle on a device.

    Attributes:
        name: a key of ``BACKENDS``.
        device: "cpu" or "cuda".
        operators: what runs the ``fdconv`` operators, and why, as a clause; empty where the
            backend settles it.
    """

    name: str
    device: str
    operators: str

    @property
    def threads(self) -> int:
        """Number of CPU threads of a run; 1 where another device does the work."""

    def load(self, bundle: Bundle, batch: int, threads: int | None = None) -> Graph:
        """Load the graph of one batch size, whose files the bundle has checked.

        ``threads`` is the number of CPU threads, where not all those of the backend.
        ``BackendError`` if the backend cannot run this graph.
        """


@dataclass(frozen=True)
class BackendOptions:
    """What a caller may set; ``None`` leaves it to the backend. See `open_session`.

    tf32: whether float32 products may round their factors to ten bits on a GPU's tensor cores; None
    leaves it to ``FDCONV_TF32``.
    """

    threads: int | None = None
    providers: tuple[Any, ...] | None = None
    native: Native = None
    tf32: bool | None = None

    @property
    def rounds_to_tf32(self) -> bool:
        """Whether TF32 was asked for; ``BackendError`` where ``FDCONV_TF32`` is neither 1 nor 0."""
        if self.tf32 is not None:
            return self.tf32
        given = os.environ.get(TF32) or "0"
        if given not in ("0", "1"):
            raise BackendError(f"{TF32} is 0 or 1, not {given!r}.")
        return given == "1"


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


def check_signature(what: str, specs: Specs, found: Sequence[set[Signature]], advice: str) -> None:
    """Refuse (``BackendError``) a graph that does not take and give what its manifest says.

    The message begins with ``what``, the graph, and ends with ``advice``.
    """
    for kind, expected, tensors in zip(("inputs", "outputs"), specs, found, strict=True):
        said = {(s.name, tuple(s.shape), np.dtype(s.dtype).name) for s in expected}
        if said != tensors:
            raise BackendError(
                f"{what} has the {kind} {sorted(tensors, key=str)}, but the bundle's manifest "
                f"says {sorted(said, key=str)}. {advice}"
            )


def differences(answers: Tensors, expected: Tensors) -> dict[str, float]:
    """The largest difference of each output, relative to the largest value expected of it."""
    return {
        name: float(np.abs(answers[name].astype(np.float64) - right).max())
        / (float(np.abs(right).max()) or 1.0)
        for name, right in expected.items()
    }
