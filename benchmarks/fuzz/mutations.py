"""What damages a file: bytes, tokens of a language, values of JSON, chunks of PNG."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

REAL = Path(__file__).parents[2] / "tests/real_packages"

Seeds = Callable[[], dict[str, bytes]]
Mutate = Callable[[random.Random, bytes, list[bytes]], bytes]


@dataclass(frozen=True)
class Reader:
    """One reader under test.

    Attributes:
        seeds: whole files, by the names that they are to have.
        mutate: makes a damaged one of a seed, given all seeds.
        read: what is done with the damaged file; it must return, or raise `FDConvError`.
        runs: how many there are of it when all readers are run.
    """

    seeds: Seeds
    mutate: Mutate
    read: Callable[[Path], object]
    runs: int


NUMBERS = [
    number.to_bytes(width, order, signed=True)
    for width in (1, 2, 4, 8)
    for number in (0, 1, -1, 1 << (8 * width - 2), (1 << (8 * width - 1)) - 1)
    for order in ("little", "big")
]  # fmt: skip


def damage(rng: random.Random, data: bytes, others: list[bytes], tokens: list[bytes]) -> bytes:
    """One to eight small changes: bits, bytes, numbers, tokens, pieces moved, cut or repeated."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        place = rng.randrange(len(result) + 1)
        length = min(rng.choice((1, 2, 4, 8, 32, 256)), len(result) - place)
        match rng.randrange(9):
            case 0 if length:
                result[place] ^= 1 << rng.randrange(8)
            case 1 if length:
                result[place : place + length] = rng.randbytes(length)
            case 2:
                number = rng.choice(NUMBERS)
                result[place : place + len(number)] = number
            case 3:
                token = rng.choice(tokens)
                result[place : place + rng.choice((0, len(token)))] = token
            case 4:
                del result[place : place + length]
            case 5:
                result[place:place] = result[place : place + length] * rng.choice((1, 2, 50))
            case 6:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                result[place : place + length] = other[start : start + length]
            case 7 if rng.random() < 0.3:
                del result[place:]
            case _:
                target = rng.randrange(len(result) + 1)
                piece = result[place : place + length]
                del result[place : place + length]
                result[target:target] = piece
    return bytes(result)


TEXT = [token.encode() for token in "( ) [ ] { } , = * ** - ' # 1.5 [] \\ \0 é 💡".split(" ")] + [
    token.encode()
    for token in (
        *("\n", "    ", "dict(", "None", "True", "nan", "inf", "1e999", "-1", "0", "(" * 25, "''"),
        *("9" * 20, "9" * 400, "9" * 5000, "10**10**10", "'a'*10**9", "[0]*10**9", "1 << 10**9"),
        *("_base_ = ['a.py']", "_delete_=True", "lambda: 0", "[x for x in y]", "{{ name }}"),
        *("type='GN'", "type=3", "depth=-1", "num_classes=0", "num_classes=True", "import os\n"),
        *(
            '"\\ud800"',
            "\\udc80",
            "model",
            "model = model",
            "backbone",
            "a.b.c = 1",
            "del model",
            "'%1000000000d' % 1",
        ),
    )
]
damage_text = partial(damage, tokens=TEXT)


# JSON

# In place of text and numbers, and written out when the file is: Python's writer takes neither.
_WRITTEN = {b'"<deep>"': b"[" * 100_000 + b"]" * 100_000, b'"<long>"': b"9" * 5000}
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 255, 2**31, 2**32, 2**63, 2**64, 10**300, "<long>"),
    *(1e308, -1e308, 1e-300, float("nan"), float("inf"), -0.0, 0.5),
    *("", "a", "1", "nan", "\0", "\ud800", "ü" * 50, "[/b]", "9" * 400, "<deep>"),
    *("../../x", "/etc/hostname", "C:\\x", "a\nb", ".", "x" * 5000),
    *([], [[]], {}, {"a": 1}, {"": None}, [1], [None], [1, 2, 3, 4], [[1, 2, 3, 4, 5, 6]]),
    [0] * 1000,
]


class _Again(str):
    """A key that its dictionary may hold twice."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def change_json(rng: random.Random, value: Any, odd: list[Any]) -> None:
    """Change one value somewhere in lists and dictionaries: replace, remove, move, double."""
    places = list(_places(value))
    if not places:
        return
    holder, key = rng.choice(places)
    old = holder[key]
    match rng.randrange(10):
        case 0 | 1 | 2 | 3:
            holder[key] = _copy(rng.choice(odd))
        case 4:
            del holder[key]
        case 5:
            source, name = rng.choice(places)
            holder[key] = _copy(source[name])
        case 6 if isinstance(holder, list):
            holder.insert(key, _copy(rng.choice([*odd, *holder[:20]])))
        case 6:
            new = _Again(key) if rng.random() < 0.5 else rng.choice(["", "a", "\ud800", "1", "-1"])
            holder[new] = _copy(rng.choice([old, *odd]))
        case _ if isinstance(old, str) and old:
            place = rng.randrange(len(old))
            letter = chr(rng.choice((rng.randrange(128), rng.randrange(0x500))))
            holder[key] = old[:place] + letter + old[place + rng.randrange(2) :]
        case _ if isinstance(old, int | float) and abs(old) < 1e200:
            holder[key] = old * rng.choice((-1, 0, 2, 0.1, 1000)) + rng.choice((0, 1, -1, 0.5))
        case _:
            holder[key] = [_copy(old)] * rng.choice((1, 2, 50))


def damage_json(
    rng: random.Random, data: bytes, others: list[bytes], odd: list[Any] | None = None
) -> bytes:
    """Mostly JSON of one to six values changed, else damaged text."""
    if rng.random() < 0.2:
        return damage_text(rng, data, others)
    value = [json.loads(data)]  # in a list, so that the whole may be changed too
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        change_json(rng, value, ODD + (odd or []))
    text = json.dumps(value[0] if value else None).encode()
    for written, meant in _WRITTEN.items():
        text = text.replace(written, meant)
    return text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place below a value: its list or dictionary, and its index or key."""
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], list | dict):
                waiting.append(holder[key])


def _copy(value: Any) -> Any:
    """Lists and dictionaries anew, as deep as they go; other values as they are."""
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


# Images

_PNG = b"\x89PNG\r\n\x1a\n"


def damage_image(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Damaged bytes; of a PNG file half of the time in a chunk, whose checksum fits again."""
    if not data.startswith(_PNG) or rng.random() < 0.5:
        return damage(rng, data, others, [_PNG, b"IDAT", b"II*\0", b"MM\0*", b"RIFF", b"Exif\0\0"])
    chunks, at = [], len(_PNG)
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + length]])
        at += 12 + length
    chunk = rng.choice(chunks)
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks) + 1), list(rng.choice(chunks)))
    elif rng.random() < 0.2:
        chunk[0] = rng.choice((b"tEXt", b"zTXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"acTL"))
    else:
        chunk[1] = damage(rng, chunk[1] or b"\0", others, [b"\0", b"\xff" * 4])
    told = [len(content) for _, content in chunks]
    if rng.random() < 0.2:
        told[rng.randrange(len(told))] = rng.choice((0, 1, (1 << 31) - 1, (1 << 32) - 1))
    return _PNG + b"".join(
        length.to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
        for length, (kind, content) in zip(told, chunks, strict=True)
    )
