"""How the process gets its memory from the system, and gives it back."""

from __future__ import annotations

import ctypes
import sys

# glibc's names for mallopt: see mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 4 << 20
_KEPT = 32 << 20


def return_large_blocks() -> bool:
    """Let blocks of 4 MiB and more be mapped by themselves, and so return when they are freed.

    glibc raises that size to the largest block ever freed, up to 32 MiB. One large image would
    be enough, and from then on what is decoded lies among what stays, and keeps memory that
    nobody uses. Smaller blocks, tensors among them, are reused without asking the system.

    :returns: whether this system's allocator takes that.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
