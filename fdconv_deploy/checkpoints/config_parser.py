"""Configs of mmcv and mmengine, read without running them.

Both write the whole config into their checkpoints as Python source (``meta["config"]``,
``meta["cfg"]``). Running it would run whatever a stranger put there, so it is parsed:
literals, ``dict(...)`` calls, earlier names and simple arithmetic are evaluated, and
anything else is reported as unreadable.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fdconv_deploy.errors import CheckpointError

MAX_BYTES = 4 << 20
MAX_DEPTH = 60
MAX_ITEMS = 100_000
MAX_NUMBER = 2**63
_GIANT = "a number of more than 64 bits"
_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"
_OTHER_FILE = "a {{…}} reference to another file"

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_CALLS: dict[str, Callable[..., Any]] = {"list": list, "tuple": tuple, "int": int, "float": float}


@dataclass(frozen=True)
class Unreadable:
    """A value that could not be read: ``reason`` says why, ``line`` the line it is on."""

    reason: str
    line: int


class _ImportedName(str):
    """A class a config imports, by its dotted name: mmengine writes types this way."""

    __slots__ = ()


class _UnreadableError(Exception):
    """Why an expression, or an inner one that it depends on, could not be read."""


UNSET: Any = object()


class Section(dict[str, Any]):
    """A dict in a config; empty in place of what is none."""

    def __init__(self, values: Any = None) -> None:
        super().__init__(values if isinstance(values, Mapping) else {})

    @property
    def type(self) -> str:
        """Its ``type`` without the module; empty if it is not there."""
        value = self.get("type")
        return value.rpartition(".")[2] if isinstance(value, str) else ""

    def section(self, *path: str) -> Section:
        """The dict at ``path``, e.g. ``("model", "backbone")``; empty if there is none."""
        found = self
        for name in path:
            found = Section(found.get(name))
        return found

    def stated(self, *names: str) -> Any:
        """The value under the first of ``names`` there is; UNSET if none could be read.

        A name may be a dotted path to an inner section's entry.
        """
        for path in names:
            *inner, name = path.split(".")
            owner = self.section(*inner)
            if name in owner:
                value = owner[name]
                entries = value if isinstance(value, (list, tuple)) else (value,)
                return UNSET if any(isinstance(entry, Unreadable) for entry in entries) else value
        return UNSET

    def refuse_others(self, name: str, *types: str, **expected: Any) -> None:
        """Refuse another type than ``types``, and settings of what is built in one way only.

        ``name`` is what an error calls this section.
        """
        if types and self.type and self.type not in types:
            raise CheckpointError(
                f"The config's {name} is a {self.type}. Expected {' or '.join(types)}; others are "
                "not supported yet."
            )
        for setting, only in expected.items():
            value = self.stated(setting)
            if value is not UNSET and value != only:
                raise CheckpointError(
                    f"The config's {name} has {setting}={str(value)[:60]}. Expected {only!r}; "
                    "anything else is not supported yet."
                )


@dataclass(frozen=True)
class Config:
    """A config's values, and sentences about what of it could not be read.

    Values are Python literals; a value that needs code is :class:`Unreadable`.
    """

    values: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def section(self, *path: str) -> Section:
        """As :meth:`Section.section`."""
        return Section(self.values).section(*path)


def config_of(meta: Mapping[str, Any]) -> Config | None:
    """The config a checkpoint's ``meta`` carries, or None if it carries none."""
    for name in ("cfg", "config"):
        value = meta.get(name)
        if isinstance(value, dict):
            return given_config(value, f"meta[{name!r}]")
        if isinstance(value, str) and value.strip():
            return parse_config(value, name=f"meta[{name!r}]")
    return None


