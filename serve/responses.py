"""The answer to a segment request: its media type, and its body in JSON, PNG, JPEG, npz or zip."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic_core import to_json

from fdconv_deploy.runtime import Detection, Segmentation
from fdconv_deploy.runtime.panoptic import PanopticSegmentation
from fdconv_deploy.runtime.postprocessing import row_blocks
from fdconv_deploy.runtime.visualization import as_rgb, encode
from fdconv_deploy.serve.errors import RefusedError

Output = Literal["json", "mask", "overlay", "logits"]
MaskForm = Literal["rle", "polygons", "none"]
JSON, PNG, JPEG = "application/json", "image/png", "image/jpeg"
NPZ, ZIP = "application/x-npz", "application/zip"
# The value of pixels whose class was not asked for; mmsegmentation's ignore index.
OTHER = 255
# Most bytes of an answer in JSON, by far more than segmented photographs take: 0.02 of a run per
# pixel are usual. A network's noise takes one for each pixel.
MAX_JSON = 16 << 20
# Most pixels of the masks of an image's objects, each in its own box.
MAX_MASKS = 256 << 20
# Of a run, and of a corner of a polygon: least bytes of text, and memory while it is made.
_RUN_TEXT, _RUN, _CORNER_TEXT, _CORNER = 4, 48, 24, 256
_PART = 1 << 20  # pixels that are looked at together
# The media types of each output, the preferred one first.
MEDIA_TYPES: dict[Output, tuple[str, ...]] = {
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


def choose_form(accept: str, output: Output | None) -> Form:
    """Choose the form of the answer from the ``Accept`` header and ``?output=``; else a 406.

    Without ``output``, image/png asks for the mask, application/x-npz for logits, and
    application/json, or anything at all, for JSON. application/zip takes what ``output`` says
    (masks, if nothing), one file per image.
    """
    offers = MEDIA_TYPES[output] if output else (JSON, PNG, NPZ)
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
    """The form of an answer to several images: JSON, or a zip of files; else a 406."""
    if form.media_type in (JSON, ZIP):
        return form
    if best_type(accept, [ZIP]) is None:
        raise RefusedError(
            406,
            f"Several images are answered in {JSON} or {ZIP}, which the Accept header rules out.",
        )
    return Form(form.output, ZIP)


def best_type(accept: str, offers: Sequence[str]) -> str | None:
    """The offer that an ``Accept`` header prefers; of equals the first; None if it accepts none.

    >>> best_type("image/*;q=0.5, application/json", ["image/png", "application/json"])
    'application/json'
    """
    ranges: dict[str, float] = {}
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = 1.0
        for key, _, value in (parameter.partition("=") for parameter in parameters):
            if key.strip() == "q":
                try:
                    quality = min(float(value), 1.0)
                except ValueError:
                    quality = 0.0
        if part.strip():
            ranges[name] = max(ranges.get(name, 0.0), quality)
    if not ranges:
        return offers[0]

    def quality_of(offer: str) -> float:
        # The most specific range that matches decides, whatever the others say.
        matching = (offer, offer.partition("/")[0] + "/*", "*/*")
        return next((ranges[name] for name in matching if name in ranges), 0.0)

    best = max(offers, key=quality_of)
    return best if quality_of(best) > 0 else None


@dataclass(frozen=True)
class Answer:
    """One image's result, to be written to the response."""

    model: str
    found: Segmentation | Detection  # a segmentor's labels are at the size asked for
    image: npt.NDArray[Any] | None  # (H, W, C) at that size, if an overlay was asked for
    name: str | None  # of the image file in the form, if it came with one
    timings_ms: dict[str, float]
    kept: tuple[int, ...] | None  # ids of the classes asked for; None for all
    logits: npt.NDArray[np.float32] | None  # (classes, h, w), if they were asked for
    image_size: tuple[int, int]  # height and width of the image as sent

    @property
    def class_ids(self) -> tuple[int, ...]:
        """Ids of the classes in the answer."""
        return tuple(range(len(self.found.classes))) if self.kept is None else self.kept


