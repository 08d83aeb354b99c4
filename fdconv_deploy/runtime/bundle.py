"""A bundle on disk: opening one with every check, writing one whole or not at all.

A bundle is a folder::

    manifest.json     what it is, and the sha256 of every other file
    model.b1.onnx     one graph per batch size
    model.b4.onnx
    weights.bin       the weights, shared by all graphs

Files the manifest does not list are left alone: nothing here opens them.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fdconv_deploy.atomic_write import replace_folder, temporary_folder
from fdconv_deploy.errors import BundleError, in_the_way
from fdconv_deploy.runtime.bundle_checks import (
    bundle_root,
    check_external_data,
    check_file,
    check_listed,
    inside,
    read_manifest,
    sha256_of,
)
from fdconv_deploy.runtime.manifest import MANIFEST_NAME, FileInfo, Manifest


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened and found whole. Make one with :meth:`open`."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
        """Open the bundle folder at ``path``, or the one whose graph or manifest ``path`` is.

        ``verify=False`` skips hashing the files (0.5 s per GB); their presence, sizes and
        every path are checked all the same.

        Raises:
            BundleError: not a bundle, incomplete, changed, of a newer format, or naming a path
                outside itself.
        """
        root = bundle_root(Path(path))
        manifest = read_manifest(root)
        for name, info in manifest.files.items():
            check_file(root, name, info, hashed=verify)
        for batch, name in manifest.models.items():
            check_listed(root, manifest, name, f"the graph of batch {batch}")
        if manifest.weights is not None:
            check_listed(root, manifest, manifest.weights, "the weights")
        for name in manifest.models.values():
            check_external_data(root, manifest, name)
        return cls(root, manifest)

    @property
    def digest(self) -> str:
        """sha256 of the manifest, which holds every file's: equal for copies of a bundle only."""
        return sha256_of(self.path / MANIFEST_NAME)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes there is a graph for, ascending."""
        return tuple(sorted(self.manifest.models))

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
