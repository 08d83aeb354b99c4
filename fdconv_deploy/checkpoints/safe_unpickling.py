"""Pickles read as data: no name in a file is imported, and nothing is called.

A pickle is a program for a small stack machine. Python's own machine imports what the program
names and calls it. :func:`unpickle` runs the same program (decoded by the standard library's
:mod:`pickletools`) and puts a record where Python would put an object: a :class:`Name` for a
class or function, a :class:`Made` for what a call would have returned. Only plain containers and
the description of a tensor (:class:`TensorRecord`) are made for real, by the code below.

``torch.load(weights_only=True)`` cannot take its place. It refuses a whole file for the first class
that it does not know, so every checkpoint of mmengine and Lightning in tests/real_packages; it
knows the instructions of protocol 2 alone; and a pickle of 210 bytes, whose dict has a key of
tuples nested in pairs, keeps it busy forever.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from fdconv_deploy.checkpoints.config_parser import printable
from fdconv_deploy.errors import CheckpointError

# An opcode of one byte can make an object of a hundred, so their number is what bounds memory.
# A training checkpoint of a ResNet-50 with its optimizer has 60,000.
MAX_OPCODES = 10_000_000
MAX_INTEGER_BITS = 4096
MAX_KEY_PARTS = 1000
MAX_DIMENSIONS = 64
MAX_ELEMENTS = 1 << 60

DTYPES: dict[str, torch.dtype] = {
    name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_STORAGES: dict[str, torch.dtype | None] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128, "UntypedStorage": None,
}  # fmt: skip


class DamagedPickleError(ValueError):
    """The program ends early or does what no pickler writes."""


class HostilePickleError(ValueError):
    """The program names code that runs commands or programs; the argument is its name."""


@dataclass(frozen=True, eq=False)
class Name:
    """Stands for a class or function that a file names; nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        builtin = self.module in ("builtins", "__builtin__")
        return self.name if builtin else f"{self.module}.{self.name}"


class Made:
    """What a call in a file would have made: ``maker`` would have been called with ``arguments``.

    ``maker`` is a :class:`Name`, or whatever else the program would have called. ``state`` is what
    the object would have been given afterwards, ``items`` what would have been appended to it, and
    ``pairs`` what would have been set in it by key; None if nothing.
    """

    # A small file can have a hundred thousand of them, so none is larger than it must be.
    __slots__ = ("arguments", "items", "maker", "pairs", "state")

    def __init__(self, maker: Any, arguments: Any = ()) -> None:
        self.maker, self.arguments, self.state = maker, arguments, None
        self.items: list[Any] | None = None
        self.pairs: dict[Any, Any] | None = None

    def __str__(self) -> str:
        maker = self.maker
        for _ in range(8):  # a method of an object: the object's class tells more
            if isinstance(maker, Made):
                maker = maker.maker
        return str(maker) if isinstance(maker, Name) else "code"


@dataclass(frozen=True)
class StorageRecord:
    """Where a tensor's numbers stand in the file, under the name ``key``.

    Attributes:
        dtype: None for bytes that the tensor gives a dtype to.
        shift: the element at which this part of the storage begins; old files alone have it.
        content: its bytes where they stand in the pickle, None where they stand beside it.
        swapped: whether these bytes are in the other order than this machine's.
    """

    key: str
    dtype: torch.dtype | None
    shift: int = 0
    content: memoryview | None = field(default=None, compare=False, repr=False)
    swapped: bool = field(default=False, compare=False, repr=False)