def json_bytes(pixels: int, mask: MaskForm) -> tuple[int, int]:
    """Memory that one image's answer in JSON takes while it is made, and its text, at most."""
    runs = min(pixels, MAX_JSON // _RUN_TEXT)
    corners = min(4 * pixels, MAX_JSON // _CORNER_TEXT)
    made = {"none": 0, "rle": runs * _RUN, "polygons": 8 * pixels + corners * _CORNER}[mask]
    return made, min(24 * pixels, 2 * MAX_JSON)


def check_masks(found: Detection) -> None:
    """Refuse objects, by a 413, whose masks would have more pixels than ``MAX_MASKS``."""
    sides = found.boxes[:, 2:].astype(np.float64) - found.boxes[:, :2]
    pixels = int(sides.prod(axis=1).sum())
    if pixels > MAX_MASKS:
        raise RefusedError(
            413,
            f"The {len(found)} objects' boxes have {pixels:,} pixels, and masks are made of at "
            f"most {MAX_MASKS:,}. Send a smaller image, or raise min_score.",
        )


class Room:
    """Bytes of JSON that an answer may still take."""

    def __init__(self, taken: int = 0) -> None:
        self.left = MAX_JSON - taken

    def take(self, size: int, what: str) -> None:
        """Count bytes in; refused, by a 413, if there are not so many."""
        self.left -= size
        if self.left < 0:
            raise RefusedError(
                413,
                f"The answer has {what}, more than fit into {MAX_JSON:,} bytes of JSON. Ask for "
                f"{PNG}, or size=network, or send smaller images or fewer at a time.",
            )


def render(
    form: Form, answers: Iterator[Answer], opacity: float, mask: MaskForm
) -> tuple[bytes, str]:
    """The response's body, and its media type; a 413 for JSON longer than ``MAX_JSON``.

    Each answer is made when the one before is written.
    """
    if form.output == "json":
        texts: list[bytes] = []
        for answer in answers:
            # Not through a model, which would check every run.
            texts.append(to_json(_document(answer, mask, Room(sum(map(len, texts))))))
        if len(texts) == 1:
            return texts[0], JSON
        return b'{"results":[' + b",".join(texts) + b"]}", JSON
    if form.media_type != ZIP:
        return _file(next(answers), form.output, form.media_type, opacity), form.media_type
    kind = MEDIA_TYPES[form.output][0]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for number, answer in enumerate(answers):
            name = answer.name or "image"
            stem = name.rpartition(".")[0] or name
            file = _file(answer, form.output, kind, opacity)
            archive.writestr(f"{number:03d}-{stem}.{_SUFFIXES[kind]}", file)
    return buffer.getvalue(), ZIP


def _file(answer: Answer, output: Output, kind: str, opacity: float) -> bytes:
    found = answer.found
    if output == "logits":
        return _npz(answer)
    selected = answer.kept is not None and isinstance(found, Segmentation)
    if output == "overlay":
        assert answer.image is not None
        picture = found.overlay(answer.image, opacity)
        if selected:
            picture = np.where(_kept_pixels(answer)[..., None], picture, as_rgb(answer.image))
        return encode(picture, "JPEG" if kind == JPEG else "PNG")
    if not selected:
        return found.mask_png()
    assert isinstance(found, Segmentation)
    image = Image.fromarray(np.where(_kept_pixels(answer), found.labels, OTHER).astype(np.uint8))
    # All 256 colours: with fewer, Pillow would store fewer bits than 255 needs.
    colours = [*found.palette, *[(0, 0, 0)] * (256 - len(found.palette))]
    image.putpalette([value for colour in colours for value in colour])
    return encode(image, "PNG", transparency=OTHER)


def _npz(answer: Answer) -> bytes:
    logits, kept, names = answer.logits, answer.class_ids, answer.found.classes
    assert logits is not None
    if len(logits) < len(names):
        kept = (1,)  # a head with one output gives the logit of class 1
    else:
        logits = logits[list(kept)] if answer.kept is not None else logits
    buffer = io.BytesIO()
    np.savez(
        buffer,
        logits=logits,
        class_ids=np.array(kept, np.int64),
        classes=np.array([names[number] for number in kept]),
        image_size=np.array(answer.image_size, np.int64),
    )
    return buffer.getvalue()


def _kept_pixels(answer: Answer) -> npt.NDArray[np.bool_]:
    """Where a segmentor's labels are of a class that was asked for: (H, W)."""
    assert isinstance(answer.found, Segmentation)
    table = np.zeros(len(answer.found.classes), np.bool_)
    table[list(answer.class_ids)] = True
    labels = answer.found.labels
    kept = np.empty(labels.shape, np.bool_)
    for rows in row_blocks(labels.shape):
        kept[rows] = table[labels[rows]]
    return kept


def _document(answer: Answer, form: MaskForm, room: Room) -> dict[str, Any]:
    """One image's JSON, as `routes.segment` describes it."""
    found, names, palette = answer.found, answer.found.classes, answer.found.palette
    ids = answer.class_ids
    classes: list[dict[str, Any]] = [{"id": n, "name": names[n], "color": palette[n]} for n in ids]
    if isinstance(found, Detection):
        (height, width), counts = found.image_size, np.bincount(found.labels, minlength=len(names))
        own = {
            "resized_to": list(found.resized_to),
            "classes": [{**one, "count": int(counts[one["id"]])} for one in classes],
            "instances": _instances(found, form, room),
        }
    else:
        (height, width), areas = found.labels.shape, found.areas().tolist()
        for one in classes:
            one |= {"area": areas[one["id"]], "share": areas[one["id"]] / found.labels.size}
        own = {"mode": found.mode, "classes": classes, **_masks(answer, found, form, room)}
    return {
        "model": answer.model,
        "file": answer.name,
        "fit": found.fit,
        "height": height,
        "width": width,
        **own,
        "timings_ms": answer.timings_ms,
    }


def _masks(answer: Answer, found: Segmentation, form: MaskForm, room: Room) -> dict[str, Any]:
    """Where a segmentor's classes are, and the segments and objects of a panoptic one."""
    labels = found.labels
    mask: dict[str, Any] | None = None
    if form == "polygons":
        areas = found.areas()
        present = [number for number in answer.class_ids if areas[number]]
        outlines = [{"id": n, "rings": class_rings(labels, n, room=room)} for n in present]
        mask = {"size": list(labels.shape), "polygons": outlines}
    elif form == "rle":
        if answer.kept is not None:
            labels = np.where(_kept_pixels(answer), labels.astype(np.int32), -1)
        mask = run_lengths(labels, room)
    if not isinstance(found, PanopticSegmentation):
        return {"mask": mask}
    objects = found.instances
    return {
        "mask": mask,
        "segments": found.segments_info(),
        "segments_mask": None if form == "none" else run_lengths(found.ids, room),
        "instances": None if objects is None else _instances(objects, form, room),
    }


def _instances(found: Detection, form: MaskForm, room: Room) -> list[dict[str, Any]]:
    size = list(found.image_size)
    entries = found.as_dicts(masks=form == "rle")
    if form == "polygons" and found.has_masks:
        for entry, part, area in zip(entries, found.pasted, found.areas().tolist(), strict=True):
            rings = class_rings(part.pixels, 1, part.top, part.left, room)
            entry |= {"area": area, "mask": {"size": size, "rings": rings}}
    return [
        {"id": number, "area": None, "mask": None, **entry}
        for number, entry in enumerate(entries, 1)
    ]


def run_lengths(labels: npt.NDArray[Any], room: Room | None = None) -> dict[str, list[int]]:
    """Encode labels (H, W) as runs in row-major order, a `RunLengthMask`."""
    room, flat = room or Room(), labels.reshape(-1)
    # In parts, each with the last pixel of the one before.
    starts, count = [np.zeros(1, np.int64)], 1
    for at in range(1, flat.size, _PART):
        part = flat[at - 1 : at + _PART]
        starts.append(np.flatnonzero(part[1:] != part[:-1]) + at)
        count += len(starts[-1])
        room.take(len(starts[-1]) * _RUN_TEXT, f"{count:,} runs or more")
    begin = np.concatenate(starts)
    counts = np.diff(begin, append=flat.size).tolist()
    return {"size": list(labels.shape), "counts": counts, "values": flat[begin].tolist()}


def class_rings(
    labels: npt.NDArray[Any],
    number: int,
    top: int = 0,
    left: int = 0,
    room: Room | None = None,
) -> list[list[int]]:
    """The outlines of a class in labels (H, W) that begin at a row and column of the image.

    They go along the pixels' edges: closed rings ``[x0, y0, x1, y1, ...]`` of pixel corners, (0, 0)
    being the top left corner of the image. A pixel is of the class when its centre is inside an odd
    number of rings (SVG's ``evenodd``). Pixels that touch only at a corner are in different rings.
    """
    room = room or Room()
    inside = np.pad(labels == number, 1)
    nw, ne, sw, se = inside[:-1, :-1], inside[:-1, 1:], inside[1:, :-1], inside[1:, 1:]
    count = nw.astype(np.int8) + ne + sw + se
    saddle = (count == 2) & (nw == se)
    corner = (count == 1) | (count == 3)
    corners = int(np.count_nonzero(corner) + 2 * np.count_nonzero(saddle))
    room.take(corners * _CORNER_TEXT, f"outlines of {corners:,} corners or more")
    y, x = np.nonzero(corner)
    sy, sx = np.nonzero(saddle)
    # At a saddle two rings touch: it is two vertices. Where the north-western pixel is of
    # the class, one joins the left and upper edge, the other the right and lower; else one
    # joins left and lower, the other right and upper.
    falling = nw[sy, sx]
    ys, xs = np.concatenate([y, sy, sy]), np.concatenate([x, sx, sx])
    right = np.concatenate([np.zeros_like(y), np.zeros_like(sy), np.ones_like(sy)])
    lower = np.concatenate([np.zeros_like(y), ~falling, falling]).astype(np.intp)
    # Along each grid line, vertices pair up: first with second, third with fourth.
    across = _pairs(np.lexsort((right, xs, ys)))
    down = _pairs(np.lexsort((lower, ys, xs)))
    return _rings(xs + left, ys + top, across, down)


def _pairs(order: npt.NDArray[np.intp]) -> list[int]:
    partner = np.empty(len(order), np.intp)
    partner[order[0::2]] = order[1::2]
    partner[order[1::2]] = order[0::2]
    return partner.tolist()


def _rings(
    xs: npt.NDArray[np.intp], ys: npt.NDArray[np.intp], across: list[int], down: list[int]
) -> list[list[int]]:
    places = np.stack([xs, ys], axis=1).tolist()
    seen = bytearray(len(places))
    rings = []
    for start in range(len(places)):
        if seen[start]:
            continue
        ring: list[int] = []
        at = start
        while not seen[at]:
            other = across[at]
            seen[at] = seen[other] = 1
            ring += places[at]
            ring += places[other]
            at = down[other]
        rings.append(ring)
    return rings
