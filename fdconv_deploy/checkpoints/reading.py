"""A checkpoint, of one file or several → its state dict and metadata. Runs no code of a file."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fdconv_deploy.checkpoints.choose_weights import choose_weights
from fdconv_deploy.checkpoints.config_parser import printable
from fdconv_deploy.checkpoints.safe_unpickling import (
    DamagedPickleError,
    HostilePickleError,
    Made,
    StorageRecord,
    TensorRecord,
    as_array,
    as_mapping,
    describe,
    plain,
    refusal_of_code,
    tensors_in,
    unpickle,
    unpickle_with_storages,
)
from fdconv_deploy.errors import CheckpointError
from fdconv_deploy.runtime.bundle import sha256_of

Format = Literal[
    "mmcv 1.x",
    "mmengine training",
    "mmengine published",
    "Lightning",
    "DeepSpeed",
    "detectron2",
    "plain",
    "safetensors",
]


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state_dict: names → dense CPU tensors, without wrappers' prefixes.
        meta: the file's ``meta``, plain data only. Empty if there is none.
        format: which of the known layouts the file has.
        dropped: what the file also holds and this leaves out, one phrase each.
        other_weights: names of other networks in the file, for ``weights`` of
            :func:`read_checkpoint`.
        path: where it was read from.
    """

    state_dict: dict[str, Tensor]
    meta: dict[str, Any]
    format: Format
    dropped: tuple[str, ...] = ()
    other_weights: tuple[str, ...] = ()
    path: Path | None = None


def read_checkpoint(path: str | Path, *, weights: str | None = None) -> Checkpoint:
    """Read a checkpoint without running anything in it.

    Args:
        path: a file of mmcv 1.x, mmengine, Lightning, DeepSpeed, detectron2 or plain PyTorch
            (``.pth``, ``.pt``, ``.ckpt``, ``.bin``, ``.pkl``), ``.safetensors``, or the folder or
            index of a checkpoint in several files.
        weights: the entry or prefix to take the weights from, e.g. ``"state_dict_ema"`` or
            ``"teacher"``. By default the trained weights, or the averaged ones if there are no
            others; see :mod:`fdconv_deploy.checkpoints.choose_weights`.

    Raises:
        CheckpointError: it cannot be read, needs code to be read, or holds no state dict.
    """
    path = Path(path)
    index = _find_index(path)
    file: PickledFile | None = None
    layout: Format = "safetensors"
    content: Mapping[Any, Any]
    if index is not None:
        content, meta = _read_shards(index)
        layout = "safetensors" if ".safetensors" in index.name else "plain"
    else:
        container = container_of(path)
        _refuse_one_shard(path)
        if container == "safetensors":
            content, meta = load_safetensors(path)
        else:
            file = PickledFile(path, container)
            content = file.mapping()
            meta = plain(as_mapping(content.get("meta"))) or {}
            layout = _format(content, meta)
    tensors, others, dropped = choose_weights(path, content, weights)
    records = {k: v for k, v in tensors.items() if isinstance(v, TensorRecord)}
    read = file.read(records) if file is not None else {}
    state = {
        name: read[name] if name in read else _at_hand(path, name, value)
        for name, value in tensors.items()
    }
    if layout == "DeepSpeed" and not any(tensor.numel() for tensor in state.values()):
        raise CheckpointError(
            f"{path} holds names without weights: DeepSpeed's stage 3 keeps them in the other "
            "files of its folder. Gather them with the zero_to_fp32.py that lies there."
        )
    return Checkpoint(state, meta, layout, dropped, others, path)


def _at_hand(path: Path, name: str, value: Any) -> Tensor:
    """A tensor that was read already, or made of a pickled array."""
    if isinstance(value, Tensor):
        return value.detach()
    array = as_array(value)
    assert array is not None
    try:
        return torch.from_numpy(np.array(array, array.dtype.newbyteorder("=")))
    except TypeError:
        raise CheckpointError(
            f"{path}: {name} is an array of {array.dtype}, which PyTorch does not have. Expected "
            "float16, float32, float64 or integers; save it as one of them."
        ) from None