@dataclass(frozen=True, eq=False)
class TensorRecord:
    """A tensor that is not read yet. ``offset`` and ``stride`` are counted in elements."""

    storage: StorageRecord
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements, whether or not the file stores that many."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def needed(self) -> int:
        """Bytes of its storage up to the last one it uses."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return (self.offset + last + 1) * self.dtype.itemsize


def unpickle(
    file: IO[bytes],
    size: int,
    storages: dict[str, StorageRecord] | None = None,
    *,
    nested: bool = False,
) -> Any:
    """The object that the pickle at ``file``'s position describes; it is left behind the last byte.

    Args:
        file: open for reading.
        size: bytes that are left in it, which no length in the pickle may exceed.
        storages: filled with the storages it names, by their keys.
        nested: whether it stands in another pickle, and so must hold no further one.

    Raises:
        DamagedPickleError: it is cut, or is no pickle.
        HostilePickleError: it names code that runs commands or programs.
    """
    machine = _Machine(size, {} if storages is None else storages, nested)
    try:
        opcodes = pickletools.genops(_Bounded(file, size))  # type: ignore[arg-type]
        for count, (opcode, argument, _) in enumerate(opcodes):
            if opcode.name == "STOP":
                return machine.stack.pop()
            if count >= MAX_OPCODES:
                raise DamagedPickleError(f"its pickle has more than {MAX_OPCODES} steps")
            machine.step(opcode.name, argument)
    except (DamagedPickleError, HostilePickleError):
        raise
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, AttributeError):
        # What the steps do with a stack that no pickler leaves behind.
        raise DamagedPickleError("bytes within its pickle are missing or changed") from None
    raise DamagedPickleError("its pickle has no end")


def unpickle_with_storages(
    file: IO[bytes], size: int, *, nested: bool = False
) -> tuple[Any, dict[str, tuple[int, int]], bool]:
    """PyTorch's format before 1.6: five pickles, then the storages. Or a pickle alone.

    Takes a file open at its beginning, and raises, as `unpickle`.

    Returns:
        The object, where each storage begins in the file and its bytes, by key, and whether these
        are in the other order than this machine's.
    """
    first = unpickle(file, size, nested=nested)
    if first != torch.serialization.MAGIC_NUMBER:
        return first, {}, False
    unpickle(file, size, nested=nested)  # the format's version
    system = unpickle(file, size, nested=nested)
    swapped = isinstance(system, dict) and system.get("little_endian") is False
    found: dict[str, StorageRecord] = {}
    content = unpickle(file, size, found, nested=nested)
    keys = unpickle(file, size, nested=nested)
    if not isinstance(keys, list):
        raise DamagedPickleError("its list of storages is missing")
    places: dict[str, tuple[int, int]] = {}
    for key in map(str, keys):
        count = int.from_bytes(file.read(8), "big" if swapped else "little")
        dtype = found[key].dtype
        length = count * (1 if dtype is None else dtype.itemsize)
        if file.tell() + length > size:
            raise DamagedPickleError("it ends within a tensor")
        places[key] = (file.tell(), length)
        file.seek(length, 1)
    return content, places, swapped


class _Bounded:
    """A file that refuses to be asked for more than it has, before memory is taken for it."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise DamagedPickleError(f"it claims {count} bytes where {self._size} are left")
        return self._file.read(count)


# Those that push what stands behind them in the file: numbers, texts and bytes. By name, so that
# no later Python adds to them.
_CONSTANTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip
_COLLECTIONS: dict[str, Callable[..., Any]] = {
    "list": list, "tuple": tuple, "torch.Size": tuple, "set": set, "frozenset": frozenset,
}  # fmt: skip
# Subclasses of Tensor that hold their numbers as they are. Others may pack or quantise them.
_PLAIN_TENSORS = {
    "torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
}  # fmt: skip


