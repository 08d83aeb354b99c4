"""A bundle on disk: opening one with every check, writing one whole or not at all.

A bundle is a folder::

    manifest.json     what it is, and the sha256 of every other file
    model.b1.onnx     one graph per batch size
    model.b4.onnx
    weights.bin       the weights, shared by all graphs

Files the manifest does not list are left alone: nothing here opens them.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType

from pydantic import ValidationError

from fdconv_deploy.errors import BundleError

from .exchange import exchange_folders
from .external_data import external_locations
from .manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    CheckpointInfo,
    FileInfo,
    InputSize,
    Manifest,
    OutputParity,
    ParityReport,
    TensorSpec,
)

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Bundle",
    "BundleWriter",
    "CheckpointInfo",
    "FileInfo",
    "InputSize",
    "Manifest",
    "OutputParity",
    "ParityReport",
    "TensorSpec",
    "sha256_of",
]

_MANIFEST_LIMIT = 64 << 20  # bytes; a real one has some tens of kilobytes


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened and found whole. Make one with :meth:`open`."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
        """Open the bundle folder at ``path``.

        ``verify=False`` skips hashing the files (0.5 s per GB); their presence, sizes and
        every path are checked all the same.

        :raises BundleError: not a bundle, incomplete, changed, of a newer format, or
            naming a path outside itself.
        """
        root = Path(path)
        manifest = _read_manifest(root)
        for name, info in manifest.files.items():
            _check_file(root, name, info, hashed=verify)
        for batch, name in manifest.models.items():
            _check_listed(root, manifest, name, f"the graph of batch {batch}")
        if manifest.weights is not None:
            _check_listed(root, manifest, manifest.weights, "the weights")
        for name in manifest.models.values():
            _check_external_data(root, manifest, name)
        return cls(root, manifest)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes there is a graph for, ascending."""
        return tuple(sorted(self.manifest.models))

    def model_path(self, batch: int) -> Path:
        """The graph file of one batch size."""
        return self.file(self.manifest.models[batch])

    def file(self, name: str) -> Path:
        """The real path of a listed file, which lies inside the bundle.

        :raises BundleError: the manifest does not list ``name``, or it leads outside.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{name!r} is not listed in the manifest of the bundle {self.path}.")
        return _inside(self.path, name)


class BundleWriter:
    """Writes a bundle beside its destination and moves it there only when it is whole.

    Use it as a context manager: write files into ``writer.path``, then call
    :meth:`commit`. Leaving the block without a commit, or with an exception, removes
    everything that was written.

    :raises BundleError: on entering, when ``destination`` exists and must not be replaced.
    """

    def __init__(self, destination: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        # Absolute, because a caller may change directory while an export runs.
        self.destination = Path(os.path.abspath(destination))  # noqa: PTH100 - keeps symlinks
        self.overwrite = overwrite
        self.path = self.destination.with_name(
            f".{self.destination.name}.partial-{secrets.token_hex(4)}"
        )

    def __enter__(self) -> BundleWriter:
        self._check_destination()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def commit(self, manifest: Manifest) -> Bundle:
        """Hash the files, write the manifest, move the bundle into place.

        ``manifest.files`` is ignored and made anew. The written bundle goes through the
        same checks as :meth:`Bundle.open` before it is moved.

        :raises BundleError: the files and the manifest do not make a bundle that opens.
        """
        files: dict[str, FileInfo] = {}
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path).as_posix()
            if file.is_symlink():
                raise BundleError(f"A bundle holds plain files only, but {name!r} is a link.")
            if file.is_file() and name != MANIFEST_NAME:
                files[name] = FileInfo(sha256=sha256_of(file), bytes=file.stat().st_size)
        complete = manifest.model_copy(update={"files": files})
        (self.path / MANIFEST_NAME).write_text(
            complete.model_dump_json(indent=2) + "\n", encoding="utf-8"
        )
        Bundle.open(self.path, verify=False)
        self._check_destination()
        self._move()
        return Bundle(self.destination, complete)

    def _check_destination(self) -> None:
        target = self.destination
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise BundleError(
                f"A bundle is a folder, but {target} is a file or a link. Give another name, "
                "or remove it."
            )
        if not target.exists() or not any(target.iterdir()):
            return
        if not (target / MANIFEST_NAME).is_file():
            raise BundleError(
                f"{target} is a folder with other things in it, not a bundle, so it is left "
                "alone. Give another name."
            )
        if not self.overwrite:
            raise BundleError(
                f"The bundle {target} exists already. Ask for it to be overwritten, or give "
                "another name."
            )

    def _move(self) -> None:
        if not self.destination.exists() or not any(self.destination.iterdir()):
            self.path.replace(self.destination)  # also takes the place of an empty folder
        else:
            # Afterwards self.path holds the old bundle, which __exit__ removes.
            exchange_folders(self.path, self.destination)


def sha256_of(path: Path) -> str:
    """The hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(root: Path) -> Manifest:
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise BundleError(
            f"A bundle is a folder made by `fdconv export`, but {root} {found}. "
            "Give the folder that holds manifest.json."
        )
    if not (root / MANIFEST_NAME).exists():
        raise BundleError(
            f"{root} has no {MANIFEST_NAME}, so it is not a bundle, or its export was cut "
            "short. Give a folder made by `fdconv export`."
        )
    file = _inside(root, MANIFEST_NAME)
    try:
        if file.stat().st_size > _MANIFEST_LIMIT:
            raise BundleError(f"The {MANIFEST_NAME} of {root} is too large to be one.")
        raw = json.loads(file.read_text(encoding="utf-8"))
        version = raw["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(
            f"The {MANIFEST_NAME} of {root} cannot be read as a bundle's manifest "
            f"({_reason(error)}). Export the bundle again."
        ) from error
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(
            f"The {MANIFEST_NAME} of {root} gives {version!r} as its format version, where a "
            "number from 1 was expected. Export the bundle again."
        )
    if version > FORMAT_VERSION:
        raise BundleError(
            f"The bundle {root} is of format {version}, newer than the {FORMAT_VERSION} this "
            "version of fdconv-deploy reads. Update fdconv-deploy, or export again with this one."
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "its contents"
        raise BundleError(
            f"The {MANIFEST_NAME} of {root} is not valid at {where}: {first['msg']}. "
            "Export the bundle again."
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON at line {error.lineno}"
    return "it is not a JSON object in UTF-8" if not isinstance(error, OSError) else "no access"


def _inside(root: Path, name: str) -> Path:
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


def _check_file(root: Path, name: str, info: FileInfo, *, hashed: bool) -> None:
    real = _inside(root, name)
    size = real.stat().st_size
    if size != info.bytes:
        raise BundleError(
            f"The file {name!r} of the bundle {root} has {size} bytes where its manifest says "
            f"{info.bytes}. Copy the folder again, or export it again."
        )
    try:
        changed = hashed and sha256_of(real) != info.sha256
    except OSError as error:
        raise BundleError(f"The file {name!r} of the bundle {root} cannot be read.") from error
    if changed:
        raise BundleError(
            f"The file {name!r} of the bundle {root} is not the one that was exported: its "
            "sha256 differs from the manifest's. Copy the folder again, or export it again."
        )


def _check_listed(root: Path, manifest: Manifest, name: str, what: str) -> None:
    if name not in manifest.files:
        _inside(root, name)  # a path outside, or a missing file, is the better sentence
        raise BundleError(
            f"The manifest of the bundle {root} names {name!r} as {what} without listing its "
            "sha256. Export the bundle again."
        )


def _check_external_data(root: Path, manifest: Manifest, model: str) -> None:
    try:
        locations = external_locations(_inside(root, model))
    except (ValueError, OSError) as error:
        raise BundleError(
            f"The file {model!r} of the bundle {root} is not an ONNX graph ({error}). "
            "Export the bundle again."
        ) from error
    for location in sorted(locations):
        name = (PurePosixPath(model).parent / location).as_posix() if location else location
        _inside(root, name)
        if name not in manifest.files:
            raise BundleError(
                f"The graph {model!r} of the bundle {root} keeps data in {name!r}, which the "
                "manifest does not list. Export the bundle again."
            )
