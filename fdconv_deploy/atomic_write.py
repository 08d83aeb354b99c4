"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

# Of Linux: paths are relative to the current folder; swap two names.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_ATTEMPTS = 100


@contextmanager
def _made(temporary: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """A file or folder that ``make`` makes, and the folders it lies in, while the block lasts.

    Folders made for it go again with it, if nothing is in them then.
    """
    missing = [folder for folder in temporary.parents if not folder.exists()]
    try:
        for attempt in range(_ATTEMPTS):
            try:
                temporary.parent.mkdir(parents=True, exist_ok=True)
                make(temporary)
                break
            # Another writer has failed, and taken the folder away; also as it was found there.
            except (FileNotFoundError, FileExistsError):
                if attempt == _ATTEMPTS - 1:
                    raise
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        for folder in missing:
            with suppress(OSError):  # what was written lies there
                folder.rmdir()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """An empty hidden file beside ``path``, renamed to it when the block ends without an error.

    It has the same suffix. It is removed if the block raises, as are folders that ``path`` lies in
    and that were made for it.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    with _made(temporary, Path.touch):
        yield temporary
        temporary.replace(path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write or replace a file, flushed to the disk before it takes its name."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def temporary_folder(path: Path) -> AbstractContextManager[Path]:
    """An empty hidden folder beside ``path``, removed when the block ends, however it ends.

    Folders that ``path`` lies in are made, and removed again if nothing is in them then.
    """
    return _made(path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}"), Path.mkdir)


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
