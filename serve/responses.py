"""Labels as the body of a response: JSON, an indexed PNG, an overlay, or logits."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from fdconv_deploy.serve.errors import RefusedError
from fdconv_deploy.serve.negotiation import best_type
from fdconv_deploy.serve.polygons import class_rings
from PIL import Image

from fdconv_deploy.runtime import Segmentation
from fdconv_deploy.runtime.visualization import as_rgb, encode, overlay

Output = Literal["json", "mask", "overlay", "logits"]
MaskForm = Literal["rle", "polygons", "none"]
JSON, PNG, JPEG = "application/json", "image/png", "image/jpeg"
NPZ, ZIP = "application/x-npz", "application/zip"
# Masks show this where a class was not asked for; the value mmsegmentation ignores.
OTHER = 255
# What each output can be sent as, the preferred first.
_TYPES: dict[Output, tuple[str, ...]] = {
    "json": (JSON,),
    "mask": (PNG,),
    "overlay": (PNG, JPEG),
    "logits": (NPZ,),
}
_SUFFIXES = {PNG: "png", JPEG: "jpg", NPZ: "npz"}


@dataclass(frozen=True)
class Form:
    """What the client gets: which output, as which media type."""

    output: Output
    media_type: str


class Writable(Protocol):
    """One image's answer, to be written down: a segmentor's or a detector's."""

    @property
    def name(self) -> str | None:
        """The image file's name in the form, if it came with one."""

    @property
    def fit(self) -> str:
        """How the image was brought to the network's size."""

    def document(self, mask: MaskForm) -> dict[str, Any]:
        """For JSON."""

    def file(self, output: Output, kind: str, opacity: float) -> bytes:
        """One of the other outputs, as a file of the media type ``kind``."""


@dataclass(frozen=True)
class Answer:
    """One image's answer, to be written down.

    ``segmentation`` has its labels at the size asked for, and ``image`` (H, W, C) is of
    that size. ``kept`` are the classes asked for, all when None. ``logits`` is
    (classes, h, w) float32 where they were asked for, with what they cover beside them.
    """

    model: str
    segmentation: Segmentation
    image: npt.NDArray[Any] | None
    name: str | None
    timings_ms: dict[str, float]
    kept: tuple[int, ...] | None = None
    logits: npt.NDArray[np.float32] | None = None
    size: tuple[int, int] = (0, 0)

    @property
    def fit(self) -> str:
        """How the image was brought to the network's size."""
        return self.segmentation.fit

    def document(self, mask: MaskForm) -> dict[str, Any]:
        """As ``schemas.Segmentation``."""
        return _document(self, mask)

    def file(self, output: Output, kind: str, opacity: float) -> bytes:
        """One of the other outputs, as a file of the media type ``kind``."""
        return _file(output, kind, self, opacity)


def choose_form(accept: str, output: Output | None) -> Form:
    """Settle the form of the answer from the ``Accept`` header and ``?output=``.

    Without ``output``, image/png asks for the mask, application/x-npz for logits, and
    application/json, or anything at all, for JSON. application/zip takes what ``output`` says
    (masks, if nothing), one file per image.

    :raises RefusedError: 406, none of it is to be had.
    """
    offers = _TYPES[output] if output else (JSON, PNG, NPZ)
    if output != "json":
        offers = (*offers, ZIP)
    chosen = best_type(accept, offers)
    if chosen is None:
        wanted = f"The output {output!r} comes" if output else "Answers come"
        raise RefusedError(
            406, f"{wanted} as {' or '.join(offers)}, which the Accept header rules out."
        )
    by_type: dict[str, Output] = {PNG: "mask", ZIP: "mask", NPZ: "logits"}
    return Form(output or by_type.get(chosen, "json"), chosen)


