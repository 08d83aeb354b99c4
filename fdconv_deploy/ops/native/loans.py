"""Constants lent to the native operators while a session is opened.

An assembly lays its spectrum out anew and keeps that. If the graph held the spectrum, too, so would
ONNX Runtime, as long as the session.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.native import SWITCH

_MOST_RANK, _MOST = 8, 1 << 24
_TYPES = {"float32": 1, "uint8": 2, "int32": 6}  # ONNXTensorElementDataType
_counted = itertools.count()


class _Tensor(ctypes.Structure):
    """``Tensor`` of source/node.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("shape", ctypes.c_int64 * _MOST_RANK),
    )


def loan_number() -> int:
    """A number that no other loan of this process has."""
    return next(_counted) % _MOST


@contextmanager
def lent(
    library: Path, loans: Mapping[int, Sequence[NDArray[Any]]], *, blocked_only: bool = False
) -> Iterator[None]:
    """Lend constants to the operators whose attribute ``lent`` is their number.

    Args:
        library: the operators'.
        loans: by number, a layer's spectrum, patterns and blocks.
        blocked_only: sessions opened in this thread meanwhile have no nodes of functions.
    """
    try:
        code = ctypes.CDLL(str(library))
    except OSError as error:
        raise cannot_load(library, str(error)) from error
    code.fdconv_lend.argtypes = ctypes.c_int64, ctypes.POINTER(_Tensor)
    code.fdconv_take_back.argtypes = (ctypes.c_int64,)
    given: list[int] = []
    held = []  # as long as they are lent
    code.fdconv_blocked_only(int(blocked_only))
    try:
        for number, arrays in loans.items():
            whole = [np.require(array, requirements=["C", "A"]) for array in arrays]
            held.append(whole)
            tensors = (_Tensor * len(whole))(*map(_described, whole))
            if code.fdconv_lend(number, tensors):
                raise BackendError("There is not enough memory to open a session.")
            given.append(number)
        yield
    finally:
        code.fdconv_blocked_only(0)
        for number in given:
            code.fdconv_take_back(number)


def cannot_load(library: Path, why: str) -> BackendError:
    """What to say of a library that is there and does not load."""
    return BackendError(
        f"ONNX Runtime cannot load the native operators {library}: {why}. Build them again with "
        f"python -m fdconv_deploy.ops.native, or do without: {SWITCH}=0."
    )


def _described(array: NDArray[Any]) -> _Tensor:
    shape = (ctypes.c_int64 * _MOST_RANK)(*array.shape)
    return _Tensor(array.ctypes.data, _TYPES[array.dtype.name], array.ndim, shape)