def parse_config(text: str, name: str = "the config") -> Config:
    """Read config text: Python source, or a JSON object.

    Nothing is executed. What cannot be read becomes a note, never a guess.

    Raises:
        CheckpointError: the text is larger than 4 MiB or is JSON that is not an object.
    """
    check_size(len(text), name)
    if text.lstrip().startswith("{"):
        return parse_json(text, name)
    reader = _Reader(name)
    for statement in _statements(text, reader):
        reader.read(statement)
    values = {k: v for k, v in reader.names.items() if not isinstance(v, _ImportedName)}
    return Config(values, tuple(dict.fromkeys([*reader.notes, *_unreadable(values, name)])))


def check_size(size: int, name: str) -> None:
    """Refuse what is larger than any config."""
    if size > MAX_BYTES:
        raise CheckpointError(f"{name} is larger than {MAX_BYTES >> 20} MiB: not a config's text.")


def printable(value: Any) -> Any:
    """``value`` with the lone surrogates of its texts replaced: no terminal or file takes them.

    They come from escapes of half a character, which JSON and Python take.
    """
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [printable(item) for item in value]
    return value


def parse_json(text: str, name: str) -> Config:
    """Read a JSON object."""
    try:
        values = printable(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON: {str(error)[:100]}.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{name} is not a config: expected a JSON object {{…}} at the top.")
    return given_config(values, name)


def given_config(values: dict[str, Any], name: str) -> Config:
    """A config whose values are there already."""
    values = _bounded(values)
    return Config(values, tuple(_unreadable(values, name)))


def _bounded(value: Any, depth: int = 0) -> Any:
    """A copy of dicts, lists and tuples, in which giant integers are `Unreadable`.

    No setting needs more than 64 bits, and Python does not even print what has 4300 digits.
    """
    if _is_giant(value):
        return Unreadable(_GIANT, 0)
    if not isinstance(value, (dict, list, tuple)):
        return value
    if depth > MAX_DEPTH:
        return Unreadable(_TOO_DEEP, 0)
    if isinstance(value, dict):
        return {k: _bounded(item, depth + 1) for k, item in value.items() if not _is_giant(k)}
    return type(value)(_bounded(item, depth + 1) for item in value)


def _is_giant(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > MAX_NUMBER


def _statements(text: str, reader: _Reader) -> list[ast.stmt]:
    try:
        return ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    # A dumped config may hold the repr of an object (`<function f at 0x…>`), which is no
    # Python. Read it assignment by assignment, so that only the broken one is lost.
    found: list[ast.stmt] = []
    starts = [m.start() for m in re.finditer(r"^[A-Za-z_]\w*\s*=", text, re.MULTILINE)]
    if not starts or text[: starts[0]].strip():
        starts.insert(0, 0)
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        line = text.count("\n", 0, start)
        try:
            tree = ast.parse(text[start:end])
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            head = text[start:end].strip().split("\n")[0][:40]
            reader.note(line + 1, f"{head!r} is not valid Python and was left out")
        else:
            found += [ast.increment_lineno(statement, line) for statement in tree.body]
    return found


class _Reader:
    """Goes over a config's statements in order, keeping the names they bind."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.names: dict[str, Any] = {}
        self.notes: list[str] = []

    def note(self, line: int, text: str) -> None:
        self.notes.append(f"{self.name}, line {line}: {text}.")

    def read(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=targets, value=value):
                result = self._value(value)
                for target in targets:
                    self._assign(target, result)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, self._value(value))
            case ast.AugAssign(target=target, op=op, value=value):
                total = ast.copy_location(ast.BinOp(target, op, value), statement)
                self._assign(target, self._value(total))
            case ast.Import(names=aliases):
                for alias in aliases:
                    bound = alias.asname or alias.name.split(".")[0]
                    self.names[bound] = _ImportedName(alias.name)
            case ast.ImportFrom(module=module, names=aliases):
                for alias in aliases:
                    if alias.name == "*":
                        self._base(statement.lineno)
                    else:
                        full = f"{module or ''}.{alias.name}"
                        self.names[alias.asname or alias.name] = _ImportedName(full)
            case ast.Expr(value=ast.Constant()) | ast.Pass():
                pass
            case ast.With(body=body) if all(isinstance(s, ast.ImportFrom) for s in body):
                self._base(statement.lineno)  # mmengine's `with read_base():`
            case _:  # code: whatever it may change is no longer known
                kind = type(statement).__name__
                self.note(statement.lineno, f"a {kind} statement is code and was not run")
                self._forget(statement, f"changed by a {kind} statement")

    def _assign(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(id="_base_"):
                self._base(target.lineno)
                self.names["_base_"] = Unreadable("it is in a base config file", target.lineno)
            case ast.Name(id=name):
                self.names[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets) if isinstance(
                value, (tuple, list)
            ) and len(targets) == len(value):
                for inner, item in zip(targets, value, strict=True):
                    self._assign(inner, item)
            case ast.Subscript(value=owner, slice=index):
                self._put(target, self._value(owner), self._value(index), value)
            case ast.Attribute(value=owner, attr=key):
                self._put(target, self._value(owner), key, value)
            case _:
                self._forget(target, "assigned in a way that is not read")

    def _put(self, target: ast.expr, owner: Any, key: Any, value: Any) -> None:
        in_dict = isinstance(owner, dict) and isinstance(key, (str, int))
        if in_dict or (isinstance(owner, list) and key in range(-len(owner), len(owner))):
            owner[key] = value
        else:
            self._forget(target, "an item of it is assigned in a way that is not read")

    def _base(self, line: int) -> None:
        self.note(
            line,
            "it builds on base config files, which are not read; what they set is unknown here. "
            "Give the flattened config (the one in the checkpoint or in work_dirs)",
        )

    def _forget(self, node: ast.AST, reason: str) -> None:
        """Every known name in ``node`` may have changed, every stored one has."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and (
                inner.id in self.names or isinstance(inner.ctx, ast.Store)
            ):
                self.names[inner.id] = Unreadable(reason, inner.lineno)

    def _value(self, node: ast.expr, depth: int = 0) -> Any:
        """The value of an expression; :class:`Unreadable` where it needs code to be run.

        Inside a container only the item that cannot be read is unreadable.
        """
        if depth > MAX_DEPTH:
            return Unreadable(_TOO_DEEP, node.lineno)
        try:
            return self._evaluate(node, depth + 1)
        except _UnreadableError as error:
            return Unreadable(str(error), node.lineno)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            return Unreadable(f"{type(error).__name__}: {error}"[:120], node.lineno)

    def _needed(self, node: ast.expr, depth: int) -> Any:
        """A value that the whole depends on: if it cannot be read, neither can the whole."""
        value = self._value(node, depth)
        if isinstance(value, Unreadable):
            raise _UnreadableError(value.reason)
        return value

    def _evaluate(self, node: ast.expr, depth: int) -> Any:
        match node:
            case ast.Constant(value=str(value)) if "{{" in value:
                raise _UnreadableError(_OTHER_FILE)
            case ast.Constant(value=value):
                return printable(_small(value))
            case ast.Name(id=name):
                if name in self.names:
                    return self.names[name]
                raise _UnreadableError(f"the name {name!r} is not assigned in the text")
            case ast.List(elts=items):
                return self._items(items, depth)
            case ast.Tuple(elts=items):
                return tuple(self._items(items, depth))
            case ast.Set(elts=[ast.Set()]):
                raise _UnreadableError(_OTHER_FILE)
            case ast.Set(elts=items):
                return set(self._items(items, depth))
            case ast.Dict(keys=keys, values=values):
                return self._pairs(zip(keys, values, strict=True), depth)
            case ast.Call(func=ast.Name(id="dict"), args=args, keywords=keywords) if len(args) < 2:
                start = dict(self._needed(args[0], depth)) if args else {}
                given = [(ast.Constant(k.arg) if k.arg else None, k.value) for k in keywords]
                return start | self._pairs(given, depth)
            case ast.Call(func=ast.Name(id=name), args=[arg], keywords=[]) if name in _CALLS:
                return _small(_CALLS[name](self._needed(arg, depth)))
            case ast.Call(func=func):
                raise _UnreadableError(f"a call of {ast.unparse(func)[:60]}")
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return _UNARY[type(op)](self._needed(operand, depth))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                first, second = self._needed(left, depth), self._needed(right, depth)
                return _arithmetic(_BINARY[type(op)], first, second)
            case ast.Attribute(value=owner, attr=name):
                return _item(self._needed(owner, depth), name)
            case ast.Subscript(value=owner, slice=index):
                return _item(self._needed(owner, depth), self._needed(index, depth))
        raise _UnreadableError(f"{type(node).__name__} is code, not data")

    def _items(self, nodes: list[ast.expr], depth: int) -> list[Any]:
        result: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                spread = self._value(node.value, depth)
                if not isinstance(spread, (list, tuple)):
                    raise _UnreadableError("a * of something that is not a list")
                result.extend(spread)
            else:
                result.append(_data(self._value(node, depth), node))
            if len(result) > MAX_ITEMS:
                raise _UnreadableError(f"a list of more than {MAX_ITEMS} items")
        return result

    def _pairs(
        self, pairs: Iterable[tuple[ast.expr | None, ast.expr]], depth: int
    ) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for key, value in pairs:
            if key is None:  # ** of another dict
                result |= dict(self._needed(value, depth))
                continue
            name = self._needed(key, depth)
            item = self._value(value, depth)
            result[name] = item if name == "type" else _data(item, value)
        return result


def _small(value: Any) -> Any:
    """``value``, unless it is an integer of more than 64 bits."""
    if _is_giant(value):
        raise _UnreadableError(_GIANT)
    return value


def _data(value: Any, node: ast.expr) -> Any:
    """``value``, unless it is an imported name: those are only read as a ``type``."""
    if isinstance(value, _ImportedName):
        return Unreadable(f"the imported {value} is code", node.lineno)
    return value


def _arithmetic(operation: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    """Numbers within 64 bits and sequences within bounds: a text can't make this run long."""
    sequences = (str, list, tuple)
    if isinstance(left, sequences) or isinstance(right, sequences):
        if operation is operator.add:
            size = len(left) + len(right)
        elif operation is operator.mul:
            size = len(left) * right if isinstance(left, sequences) else len(right) * left
        else:
            raise TypeError("not arithmetic on numbers")
        if size > MAX_ITEMS:
            raise ValueError(f"a sequence of more than {MAX_ITEMS} items")
    elif not isinstance(left, (int, float)) or not isinstance(right, (int, float)):
        raise TypeError("not arithmetic on numbers")
    elif operation is operator.pow and not (abs(right) <= 64 and abs(left) <= 1e6):
        raise ValueError("a power out of bounds")
    result = operation(left, right)
    if isinstance(result, (int, float)) and abs(result) > MAX_NUMBER:
        raise ValueError(_GIANT)
    if isinstance(result, complex):
        raise ValueError("a complex number")
    return result


def _item(owner: Any, key: Any) -> Any:
    if isinstance(owner, (dict, list, tuple)):
        return owner[key]
    if isinstance(owner, _ImportedName):
        raise TypeError(f"the imported {owner} is code")
    raise TypeError(f"{type(owner).__name__} has no items")


def _unreadable(values: dict[str, Any], name: str) -> list[str]:
    """One sentence for each unreadable value, naming its path. Shared containers count once."""
    notes: list[str] = []
    seen: set[int] = set()
    ahead: list[tuple[str, Any]] = [("", values)]
    while ahead and len(notes) < 50:
        path, value = ahead.pop()
        if isinstance(value, Unreadable):
            if path != "_base_":
                where = f"{name}, line {value.line}" if value.line else name
                notes.append(f"{where}: {path} could not be read: {value.reason}.")
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
            # Popped from the end: reversed, so that notes come in the text's order.
            ahead += [(f"{path}.{k}" if path else str(k), item) for k, item in reversed(pairs)]
    return notes
