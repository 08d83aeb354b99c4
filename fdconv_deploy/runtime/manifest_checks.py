"""What a manifest must say of a segmentor's and a detector's graphs.

Each failure is a ``ValueError`` that says what was expected and what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdconv_deploy.runtime.manifest import Manifest, TensorSpec

# A tensor's name, shape (None where any size is good) and type.
Expected = tuple[str, tuple[int | None, ...], str]


def check_segmentor(manifest: Manifest) -> None:
    """An architecture and a size, and graphs from ``images`` to ``logits`` that fit them."""
    architecture, size = manifest.architecture, manifest.input
    if architecture is None or size is None:
        raise ValueError("a segmentor's manifest must hold 'architecture' and 'input'")
    head, bands = architecture.decode_head, architecture.backbone.in_channels
    counts = [head.num_classes] if head.label_threshold is None else [1, 2]
    _check_names(counts, architecture.classes, architecture.palette)
    for batch in manifest.models:
        images = ("images", (batch, bands, size.height, size.width), "float32")
        logits = ("logits", (batch, head.outputs, None, None), "float32")
        _check_graph(manifest, batch, [images], [logits])


def check_detector(manifest: Manifest) -> None:
    """A detector's architecture and a size, and graphs from images to objects that fit them."""
    detector, size = manifest.detector, manifest.input
    if detector is None or size is None:
        raise ValueError("a detector's manifest must hold 'detector' and 'input'")
    _check_names([detector.bbox_head.num_classes], detector.classes, detector.palette)
    most, side = detector.test.rcnn.max_per_img, detector.mask_size
    for batch in manifest.models:
        inputs: list[Expected] = [
            ("images", (batch, 3, size.height, size.width), "float32"),
            ("sizes", (batch, 2), "float32"),
        ]
        outputs: list[Expected] = [
            ("boxes", (batch, most, 4), "float32"),
            ("scores", (batch, most), "float32"),
            ("labels", (batch, most), "int64"),
            ("count", (batch,), "int64"),
        ]
        if side:
            outputs.append(("masks", (batch, most, side, side), "float32"))
        _check_graph(manifest, batch, inputs, outputs)


def _check_names(
    counts: Sequence[int], names: Sequence[str], palette: Sequence[tuple[int, int, int]]
) -> None:
    for given, what in ((names, "class names"), (palette, "palette colours")):
        if given and len(given) not in counts:
            classes = " or ".join(map(str, counts))
            raise ValueError(f"the head has {classes} classes but there are {len(given)} {what}")


def _check_graph(
    manifest: Manifest, batch: int, inputs: list[Expected], outputs: list[Expected]
) -> None:
    for found, expected, does in (
        (manifest.inputs[batch], inputs, "take"),
        (manifest.outputs[batch], outputs, "give"),
    ):
        if len(found) != len(expected) or not all(map(_fits, found, expected)):
            ports = ("input" if does == "take" else "output") + "s" * (len(expected) > 1)
            raise ValueError(
                f"a {manifest.kind}'s graph of batch {batch} must {does} "
                f"{_number(len(expected))} {ports} {', '.join(map(_named, expected))}, found "
                f"{_listed(found)}"
            )


def _fits(tensor: TensorSpec, expected: Expected) -> bool:
    name, shape, dtype = expected
    return ((tensor.name, tensor.dtype, len(tensor.shape)) == (name, dtype, len(shape))) and all(
        b in (None, a) for a, b in zip(tensor.shape, shape, strict=True)
    )


def _named(expected: Expected) -> str:
    name, shape, dtype = expected
    free = iter("hw")
    sizes = [str(length) if length is not None else next(free) for length in shape]
    return f"{name} ({', '.join(sizes)}{',' * (len(sizes) == 1)}) {dtype}"


def _number(count: int) -> str:
    return ("no", "one", "two", "three", "four", "five")[count]


def _listed(tensors: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{t.name} {t.shape} {t.dtype}" for t in tensors) or "none"
