"""A bundle on disk: opening one with every check, writing one whole or not at all.

A bundle is a folder::

    manifest.json     what it is, and the sha256 of every other file
    model.b1.onnx     one graph per batch size
    model.b4.onnx
    weights.bin       the weights, shared by all graphs

Graphs of other input sizes, ``model.1344x800.b1.onnx``, share the weights, too. Files the manifest
does not list are left alone: nothing here opens them.

What runs is what was hashed: graphs and weights are read once, into memory of this process, and an
inference engine is given those bytes. A file that an engine maps would change under it, or end it
by a bus error, when somebody copies another bundle over this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fdconv_deploy.atomic_write import replace_folder, temporary_folder
from fdconv_deploy.errors import BundleError, FDConvError, in_the_way
from fdconv_deploy.runtime.images import SUFFIXES
from fdconv_deploy.runtime.manifest import FORMAT_VERSION, MANIFEST_NAME, FileInfo, Manifest
from fdconv_deploy.runtime.onnx_graph import external_locations

M = TypeVar("M", bound=BaseModel)
# What holds a file's bytes: of a read file, or of memory that processes share.
Bytes = bytes | memoryview
_CHECKPOINTS = (".pth", ".pt", ".ckpt", ".safetensors", ".pkl")
_JSON_LIMIT = 64 << 20  # bytes; a real manifest has some tens of kilobytes
# What else may be the matter with a file that is not the listed one, and what to do.
_NOT_LISTED = (
    "It is damaged, or another bundle is being copied over this one: let the copy finish, copy the "
    "folder again, or export it again."
)


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened and found whole. Make one with :meth:`open`.

    Attributes:
        path: its folder.
        manifest: what it says about itself.
        verify: whether the bytes that run are hashed when they are read.
        contents: the files that were read and not let go of, by name.
    """

    path: Path
    manifest: Manifest
    verify: bool = True
    contents: dict[str, Bytes] = field(default_factory=dict, repr=False, compare=False)
    _locations: dict[str, dict[str, str]] = field(default_factory=dict, repr=False, compare=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, verify: bool = True, hold: bool = False
    ) -> Bundle:
        """Open the bundle folder at ``path``, or the one whose graph or manifest ``path`` is.

        Args:
            path: the folder, or a file in it.
            verify: False skips hashing the files, now and when they are read (0.5 s per GB);
                their presence, sizes and every path are checked all the same.
            hold: read graphs and weights into memory now, see :meth:`hold`.

        Raises:
            BundleError: not a bundle, incomplete, changed, of a newer format, or naming a path
                outside itself.
        """
        root = bundle_root(Path(path))
        manifest = read_manifest(root)
        bundle = cls(root, manifest, verify)
        for name in manifest.files:
            bundle._check_size(name, inside(root, name).stat().st_size)
        for name in manifest.graphs:
            bundle._check_listed(name, "a graph of the bundle")
        if manifest.weights is not None:
            bundle._check_listed(manifest.weights, "the weights of the bundle")
        for model in manifest.graphs:
            bundle._external(model)
        if hold:
            bundle.hold()
        for name in manifest.files.keys() - bundle.contents.keys() if verify else ():
            bundle._check_file(name)
        if not hold:
            bundle.release()
        return bundle

    def content(self, name: str) -> Bytes:
        """A listed file's bytes, read and hashed at the first call, and kept.

        ``BundleError`` where they are not those that the manifest lists.
        """
        with self._lock:
            if name not in self.contents:
                self.contents[name] = self._read(name)
            return self.contents[name]

    def external_data(self, model: str) -> dict[str, Bytes]:
        """Bytes of the files that a graph keeps data in, by how the graph calls them."""
        return {called: self.content(name) for called, name in self._external(model).items()}

    def hold(self) -> dict[str, Bytes]:
        """Read every graph and the weights into memory, so that the folder is needed no more.

        Their bytes by name. Raises as :meth:`content`.
        """
        with self._lock:
            for model in self.manifest.graphs:
                self.content(model)
                self.external_data(model)
            return dict(self.contents)

    def release(self) -> None:
        """Let go of what was read; asked for again, it is read and hashed again."""
        with self._lock:
            self.contents.clear()

    def copy_to(self, folder: Path) -> Bundle:
        """Write what runs to a folder of one's own, for tools that read files, and let go of it.

        The bundle there. Raises as :meth:`content`.
        """
        for name, data in self.hold().items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        self.release()
        return Bundle(folder, self.manifest, self.verify)

    def _read(self, name: str) -> bytes:
        """A listed file's bytes, read once and never mapped: what is hashed is what is returned."""
        info, real = self.manifest.files[name], inside(self.path, name)
        try:
            with real.open("rb") as file:
                data = file.read(info.bytes + 1)  # a byte too many tells, however large the file is
                size = len(data) if len(data) <= info.bytes else os.fstat(file.fileno()).st_size
        except OSError as error:
            raise self._refused(name, "cannot be read.") from error
        self._check_size(name, size)
        if self.verify:
            self._check_hash(name, hashlib.sha256(data).hexdigest())
        return data

    def _check_file(self, name: str) -> None:
        try:
            self._check_hash(name, sha256_of(inside(self.path, name)))
        except OSError as error:
            raise self._refused(name, "cannot be read.") from error

    def _refused(self, name: str, found: str) -> BundleError:
        return BundleError(f"The file {name!r} of the bundle {self.path} {found}")

    def _check_size(self, name: str, size: int) -> None:
        if size != (listed := self.manifest.files[name].bytes):
            found = f"has {size} bytes where its manifest says {listed}."
            raise self._refused(name, f"{found} {_NOT_LISTED}")

    def _check_hash(self, name: str, digest: str) -> None:
        if digest != self.manifest.files[name].sha256:
            found = "is not the one that was exported: its sha256 differs from the manifest's."
            raise self._refused(name, f"{found} {_NOT_LISTED}")

    def _check_listed(self, name: str, role: str) -> None:
        if name not in self.manifest.files:
            inside(self.path, name)  # a path outside, or a missing file, is the better sentence
            raise BundleError(
                f"The manifest does not list the file {name!r}, {role} {self.path}. Export the "
                "bundle again."
            )

    def _external(self, model: str) -> dict[str, str]:
        """The files that a graph keeps data in: their names here, by how the graph calls them."""
        with self._lock:
            if model not in self._locations:
                try:
                    locations = external_locations(bytes(self.content(model)))
                except ValueError as error:
                    found = f"is not an ONNX graph ({error}). Export the bundle again."
                    raise self._refused(model, found) from error
                names = {}
                for location in sorted(locations):
                    name = location and (PurePosixPath(model).parent / location).as_posix()
                    self._check_listed(name, f"data of the graph {model!r} of the bundle")
                    names[location] = name
                self._locations[model] = names
            return self._locations[model]

    @property
    def digest(self) -> str:
        """sha256 of the manifest, which holds every file's: equal for copies of a bundle only."""
        return sha256_of(self.path / MANIFEST_NAME)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes there is a graph for, ascending."""
        return tuple(sorted(self.manifest.models))

    def at(self, size: tuple[int, int]) -> Bundle:
        """The bundle as if it had the graphs of one (height, width) alone; ``ValueError`` if none.

        It holds what is held here; either lets go of it for itself.
        """
        with self._lock:
            return replace(self, manifest=self.manifest.at(size), contents=dict(self.contents))

    def model_path(self, batch: int) -> Path:
        """The graph file of one batch size, its links followed inside the bundle."""
        return inside(self.path, self.manifest.models[batch])


class BundleWriter:
    """Writes a bundle beside its destination and moves it there only when it is whole.

    A context manager: write files into ``writer.path``, then call :meth:`commit`. What was not
    committed is removed. ``BundleError`` on entering, when ``destination`` exists and must not be
    replaced.
    """

    def __init__(self, destination: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        # Absolute, because a caller may change directory while an export runs.
        self.destination = Path(os.path.abspath(destination))  # noqa: PTH100 - keeps symlinks
        self.overwrite = overwrite
        self._folder = ExitStack()

    def __enter__(self) -> BundleWriter:
        self._check_destination()
        self.path = self._folder.enter_context(temporary_folder(self.destination))
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.close()

    def commit(self, manifest: Manifest) -> Bundle:
        """Hash the files, write the manifest, check as :meth:`Bundle.open`, move into place.

        ``manifest.files`` is made anew. ``BundleError`` where this makes no bundle that opens.
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
        replace_folder(self.path, self.destination)  # __exit__ removes an old one
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
            raise in_the_way(BundleError, f"The bundle {target} exists already.")


