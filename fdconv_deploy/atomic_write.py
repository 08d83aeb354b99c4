"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Of Linux: paths are relative to the current folder; swap two names.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def _folders_of(path: Path) -> Iterator[None]:
    """Make the folders that ``path`` lies in; those made go again if nothing is in them."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with suppress(OSError):  # what was written lies there
                folder.rmdir()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it when the block ends without an error.

    It is hidden, with the same suffix, where nothing is yet; removed if the block raises, as are
    folders that ``path`` lies in and that were made for it.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    with _folders_of(path):
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write or replace a file, flushed to the disk before it takes its name."""
    with atomic_path(path) as temporary, temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """An empty hidden folder beside ``path``, removed when the block ends, however it ends.

    Folders that ``path`` lies in are made, and removed again if nothing is in them then.
    """
    temporary = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    with _folders_of(path):
        try:
            temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty temporary folder beside ``path`` that takes its place if no error ends the block."""
    with temporary_folder(path) as temporary:
        yield temporary
        replace_folder(temporary, path)


def replace_folder(made: Path, path: Path) -> None:
    """Move a folder to ``path`` beside it; what was there, if not empty, is ``made`` afterwards."""
    if not path.exists() or not any(path.iterdir()):
        made.replace(path)  # also takes the place of an empty folder
    else:
        _exchange(made, path)


def _exchange(first: Path, second: Path) -> None:
    """Swap the names of two folders beside each other, both of which exist.

    On Linux in one step (renameat2), so that a reader finds the old folder or the new one
    at every moment. Elsewhere, and on file systems without it, in three renames: for an
    instant ``second`` is missing, and a failure puts it back.
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