def _format(content: Mapping[Any, Any], meta: Mapping[str, Any]) -> Format:
    if "pytorch-lightning_version" in content:
        return "Lightning"
    if "ds_version" in content or "ds_config" in content:
        return "DeepSpeed"
    if "__author__" in content or ("model" in content and "iteration" in content):
        return "detectron2"
    if meta and as_mapping(content.get("state_dict")) is not None:
        if "message_hub" in content or ("mmengine_version" in meta and "optimizer" in content):
            # mmsegmentation's publish tool leaves the message hub in.
            return "mmengine training" if "optimizer" in content else "mmengine published"
        if "mmengine_version" in meta or "cfg" in meta or "dataset_meta" in meta:
            return "mmengine published"
        if {"mmcv_version", "config", "CLASSES"} & set(meta):
            return "mmcv 1.x"
    return "plain"


# What a file is, by its bytes

Container = Literal["torch zip", "pickle", "safetensors"]

EXPECTED = "Expected a PyTorch checkpoint (.pth, .pt, .ckpt, .pkl) or a .safetensors file"

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
    """What kind of file ``path`` is, by its first bytes; all others are refused."""
    if (path / "manifest.json").is_file():
        raise CheckpointError(
            f"{path} is a bundle, which an export made. {EXPECTED}: the one it was exported from."
        )
    if path.is_dir():
        suffixes = (".pth", ".pt", ".safetensors")
        found = [file.name for file in path.iterdir() if file.suffix in suffixes]
        example = max(found, default="epoch_12.pth")
        raise CheckpointError(f"{path} is a folder. {EXPECTED}; give a file in it, e.g. {example}.")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. {EXPECTED}. Check the path.") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be opened: {error.strerror}. {EXPECTED} that you may read."
        ) from None
    if not head:
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


def load_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and metadata of a .safetensors file.

    The format's metadata are strings; ``classes`` and ``palette`` (JSON) become what mmengine's
    ``meta`` holds.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            meta: dict[str, Any] = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} looks like a safetensors file but cannot be read: {_first_line(error)}. "
            "Download or copy it again."
        ) from None
    dataset: dict[str, Any] = {}
    name = ""
    try:
        for name in ("classes", "palette"):
            if name in meta:
                dataset[name] = printable(json.loads(meta[name]))
                del meta[name]
    except (ValueError, RecursionError):
        raise CheckpointError(
            f"{path}: the metadata entry {name!r} should be a JSON list, found "
            f"{meta[name][:40]!r}. Write it with json.dumps, or remove it and give {name} yourself."
        ) from None
    return tensors, meta | ({"dataset_meta": dataset} if dataset else {})


# What zipfile raises for damaged archives beside its own error, and torch for odd strides.
_DAMAGE = (
    DamagedPickleError, zipfile.BadZipFile, OSError, ValueError, KeyError, EOFError,
    NotImplementedError, RuntimeError, OverflowError, struct.error,
)  # fmt: skip


