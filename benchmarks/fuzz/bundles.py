"""Readers of bundles: manifests and graphs."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.fuzz.mutations import ODD, Reader, damage, damage_json

if TYPE_CHECKING:
    from fdconv_deploy.runtime import Session

HEIGHT, WIDTH = 32, 48
GRAPH = "model.b1.onnx"
# The graph is no detector's: where such a manifest is taken, loading the graph is refused.
_DETECTOR_INPUTS = [("images", (1, 3, HEIGHT, WIDTH), "float32"), ("sizes", (1, 2), "float32")]
_DETECTOR_OUTPUTS = [
    *(("boxes", (1, 100, 4), "float32"), ("scores", (1, 100), "float32")),
    *(("labels", (1, 100), "int64"), ("count", (1,), "int64")),
]


@cache
def _files() -> dict[str, bytes]:
    """A bundle of a small network whose layers are all there is to fold, by file name."""
    import torch

    from benchmarks.networks import trained_like
    from fdconv_deploy.config import FCNHeadConfig, FDConvConfig, ResNetConfig, SegmentorConfig
    from fdconv_deploy.export.api import export_network
    from fdconv_deploy.nn import Segmentor

    backbone = ResNetConfig(
        depth=18,
        base_channels=16,
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(0, 1),
        conv=FDConvConfig(kernel_num=2),
    )
    head = FCNHeadConfig(in_channels=(32,), in_index=(1,), channels=8, num_classes=3
    )  # fmt: skip
    names = {"classes": ("road", "car", "sky"), "palette": ((1, 2, 3), (4, 5, 6), (7, 8, 9))}
    torch.manual_seed(0)
    network = Segmentor(SegmentorConfig(backbone=backbone, decode_head=head, **names))  # type: ignore[arg-type]
    trained_like(network, size=64)
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_network(network, Path(folder) / "bundle", size=(HEIGHT, WIDTH))  # type: ignore[arg-type]
        return {file.name: file.read_bytes() for file in bundle.path.iterdir()}


@cache
def _manifests() -> dict[str, bytes]:
    """One bundle's manifest, as of a segmentor of either mode, a detector and a module."""
    from fdconv_deploy.config import DetectorConfig

    told = json.loads(_files()["manifest.json"])
    told["created_at"] = "2026-11-28T00:00:00Z"  # runs are the same on any day
    told["parity"]["batches"]["1"] = [{"name": "logits", "max_abs": 1e-6, "max_rel": 1e-7}]
    slide = {"mode": "slide", "crop_size": [HEIGHT, WIDTH], "stride": [16, 24]}
    detector = DetectorConfig(backbone={"depth": 18})  # type: ignore[arg-type]
    inputs, outputs = (
        [{"name": n, "shape": shape, "dtype": kind} for n, shape, kind in tensors]
        for tensors in (_DETECTOR_INPUTS, _DETECTOR_OUTPUTS)
    )
    kinds = {
        "whole": told,
        "slide": {**told, "architecture": {**told["architecture"], "test": slide}},
        "detector": {
            **{**told, "kind": "detector", "architecture": None},
            **{"detector": detector.model_dump(), "inputs": {1: inputs}, "outputs": {1: outputs}},
        },
        "module": {**told, "kind": "module"},
    }
    return {f"{name}.json": json.dumps(kind).encode() for name, kind in kinds.items()}


def _bundle(folder: Path) -> Path:
    """A copy of the bundle in a folder, made once."""
    bundle = folder / "bundle"
    if not bundle.is_dir():
        bundle.mkdir()
        for name, content in _files().items():
            (bundle / name).write_bytes(content)
    return bundle


def _answer(session: Session) -> None:
    """What a session says of itself, and one answer by the way of its bundle's kind."""
    from PIL import Image

    from fdconv_deploy.runtime.input_files import Source
    from fdconv_deploy.runtime.result_files import Failure, segment_files

    assert session.bundle.digest
    assert all((session.choice, session.operators, session.runner.ways))
    kind = session.bundle.manifest.kind
    if kind == "module":
        session.warm_up()
        return
    picture = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
    if kind == "detector":
        session.detect(picture)
        return
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        Image.fromarray(picture).save(image)
        for result in segment_files(session, [Source(image, Path("a"))], Path(folder) / "out"):
            if isinstance(result, Failure):
                raise result.error
            json.dumps(result.record)
            result.line.encode()


