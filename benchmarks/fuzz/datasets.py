"""Readers of images, label images and annotations."""

from __future__ import annotations

import io
import json
import random
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.fuzz.mutations import REAL, Reader, damage, damage_image, damage_json
from fdconv_deploy.coco_rle import encode
from fdconv_deploy.errors import FDConvError

HEIGHT, WIDTH = 40, 60
CLASSES = ("road", "car")


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def _picture() -> Image.Image:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(
        np.stack([rows * 6, columns * 4, rows ^ columns], axis=2).astype(np.uint8)
    )


# COCO


@cache
def _mask() -> dict[str, Any]:
    mask = np.zeros((HEIGHT, WIDTH), np.bool_)
    mask[5:20, 7:40] = True
    return dict(encode(mask))


def _coco() -> dict[str, bytes]:
    """Every kind of mask in six objects of three images; boxes alone; ids that are texts."""
    box = [5, 5, 25, 5, 25, 25, 5, 25]
    runs = {"size": [HEIGHT, WIDTH], "counts": [500, 300, HEIGHT * WIDTH - 800]}
    masks: list[Any] = [[box], [box, [1, 1, 9, 1, 9, 9]], _mask(), runs, [], [runs]]
    objects = [
        {
            "id": number + 1,
            "image_id": number % 3 + 1,
            "category_id": number % 2 + 1,
            "bbox": [5, 5, 20, 20],
            "area": 400,
            "iscrowd": int(number in (3, 5)),
            "segmentation": mask,
        }
        for number, mask in enumerate(masks)
    ]
    images = [
        {"id": n + 1, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH} for n in range(3)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
    whole = {"info": {}, "images": images, "categories": categories, "annotations": objects}
    boxes = [{k: v for k, v in one.items() if k != "segmentation"} for one in objects]
    texts = [{**one, "id": f"a{one['id']}", "image_id": str(one["image_id"])} for one in objects]
    named = [{**one, "id": str(one["id"]), "file_name": f"D:\\x\\{n}.png"} for n, one in
             enumerate(images)]  # fmt: skip
    kinds = {
        "masks.json": whole,
        "boxes.json": {**whole, "annotations": boxes},
        "texts.json": {**whole, "images": named, "annotations": texts},
    }
    return {name: json.dumps(told).encode() for name, told in kinds.items()}


_COCO_ODD: list[Any] = [
    {"size": [HEIGHT, WIDTH], "counts": "abc"},
    {"size": [1e9, 1e9], "counts": [1]},
    {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH, 0]},
    {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]},
    [[1e7, 0, 0, 1e7, 1e7, 1e7]],
    [[-1e6, -1e6, 1e6, 1e6, 0, 3]],
    [[0, 0] * 2000],
]


def read_annotations(path: Path) -> None:
    """As ``fdconv evaluate``: all that is found in a file, its images, and both scores."""
    from fdconv_deploy.evaluation.coco import average_precision, read_coco

    folder = path.parent / "images"
    if not folder.is_dir():
        folder.mkdir()
        for number in range(3):
            _picture().save(folder / f"{number}.png")
    data = read_coco(path, folder)
    count = sum(1 for _ in data)
    findings = [*data.checked.left_out, *data.checked.noted]
    "\n".join(map(str, findings)).encode()
    json.dumps([vars(finding) for finding in findings]).encode()
    try:
        categories = data.category_ids(CLASSES)
    except FDConvError:
        categories = [entry["id"] for entry in data.truth["categories"]]
    answers = [
        {
            "image_id": image,
            "category_id": category,
            "bbox": [5, 5, 21, 19],
            "score": 0.9,
            "segmentation": _mask(),
        }
        for image in range(1, count + 1)
        for category in categories
    ]
    for kind in ("bbox", "segm") if data.checked.has_masks else ("bbox",):
        found = [dict(answer) for answer in answers]
        json.dumps(average_precision(data, found, categories, kind).as_dict())  # type: ignore[arg-type]


# Run lengths


def _run_lengths() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    masks = [rng.random((9, 7)) < 0.5, np.ones((3, 4), np.bool_), np.zeros((3, 4), np.bool_)]
    kinds = [_mask(), *(dict(encode(mask)) for mask in masks)]
    return {f"{number}.json": json.dumps(told).encode() for number, told in enumerate(kinds)}