class PickledFile:
    """A PyTorch file: what its pickle describes, and its tensors on request.

    ``content`` has plain containers, and records of the tensors and of all that is code.
    """

    def __init__(self, path: Path, container: Container) -> None:
        """Read the pickle and none of the tensors.

        Raises:
            CheckpointError: the file is cut, compressed, a TorchScript program or an archive of
                something else, or names code that runs programs.
        """
        self.path = path
        self._size = path.stat().st_size
        self._folder = _check_zip(path, self._size) if container == "torch zip" else None
        # Where each storage begins in the file (unused in a zip archive), and its bytes.
        self._places: dict[str, tuple[int, int]] = {}
        self._swapped = False
        try:
            if self._folder is not None:
                self.content = self._unzip(self._folder)
            else:
                with path.open("rb") as file:
                    found = unpickle_with_storages(file, self._size)
                self.content, self._places, self._swapped = found
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

    def mapping(self) -> Mapping[Any, Any]:
        """What it holds, by name."""
        mapping = as_mapping(self.content)
        if mapping is not None:
            return mapping
        if isinstance(self.content, Made) and tensors_in(self.content):
            raise refusal_of_code(self.path, "what it holds", self.content)
        raise CheckpointError(
            f"{self.path} holds {describe(self.content)}. Expected a state dict (names → tensors) "
            "or a dict with one in it. Save the network with torch.save(network.state_dict(), "
            "path)."
        )

    def read(self, records: Mapping[str, TensorRecord]) -> dict[str, Tensor]:
        """Tensors under the same names, on the CPU. Those that shared a storage share it still."""
        for name, record in records.items():
            stored = self._stored(record.storage)
            # Strides of zero let a few bytes pose as a tensor of any size.
            if record.needed > stored or record.nbytes > max(stored, 1 << 20):
                raise CheckpointError(
                    f"{self.path}: {name} claims {record.shape} elements but the file stores "
                    f"{stored} bytes for it. Get the original file again."
                )
        claimed = sum(record.nbytes for record in records.values())
        if claimed > 4 * self._size + (64 << 20):
            raise CheckpointError(
                f"{self.path}: its tensors claim {claimed:,} bytes, many times those of the file. "
                "Get the original file again."
            )
        storages: dict[str, Tensor] = {}
        try:
            with self.path.open("rb") if self._folder is None else zipfile.ZipFile(self.path) as f:
                for record in records.values():
                    key = record.storage.key
                    if key not in storages and self._stored(record.storage):
                        storages[key] = self._storage(f, record.storage, record.dtype)
            return {name: _tensor(record, storages) for name, record in records.items()}
        except _DAMAGE as error:
            raise self._damaged(error) from None

    def _stored(self, storage: StorageRecord) -> int:
        """How many bytes the file has of a storage."""
        if storage.content is not None:
            return len(storage.content)
        return self._places.get(storage.key, (0, 0))[1]

    def _storage(
        self, file: zipfile.ZipFile | IO[bytes], storage: StorageRecord, dtype: torch.dtype
    ) -> Tensor:
        flat = torch.empty(self._stored(storage), dtype=torch.uint8)
        source: Any = file
        if storage.content is not None:
            source = BytesIO(storage.content)
        elif isinstance(file, zipfile.ZipFile):
            source = file.open(f"{self._folder}data/{storage.key}")
        else:
            file.seek(self._places[storage.key][0])
        if source.readinto(flat.numpy()) != len(flat):
            raise DamagedPickleError("it ends within a tensor")
        swapped = self._swapped if storage.content is None else storage.swapped
        if swapped and dtype.itemsize > 1:
            flat.untyped_storage().byteswap(dtype)
        return flat

    def _unzip(self, folder: str) -> Any:
        prefix = f"{folder}data/"
        with zipfile.ZipFile(self.path) as archive:
            for entry in archive.infolist():
                if entry.filename.startswith(prefix):
                    self._places[entry.filename.removeprefix(prefix)] = (0, entry.file_size)
            order = f"{folder}byteorder"
            self._swapped = order in archive.NameToInfo and archive.read(order) == b"big"
            entry = archive.getinfo(f"{folder}data.pkl")
            with archive.open(entry) as file:
                return unpickle(file, entry.file_size)

    def _damaged(self, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged or cut short: {_first_line(error)}. {EXPECTED}, whole. "
            "Download or copy it again."
        )


def _tensor(record: TensorRecord, storages: Mapping[str, Tensor]) -> Tensor:
    if 0 in record.shape:
        return torch.empty(record.shape, dtype=record.dtype)
    flat = storages[record.storage.key]
    size = record.dtype.itemsize
    whole = flat[: flat.numel() // size * size].view(record.dtype)
    return whole.as_strided(record.shape, record.stride, record.offset)


def _check_zip(path: Path, size: int) -> str:
    """The folder of PyTorch's files in a zip archive, with its slash."""
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
    if "data.pkl" not in names:
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
    if sum(entry.file_size for entry in entries) > size:
        raise CheckpointError(
            f"{path} claims to hold more bytes than it has. Get the original file again."
        )
    return entries[names.index("data.pkl")].filename.removesuffix("data.pkl")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200].rstrip(".") if text else type(error).__name__


