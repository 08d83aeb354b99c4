"""The ``fdconv`` operators in C for ONNX Runtime's CPU provider: optional, and faster.

A library of custom operators under the names of the model-local functions that every bundle
carries; where it is registered, ONNX Runtime takes it for them, and bundles of format 3 and later
run faster. ``source/`` holds the C, `build` compiles it; see docs/native.md.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

from fdconv_deploy.errors import BackendError
from fdconv_deploy.ops.native.build import (
    BuildError,
    build,
    build_openvino,
    compiler,
    library_name,
)

__all__ = [
    "FOLDER",
    "NCHW",
    "SWITCH",
    "BuildError",
    "Native",
    "build",
    "build_openvino",
    "compiler",
    "kept_layout",
    "library_name",
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
