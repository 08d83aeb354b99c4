"""Which of several media types a client would rather have."""

from __future__ import annotations

from collections.abc import Sequence


def best_type(accept: str, offers: Sequence[str]) -> str | None:
    """The offer that an ``Accept`` header likes most; of equals the first; None if none.

    >>> best_type("image/*;q=0.5, application/json", ["image/png", "application/json"])
    'application/json'
    """
    ranges = [_parse(part) for part in accept.split(",") if part.strip()]
    if not ranges:
        return offers[0]
    best, best_quality = None, 0.0
    for offer in offers:
        quality = _quality(offer, ranges)
        if quality > best_quality:
            best, best_quality = offer, quality
    return best


def _parse(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            try:
                return name, min(max(float(value), 0.0), 1.0)
            except ValueError:
                return name, 0.0
    return name, 1.0


def _quality(offer: str, ranges: list[tuple[str, float]]) -> float:
    # The most specific range that matches decides, whatever the others say.
    family = offer.partition("/")[0] + "/*"
    for wanted in (offer, family, "*/*"):
        found = [quality for name, quality in ranges if name == wanted]
        if found:
            return max(found)
    return 0.0
