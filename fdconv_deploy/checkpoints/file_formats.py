"""A path → what the bytes are, and the objects in them. Never runs code from a file."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from fdconv_deploy.checkpoints.config_parser import printable
from fdconv_deploy.checkpoints.safe_unpickling import (
    DamagedPickleError,
    HostilePickleError,
    StorageRecord,
    TensorRecord,
    unpickle,
)
from fdconv_deploy.errors import CheckpointError

Container = Literal["torch zip", "pickle", "safetensors"]

EXPECTED = "Expected a PyTorch checkpoint (.pth, .pt, .ckpt) or a .safetensors file"

# What people hand over by mistake: (first bytes, what it is, what to do).
_MISTAKES = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer",
        "Run `git lfs pull` to fetch the file itself.",
    ),
    (b"<", "an HTML or XML page", "Download the checkpoint itself, not the page that shows it."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (b"\x08", "probably an ONNX model", "Give the checkpoint it was exported from."),
    (b"\x89HDF", "an HDF5 file", "Only PyTorch checkpoints can be read."),
    (
        b"\x93NUMPY",
        "one NumPy array (.npy)",
        "Give the whole checkpoint; a network's weights are many arrays under names.",
    ),
)


def container_of(path: Path) -> Container:
    """What kind of file ``path`` is, by its first bytes.

    Raises:
        CheckpointError: it does not exist, is a folder, is empty or is something else.
    """
    if path.is_dir():
        raise CheckpointError(
            f"{path} is a bundle, which an export made. {EXPECTED}: the one it was exported from."
            if (path / "manifest.json").is_file()
            else f"{path} is a folder. {EXPECTED}; give a file in it, e.g. {_example_in(path)}."
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. {EXPECTED}. Check the path.") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be opened: {error.strerror}. {EXPECTED} that you may read."
        ) from None
    if not size:
        raise CheckpointError(f"{path} is empty. {EXPECTED}. Download or copy it again.")
    if head.startswith(b"PK\x03\x04"):
        return "torch zip"
    if len(head) > 9 and head[8:9] == b"{":
        return "safetensors"
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return "pickle"
    for start, what, remedy in _MISTAKES:
        if head.startswith(start):
            raise CheckpointError(f"{path} is {what}. {EXPECTED}. {remedy}")
    raise CheckpointError(
        f"{path} is not a checkpoint: it starts with {head[:8]!r}. {EXPECTED}. "
        "Check that this is the right file and that it was downloaded whole."
    )


def _example_in(folder: Path) -> str:
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".pth", ".pt", ".safetensors"))
    return found[-1] if found else "epoch_12.pth"


def load_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and meta data of a .safetensors file.

    The format's meta data are strings; ``config`` or ``cfg`` (text), ``classes`` and
    ``palette`` (JSON) become what mmengine's ``meta`` holds. Others are kept as strings.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            strings: dict[str, str] = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} looks like a safetensors file but cannot be read: {_first_line(error)}. "
            "Download or copy it again."
        ) from None
    dataset = {
        name: _json(path, name, strings.pop(name))
        for name in ("classes", "palette")
        if name in strings
    }
    return tensors, strings | ({"dataset_meta": dataset} if dataset else {})


def _json(path: Path, name: str, text: str) -> Any:
    try:
        return printable(json.loads(text))
    except (ValueError, RecursionError):
        raise CheckpointError(
            f"{path}: the meta data entry {name!r} should be a JSON list, found {text[:40]!r}. "
            f"Write it with json.dumps, or remove it and give {name} yourself."
        ) from None


class PickledFile:
    """A PyTorch file: what its pickle describes, and its tensors on request.

    Attributes:
        path: the file.
        content: plain containers, and records of the tensors and of all that is code; see
            :mod:`fdconv_deploy.checkpoints.safe_unpickling`.
    """

    def __init__(self, path: Path, container: Container) -> None:
        """Read the pickle and none of the tensors.

        Raises:
            CheckpointError: the file is cut, compressed, a TorchScript program or an archive of
                something else, or names code that runs programs. Nothing it names is ever
                imported or run.
        """
        self.path = path
        self._zipped = container == "torch zip"
        self._folder = _check_zip(path) if self._zipped else ""
        self._places: dict[str, tuple[int, int]] = {}
        self._swapped = False
        try:
            self.content = self._unzip() if self._zipped else self._unpickle()
        except HostilePickleError as error:
            raise CheckpointError(
                f"{path} names {error}, which is code and not weights. Checkpoints are read "
                "without running code, so it was refused and nothing in it was run. If you trust "
                "the file, load it where it was trained and save only its weights: "
                "torch.save({'meta': ckpt['meta'], 'state_dict': ckpt['state_dict']}, path)."
            ) from None
        except MemoryError:
            raise CheckpointError(
                f"{path} asks for more memory than this machine has. If it is a checkpoint you "
                "trust, save its state_dict alone on the machine that trained it."
            ) from None
        except _DAMAGE as error:
            raise self._damaged(error) from None

    def stored(self, key: str) -> int:
        """Bytes that the file holds for a storage; 0 if it has no such storage."""
        return self._places.get(key, (0, 0))[1]

    def read(self, records: Mapping[str, TensorRecord]) -> dict[str, torch.Tensor]:
        """Tensors under the same names, on the CPU. Those that shared a storage share it still.

        Raises:
            CheckpointError: the file is cut or damaged, or a tensor claims more than it stores.
        """
        self._check_claims(records)
        storages: dict[str, torch.Tensor] = {}
        try:
            with zipfile.ZipFile(self.path) if self._zipped else self.path.open("rb") as file:
                for record in records.values():
                    key = record.storage.key
                    if key not in storages and self.stored(key):
                        storages[key] = self._bytes(file, key, record.dtype)
            return {name: _tensor(record, storages) for name, record in records.items()}
        except _DAMAGE as error:
            raise self._damaged(error) from None

    def _check_claims(self, records: Mapping[str, TensorRecord]) -> None:
        for name, record in records.items():
            stored = self.stored(record.storage.key)
            # Strides of zero let a few bytes pose as a tensor of any size.
            if record.needed > stored or record.nbytes > max(stored, 1 << 20):
                raise CheckpointError(
                    f"{self.path}: {name} claims {record.shape} elements but the file stores "
                    f"{stored} bytes for it. Get the original file again."
                )
        claimed = sum(record.nbytes for record in records.values())
        if claimed > 4 * self.path.stat().st_size + (64 << 20):
            raise CheckpointError(
                f"{self.path}: its tensors claim {claimed:,} bytes, many times those of the file. "
                "Get the original file again."
            )

    def _bytes(self, file: zipfile.ZipFile | IO[bytes], key: str, dtype: torch.dtype) -> Any:
        place, size = self._places[key]
        flat = torch.empty(size, dtype=torch.uint8)
        target: Any = flat.numpy()
        if isinstance(file, zipfile.ZipFile):
            with file.open(f"{self._folder}data/{key}") as entry:
                count = entry.readinto(target)  # type: ignore[attr-defined]
        else:
            file.seek(place)
            count = file.readinto(target)  # type: ignore[attr-defined]
        if count != size:
            raise DamagedPickleError("it ends within a tensor")
        if self._swapped and dtype.itemsize > 1:
            flat.untyped_storage().byteswap(dtype)
        return flat

    def _unzip(self) -> Any:
        with zipfile.ZipFile(self.path) as archive:
            prefix = f"{self._folder}data/"
            for entry in archive.infolist():
                if entry.filename.startswith(prefix):
                    self._places[entry.filename[len(prefix) :]] = (0, entry.file_size)
            order = f"{self._folder}byteorder"
            self._swapped = order in archive.NameToInfo and archive.read(order) == b"big"
            entry = archive.getinfo(f"{self._folder}data.pkl")
            with archive.open(entry) as file:
                return unpickle(file, entry.file_size)

    def _unpickle(self) -> Any:
        """PyTorch's format before 1.6: five pickles, then the storages. Or a pickle alone."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            first = unpickle(file, size)
            if first != torch.serialization.MAGIC_NUMBER:
                return first
            unpickle(file, size)  # the format's version
            system = unpickle(file, size)
            self._swapped = isinstance(system, dict) and system.get("little_endian") is False
            found: dict[str, StorageRecord] = {}
            content = unpickle(file, size, found)
            keys = unpickle(file, size)
            if not isinstance(keys, list):
                raise DamagedPickleError("its list of storages is missing")
            order = "big" if self._swapped else "little"
            for key in map(str, keys):
                count = int.from_bytes(file.read(8), order)  # type: ignore[arg-type]
                dtype = found[key].dtype
                length = count * (1 if dtype is None else dtype.itemsize)
                if count < 0 or file.tell() + length > size:
                    raise DamagedPickleError("it ends within a tensor")
                self._places[key] = (file.tell(), length)
                file.seek(length, 1)
            return content

    def _damaged(self, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged or cut short: {_first_line(error)}. {EXPECTED}, whole. "
            "Download or copy it again."
        )


