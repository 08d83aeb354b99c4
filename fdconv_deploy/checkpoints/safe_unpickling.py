"""Pickles read as data: no name in a file is imported, and nothing is called.

A pickle is a program for a small stack machine. Python's own machine imports what the program
names and calls it. :func:`unpickle` runs the same program (decoded by the standard library's
:mod:`pickletools`) and puts a record where Python would put an object: a :class:`Name` for a
class or function, a :class:`Made` for what a call would have returned. Only plain containers and
the description of a tensor (:class:`TensorRecord`) are made for real, by the code below.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch

from fdconv_deploy.checkpoints.config_parser import printable

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
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": None,
}


class DamagedPickleError(ValueError):
    """The program ends early or does what no pickler writes."""


class HostilePickleError(ValueError):
    """The program names code that runs commands or programs; the argument is its name."""


@dataclass(frozen=True, eq=False)
class Name:
    """A class or function that a file names. Stands for it; nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        builtin = self.module in ("builtins", "__builtin__")
        return self.name if builtin else f"{self.module}.{self.name}"


class Made:
    """What a call in a file would have made: who would have been called, and with what.

    Attributes:
        maker: a :class:`Name`, or whatever else the program would have called.
        arguments: of the call.
        state: what the object would have been given afterwards.
    """

    # A small file can have a hundred thousand of them, so none is larger than it must be.
    __slots__ = ("_items", "_pairs", "arguments", "maker", "state")

    def __init__(self, maker: Any, arguments: Any = ()) -> None:
        self.maker, self.arguments = maker, arguments
        self.state: Any = None
        self._items: list[Any] | None = None
        self._pairs: dict[Any, Any] | None = None

    @property
    def items(self) -> list[Any]:
        """What would have been appended to it, if it is a list's kind."""
        if self._items is None:
            self._items = []
        return self._items

    @property
    def pairs(self) -> dict[Any, Any]:
        """What would have been set in it, if it is a dict's kind."""
        if self._pairs is None:
            self._pairs = {}
        return self._pairs

    def __str__(self) -> str:
        maker = self.maker
        for _ in range(8):  # a method of an object: the object's class tells more
            if not isinstance(maker, Made):
                break
            maker = maker.maker
        return str(maker) if isinstance(maker, Name) else "code"


@dataclass(frozen=True)
class StorageRecord:
    """Where a tensor's numbers stand in the file.

    ``dtype`` is None for bytes that the tensor gives a dtype to. ``shift`` is the element of the
    storage at which this part of it begins, which only old files have.
    """

    key: str
    dtype: torch.dtype | None
    elements: int
    shift: int = 0


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


def unpickle(file: IO[bytes], size: int, storages: dict[str, StorageRecord] | None = None) -> Any:
    """The object that the pickle at ``file``'s position describes.

    The file is left behind the pickle's last byte.

    Args:
        file: open for reading.
        size: bytes that are left in it, which no length in the pickle may exceed.
        storages: filled with the storages it names, by their keys.

    Raises:
        DamagedPickleError: it is cut, or is no pickle.
        HostilePickleError: it names code that runs commands or programs.
    """
    return _Machine(size, storages).run(file, size)


