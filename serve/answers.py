"""Labels as the body of a response: JSON with run lengths, an indexed PNG, or an overlay."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fdconv_deploy.runtime import Segmentation
from fdconv_deploy.runtime.rendering import encode

from .negotiation import best_type
from .problems import RefusedError

Output = Literal["json", "mask", "overlay"]
JSON, PNG, JPEG = "application/json", "image/png", "image/jpeg"
# What each output can be sent as, the preferred first.
_TYPES: dict[Output, tuple[str, ...]] = {
    "json": (JSON,),
    "mask": (PNG,),
    "overlay": (PNG, JPEG),
}


@dataclass(frozen=True)
class Form:
    """What the client gets: which output, as which media type."""

    output: Output
    media_type: str


def choose_form(accept: str, output: Output | None) -> Form:
    """Settle the form of the answer from the ``Accept`` header and ``?output=``.

    Without ``output``, image/png asks for the mask and application/json, or anything at
    all, for JSON.

    :raises RefusedError: 406, none of it is to be had.
    """
    offers = _TYPES[output] if output else (JSON, PNG)
    chosen = best_type(accept, offers)
    if chosen is None:
        wanted = f"The output {output!r} comes" if output else "Answers come"
        raise RefusedError(
            406, f"{wanted} as {' or '.join(offers)}, which the Accept header rules out."
        )
    return Form(output or ("mask" if chosen == PNG else "json"), chosen)


def run_lengths(labels: npt.NDArray[Any]) -> dict[str, list[int]]:
    """Labels (H, W) as runs in row-major order: see ``schemas.RunLengthMask``."""
    flat = labels.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    counts = np.diff(starts, append=flat.size)
    return {
        "size": list(labels.shape),
        "counts": counts.tolist(),
        "values": flat[starts].tolist(),
    }


def render(
    form: Form,
    model: str,
    answer: Segmentation,
    image: npt.NDArray[np.uint8],
    opacity: float,
    timings_ms: dict[str, float],
) -> bytes:
    """The response's body."""
    if form.output == "mask":
        return answer.mask_png()
    if form.output == "overlay":
        kind: Literal["PNG", "JPEG"] = "JPEG" if form.media_type == JPEG else "PNG"
        return encode(answer.overlay(image, opacity), kind)
    height, width = answer.labels.shape
    areas = answer.areas().tolist()
    # As schemas.Segmentation; not through pydantic, which would check every run.
    return json.dumps(
        {
            "model": model,
            "height": height,
            "width": width,
            "fit": answer.fit,
            "mode": answer.mode,
            "classes": [
                {
                    "id": number,
                    "name": name,
                    "color": colour,
                    "area": areas[number],
                    "share": areas[number] / (height * width),
                }
                for number, (name, colour) in enumerate(
                    zip(answer.classes, answer.palette, strict=True)
                )
            ],
            "mask": run_lengths(answer.labels),
            "timings_ms": timings_ms,
        },
        separators=(",", ":"),
    ).encode()