class _Machine:
    """The stack machine.

    Attributes:
        allowance: how many values may still be copied. An honest file has each part copied once,
            a small hostile one the same part a million times.
    """

    def __init__(self, size: int, storages: dict[str, StorageRecord], nested: bool) -> None:
        self.storages, self.nested, self.embedded = storages, nested, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.allowance = 4 * size + 10_000

    def step(self, opcode: str, argument: Any) -> None:
        """Follow one instruction; ``argument`` is what stands behind it in the file."""
        stack = self.stack
        match opcode:
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[argument])
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case _ if opcode in _CONSTANTS:
                stack.append(_harmless(argument))
            case _ if opcode in _EMPTY:
                stack.append(_EMPTY[opcode]())
            case "MARK":
                self.marks.append(len(stack))
            case "POP" if self.marks and self.marks[-1] == len(stack):
                self.marks.pop()  # as Python's own machine lets it
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.above_mark()
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE":
                stack.append(tuple(self.above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.take(int(opcode[-1]))))
            case "LIST":
                stack.append(self.above_mark())
            case "DICT":
                stack.append(_set_pairs({}, self.above_mark()))
            case "FROZENSET":
                stack.append(frozenset(map(_key, self.above_mark())))
            case "APPEND" | "APPENDS":
                values = self.take(1) if opcode == "APPEND" else self.above_mark()
                _list_of(stack[-1]).extend(values)
            case "SETITEM" | "SETITEMS":
                values = self.take(2) if opcode == "SETITEM" else self.above_mark()
                _set_pairs(stack[-1], values)
            case "ADDITEMS":
                values = self.above_mark()
                if isinstance(stack[-1], Made):
                    _list_of(stack[-1]).extend(values)
                else:
                    stack[-1].update(map(_key, values))
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(*self.take(2)))
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(Name("copyreg", f"extension {argument}"))
            case "REDUCE" | "NEWOBJ":
                stack.append(self.call(*self.take(2)))
            case "NEWOBJ_EX":
                maker, arguments, names = self.take(3)
                stack.append(Made(maker, arguments) if names else self.call(maker, arguments))
            case "OBJ":
                maker, *rest = self.above_mark()
                stack.append(self.call(maker, tuple(rest)))
            case "INST":
                maker = _name(*argument.split(" ", 1))
                stack.append(self.call(maker, tuple(self.above_mark())))
            case "BUILD":
                state = stack.pop()
                # Attributes of anything else, such as a state dict's `_metadata`, are not needed.
                if isinstance(stack[-1], Made):
                    stack[-1].state = state
            case "PERSID" | "BINPERSID":
                found = _persistent(argument if opcode == "PERSID" else stack.pop())
                if isinstance(found, StorageRecord):
                    self.storages.setdefault(found.key, found)
                stack.append(found)
            case "PROTO" | "FRAME":
                pass
            case _:  # NEXT_BUFFER, READONLY_BUFFER
                raise DamagedPickleError("part of it is stored outside of it")

    def above_mark(self) -> list[Any]:
        """Take what was put on the stack since the last mark."""
        return self.take(len(self.stack) - self.marks.pop())

    def take(self, count: int) -> list[Any]:
        """Take the last values from the stack."""
        if not 0 <= count <= len(self.stack):
            raise IndexError
        start = len(self.stack) - count
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def spend(self, amount: int) -> None:
        """Count values that are copied."""
        self.allowance -= amount
        if self.allowance < 0:
            raise DamagedPickleError("its pickle copies the same part again and again")

    def call(self, maker: Any, arguments: Any) -> Any:
        """What the call makes if it is one of those known here, else a record of it."""
        made = None
        if isinstance(maker, Name) and isinstance(arguments, tuple):
            made = self.known(str(maker), arguments)
        return Made(maker, arguments) if made is None else made

    def known(self, maker: str, arguments: tuple[Any, ...]) -> Any:
        """What a call of a known name makes; None for a name or arguments not known here."""
        match maker, arguments:
            case ("dict" | "collections.OrderedDict", ()) | ("collections.defaultdict", () | (_,)):
                return {}
            case ("dict" | "collections.OrderedDict", (dict() | list() as pairs,)) | (
                "collections.defaultdict",
                (_, dict() | list() as pairs),
            ):
                self.spend(len(pairs))
                items = pairs.items() if isinstance(pairs, dict) else pairs
                return {_key(key): value for key, value in items}
            case _, () | (list() | tuple() | set() | frozenset(),) if maker in _COLLECTIONS:
                values = arguments[0] if arguments else ()
                self.spend(len(values))
                hashed = maker in ("set", "frozenset")
                return _COLLECTIONS[maker](map(_key, values) if hashed else values)
            # Protocol 2 has no bytes: text, and the encoding that makes bytes of it.
            case (
                "_codecs.encode" | "bytes" | "bytearray",
                (str() as text, "latin1" | "latin-1"),
            ):
                self.spend(len(text))
                return text.encode("latin-1")
            case "bytes" | "bytearray", () | (bytes() | bytearray(),):
                data = arguments[0] if arguments else b""
                self.spend(len(data))
                return bytes(data)
            # What pickle alone makes of a tensor: its storage as a whole file of PyTorch's.
            case "torch.storage._load_from_bytes", (bytes() | bytearray() as data,):
                return None if self.nested else self.storage_in(data)
            case (
                "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
                (StorageRecord() as storage, offset, shape, stride, *rest),
            ):
                return _tensor(storage, storage.dtype, offset, shape, stride, *rest[2:3])
            case (
                "torch._utils._rebuild_tensor_v3",
                (StorageRecord() as storage, offset, shape, stride, _, _, Name() as kind, *rest),
            ):
                return _tensor(storage, DTYPES.get(kind.name), offset, shape, stride, *rest[:1])
            case (
                "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
                (TensorRecord() as tensor, *_),
            ):
                return tensor
            case "torch._tensor._rebuild_from_type_v2", (rebuild, Name() as kind, inner, _):
                made = self.call(rebuild, inner) if str(kind) in _PLAIN_TENSORS else None
                return made if isinstance(made, TensorRecord) else None
        return None

    def storage_in(self, data: bytes | bytearray) -> StorageRecord | None:
        """The storage that a file of PyTorch's holds; None if it holds anything else."""
        found, places, swapped = unpickle_with_storages(BytesIO(data), len(data), nested=True)
        if not isinstance(found, StorageRecord) or found.key not in places:
            return None
        place, length = places[found.key]
        self.embedded += 1
        content = memoryview(data)[place : place + length]
        return replace(found, key=f"embedded {self.embedded}", content=content, swapped=swapped)


