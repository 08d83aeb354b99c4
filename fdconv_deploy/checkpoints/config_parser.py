"""Configs of mmcv and mmengine, read without running them.

Both write the whole config into their checkpoints as Python source (``meta["config"]``,
``meta["cfg"]``). Running it would run whatever a stranger put there, so it is parsed:
literals, ``dict(...)`` calls, earlier names and simple arithmetic are evaluated, and
anything else is reported as unreadable.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdconv_deploy.checkpoints.config_expressions import (
    ImportedName,
    Unreadable,
    bounded,
    evaluate,
    printable,
)
from fdconv_deploy.errors import CheckpointError

MAX_BYTES = 4 << 20


@dataclass(frozen=True)
class Config:
    """A config's values, and sentences about what of it could not be read.

    Values are Python literals; a value that needs code is :class:`Unreadable`.
    """

    values: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def section(self, *path: str) -> dict[str, Any]:
        """The dict at ``path``, e.g. ``("model", "backbone")``; empty if there is none."""
        value: Any = self.values
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else {}


def config_of(meta: Mapping[str, Any]) -> Config | None:
    """The config a checkpoint's ``meta`` carries, or None if it carries none."""
    for name in ("cfg", "config"):
        value = meta.get(name)
        if isinstance(value, dict):
            return _given(value, f"meta[{name!r}]")
        if isinstance(value, str) and value.strip():
            return parse_config(value, name=f"meta[{name!r}]")
    return None


def read_config(path: str | Path) -> Config:
    """Read a ``.py`` or ``.json`` config file without running it.

    Raises:
        CheckpointError: no such file, not UTF-8 text, or another kind of file.
    """
    path = Path(path)
    if path.suffix not in (".py", ".json"):
        raise CheckpointError(
            f"{path} is not a config: expected a .py or .json file of mmsegmentation."
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(
                f"{path} is larger than {MAX_BYTES >> 20} MiB. Expected the text of a config."
            )
        text = path.read_text("utf-8")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Expected a .py or .json config file."
        ) from None
    except UnicodeDecodeError:
        raise CheckpointError(
            f"{path} is not UTF-8 text. Expected a .py or .json config."
        ) from None
    return _json(text, str(path)) if path.suffix == ".json" else parse_config(text, name=str(path))


def parse_config(text: str, *, name: str = "the config") -> Config:
    """Read config text: Python source, or a JSON object.

    Nothing is executed. What cannot be read becomes a note, never a guess.

    Raises:
        CheckpointError: the text is larger than 4 MiB or is JSON that is not an object.
    """
    if len(text) > MAX_BYTES:
        raise CheckpointError(f"{name} is larger than {MAX_BYTES >> 20} MiB: not a config's text.")
    if text.lstrip().startswith("{"):
        return _json(text, name)
    reader = _Reader(name)
    for statement in _statements(text, reader):
        reader.read(statement)
    values = {k: v for k, v in reader.names.items() if not isinstance(v, ImportedName)}
    return Config(values, tuple(dict.fromkeys([*reader.notes, *_unreadable(values, name)])))


def _json(text: str, name: str) -> Config:
    try:
        values = printable(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON: {str(error)[:100]}.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{name} is not a config: expected a JSON object {{…}} at the top.")
    return _given(values, name)


def _given(values: dict[str, Any], name: str) -> Config:
    """A config whose values are there already."""
    values = bounded(values)
    return Config(values, tuple(_unreadable(values, name)))


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
                result = evaluate(value, self.names)
                for target in targets:
                    self._assign(target, result)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, evaluate(value, self.names))
            case ast.AugAssign(target=target, op=op, value=value):
                total = ast.copy_location(ast.BinOp(target, op, value), statement)
                self._assign(target, evaluate(total, self.names))
            case ast.Import(names=aliases):
                for alias in aliases:
                    bound = alias.asname or alias.name.split(".")[0]
                    self.names[bound] = ImportedName(alias.name)
            case ast.ImportFrom(module=module, names=aliases):
                for alias in aliases:
                    if alias.name == "*":
                        self._base(statement.lineno)
                    else:
                        self.names[alias.asname or alias.name] = ImportedName(
                            f"{module or ''}.{alias.name}"
                        )
            case ast.Expr(value=ast.Constant()) | ast.Pass():
                pass
            case ast.With(body=body) if all(isinstance(s, ast.ImportFrom) for s in body):
                self._base(statement.lineno)  # mmengine's `with read_base():`
            case _:
                self._lose(statement)

    def _assign(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name(id="_base_"):
                self._base(target.lineno)
                self.names["_base_"] = Unreadable("it stands in a base config file", target.lineno)
            case ast.Name(id=name):
                self.names[name] = value
            case ast.Tuple(elts=parts) | ast.List(elts=parts) if isinstance(
                value, (tuple, list)
            ) and len(parts) == len(value):
                for part, item in zip(parts, value, strict=True):
                    self._assign(part, item)
            case ast.Subscript(value=owner, slice=index):
                self._put(target, evaluate(owner, self.names), evaluate(index, self.names), value)
            case ast.Attribute(value=owner, attr=key):
                self._put(target, evaluate(owner, self.names), key, value)
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

    def _lose(self, statement: ast.stmt) -> None:
        """A statement that is code: whatever it may change is no longer known."""
        kind = type(statement).__name__
        self.note(statement.lineno, f"a {kind} statement is code and was not run")
        self._forget(statement, f"changed by a {kind} statement")

    def _forget(self, node: ast.AST, reason: str) -> None:
        """Every known name in ``node`` may have changed, every stored one has."""
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and (
                part.id in self.names or isinstance(part.ctx, ast.Store)
            ):
                self.names[part.id] = Unreadable(reason, part.lineno)


def _unreadable(values: dict[str, Any], name: str) -> list[str]:
    """One sentence for each unreadable value, naming its path. Shared parts count once."""
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
