"""The ``fdconv`` operators in C for ONNX Runtime's CPU provider: optional, and faster.

A library of custom operators under the names of the model-local functions that every bundle
carries; where it is registered, ONNX Runtime takes it for them, and bundles of format 3 and later
run faster. ``source/`` holds the C, `build` compiles it; see docs/native.md.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.native.build import (
    BuildError,
    build,
    build_openvino,
    compiler,
    library_name,
)

if TYPE_CHECKING:  # it takes a tenth of a second, which the command line does without
    from numpy.typing import NDArray

__all__ = [
    "FOLDER",
    "NCHW",
    "SWITCH",
    "BuildError",
    "Native",
    "build",
    "build_openvino",
    "cannot_load",
    "compiler",
    "kept_layout",
    "lent",
    "library_name",
    "loan_number",
    "native_library",
]

# 0: never; 1: always, and it is an error where they are not built; nchw: so, with features in the
# layout of the export; unset: where they are built.
SWITCH = "FDCONV_NATIVE"
NCHW: Literal["nchw"] = "nchw"
Native = bool | Literal["nchw"] | None
# Where installing builds them.
FOLDER = Path(__file__).parent
log = logging.getLogger("fdconv.native")
_MOST_RANK, _MOST = 8, 1 << 24
_TYPES = {"float32": 1, "uint8": 2, "int32": 6}  # ONNXTensorElementDataType
_counted = itertools.count()
HOW = "python -m fdconv_deploy.ops.native builds them"


def native_library(
    wanted: Native = None, problem: str | None = None, openvino: str | None = None
) -> tuple[Path | None, str]:
    """The library to register, or None, and why, as a clause.

    Args:
        wanted: True or "nchw": use them; False: do not; None: as the environment variable
            ``FDCONV_NATIVE`` decides, else where they are built.
        problem: why they cannot run a bundle, as a clause; see `Manifest.older_nodes`.
        openvino: the version of OpenVINO whose extension it is; ONNX Runtime's library if None.

    Raises:
        BackendError: they are wanted and not built or cannot run the bundle, or the switch has a
            value of no meaning.
    """
    by = "open_session(native=False)"
    if wanted is None and (switch := os.environ.get(SWITCH)):
        if switch not in ("0", "1", NCHW):
            raise BackendError(f"{SWITCH} is 0, 1 or {NCHW}, not {switch!r}.")
        wanted, by = switch != "0", f"{SWITCH}=0"
    if wanted is False:
        return None, f"{by} switches native ones off"
    if problem is not None:
        if wanted:
            raise BackendError(f"Native operators are required, but {problem}.")
        log.warning("portable operators run, since %s", problem)
        return None, problem
    path = FOLDER / library_name(openvino)
    if path.is_file():
        return path, "they are built here"
    if wanted:
        raise BackendError(
            f"Native operators are required, but there is no {path.name} in {FOLDER}: {HOW}."
        )
    if any(FOLDER.glob("fdconv_native_*" if openvino is None else "fdconv_openvino*")):
        source = "their source" if openvino is None else "their source, or of OpenVINO"
        why = f"the native ones here are built of another version of {source} ({HOW} anew)"
        log.warning("portable operators run, since %s", why)  # a speed lost by an update
        return None, why
    return None, f"native ones are not built here ({HOW})"


def kept_layout(wanted: Native = None) -> str | None:
    """Why features keep the layout of the export, as a clause; None where they need not.

    Args:
        wanted: as of `native_library`, which has found a library.
    """
    if wanted is None and os.environ.get(SWITCH) == NCHW:
        return f"{SWITCH}={NCHW} keeps NCHW"
    return f"open_session(native={NCHW!r}) keeps NCHW" if wanted == NCHW else None


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
    """Lend constants to the operators whose attribute ``lent`` is their number, for a session.

    An assembly lays its spectrum out anew and keeps that. If the graph held the spectrum, too, so
    would ONNX Runtime, as long as the session.

    Args:
        library: the operators'.
        loans: by number, a layer's spectrum, patterns and blocks.
        blocked_only: sessions opened in this thread meanwhile have no nodes of functions.
    """
    import numpy as np

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
