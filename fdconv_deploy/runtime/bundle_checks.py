"""What a bundle must stand before it is used: the checks behind ``Bundle.open``.

Each failure is one ``BundleError`` that says what was expected, found, and what to do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fdconv_deploy.errors import BundleError, FDConvError
from fdconv_deploy.runtime.images import SUFFIXES
from fdconv_deploy.runtime.manifest import FORMAT_VERSION, MANIFEST_NAME, FileInfo, Manifest
from fdconv_deploy.runtime.onnx_messages import external_locations

M = TypeVar("M", bound=BaseModel)
_CHECKPOINTS = (".pth", ".pt", ".ckpt", ".safetensors", ".pkl")
_JSON_LIMIT = 64 << 20  # bytes; a real manifest has some tens of kilobytes


def sha256_of(path: Path) -> str:
    """The hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def bundle_root(path: Path) -> Path:
    """The bundle's folder where ``path`` is one of its files; ``path`` itself otherwise."""
    if path.is_file() and (path.parent / MANIFEST_NAME).is_file():
        belongs = path.name == MANIFEST_NAME or path.suffix == ".onnx"
        return path.parent if belongs else path
    return path


def bundles_and_checkpoints(paths: Iterable[Path]) -> list[Path]:
    """Bundles' folders and checkpoint files as a user names them, the former as `bundle_root`.

    Raises:
        FDConvError: one does not exist.
    """
    found = [bundle_root(path) for path in paths]
    for path in found:
        if not path.exists():
            raise FDConvError(f"{path} does not exist. Give a bundle's folder or a checkpoint.")
    return found


def _no_folder(path: Path) -> str:
    """What is wrong with a path given in a bundle's place that is no folder, and what to do."""
    expected = "A bundle is a folder made by `fdconv export`"
    ending = path.suffix.lower()
    if not path.exists():
        return f"{expected}, but {path} does not exist. Check the path."
    if ending in _CHECKPOINTS:
        output = f"{path.stem}_bundle"
        return (
            f"{expected}, but {path} is a file, a checkpoint by its ending. Export it first "
            f"(`fdconv inspect {path}` prints the command), then give the folder, e.g. {output}."
        )
    if ending in SUFFIXES:
        return (
            f"{expected}, but {path} is a file, an image by its ending. The bundle comes first, "
            "then the images."
        )
    if ending == ".onnx":
        return (
            f"{expected}, but {path} is a file, and no {MANIFEST_NAME} lies beside it. Give the "
            "folder that export wrote: its manifest tells classes and preprocessing."
        )
    return f"{expected}, but {path} is a file. Give the folder that holds {MANIFEST_NAME}."


def read_manifest(root: Path) -> Manifest:
    """The manifest of the bundle folder ``root``, of a format known here and consistent."""
    if not root.is_dir():
        raise BundleError(_no_folder(root))
    if not (root / MANIFEST_NAME).exists():
        raise BundleError(
            f"{root} has no {MANIFEST_NAME}, so it is not a bundle, or its export was cut "
            "short. Give a folder made by `fdconv export`."
        )
    file = inside(root, MANIFEST_NAME)
    return read_versioned(file, Manifest, FORMAT_VERSION, "Export the bundle again.")