# Checkpoints in several files

_INDEX = re.compile(r"\.(safetensors|bin|pth|pt)\.index\.json$")
_SHARD = re.compile(r"-(\d{5,})-of-(\d{5,})\.(safetensors|bin|pth|pt)$")
_NAME = re.compile(r"[^\\/\0]{1,200}")
MAX_INDEX_BYTES = 64 << 20


def _find_index(path: Path) -> Path | None:
    """The index of a sharded checkpoint, if ``path`` is one or its folder."""
    if not path.is_dir():
        if path.suffix == ".distcp" or path.name == ".metadata":
            raise _distributed(path, path.parent)
        return path if _INDEX.search(path.name) and path.is_file() else None
    if (path / ".metadata").is_file() or any(path.glob("*.distcp")):
        raise _distributed(path, path)
    if (path / "latest").is_file() or (path / "zero_to_fp32.py").is_file():
        raise CheckpointError(
            f"{path} is a folder of DeepSpeed. Expected a file: give the "
            "mp_rank_00_model_states.pt in it; of stage 3, gather it first with the "
            "zero_to_fp32.py that lies there."
        )
    found = sorted(file for file in path.iterdir() if _INDEX.search(file.name))
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds several checkpoints: {', '.join(file.name for file in found[:5])}. "
            "Give one of these files."
        )
    return found[0] if found else None


def _distributed(path: Path, folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is of a distributed checkpoint of PyTorch (.metadata and .distcp files). "
        "Expected one file. Gather it first: python -m torch.distributed.checkpoint.format_utils "
        f"dcp_to_torch {folder} gathered.pth"
    )


def _refuse_one_shard(path: Path) -> None:
    found = _SHARD.search(path.name)
    if found and int(found[2]) > 1:
        raise CheckpointError(
            f"{path} is one of {int(found[2])} files that hold one network. Give their folder, or "
            "the ….index.json in it, and keep all of them there."
        )


def digest_of(path: Path) -> str:
    """The sha256 of a checkpoint: of its file, or of its index and all files that it names."""
    index = _find_index(path)
    if index is None:
        return sha256_of(path)
    files = [index, *(index.parent / name for name in sorted(set(_weight_map(index).values())))]
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()


def _read_shards(index: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """All tensors that an index's ``weight_map`` names, in its order, and the files' metadata."""
    places = _weight_map(index)
    tensors: dict[str, Any] = {}
    meta: dict[str, Any] = {}
    for name in dict.fromkeys(places.values()):
        path = index.parent / name
        if not path.is_file():
            raise CheckpointError(
                f"{index} names the file {name}, which is not there. Download all files of the "
                "checkpoint into one folder."
            )
        container = container_of(path)
        if container == "safetensors":
            found, strings = load_safetensors(path)
            meta |= strings
        else:
            file = PickledFile(path, container)
            records = {str(k): v for k, v in file.mapping().items() if isinstance(v, TensorRecord)}
            found = dict(file.read(records))
        tensors |= {key: value for key, value in found.items() if places.get(key) == name}
    missing = [key for key in places if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{index} names {missing[0]} in {places[missing[0]]}, and it is not there"
            f"{f' ({len(missing)} such tensors)' if len(missing) > 1 else ''}. The files are not "
            "of one checkpoint; download all of them again."
        )
    return {key: tensors[key] for key in places}, meta


def _weight_map(index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError("it is too large")
        content = printable(json.loads(index.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{index} cannot be read as the index of a checkpoint: {error}. Download it again."
        ) from None
    places = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(
            f"{index} has no weight_map (names of tensors → names of files). Expected the index of "
            "a checkpoint in several files; download it again."
        )
    for key, name in places.items():
        # A name with a folder in it could reach any file of this machine.
        if not isinstance(name, str) or Path(name).name != name or not _NAME.fullmatch(name):
            raise CheckpointError(
                f"{index} places {key} in {str(name)[:80]!r}. Expected the name of a file beside "
                "it. Download it again."
            )
    return places