def sha256_of(path: Path) -> str:
    """The hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
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
    """Bundles' folders, as `bundle_root`, and checkpoint files; ``FDConvError`` if one lacks."""
    found = [bundle_root(path) for path in paths]
    for path in found:
        if not path.exists():
            raise FDConvError(f"{path} does not exist. Give a bundle's folder or a checkpoint.")
    return found


def _no_folder(path: Path) -> str:
    """What is wrong with a path given in a bundle's place that is no folder, and what to do."""
    expected = f"A bundle is a folder made by `fdconv export`, but {path}"
    ending = path.suffix.lower()
    if not path.exists():
        return f"{expected} does not exist. Check the path."
    advice = f". Give the folder that holds {MANIFEST_NAME}."
    if ending in _CHECKPOINTS:
        advice = (
            f", a checkpoint by its ending. Export it first (`fdconv inspect {path}` prints the "
            f"command), then give the folder, e.g. {path.stem}_bundle."
        )
    elif ending in SUFFIXES:
        advice = ", an image by its ending. The bundle comes first, then the images."
    elif ending == ".onnx":
        advice = (
            f", and no {MANIFEST_NAME} lies beside it. Give the folder that export wrote: its "
            "manifest tells classes and preprocessing."
        )
    return f"{expected} is a file{advice}"


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

    ``BundleError`` if it is none, or does not fit ``model``; ``advice`` ends the message.
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
    if not name or "\0" in name or windows.drive or windows.root or ".." in windows.parts:
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