def damage_run_lengths(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Half of the time a mask whose characters are damaged, else any damaged JSON."""
    if rng.random() < 0.5:
        value = [json.loads(data)]
        for _ in range(rng.choice((1, 1, 2))):
            damaged = damage_json(rng, json.dumps(value[0]).encode(), others, _COCO_ODD)
            with_json = _parsed(damaged)
            value = [with_json]
        return json.dumps(value[0]).encode()
    told = json.loads(data)
    counts = damage(rng, told["counts"].encode(), others, [b"0", b"o", b"P" * 12, b"\xff"])
    return json.dumps({**told, "counts": counts.decode("latin-1")}).encode()


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_run_lengths(path: Path) -> None:
    """A mask and its area. What is none is a ``ValueError`` with a sentence, as documented."""
    from fdconv_deploy.coco_rle import area, decode

    told = json.loads(path.read_bytes())
    try:
        assert decode(told).sum() == area(told)
    except ValueError as error:
        if not str(error).startswith(("the run lengths ", "these are not COCO's ")):
            raise  # numpy's, not ours
        raise FDConvError(str(error)) from error


# Label images


def _label_images() -> dict[str, bytes]:
    labels = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 3
    kinds = {
        "gray": Image.fromarray(labels.astype(np.uint8)),
        "deep": Image.fromarray(labels.astype(np.uint16)),
        "palette": Image.fromarray(labels.astype(np.uint8)).convert("P"),
        "bits": Image.fromarray(labels > 0),
    }
    # Data sets' masks are PNG files; Pillow goes by what a file begins with, not by its name.
    return {f"{name}.png": _encoded(image, "PNG") for name, image in kinds.items()} | {
        "tiff.png": _encoded(kinds["deep"], "TIFF"),
        "packed.png": _encoded(kinds["gray"], "TIFF", compression="tiff_lzw"),
        "bmp.png": _encoded(kinds["gray"], "BMP"),
    }


def read_label_image(path: Path) -> None:
    """As ``fdconv evaluate``: what a mask holds, whether those are classes."""
    from fdconv_deploy.evaluation.class_mapping import LabelRule
    from fdconv_deploy.evaluation.datasets import Pair, Samples

    image = path.parent / "image.bmp"
    if not image.is_file():
        _picture().save(image)
    samples = Samples([Pair(image, path)], LabelRule(3))
    samples.check()
    (sample,) = samples
    assert sample.truth.shape == (HEIGHT, WIDTH)


def _label_maps() -> dict[str, bytes]:
    told = {"0": None, "7": "road", "8": 1, "255": None}
    return {"a.json": json.dumps(told).encode(), "b.json": b"\xef\xbb\xbf{}"}


def damage_label_map(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Damaged JSON, with Windows' mark before it or not."""
    if data.startswith(b"\xef\xbb\xbf"):
        return b"\xef\xbb\xbf" + damage_json(rng, data[3:], others)
    return damage_json(rng, data, others)


def read_map(path: Path) -> None:
    """As ``fdconv evaluate --label-map``."""
    from fdconv_deploy.evaluation.class_mapping import read_label_map

    read_label_map(path, CLASSES)


# Images


def _images() -> dict[str, bytes]:
    picture = _picture()
    deep = Image.fromarray(np.asarray(picture)[:, :, 0].astype(np.uint16) * 257)
    alpha = picture.convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a picture"
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "plain.png": (picture, "PNG", {}),
        "gray.png": (picture.convert("L"), "PNG", {}),
        "palette.png": (picture.convert("P"), "PNG", {"transparency": 3}),
        "alpha.png": (alpha, "PNG", {"exif": exif}),
        "deep.png": (deep, "PNG", {}),
        "plain.jpg": (picture, "JPEG", {"exif": exif}),
        "progressive.jpg": (picture, "JPEG", {"progressive": True, "quality": 60}),
        "cmyk.jpg": (picture.convert("CMYK"), "JPEG", {}),
        "plain.webp": (picture, "WEBP", {"exif": exif}),
        "alpha.webp": (alpha, "WEBP", {"lossless": True}),
        "moving.webp": (picture, "WEBP", {"save_all": True, "append_images": [alpha]}),
        "plain.bmp": (picture, "BMP", {}),
        "palette.bmp": (picture.convert("P"), "BMP", {}),
        "plain.tif": (picture, "TIFF", {"exif": exif}),
        "lzw.tif": (picture, "TIFF", {"compression": "tiff_lzw"}),
        "jpeg.tif": (picture, "TIFF", {"compression": "jpeg"}),
        "packed.tif": (picture.convert("P"), "TIFF", {"compression": "tiff_adobe_deflate"}),
        "deep.tif": (deep, "TIFF", {"compression": "tiff_deflate"}),
        "pages.tif": (picture, "TIFF", {"save_all": True, "append_images": [deep]}),
    }
    return {name: _encoded(image, kind, **options) for name, (image, kind, options) in
            kinds.items()}  # fmt: skip