def read_manifest(path: Path) -> None:
    """A bundle of this manifest, opened, and run where it opens."""
    from fdconv_deploy.runtime import Bundle, open_session

    bundle = _bundle(path.parent)
    shutil.copyfile(path, bundle / "manifest.json")
    with open_session(Bundle.open(bundle), threads=1, native=False) as session:
        _answer(session)


# Graphs


def damage_graph(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Mostly a graph of one to four fields changed, whatever they say; else damaged bytes."""
    import onnx

    if rng.random() < 0.3:
        return damage(rng, data, others, [b"weights.bin", b"manifest.json", b"location", b"fdconv"])
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change_field(rng, model)
    return model.SerializeToString()


_NUMBERS = (0, 1, 2, 3, -1, 4, 7, 64, 1 << 16, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))
_TEXTS = (
    *("", "a", "../weights.bin", "/etc/hostname", "manifest.json", "weights.bin", "0", "-1"),
    *("1000000000000", "9" * 30, "1e3", "4", "fdconv", "FrequencyAssembly", "Conv", "Loop"),
)


def _change_field(rng: random.Random, model: Any) -> None:
    """Change one field, of every name as likely as of any other."""
    fields: dict[str, list[tuple[Any, Any, Any]]] = {}
    texts, waiting = list(_TEXTS), [model]
    while waiting:
        message = waiting.pop()
        for field, value in message.ListFields():
            many = value if field.is_repeated else [value]
            fields.setdefault(field.full_name, []).append((message, field, many))
            if field.message_type is not None:
                waiting.extend(many)
            elif field.type == field.TYPE_STRING:
                texts.extend(many)
    message, field, many = rng.choice(fields[rng.choice(sorted(fields))])
    place = rng.randrange(len(many))
    if rng.random() < 0.15:  # gone
        if field.is_repeated:
            del many[place]
        else:
            message.ClearField(field.name)
        return
    if field.message_type is not None:
        others = [one for _, _, more in fields[field.full_name] for one in more]
        chosen = rng.choice(others)
        if not field.is_repeated:
            copied = type(chosen).FromString(chosen.SerializeToString())
            getattr(message, field.name).CopyFrom(copied)
        elif rng.random() < 0.5:
            many.add().CopyFrom(chosen)
        else:
            many[place].CopyFrom(type(chosen).FromString(chosen.SerializeToString()))
        return
    new = _scalar(rng, field, many[place], texts)
    try:
        if field.is_repeated:
            many[place] = new
        else:
            setattr(message, field.name, new)
    except ValueError:  # a number that the field's type does not hold
        message.ClearField(field.name)


def _scalar(rng: random.Random, field: Any, old: Any, texts: list[str]) -> Any:
    if field.enum_type is not None:
        return rng.choice([value.number for value in field.enum_type.values])
    if isinstance(old, str):
        return rng.choice(texts)
    if isinstance(old, bytes):
        return damage(rng, old or b"\0", [old], [b"\0" * 8, b"\xff" * 8])
    if isinstance(old, float):
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf"), old * 2))
    return rng.choice((*_NUMBERS, old + 1, old - 1, old * 2))


def _graphs() -> dict[str, bytes]:
    return {GRAPH: _files()[GRAPH]}


def read_graph(path: Path, *, native: bool) -> None:
    """A bundle of this graph, whose manifest lists it, opened and run."""
    from fdconv_deploy.ops.native import native_library
    from fdconv_deploy.runtime import Bundle, open_session
    from fdconv_deploy.runtime.bundle import sha256_of

    if native and native_library()[0] is None:
        raise RuntimeError("The native operators are not built: python -m fdconv_deploy.ops.native")
    bundle = _bundle(path.parent)
    shutil.copyfile(path, bundle / GRAPH)
    told = json.loads(_files()["manifest.json"])
    told["files"][GRAPH] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    (bundle / "manifest.json").write_text(json.dumps(told))
    with open_session(Bundle.open(bundle), threads=1, native=native) as session:
        _answer(session)


READERS = {
    "manifest": Reader(_manifests, partial(damage_json, odd=ODD), read_manifest, 1500),
    "graph": Reader(_graphs, damage_graph, partial(read_graph, native=False), 1000),
    "graph-native": Reader(_graphs, damage_graph, partial(read_graph, native=True), 1000),
}
