"""A path → what the bytes are, and the objects in them. Never runs code from a file."""

from __future__ import annotations

import json
import pickle
import re
import threading
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from fdconv_deploy.checkpoints.stand_ins import ALLOWED
from fdconv_deploy.errors import CheckpointError

Container = Literal["torch zip", "torch legacy", "safetensors"]

EXPECTED = "Expected a PyTorch checkpoint (.pth, .pt) or a .safetensors file"

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
)

# torch keeps its allow-list per process, so two threads must not add and remove at once.
_ALLOWING = threading.Lock()


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
        return "torch legacy"
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
        return json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(
            f"{path}: the meta data entry {name!r} should be a JSON list, found {text[:40]!r}. "
            f"Write it with json.dumps, or remove it and give {name} yourself."
        ) from None


def load_pickled(path: Path, container: Container) -> Any:
    """The object in a PyTorch file: tensors, plain containers and inert stand-ins.

    Raises:
        CheckpointError: the file is cut, compressed, a TorchScript program, or names a class
            or function outside the allow-list. Nothing it names is ever imported or run.
    """
    if container == "torch zip":
        _check_zip(path)
    try:
        with (
            _ALLOWING,
            torch.serialization.safe_globals(list(ALLOWED)),
            warnings.catch_warnings(),
            path.open("rb") as file,
        ):
            warnings.simplefilter("ignore")
            # weights_only with an allow-list of inert stand-ins: the one permitted call.
            return torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from None
    except MemoryError:
        raise CheckpointError(
            f"{path} asks for more memory than this machine has. If it is a checkpoint you trust, "
            "save its state_dict alone on the machine that trained it."
        ) from None
    # torch and its unpickler raise whatever a damaged file leads them to.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or cut short: {_first_line(error)}. {EXPECTED}, whole. "
            "Download or copy it again."
        ) from None


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
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
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(
            f"{path} claims to hold more bytes than it has. Get the original file again."
        )


def _refusal(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL (\S+)(?: was not| whose)", message)
    if found:
        return (
            f"{path} names {found[1]}, which is code and not weights. Checkpoints are read "
            "without running code, so it was refused and nothing in it was run. If you trust the "
            "file, load it where it was trained and save only its weights: "
            "torch.save({'meta': ckpt['meta'], 'state_dict': ckpt['state_dict']}, path)."
        )
    line = next((part for part in reversed(message.splitlines()) if "Unpickler error" in part), "")
    detail = line.split("Unpickler error:")[-1].strip() or message.strip().splitlines()[-1]
    detail = re.split(r"\s*Check the documentation", detail)[0].rstrip(". ")
    return (
        f"{path} cannot be read as plain weights: {detail or 'its content is damaged'}. "
        f"{EXPECTED}. Save the state_dict alone with torch.save, or download the file again."
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200].rstrip(".") if text else type(error).__name__