def read_picture(path: Path) -> None:
    """By its path and as its bytes, which must be read alike, in a folder, and its size alone."""
    from fdconv_deploy.export.options import Pictures
    from fdconv_deploy.runtime.images import image_size, read_image

    whole = path.read_bytes()
    try:
        image = read_image(path)
    except FDConvError:
        try:
            read_image(whole)
        except FDConvError:
            image_size(path)  # may be told by a header that is whole
            raise
        raise AssertionError("Refused by its path, and read as bytes.") from None
    assert image.shape == (*image_size(path), 3)
    assert np.array_equal(image, Pictures([path])[0])
    assert np.array_equal(image, read_image(whole))


# Arrays and images of any bands


def _bands() -> dict[str, bytes]:
    """Files that GDAL and tifffile wrote, named by their bands, and NumPy's arrays."""
    found = {
        f"{path.stem.split('-')[2]}_{path.name}": path.read_bytes()
        for path in sorted((REAL / "geotiff/files").glob("*.tif"))
    }
    rng = np.random.default_rng(0)
    for number, kind in ((1, "<f4"), (4, ">u2"), (12, "|u1")):
        buffer = io.BytesIO()
        np.save(buffer, rng.integers(0, 99, (9, 7, number)).astype(kind))
        found[f"{number}_array.npy"] = buffer.getvalue()
    pictures = _images()
    return found | {"4_alpha.png": pictures["alpha.png"], "1_deep.png": pictures["deep.png"]}


def damage_bands(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Damaged as pictures are; of a NumPy file mostly its header."""
    if not data.startswith(b"\x93NUMPY") or rng.random() < 0.2:
        return damage_image(rng, data, others)
    end = 10 + int.from_bytes(data[8:10], "little")
    odd = [b"9" * 15, b"-1", b"()", b"'|O'", b"'<f8'", b"'<M8[s]'", b"True", b"(" * 300]
    header = damage(rng, data[10:end].strip(), others, odd)
    return data[:8] + len(header).to_bytes(4, "little")[:2] + header + data[end:]


def read_bands(path: Path) -> None:
    """By its path and as its bytes, in each way of loading that takes other bands than three."""
    from fdconv_deploy.config import Preprocessing
    from fdconv_deploy.runtime.images import load_image

    number = int(path.name.split("_")[0])
    refused = None
    for loading in ("bands", "unchanged", "grayscale"):
        bands = 1 if loading == "grayscale" else number
        how = Preprocessing(mean=(0.0,) * bands, std=(1.0,) * bands, loading=loading)  # type: ignore[arg-type]
        try:
            image = load_image(path, how)
            assert image.ndim == 3
            assert image.dtype.kind in "uif"
            assert image.shape[2] == bands
            assert np.array_equal(image, load_image(path.read_bytes(), how), equal_nan=True)
        except FDConvError as error:
            if loading == "bands":
                refused = error
    if refused is not None:
        raise refused


READERS = {
    "coco": Reader(_coco, partial(damage_json, odd=_COCO_ODD), read_annotations, 3500),
    "run-lengths": Reader(_run_lengths, damage_run_lengths, read_run_lengths, 2500),
    "label-image": Reader(_label_images, damage_image, read_label_image, 1500),
    "label-map": Reader(_label_maps, damage_label_map, read_map, 500),
    "image": Reader(_images, damage_image, read_picture, 3000),
    "image-bands": Reader(_bands, damage_bands, read_bands, 1500),
}
