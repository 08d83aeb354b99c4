"""Python literals and the little arithmetic configs use, evaluated without running anything."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 60
MAX_ITEMS = 100_000
MAX_NUMBER = 2**63
_GIANT = "a number of more than 64 bits"


@dataclass(frozen=True)
class Unreadable:
    """A value that could not be read: ``reason`` says why, ``line`` where it stands."""

    reason: str
    line: int


class ImportedName(str):
    """A class a config imports, by its dotted name: mmengine writes types this way."""

    __slots__ = ()


class _NotReadableError(Exception):
    def __init__(self, reason: str, node: ast.AST) -> None:
        super().__init__(reason)
        self.value = Unreadable(reason, getattr(node, "lineno", 0))


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


def bounded(value: Any) -> Any:
    """A config's values that were not read from its text, with giant integers `Unreadable`.

    No setting needs more than 64 bits, and Python does not even print what has 4300 digits.

    Args:
        value: dicts, lists and tuples, which are copied, and whatever is in them, which is not.
    """
    return _bounded(value, {}, 0)


def _bounded(value: Any, known: dict[int, Any], depth: int) -> Any:
    if _is_giant(value):
        return Unreadable(_GIANT, 0)
    if not isinstance(value, (dict, list, tuple)):
        return value
    if id(value) in known:  # shared parts stay shared, and may hold themselves
        return known[id(value)]
    if depth > MAX_DEPTH:
        return Unreadable(f"nested deeper than {MAX_DEPTH} levels", 0)
    if isinstance(value, dict):
        copy: Any = known.setdefault(id(value), {})
        copy.update(
            (key, _bounded(item, known, depth + 1))
            for key, item in value.items()
            if not _is_giant(key)
        )
        return copy
    if isinstance(value, list):
        copy = known.setdefault(id(value), [])
        copy.extend(_bounded(item, known, depth + 1) for item in value)
        return copy
    known[id(value)] = tuple(_bounded(item, known, depth + 1) for item in value)
    return known[id(value)]


def _is_giant(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > MAX_NUMBER


def printable(value: Any) -> Any:
    """``value`` with the lone surrogates of its texts replaced: no terminal or file takes them.

    They come from escapes such as ``"\\ud800"``, of which JSON and Python make half a character.
    """
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [printable(item) for item in value]
    return value


def evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of an expression; :class:`Unreadable` where it needs code to be run.

    Inside a container only the item that cannot be read is unreadable.

    Args:
        node: an expression.
        names: what earlier assignments bound.
    """
    return _value(node, names, 0)


def _value(node: ast.expr, names: dict[str, Any], depth: int) -> Any:
    if depth > MAX_DEPTH:
        return Unreadable(f"nested deeper than {MAX_DEPTH} levels", node.lineno)
    try:
        return _strict(node, names, depth)
    except _NotReadableError as error:
        return error.value
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        return Unreadable(f"{type(error).__name__}: {error}"[:120], node.lineno)


def _strict(node: ast.expr, names: dict[str, Any], depth: int) -> Any:
    def needed(child: ast.expr) -> Any:
        """A part the whole depends on: if it cannot be read, neither can the whole."""
        value = _value(child, names, depth + 1)
        if isinstance(value, Unreadable):
            raise _NotReadableError(value.reason, child)
        return value

    match node:
        case ast.Constant(value=value):
            if isinstance(value, str) and "{{" in value:
                raise _NotReadableError("a {{…}} reference to another file", node)
            if _is_giant(value):
                raise _NotReadableError(_GIANT, node)
            return printable(value)
        case ast.Name(id=name):
            if name in names:
                return names[name]
            raise _NotReadableError(f"the name {name!r} is not assigned in the text", node)
        case ast.List(elts=items):
            return _items(items, names, depth)
        case ast.Tuple(elts=items):
            return tuple(_items(items, names, depth))
        case ast.Set(elts=[ast.Set()]):
            raise _NotReadableError("a {{…}} reference to another file", node)
        case ast.Set(elts=items):
            return set(_items(items, names, depth))
        case ast.Dict(keys=keys, values=values):
            return _pairs(list(zip(keys, values, strict=True)), names, depth, needed)
        case ast.Call(func=ast.Name(id="dict"), args=args, keywords=keywords) if len(args) < 2:
            start = dict(needed(args[0])) if args else {}
            given: list[tuple[ast.expr | None, ast.expr]] = [
                (ast.Constant(k.arg) if k.arg else None, k.value) for k in keywords
            ]
            return start | _pairs(given, names, depth, needed)
        case ast.Call(func=ast.Name(id=name), args=[arg], keywords=[]) if name in _CALLS:
            made = _CALLS[name](needed(arg))
            if _is_giant(made):
                raise _NotReadableError(_GIANT, node)
            return made
        case ast.Call(func=func):
            raise _NotReadableError(f"a call of {ast.unparse(func)[:60]}", node)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](needed(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _arithmetic(_BINARY[type(op)], needed(left), needed(right))
        case ast.Attribute(value=owner, attr=name):
            return _item(needed(owner), name)
        case ast.Subscript(value=owner, slice=index):
            return _item(needed(owner), needed(index))
    raise _NotReadableError(f"{type(node).__name__} is code, not data", node)


def _items(nodes: list[ast.expr], names: dict[str, Any], depth: int) -> list[Any]:
    result: list[Any] = []
    for node in nodes:
        if isinstance(node, ast.Starred):
            spread = _value(node.value, names, depth + 1)
            if not isinstance(spread, (list, tuple)):
                raise _NotReadableError("a * of something that is not a list", node)
            result.extend(spread)
        else:
            result.append(_data(_value(node, names, depth + 1), node))
        if len(result) > MAX_ITEMS:
            raise _NotReadableError(f"a list of more than {MAX_ITEMS} items", node)
    return result


def _pairs(
    pairs: list[tuple[ast.expr | None, ast.expr]],
    names: dict[str, Any],
    depth: int,
    needed: Callable[[ast.expr], Any],
) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key, value in pairs:
        if key is None:  # ** of another dict
            result |= dict(needed(value))
            continue
        name = printable(key.value) if isinstance(key, ast.Constant) else needed(key)
        item = _value(value, names, depth + 1)
        result[name] = item if name == "type" else _data(item, value)
    return result


def _data(value: Any, node: ast.expr) -> Any:
    """``value``, unless it is an imported name: those are only read as a ``type``."""
    if isinstance(value, ImportedName):
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
    if isinstance(owner, ImportedName):
        raise TypeError(f"the imported {owner} is code")
    raise TypeError(f"{type(owner).__name__} has no items")