# What zipfile raises for damaged archives beside its own error, and torch for odd strides.
_DAMAGE = (
    DamagedPickleError, zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError,
    NotImplementedError, RuntimeError, OverflowError, struct.error,
)  # fmt: skip


def _tensor(record: TensorRecord, storages: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if 0 in record.shape:
        return torch.empty(record.shape, dtype=record.dtype)
    flat = storages[record.storage.key]
    size = record.dtype.itemsize
    whole = flat[: flat.numel() // size * size].view(record.dtype)
    return whole.as_strided(record.shape, record.stride, record.offset)


def _check_zip(path: Path) -> str:
    """The folder of PyTorch's files in a zip archive, with its slash.

    Raises:
        CheckpointError: it is cut, holds something else, or could unpack to any size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except _DAMAGE:
        raise CheckpointError(
            f"{path} is a PyTorch file that was cut short (its index, at the end, is missing). "
            "Download or copy it again."
        ) from None
    names = [entry.filename.split("/", 1)[-1] for entry in entries]
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path} is a TorchScript program, not a checkpoint. {EXPECTED}: "
            "give the file that training wrote."
        )
    if names and all(name.endswith(".npy") for name in names):
        raise CheckpointError(
            f"{path} is a NumPy archive (.npz). {EXPECTED}. Make one of it: torch.save({{k: "
            "torch.from_numpy(v) for k, v in numpy.load(path).items()}, 'weights.pth')."
        )
    pickles = [e.filename for e in entries if e.filename.split("/", 1)[-1] == "data.pkl"]
    if not pickles:
        raise CheckpointError(
            f"{path} is a zip archive without PyTorch's data.pkl. {EXPECTED}. "
            "If it holds a checkpoint, unpack it first."
        )
    # torch stores entries as they are. Compressed or overlapping ones could unpack to
    # any size, so they are refused before anything is allocated.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path} holds compressed entries, which PyTorch never writes. "
            "Save it again with torch.save, or get the original file."
        )
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(
            f"{path} claims to hold more bytes than it has. Get the original file again."
        )
    return pickles[0].removesuffix("data.pkl")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200].rstrip(".") if text else type(error).__name__
