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

import os
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from fdconv_deploy.atomic_write import replace_folder, temporary_folder
from fdconv_deploy.errors import BundleError, in_the_way
from fdconv_deploy.runtime.bundle_checks import (
    bundle_root,
    check_file,
    check_listed,
    external_files,
    inside,
    read_file,
    read_manifest,
    sha256_of,
)
from fdconv_deploy.runtime.manifest import MANIFEST_NAME, FileInfo, Manifest

# What holds a file's bytes: of a read file, or of memory that processes share.
Bytes = bytes | memoryview


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
        for name, info in manifest.files.items():
            check_file(root, name, info, hashed=False)
        for name in manifest.graphs:
            check_listed(root, manifest, name, "a graph")
        if manifest.weights is not None:
            check_listed(root, manifest, manifest.weights, "the weights")
        bundle = cls(root, manifest, verify)
        for model in manifest.graphs:
            bundle._external(model)
        if hold:
            bundle.hold()
        for name in manifest.files.keys() - bundle.contents.keys() if verify else ():
            check_file(root, name, manifest.files[name], hashed=True)
        if not hold:
            bundle.release()
        return bundle

    def content(self, name: str) -> Bytes:
        """A listed file's bytes, read and hashed at the first call, and kept.

        Raises:
            BundleError: they are not those that the manifest lists.
        """
        with self._lock:
            if name not in self.contents:
                info = self.manifest.files[name]
                self.contents[name] = read_file(self.path, name, info, hashed=self.verify)
            return self.contents[name]

    def external_data(self, model: str) -> dict[str, Bytes]:
        """Bytes of the files that a graph keeps data in, by how the graph calls them.

        Raises:
            BundleError: as :meth:`content`.
        """
        return {called: self.content(name) for called, name in self._external(model).items()}

    def hold(self) -> dict[str, Bytes]:
        """Read every graph and the weights into memory, so that the folder is needed no more.

        Returns:
            Their bytes by name.

        Raises:
            BundleError: as :meth:`content`.
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

        Returns:
            The bundle there.

        Raises:
            BundleError: as :meth:`content`.
        """
        for name, data in self.hold().items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        self.release()
        return Bundle(folder, self.manifest, self.verify)

    def _external(self, model: str) -> dict[str, str]:
        """The files that a graph keeps data in: their names here, by how the graph calls them."""
        with self._lock:
            if model not in self._locations:
                graph = bytes(self.content(model))
                self._locations[model] = external_files(self.path, self.manifest, model, graph)
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
        """The bundle as if it had the graphs of one (height, width) alone.

        It holds what is held here; either lets go of it for itself.

        Raises:
            ValueError: it has no graphs of that size.
        """
        with self._lock:
            return replace(self, manifest=self.manifest.at(size), contents=dict(self.contents))

    def model_path(self, batch: int) -> Path:
        """The graph file of one batch size."""
        return self.file(self.manifest.models[batch])

    def file(self, name: str) -> Path:
        """The real path of a listed file, which lies inside the bundle.

        Raises:
            BundleError: the manifest does not list ``name``, or it leads outside.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{name!r} is not listed in the manifest of the bundle {self.path}.")
        return inside(self.path, name)


class BundleWriter:
    """Writes a bundle beside its destination and moves it there only when it is whole.

    Use it as a context manager: write files into ``writer.path``, then call
    :meth:`commit`. Leaving the block without a commit, or with an exception, removes
    everything that was written.

    Raises:
        BundleError: on entering, when ``destination`` exists and must not be replaced.
    """

    def __init__(self, destination: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        # Absolute, because a caller may change directory while an export runs.
        self.destination = Path(os.path.abspath(destination))  # noqa: PTH100 - keeps symlinks
        self.overwrite = overwrite
        self._folder = ExitStack()

    def __enter__(self) -> BundleWriter:
        self._check_destination()
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        self.path = self._folder.enter_context(temporary_folder(self.destination))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._folder.close()

    def commit(self, manifest: Manifest) -> Bundle:
        """Hash the files, write the manifest, move the bundle into place.

        ``manifest.files`` is ignored and made anew. The written bundle goes through the
        same checks as :meth:`Bundle.open` before it is moved.

        Raises:
            BundleError: the files and the manifest do not make a bundle that opens.
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