def _harmless(constant: Any) -> Any:
    """A constant, unless printing or encoding it would fail."""
    if isinstance(constant, str):
        return printable(constant)
    if isinstance(constant, int) and constant.bit_length() > MAX_INTEGER_BITS:
        return Made(Name("builtins", "int"))
    return constant


def _list_of(target: Any) -> list[Any]:
    if isinstance(target, Made):
        target.items = target.items or []
        return target.items
    if not isinstance(target, list):
        raise TypeError
    return target


def _set_pairs(target: Any, flat: list[Any]) -> Any:
    """``target`` with the keys and values that stand one after another in ``flat``."""
    pairs = target
    if isinstance(target, Made):
        pairs = target.pairs = target.pairs or {}
    if not isinstance(pairs, dict):
        raise TypeError
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        pairs[_key(key)] = value
    return target


def _key(key: Any) -> Any:
    """A key that is quick to hash: nested tuples and huge numbers can take forever."""
    left, parts = [key], 0
    while left:
        part = left.pop()
        parts += 1
        if isinstance(part, (tuple, frozenset)):
            left.extend(part)
        if parts + len(left) > MAX_KEY_PARTS:
            raise DamagedPickleError("a dict in it has keys of a thousand parts")
        if isinstance(part, int) and part.bit_length() > 64:
            raise DamagedPickleError("a dict in it has a number of more than 64 bits as a key")
    return key


def _tensor(
    storage: StorageRecord,
    dtype: torch.dtype | None,
    offset: Any,
    shape: Any,
    stride: Any,
    metadata: Any = None,
) -> TensorRecord | None:
    """The record of a tensor; None for a view that negates or conjugates (``metadata``)."""
    if metadata or dtype is None or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        return None
    fits = len(shape) == len(stride) <= MAX_DIMENSIONS
    if not fits or not all(map(_is_count, (offset, *shape, *stride))):
        return None
    if math.prod(n or 1 for n in shape) > MAX_ELEMENTS:
        return None
    return TensorRecord(storage, dtype, offset + storage.shift, shape, stride)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_ELEMENTS


