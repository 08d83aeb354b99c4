"""Swapping two folders of one file system."""

from __future__ import annotations

import ctypes
import os
import secrets
import sys
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def exchange_folders(first: Path, second: Path) -> None:
    """Swap the names of two folders beside each other, both of which exist.

    On Linux in one step (renameat2), so that a reader finds the old folder or the new one
    at every moment. Elsewhere, and on file systems without it, in three renames: for an
    instant ``second`` is missing, and a failure puts it back.

    :raises OSError: the file system refused.
    """
    if _exchange_in_one_step(first, second):
        return
    aside = second.with_name(f".{second.name}.replaced-{secrets.token_hex(4)}")
    second.rename(aside)
    try:
        first.rename(second)
    except BaseException:
        aside.rename(second)
        raise
    aside.rename(first)


def _exchange_in_one_step(first: Path, second: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