class _Bounded:
    """A file that refuses to be asked for more than it has, before memory is taken for it."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise DamagedPickleError(f"it claims {count} bytes where {self._size} are left")
        return self._file.read(count)


class _Machine:
    """The stack machine. One method per opcode that is more than a constant."""

    def __init__(self, size: int, storages: dict[str, StorageRecord] | None = None) -> None:
        self.storages = {} if storages is None else storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        # Copies of what was read. An honest file has each part copied once, a small hostile
        # one the same part a million times.
        self.allowance = 4 * size + 10_000

    def run(self, file: IO[bytes], size: int) -> Any:
        steps = pickletools.genops(_Bounded(file, size))  # type: ignore[arg-type]
        try:
            for count, (opcode, argument, _) in enumerate(steps):
                name = opcode.name
                if name == "STOP":
                    return self.stack.pop()
                if count >= MAX_OPCODES:
                    raise DamagedPickleError(f"its pickle has more than {MAX_OPCODES} steps")
                if name in _CONSTANTS:
                    self.stack.append(_harmless(argument))
                elif name in _SINGLE:
                    self.stack.append(_SINGLE[name])
                elif name in _EMPTY:
                    self.stack.append(_EMPTY[name]())
                elif name not in ("PROTO", "FRAME"):
                    _STEPS[name](self, argument)
        except (DamagedPickleError, HostilePickleError):
            raise
        except (IndexError, KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
            # What the steps below do with a stack that no pickler leaves behind.
            raise DamagedPickleError(f"its pickle is not whole ({type(e).__name__})") from None
        raise DamagedPickleError("its pickle has no end")

    def spend(self, amount: int) -> None:
        self.allowance -= amount
        if self.allowance < 0:
            raise DamagedPickleError("its pickle copies the same part again and again")

    # The stack

    def above_mark(self) -> list[Any]:
        mark = self.marks.pop()
        found = self.stack[mark:]
        del self.stack[mark:]
        return found

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def pop(self, _: Any) -> None:
        # Python's own machine lets POP take a mark as well.
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def pop_mark(self, _: Any) -> None:
        self.above_mark()

    def dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    # Containers

    def build_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.above_mark()))

    def small_tuple(self, length: int) -> None:
        parts = tuple(self.stack[-length:])
        if len(parts) < length:
            raise IndexError
        del self.stack[-length:]
        self.stack.append(parts)

    def build_list(self, _: Any) -> None:
        self.stack.append(self.above_mark())

    def build_dict(self, _: Any) -> None:
        made: dict[Any, Any] = {}
        _set_pairs(made, self.above_mark())
        self.stack.append(made)

    def build_frozenset(self, _: Any) -> None:
        self.stack.append(frozenset(map(_key, self.above_mark())))

    def append(self, _: Any) -> None:
        value = self.stack.pop()
        _list_of(self.stack[-1]).append(value)

    def appends(self, _: Any) -> None:
        values = self.above_mark()
        _list_of(self.stack[-1]).extend(values)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_pairs(self.stack[-1], [key, value])

    def set_items(self, _: Any) -> None:
        values = self.above_mark()
        _set_pairs(self.stack[-1], values)

    def add_items(self, _: Any) -> None:
        values = self.above_mark()
        target = self.stack[-1]
        if isinstance(target, Made):
            target.items.extend(values)
        else:
            target.update(map(_key, values))

    # Names and calls

    def name(self, argument: str) -> None:
        self.stack.append(_name(*argument.split(" ", 1)))

    def stack_name(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError
        self.stack.append(_name(module, name))

    def extension(self, code: int) -> None:
        self.stack.append(Name("copyreg", f"extension {code}"))

    def reduce(self, _: Any) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(maker, arguments))

    def new_object_with_names(self, _: Any) -> None:
        names, arguments, maker = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(maker, arguments) if not names else Made(maker, arguments))

    def object(self, _: Any) -> None:
        maker, *arguments = self.above_mark()
        self.stack.append(self.call(maker, tuple(arguments)))

    def instance(self, argument: str) -> None:
        arguments = tuple(self.above_mark())
        self.stack.append(self.call(_name(*argument.split(" ", 1)), arguments))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        # Attributes of anything else, such as a state dict's `_metadata`, are not needed.
        if isinstance(target, Made):
            target.state = state

    def persistent(self, _: Any) -> None:
        found = _persistent(self.stack.pop())
        if isinstance(found, StorageRecord):
            self.storages.setdefault(found.key, found)
        self.stack.append(found)

    def refuse(self, _: Any) -> None:
        raise DamagedPickleError("part of it is stored outside of it")

    def call(self, maker: Any, arguments: Any) -> Any:
        """What the call makes if it is one of those known here, else a record of it."""
        if isinstance(maker, Name) and isinstance(arguments, tuple):
            known = _KNOWN.get((maker.module, maker.name))
            made = None if known is None else known(self, arguments)
            if made is not None:
                return made
        return Made(maker, arguments)


def _harmless(constant: Any) -> Any:
    """A constant, unless printing or encoding it would fail."""
    if isinstance(constant, str):
        return printable(constant)
    if isinstance(constant, int) and constant.bit_length() > MAX_INTEGER_BITS:
        return Made(Name("builtins", "int"))
    return constant


def _list_of(target: Any) -> list[Any]:
    if isinstance(target, Made):
        return target.items
    if not isinstance(target, list):
        raise TypeError
    return target


def _set_pairs(target: Any, flat: list[Any]) -> None:
    pairs = target.pairs if isinstance(target, Made) else target
    if not isinstance(pairs, dict) or len(flat) % 2:
        raise TypeError
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        pairs[_key(key)] = value


def _key(key: Any) -> Any:
    """A key that is quick to hash: nested tuples and huge numbers can take for ever."""
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


def _persistent(identity: Any) -> Any:
    """What torch keeps outside the pickle: a storage, or the source of a class."""
    if isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage":
        _, kind, key, _, elements, *rest = identity
        dtype = _STORAGES.get(kind.name, 0) if isinstance(kind, Name) else 0
        view = rest[0] if rest else None
        shift = 0 if view is None else view[1]
        if dtype == 0 or not _is_count(elements) or not _is_count(shift):
            return Made(Name("torch", f"storage of {kind}"))
        return StorageRecord(str(key), dtype, elements, shift)  # type: ignore[arg-type]
    if isinstance(identity, tuple) and len(identity) > 1 and identity[0] == "module":
        return identity[1]
    return Made(Name("pickle", "persistent object"))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_ELEMENTS


# Each takes the machine and the call's arguments, and gives None for arguments it does not know.


def _pairs_to_dict(machine: _Machine, arguments: tuple[Any, ...]) -> Any:
    if not arguments:
        return {}
    if len(arguments) > 1 or not isinstance(arguments[0], (list, dict)):
        return None
    pairs = arguments[0].items() if isinstance(arguments[0], dict) else arguments[0]
    machine.spend(len(pairs))
    made: dict[Any, Any] = {}
    for key, value in pairs:
        made[_key(key)] = value
    return made


def _default_dict(machine: _Machine, arguments: tuple[Any, ...]) -> Any:
    return _pairs_to_dict(machine, arguments[1:])


def _collection(kind: Callable[..., Any]) -> Callable[[_Machine, tuple[Any, ...]], Any]:
    def build(machine: _Machine, arguments: tuple[Any, ...]) -> Any:
        if not arguments:
            return kind()
        if len(arguments) > 1 or not isinstance(arguments[0], (list, tuple, set, frozenset)):
            return None
        machine.spend(len(arguments[0]))
        hashed = kind in (set, frozenset)
        return kind(map(_key, arguments[0])) if hashed else kind(arguments[0])

    return build


def _encode(machine: _Machine, arguments: tuple[Any, ...]) -> bytes | None:
    """Bytes in protocol 2, which has none: text and the encoding that makes bytes of it."""
    if len(arguments) != 2 or not isinstance(arguments[0], str):
        return None
    if arguments[1] not in ("latin1", "latin-1"):
        return None
    machine.spend(len(arguments[0]))
    return arguments[0].encode("latin-1")


def _bytes(machine: _Machine, arguments: tuple[Any, ...]) -> bytes | None:
    if len(arguments) == 1 and isinstance(arguments[0], (bytes, bytearray)):
        machine.spend(len(arguments[0]))
        return bytes(arguments[0])
    return _encode(machine, arguments) if arguments else b""


def _tensor(_: _Machine, arguments: tuple[Any, ...]) -> TensorRecord | None:
    return _tensor_record(arguments, None, arguments[6:7])


def _typed_tensor(_: _Machine, arguments: tuple[Any, ...]) -> TensorRecord | None:
    if len(arguments) < 7 or not isinstance(arguments[6], Name):
        return None
    dtype = DTYPES.get(arguments[6].name)
    return None if dtype is None else _tensor_record(arguments, dtype, arguments[7:8])


def _tensor_record(
    arguments: tuple[Any, ...], dtype: torch.dtype | None, metadata: tuple[Any, ...]
) -> TensorRecord | None:
    if len(arguments) < 4 or (metadata and metadata[0]):  # metadata: a view negates or conjugates
        return None
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, StorageRecord) or not _is_count(offset):
        return None
    for counts in (shape, stride):
        if not isinstance(counts, tuple) or not all(map(_is_count, counts)):
            return None
    dtype = dtype or storage.dtype
    if dtype is None or len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        return None
    if math.prod(n or 1 for n in shape) > MAX_ELEMENTS:
        return None
    return TensorRecord(storage, dtype, offset + storage.shift, shape, stride)


def _parameter(_: _Machine, arguments: tuple[Any, ...]) -> TensorRecord | None:
    return arguments[0] if arguments and isinstance(arguments[0], TensorRecord) else None


# Subclasses of Tensor that hold their numbers as they are. Others may pack or quantise them.
_PLAIN_TENSORS = {
    ("torch", "Tensor"),
    ("torch._tensor", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.nn.parameter", "Buffer"),
}


def _subclass(machine: _Machine, arguments: tuple[Any, ...]) -> Any:
    if len(arguments) != 4 or not isinstance(arguments[1], Name):
        return None
    rebuild, kind, inner, _ = arguments
    if (kind.module, kind.name) not in _PLAIN_TENSORS:
        return None
    made = machine.call(rebuild, inner)
    return made if isinstance(made, TensorRecord) else None


_KNOWN: dict[tuple[str, str], Callable[[_Machine, tuple[Any, ...]], Any]] = {
    ("collections", "OrderedDict"): _pairs_to_dict,
    ("collections", "defaultdict"): _default_dict,
    ("torch", "Size"): _collection(tuple),
    ("_codecs", "encode"): _encode,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _subclass,
}
for _module in ("builtins", "__builtin__"):
    _KNOWN |= {
        (_module, "dict"): _pairs_to_dict,
        (_module, "list"): _collection(list),
        (_module, "tuple"): _collection(tuple),
        (_module, "set"): _collection(set),
        (_module, "frozenset"): _collection(frozenset),
        (_module, "bytes"): _bytes,
        (_module, "bytearray"): _bytes,
    }

_CONSTANTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_SINGLE = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.dup,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "TUPLE": _Machine.build_tuple,
    "TUPLE1": lambda machine, _: machine.small_tuple(1),
    "TUPLE2": lambda machine, _: machine.small_tuple(2),
    "TUPLE3": lambda machine, _: machine.small_tuple(3),
    "LIST": _Machine.build_list,
    "DICT": _Machine.build_dict,
    "FROZENSET": _Machine.build_frozenset,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "EXT1": _Machine.extension,
    "EXT2": _Machine.extension,
    "EXT4": _Machine.extension,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_object_with_names,
    "OBJ": _Machine.object,
    "INST": _Machine.instance,
    "BUILD": _Machine.build,
    "PERSID": lambda machine, identity: machine.stack.append(_persistent(identity)),
    "BINPERSID": _Machine.persistent,
    "NEXT_BUFFER": _Machine.refuse,
    "READONLY_BUFFER": _Machine.refuse,
}


# numpy's arrays


def as_array(value: Any) -> np.ndarray[Any, Any] | None:
    """The booleans, integers or floats of a pickled numpy array or scalar; None for all else."""
    if not isinstance(value, Made) or not isinstance(value.maker, Name):
        return None
    name, arguments, state = value.maker.name, value.arguments, value.state
    if not value.maker.module.startswith("numpy.") or not isinstance(arguments, tuple):
        return None
    shape: Any = ()
    fortran: Any = False
    if name == "_reconstruct" and isinstance(state, tuple) and len(state) == 5:
        _, shape, kind, fortran, content = state
    elif name == "_frombuffer" and len(arguments) == 4:
        content, kind, shape, order = arguments
        fortran = order == "F"
    elif name == "scalar" and len(arguments) == 2:
        kind, content = arguments
    else:
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
    arguments, state = value.arguments, value.state
    name = arguments[0] if isinstance(arguments, tuple) and arguments else None
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"
    if not isinstance(name, str) or len(name) > 3 or order not in ("<", ">", "|", "="):
        return None
    try:
        dtype = np.dtype(f"{order}{name}")
    except (TypeError, ValueError):
        return None
    return dtype if dtype.kind in "biuf" else None


# What a reader does with the records

MAX_DEPTH = 50
MAX_VALUES = 200_000


def plain(value: Any) -> Any:
    """``value`` with numpy's numbers as numbers and lists, and everything that is code as None.

    Subclasses of dict and list come out as these. What is nested deeper than 50 levels or comes
    after 200,000 values is None, so a small file cannot make this run long.
    """
    return _Plain().of(value, 0)


class _Plain:
    def __init__(self) -> None:
        self.left = MAX_VALUES

    def of(self, value: Any, depth: int) -> Any:
        self.left -= 1
        if isinstance(value, (str, int, float, bytes, bytearray, type(None))):
            return value
        if depth > MAX_DEPTH or self.left < 0:
            return None
        array = as_array(value)
        if array is not None:
            self.left -= array.size
            return array.tolist() if self.left >= 0 else None
        if isinstance(value, Made):
            value = value.pairs or value.items or None
        if isinstance(value, dict):
            return {
                key: self.of(item, depth + 1)
                for key, item in value.items()
                if isinstance(key, (str, int, float))
            }
        if isinstance(value, (list, tuple)):
            return type(value)(self.of(item, depth + 1) for item in value)
        if isinstance(value, (set, frozenset)):
            return [self.of(item, depth + 1) for item in value]
        return None


def as_mapping(value: Any) -> dict[Any, Any] | None:
    """A dict, or the items of what would be a subclass of one; None for all else."""
    if isinstance(value, Made) and value.pairs:
        return value.pairs
    return value if isinstance(value, dict) else None


def tensors_in(value: Any, seen: set[int] | None = None) -> bool:
    """Whether there is a tensor or an array anywhere in ``value``.

    ``seen``: ids of objects in which there is none; those of ``value`` are added to them.
    """
    left, seen = [value], set() if seen is None else seen
    while left:
        part = left.pop()
        if isinstance(part, (TensorRecord, StorageRecord)) or as_array(part) is not None:
            return True
        if isinstance(part, Name) and part.module == "torch._utils":  # rebuilds one without data
            return True
        if id(part) in seen:
            continue
        seen.add(id(part))
        left.extend(_inside(part))
    return False


def _inside(part: Any) -> Iterator[Any]:
    if isinstance(part, Made):
        yield from (part.maker, part.arguments, part.state, part.items, part.pairs)
    elif isinstance(part, dict):
        yield from part.values()
    elif isinstance(part, (list, tuple, set, frozenset)):
        yield from part


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
