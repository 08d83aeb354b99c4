"""Inert stand-ins for the training-state classes that stand in checkpoints.

``torch.load(weights_only=True)`` builds tensors and plain containers only. Training
frameworks also pickle loss histories, numpy numbers and argument namespaces. None of
it is needed here, so each such name is bound to a class that keeps what it is given
and does nothing: no code of mmengine, numpy or argparse runs, and none is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

MAX_VALUES = 100_000


class Inert:
    """Takes any arguments and any state, and does nothing with them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class DType(Inert):
    """A numpy dtype as pickled: its short name, e.g. ``f8``, and its byte order."""

    def __init__(self, name: Any = "", *args: Any) -> None:
        self.name = name if isinstance(name, str) else ""
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    def real(self) -> np.dtype[Any] | None:
        """The numpy dtype, or None unless it is a boolean, an integer or a float."""
        try:
            dtype = np.dtype(f"{self.order}{self.name}")
        except (TypeError, ValueError):
            return None
        return dtype if dtype.kind in "biuf" else None


class Values(Inert):
    """A numpy array or scalar as pickled. :meth:`plain` gives numbers and lists."""

    def __init__(self, *args: Any) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype: Any = None
        self.content: Any = None
        self.fortran = False

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, self.shape, self.dtype, self.fortran, self.content = state

    def plain(self) -> Any:
        """Numbers in nested lists, or None for anything that is not plain numbers."""
        dtype = self.dtype.real() if isinstance(self.dtype, DType) else None
        if dtype is None or not isinstance(self.content, bytes):
            return None
        if len(self.content) > MAX_VALUES * dtype.itemsize:
            return None
        try:
            flat = np.frombuffer(self.content, dtype)
            return flat.reshape(self.shape, order="F" if self.fortran else "C").tolist()
        except (TypeError, ValueError):
            return None


def _reconstruct(*args: Any) -> Values:
    return Values()


def _scalar(*args: Any) -> Values:
    value = Values()
    if len(args) == 2:
        value.dtype, value.content = args
    return value


class HistoryBuffer(Inert):
    """mmengine's history of one logged scalar."""


class Namespace(Inert):
    """The command-line arguments of a training script."""


class Path(Inert):
    """A path of the training machine."""


# Exactly these names, beside what torch itself allows, may stand in a checkpoint.
ALLOWED: tuple[tuple[Callable[..., Any], str], ...] = (
    (HistoryBuffer, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (Values, "numpy.ndarray"),
    (DType, "numpy.dtype"),
    (Namespace, "argparse.Namespace"),
    (Path, "pathlib.PosixPath"),
    (Path, "pathlib.PurePosixPath"),
    (Path, "pathlib.WindowsPath"),
    (Path, "pathlib.PureWindowsPath"),
)


def plain(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """``value`` with numpy stand-ins as numbers, other stand-ins as None.

    Containers that stand in several places are converted once, and one that holds itself
    ends in None, so a small file cannot make this run long.
    """
    seen = {} if seen is None else seen
    if isinstance(value, Values):
        return value.plain()
    if isinstance(value, Inert):
        return None
    if not isinstance(value, (dict, list, tuple)):
        return value
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = None
    result: Any
    if isinstance(value, dict):
        result = {key: plain(item, seen) for key, item in value.items()}
    else:
        result = type(value)(plain(item, seen) for item in value)
    seen[id(value)] = result
    return result
