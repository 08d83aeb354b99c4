"""Which files are meant by what a user names: images, folders, patterns, lists and videos."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePath
from typing import TypeVar

from fdconv_deploy.errors import ImageError
from fdconv_deploy.runtime.images import ARRAY_SUFFIX, SUFFIXES

AnyPath = TypeVar("AnyPath", bound=PurePath)
MASK_ENDING = "_labels.png"
LIST_SUFFIX = ".txt"
# Beside a segmentor's masks: the class and the colour of each mask value.
CLASSES_NAME = "classes.json"
LEGEND_NAME = "legend.png"
# Containers that OpenCV's bundled FFmpeg reads.
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")


@dataclass(frozen=True)
class Source:
    """A file to segment.

    Attributes:
        path: the image or video; no ``Path`` where it is in an object store.
        name: where its results go below the output folder, without an ending: the file's place
            within the folder, pattern or list that named it, or its own name.
    """

    path: PurePath
    name: PurePath

    @property
    def is_video(self) -> bool:
        """Whether the file's ending is that of a video."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def images_of(folder: Path) -> list[Path]:
    """Images that lie directly in a folder, sorted by name, recognised by their endings.

    A file named like another with ``_labels.png`` at the end is that one's mask, not an image.
    Where there are no others, NumPy's files are the images.

    Raises:
        ImageError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ImageError(f"a folder of images was expected, but {folder} {found}.")
    images = image_files(folder.iterdir())
    if not images:
        endings = ", ".join((*SUFFIXES, ARRAY_SUFFIX))
        raise ImageError(f"{folder} holds no images ({endings}). Give a folder that does.")
    return images


def image_files(paths: Iterable[AnyPath]) -> list[AnyPath]:
    """Those of a folder's files that are its images, as :func:`images_of` has it, sorted."""
    files = sorted(p for p in paths if p.suffix.lower() in (*SUFFIXES, ARRAY_SUFFIX))
    stems = {path.with_suffix("") for path in files}

    def is_mask(path: AnyPath) -> bool:
        image = path.with_name(path.name.removesuffix(MASK_ENDING))
        return path.name.endswith(MASK_ENDING) and image in stems

    images = [path for path in files if not is_mask(path)]
    return [path for path in images if path.suffix.lower() != ARRAY_SUFFIX] or images


def sources_at(inputs: Iterable[Path], output: Path) -> list[Source]:
    """Files to segment, in the order of ``inputs`` and of their names within each.

    Args:
        inputs: image or video files; folders, searched with their subfolders (hidden ones,
            ``output`` and results of earlier runs left out); glob patterns, where ``**`` stands
            for any folders; and ``.txt`` files that list one path a line, relative to the
            current folder or to the list's own.
        output: the folder for results, which are no input.

    Raises:
        ImageError: an input does not exist, or names no image or video.
    """
    return [source for given in inputs for source in _named_by(given, output)]


def _named_by(given: Path, output: Path) -> Sequence[Source]:
    if given.is_dir():
        return sources_below(given, list(_walk(given, output.resolve())), "folder")
    if given.suffix.lower() == LIST_SUFFIX and given.is_file():
        return _listed(given)
    if not given.exists() and glob.has_magic(str(given)):
        found = [Path(name) for name in sorted(glob.glob(str(given), recursive=True))]  # noqa: PTH207 - of an absolute pattern, too
        skipped = output.resolve()
        files = [path for path in found if skipped not in path.resolve().parents]
        return sources_below(
            _fixed_part(given), [f for f in files if f.is_file()], "pattern", given
        )
    return [Source(given, Path(given.stem))]


def sources_below(
    root: PurePath, files: Sequence[PurePath], kind: str, given: PurePath | None = None
) -> list[Source]:
    """The images and videos among a folder's files, named by their places in it.

    Where there are none, the ``ImageError`` calls it ``kind`` and ``given``, else ``root``.
    """
    videos = {path for path in files if path.suffix.lower() in VIDEO_SUFFIXES}
    images = {*image_files(files)}
    if not videos and not images:
        endings = ", ".join((*SUFFIXES, ARRAY_SUFFIX, *VIDEO_SUFFIXES))
        raise ImageError(
            f"The {kind} {given or root} holds no images or videos ({endings}). Give one that does."
        )
    chosen = [path for path in files if path in videos or path in images]
    return [Source(path, path.relative_to(root).with_suffix("")) for path in chosen]


def _walk(folder: Path, skipped: Path) -> Iterator[Path]:
    seen = {folder.resolve()}
    # Data sets are often put together of links, so links are followed, each folder once.
    for root, folders, files in os.walk(folder, followlinks=True):
        below = []
        for name in sorted(folders):
            real = Path(root, name).resolve()
            left_out = name.startswith(".") or real == skipped or _holds_results(real)
            if not left_out and real not in seen:
                seen.add(real)
                below.append(name)
        folders[:] = below
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def _holds_results(folder: Path) -> bool:
    """Whether an earlier run wrote a segmentor's results to a folder."""
    return all((folder / name).is_file() for name in (CLASSES_NAME, LEGEND_NAME))


def _listed(file: Path) -> list[Source]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(
            f"The list {file} cannot be read as UTF-8 text ({error}). Write one path a line."
        ) from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ImageError(f"The list {file} names no file. Write one path a line.")
    found = []
    for line in lines:
        path = Path(line)
        if not path.exists() and (file.parent / path).exists():
            path = file.parent / path
        inside = not Path(line).is_absolute() and ".." not in Path(line).parts
        found.append(Source(path, Path(line).with_suffix("") if inside else Path(path.stem)))
    return found


def _fixed_part(pattern: Path) -> Path:
    """The folders of a pattern before the first wildcard."""
    return Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts[:-1]))