def read_versioned(file: Path, model: type[M], newest: int, advice: str) -> M:
    """A JSON file that gives its ``format_version``, 1 to ``newest``.

    Raises:
        BundleError: it is none, or does not fit ``model``; ``advice`` ends the message.
    """
    try:
        if file.stat().st_size > _JSON_LIMIT:
            raise BundleError(f"{file} is too large, over {_JSON_LIMIT:,} bytes. {advice}")
        raw = json.loads(file.read_text(encoding="utf-8"))
        version = raw["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = "it is not a JSON object in UTF-8 with a format_version"
        if isinstance(error, (OSError, json.JSONDecodeError)):
            reason = str(error)
        raise BundleError(f"{file} cannot be read ({reason}). {advice}") from error
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(
            f"{file} gives {version!r} as its format version, where a number from 1 was expected. "
            f"{advice}"
        )
    if version > newest:
        raise BundleError(
            f"{file} is of format {version}, newer than the {newest} this version of fdconv-deploy "
            f"reads. Update fdconv-deploy. Or: {advice}"
        )
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "its contents"
        raise BundleError(f"{file} is not valid at {where}: {first['msg']}. {advice}") from error


def inside(root: Path, name: str) -> Path:
    """``root / name`` with links followed, which must end up inside ``root``."""
    windows = PureWindowsPath(name)
    if (
        not name
        or "\0" in name
        or PurePosixPath(name).is_absolute()
        or windows.drive
        or windows.root
        or ".." in windows.parts
    ):
        raise BundleError(
            f"The bundle {root} names {name!r}, which leads outside it; such a bundle is not "
            "opened. Get it from a source you trust."
        )
    try:
        real = (root / name).resolve(strict=True)
    except FileNotFoundError as error:
        raise BundleError(
            f"The bundle {root} lacks the file {name!r} that its manifest lists. Copy the whole "
            "folder, or export it again."
        ) from error
    except (OSError, RuntimeError) as error:
        raise BundleError(f"The file {name!r} of the bundle {root} cannot be reached.") from error
    if not real.is_relative_to(root.resolve()):
        raise BundleError(
            f"The file {name!r} of the bundle {root} is a link that leads outside it; such a "
            "bundle is not opened. Replace the link by the file."
        )
    if not real.is_file():
        raise BundleError(f"{name!r} in the bundle {root} is not a file.")
    return real


# What else may be the matter with a file that is not the listed one, and what to do.
_NOT_LISTED = (
    "It is damaged, or another bundle is being copied over this one: let the copy finish, copy the "
    "folder again, or export it again."
)


def check_file(root: Path, name: str, info: FileInfo, *, hashed: bool) -> None:
    """A listed file is inside the bundle, of the listed size and, if asked, of its hash."""
    real = inside(root, name)
    _check_size(root, name, real.stat().st_size, info)
    try:
        found = sha256_of(real) if hashed else None
    except OSError as error:
        raise BundleError(f"The file {name!r} of the bundle {root} cannot be read.") from error
    _check_hash(root, name, found, info)


def read_file(root: Path, name: str, info: FileInfo, *, hashed: bool) -> bytes:
    """A listed file's bytes, of the listed size and, if asked, of its hash.

    The bytes that are hashed are those returned: the file is read once, and never mapped, so that
    whoever writes to it later changes nothing here.

    Raises:
        BundleError: they are not.
    """
    real = inside(root, name)
    try:
        with real.open("rb") as file:
            data = file.read(info.bytes + 1)  # a byte too many tells, however large the file is
            size = len(data) if len(data) <= info.bytes else os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BundleError(f"The file {name!r} of the bundle {root} cannot be read.") from error
    _check_size(root, name, size, info)
    _check_hash(root, name, hashlib.sha256(data).hexdigest() if hashed else None, info)
    return data


def _check_size(root: Path, name: str, size: int, info: FileInfo) -> None:
    if size != info.bytes:
        raise BundleError(
            f"The file {name!r} of the bundle {root} has {size} bytes where its manifest says "
            f"{info.bytes}. {_NOT_LISTED}"
        )


def _check_hash(root: Path, name: str, found: str | None, info: FileInfo) -> None:
    if found not in (None, info.sha256):
        raise BundleError(
            f"The file {name!r} of the bundle {root} is not the one that was exported: its "
            f"sha256 differs from the manifest's. {_NOT_LISTED}"
        )


def check_listed(root: Path, manifest: Manifest, name: str, what: str) -> None:
    """A file the manifest names is one whose hash it lists."""
    if name not in manifest.files:
        inside(root, name)  # a path outside, or a missing file, is the better sentence
        raise BundleError(
            f"The manifest of the bundle {root} names {name!r} as {what} without listing its "
            "sha256. Export the bundle again."
        )


def external_files(root: Path, manifest: Manifest, model: str, graph: bytes) -> dict[str, str]:
    """The files an ONNX graph keeps data in: names in the bundle by how the graph calls them.

    Args:
        root: the bundle's folder.
        manifest: its manifest.
        model: the graph's name in the bundle.
        graph: its bytes.

    Raises:
        BundleError: it is no ONNX graph, or a file is outside the bundle or not listed.
    """
    try:
        locations = external_locations(graph)
    except ValueError as error:
        raise BundleError(
            f"The file {model!r} of the bundle {root} is not an ONNX graph ({error}). "
            "Export the bundle again."
        ) from error
    names = {}
    for location in sorted(locations):
        name = (PurePosixPath(model).parent / location).as_posix() if location else location
        if name not in manifest.files:
            inside(root, name)  # a path outside, or a missing file, is the better sentence
            raise BundleError(
                f"The graph {model!r} of the bundle {root} keeps data in {name!r}, which the "
                "manifest does not list. Export the bundle again."
            )
        names[location] = name
    return names