def form_for_several(accept: str, form: Form) -> Form:
    """As :func:`choose_form` settled it, for more than one image: JSON, or a zip of files.

    :raises RefusedError: 406.
    """
    if form.media_type in (JSON, ZIP):
        return form
    if best_type(accept, [ZIP]) is None:
        raise RefusedError(
            406,
            f"Several images are answered in {JSON} or {ZIP}, which the Accept header rules out.",
        )
    return Form(form.output, ZIP)


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
    form: Form, answers: Sequence[Writable], opacity: float, mask: MaskForm
) -> tuple[bytes, str]:
    """The response's body and its media type."""
    if form.output == "json":
        documents = [answer.document(mask) for answer in answers]
        found = documents[0] if len(answers) == 1 else {"results": documents}
        # Not through pydantic, which would check every run.
        return json.dumps(found, separators=(",", ":")).encode(), JSON
    kind = _TYPES[form.output][0] if form.media_type == ZIP else form.media_type
    if len(answers) == 1 and form.media_type != ZIP:
        return answers[0].file(form.output, kind, opacity), kind
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for number, answer in enumerate(answers):
            stem = (answer.name or "image").rpartition(".")[0] or (answer.name or "image")
            archive.writestr(
                f"{number:03d}-{stem}.{_SUFFIXES[kind]}",
                answer.file(form.output, kind, opacity),
            )
    return buffer.getvalue(), ZIP


def _file(output: Output, kind: str, answer: Answer, opacity: float) -> bytes:
    found = answer.segmentation
    if output == "logits":
        return _npz(answer)
    if output == "overlay":
        assert answer.image is not None
        picture = overlay(answer.image, found.labels, found.palette, opacity)
        if answer.kept is not None:
            picture = np.where(_keeps(answer)[..., None], picture, as_rgb(answer.image))
        return encode(picture, "JPEG" if kind == JPEG else "PNG")
    if answer.kept is None:
        return found.mask_png()
    image = Image.fromarray(np.where(_keeps(answer), found.labels, OTHER).astype(np.uint8))
    # All 256 colours: with fewer, Pillow would store fewer bits than 255 needs.
    colours = [*found.palette, *[(0, 0, 0)] * (256 - len(found.palette))]
    image.putpalette([value for colour in colours for value in colour])
    return encode(image, "PNG", transparency=OTHER)


def _npz(answer: Answer) -> bytes:
    assert answer.logits is not None
    found = answer.segmentation
    kept = answer.kept if answer.kept is not None else tuple(range(len(found.classes)))
    logits = answer.logits
    if len(logits) < len(found.classes):
        kept = (1,)  # the one output there is tells class 1 from class 0
    elif answer.kept is not None:
        logits = logits[list(kept)]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        logits=logits,
        class_ids=np.array(kept, np.int64),
        classes=np.array([found.classes[number] for number in kept]),
        image_size=np.array(answer.size, np.int64),
    )
    return buffer.getvalue()


def _keeps(answer: Answer) -> npt.NDArray[np.bool_]:
    table = np.zeros(len(answer.segmentation.classes), np.bool_)
    table[list(answer.kept or ())] = True
    return table[answer.segmentation.labels]


def _document(answer: Answer, mask: MaskForm) -> dict[str, Any]:
    found = answer.segmentation
    height, width = found.labels.shape
    areas = found.areas().tolist()
    kept = answer.kept if answer.kept is not None else range(len(found.classes))
    return {
        "model": answer.model,
        "file": answer.name,
        "height": height,
        "width": width,
        "fit": found.fit,
        "mode": found.mode,
        "classes": [
            {
                "id": number,
                "name": found.classes[number],
                "color": found.palette[number],
                "area": areas[number],
                "share": areas[number] / (height * width),
            }
            for number in kept
        ],
        "mask": _mask(answer, mask, areas),
        "timings_ms": answer.timings_ms,
    }


def _mask(answer: Answer, form: MaskForm, areas: list[int]) -> dict[str, Any] | None:
    labels = answer.segmentation.labels
    if form == "none":
        return None
    kept = answer.kept if answer.kept is not None else range(len(areas))
    if form == "polygons":
        return {
            "size": list(labels.shape),
            "polygons": [
                {"id": number, "rings": class_rings(labels, number)}
                for number in kept
                if areas[number]
            ],
        }
    if answer.kept is None:
        return run_lengths(labels)
    return run_lengths(np.where(_keeps(answer), labels.astype(np.int32), -1))