def _persistent(identity: Any) -> Any:
    """What torch keeps outside the pickle: a storage, or the source of a class."""
    match identity:
        case ("storage", kind, key, _, elements, *rest):
            dtype = _STORAGES.get(kind.name, 0) if isinstance(kind, Name) else 0
            shift = rest[0][1] if rest and rest[0] is not None else 0
            if dtype == 0 or not _is_count(elements) or not _is_count(shift):
                return Made(Name("torch", f"storage of {kind}"))
            return StorageRecord(str(key), dtype, shift)  # type: ignore[arg-type]
        case ("module", source, *_):
            return source
        case _:
            return Made(Name("pickle", "persistent object"))


# What Python would run these for is never what a checkpoint needs them for. They are not run here
# in any case; a file that names them is refused so that its owner learns what he holds.
_SYSTEM = {
    "_ctypes", "_io", "_posixsubprocess", "_socket", "_thread", "ctypes", "ftplib", "importlib",
    "io", "nt", "os", "pdb", "pip", "posix", "pty", "runpy", "shutil", "signal", "smtplib",
    "socket", "subprocess", "sys", "tempfile", "urllib", "webbrowser",
}  # fmt: skip
_RUNS = {
    "__import__", "breakpoint", "compile", "delattr", "eval", "exec", "execfile", "exit", "file",
    "globals", "input", "locals", "open", "quit", "raw_input", "reload", "setattr", "vars",
}  # fmt: skip
_DATA_OF_SYSTEM = {
    "BytesIO", "StringIO", "_Environ", "environ", "stat_result", "terminal_size", "uname_result",
    "CompletedProcess",
}  # fmt: skip


def _name(module: str, name: str = "") -> Name:
    root, first = module.partition(".")[0], name.partition(".")[0]
    builtin = root in ("builtins", "__builtin__")
    if (builtin and first in _RUNS) or (root in _SYSTEM and name not in _DATA_OF_SYSTEM):
        raise HostilePickleError(str(Name(module, name)))
    return Name(module, name)


# What a reader does with the records


def as_array(value: Any) -> np.ndarray[Any, Any] | None:
    """The booleans, integers or floats of a pickled numpy array or scalar; None for all else."""
    if not isinstance(value, Made) or not isinstance(value.maker, Name):
        return None
    if not value.maker.module.startswith("numpy."):
        return None
    shape: Any = ()
    fortran: Any = False
    match value.maker.name, value.arguments, value.state:
        case "_reconstruct", tuple(), (_, shape, kind, fortran, content):
            pass
        case "_frombuffer", (content, kind, shape, order), _:
            fortran = order == "F"
        case "scalar", (kind, content), _:
            pass
        case _:
            return None
    dtype = _dtype(kind)
    if dtype is None or not isinstance(content, (bytes, bytearray)):
        return None
    try:
        return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
    except (TypeError, ValueError, OverflowError):
        return None


def _dtype(value: Any) -> np.dtype[Any] | None:
    """A pickled numpy dtype: its short name, e.g. ``f8``, and its byte order in the state."""
    if not isinstance(value, Made) or str(value.maker) != "numpy.dtype":
        return None
    match value.arguments, value.state:
        case (str() as name, *_), (_, order, *_):
            pass
        case (str() as name, *_), _:
            order = "|"
        case _:
            return None
    if len(name) > 3 or order not in ("<", ">", "|", "="):
        return None
    try:
        dtype = np.dtype(f"{order}{name}")
    except (TypeError, ValueError):
        return None
    return dtype if dtype.kind in "biuf" else None


MAX_DEPTH = 50
MAX_VALUES = 200_000


def plain(value: Any) -> Any:
    """``value`` with numpy's numbers as numbers and lists, and everything that is code as None.

    Subclasses of dict and list come out as these. What is nested deeper than 50 levels or comes
    after 200,000 values is None, so a small file cannot make this run long.
    """
    left = MAX_VALUES

    def of(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if isinstance(value, (str, int, float, bytes, bytearray, type(None))):
            return value
        if depth > MAX_DEPTH or left < 0:
            return None
        array = as_array(value)
        if array is not None:
            left -= array.size
            return array.tolist() if left >= 0 else None
        if isinstance(value, Made):
            value = value.pairs or value.items or None
        if isinstance(value, dict):
            named = ((k, v) for k, v in value.items() if isinstance(k, (str, int, float)))
            return {key: of(item, depth + 1) for key, item in named}
        if isinstance(value, (list, tuple, set, frozenset)):
            items = [of(item, depth + 1) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        return None

    return of(value, 0)


def as_mapping(value: Any) -> dict[Any, Any] | None:
    """A dict, or the items of what would be a subclass of one; None for all else."""
    if isinstance(value, Made) and value.pairs:
        return value.pairs
    return value if isinstance(value, dict) else None


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor, the record of one, or a pickled numpy array."""
    return isinstance(value, (torch.Tensor, TensorRecord)) or as_array(value) is not None


def tensors_in(value: Any, seen: set[int] | None = None) -> bool:
    """Whether there is a tensor or an array anywhere in ``value``.

    Of objects whose ids are ``seen`` it is known that there is none; those of ``value`` are added.
    """
    return any(
        is_tensor(part)
        or isinstance(part, StorageRecord)
        or (isinstance(part, Name) and part.module == "torch._utils")  # rebuilds one without data
        for part in _parts(value, set() if seen is None else seen)
    )


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """``value`` and all that is in it, each once, but for what is ``seen``."""
    left = [value]
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, Made):
            left += (part.maker, part.arguments, part.state, part.items, part.pairs)
        elif isinstance(part, dict):
            left += part.values()
        elif isinstance(part, (list, tuple, set, frozenset)):
            left += part


def describe(value: Any) -> str:
    """What ``value`` is, in words for an error message."""
    if isinstance(value, TensorRecord):
        return "a single tensor"
    if value is None:
        return "nothing"
    if isinstance(value, Made):
        return f"code's ({value})" if str(value) == "code" else f"an object of {value}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


# Why weights are refused that only running code would make

_DENSE = "Expected dense weights; save the network before quantising or pruning it."
# What torch's own functions would have rebuilt, and other tensors that are no plain numbers.
_FOREIGN = (
    ("_rebuild_sparse", "is a sparse tensor", _DENSE),
    ("_rebuild_qtensor", "is a quantised tensor", _DENSE),
    ("torchao.", "is a tensor quantised by torchao", _DENSE),
    ("bitsandbytes.", "is a tensor quantised by bitsandbytes", _DENSE),
    ("_rebuild_nested", "is a nested tensor", _DENSE),
    (
        "_rebuild_meta",
        "has a shape but no data (a `meta` tensor)",
        "Save the network after its weights were loaded.",
    ),
    (
        "torch.distributed.",
        "is one process's piece of a sharded tensor (FSDP2's DTensor)",
        "Gather before saving: torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
        "options=StateDictOptions(full_state_dict=True, cpu_offload=True)).",
    ),
)


def refusal_of_code(path: Path, name: Any, value: Made) -> CheckpointError:
    """The error for weights, under ``name`` in the file, that only running code would make."""
    makers = [str(part) for part in islice(_parts(value, set()), 10_000) if isinstance(part, Name)]
    for mark, what, remedy in _FOREIGN:
        if any(mark in maker for maker in makers):
            return CheckpointError(f"{path}: {name} {what}. {remedy}")
    state = as_mapping(value.state) or {}
    if "_modules" in state or "_parameters" in state:
        return CheckpointError(
            f"{path}: {name} is a whole network, pickled as code ({value}). Checkpoints are read "
            "without running code. Where its code is, load it and save its weights alone: "
            "torch.save(network.state_dict(), path)."
        )
    return CheckpointError(
        f"{path}: {name} is made by {value}, which is code and not weights. Checkpoints are read "
        "without running code. If you trust the file, load it where it was written and save plain "
        "tensors: torch.save(network.state_dict(), path)."
    )
