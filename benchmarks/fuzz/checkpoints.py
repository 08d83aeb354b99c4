"""Readers of checkpoints and configs."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import random
import shutil
import zipfile
from collections import OrderedDict
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.fuzz.mutations import REAL, Reader, damage, damage_text
from fdconv_deploy.errors import FDConvError

PICKLE = [
    *(bytes([code]) for code in b"(.012FNKMJGITUVXY]abcdeghijlopqrstu})"),
    *(bytes([code]) for code in range(0x80, 0x99)),
    *(
        name.encode()
        for name in (
            "ctorch._utils\n_rebuild_tensor_v2\n",
            "ctorch._utils\n_rebuild_parameter\n",
            "ctorch\nFloatStorage\n",
            "c__builtin__\ngetattr\n",
            "c__builtin__\nset\n",
            "ccollections\nOrderedDict\n)R",
            "c_codecs\nencode\n",
            "cnumpy\ndtype\n",
            "cos\nsystem\n",
            "X\x05\x00\x00\x00model",
        )
    ),
]
damage_pickle = partial(damage, tokens=PICKLE)


def damage_zip(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Mostly an archive that is whole and holds a damaged entry, else a damaged archive."""
    if rng.random() < 0.3:
        return damage_pickle(rng, data, others)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as target:
        entries = source.infolist()
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        chosen = rng.choice(pickles if rng.random() < 0.8 else entries)
        for entry in entries:
            content = source.read(entry)
            if entry is chosen:
                content = damage_pickle(rng, content or b"\0", others)
            target.writestr(entry.filename, content)
    return buffer.getvalue()


def damage_safetensors(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Mostly a damaged header of the length it says."""
    if rng.random() < 0.4:
        return damage(rng, data, others, PICKLE)
    length = int.from_bytes(data[:8], "little")
    header = damage_text(rng, data[8 : 8 + length], others)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _content() -> dict[str, Any]:
    import numpy as np
    import torch

    weights = {
        "backbone.conv1.weight": torch.arange(6.0).reshape(2, 3),
        "backbone.layer1.0.conv1.weight": torch.ones(2, 2, 3, 3).half(),
        "decode_head.conv_seg.weight": torch.ones(2, 2, 1, 1).expand(2, 2, 1, 1),
        "decode_head.steps": torch.tensor(3),
    }
    return {
        "state_dict": OrderedDict(weights),
        "meta": {
            "cfg": "model = dict(type='EncoderDecoder', backbone=dict(depth=18))",
            "mmengine_version": "0.10.7",
            "dataset_meta": {"classes": ("a", "b"), "palette": np.array([[1, 2, 3], [4, 5, 6]])},
            "when": datetime(2026, 11, 28),
        },
        "message_hub": {"loss": np.arange(3.0), "last": np.float32(1), "names": {"x"}},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]},
        "ema": {f"module.{name}": value for name, value in weights.items()},
        "criterion": {"criterion.pos_weight": torch.ones(2)},
    }


def _saved(*, zipped: bool) -> dict[str, bytes]:
    import torch

    found: dict[str, bytes] = {}
    for protocol in (2, 3, 4, 5):
        buffer = io.BytesIO()
        options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
        torch.save(_content(), buffer, **options)  # type: ignore[arg-type]
        found[f"protocol_{protocol}.pth"] = buffer.getvalue()
    return found


def _files(*patterns: str) -> dict[str, bytes]:
    paths = [path for pattern in patterns for path in sorted(REAL.glob(pattern))]
    return {f"{i}_{path.name}": path.read_bytes() for i, path in enumerate(paths)}


def _arrays() -> dict[str, bytes]:
    import numpy as np

    model = {"backbone.conv1.weight": np.ones((2, 3), np.float32), "decode_head.b": np.ones(2)}
    content = {"model": model, "__author__": "a", "seen": [np.int64(1)]}
    own = {f"{n}.pkl": pickle.dumps(content, protocol=n) for n in (2, 3, 4, 5)}
    return own | _files("fvcore/files/*.pkl")


def _safetensors() -> dict[str, bytes]:
    from safetensors.torch import save

    state = {name: value.contiguous() for name, value in _content()["state_dict"].items()}
    metadata = {"config": "model = dict()", "classes": '["a", "b"]', "palette": "[[1, 2, 3]]"}
    return {"a.safetensors": save(state, metadata)}


def _index() -> dict[str, bytes]:
    return _files("huggingface_hub/files/safetensors/*.json", "huggingface_hub/files/bin/*.json")


def read_index(path: Path) -> None:
    """The index beside its files, none of which is damaged."""
    for file in REAL.glob("huggingface_hub/files/*/*-of-*"):
        shutil.copy(file, path.parent)
    read_checkpoint_file(path)


def _show(report: Any) -> None:
    from rich.console import Console

    from fdconv_deploy.checkpoints.inspect import render

    render(report, Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8")))
    report.model_dump_json().encode()


def read_checkpoint_file(path: Path) -> None:
    """As ``fdconv inspect``, and once more for each choice of weights."""
    from fdconv_deploy.checkpoints import inspect_checkpoint, read_checkpoint

    found = read_checkpoint(path)
    for name in found.other_weights[:3]:
        with contextlib.suppress(FDConvError):
            read_checkpoint(path, weights=name)
    _show(inspect_checkpoint(path))


@cache
def _shapes() -> dict[str, Any]:
    from fdconv_deploy.checkpoints import read_checkpoint
    from fdconv_deploy.demo import packaged_checkpoint

    state = read_checkpoint(packaged_checkpoint()).state_dict
    return {name: value.to("meta") for name, value in state.items()}


def _configs() -> dict[str, bytes]:
    from fdconv_deploy.checkpoints import read_checkpoint
    from fdconv_deploy.checkpoints.config_parser import parse_config
    from fdconv_deploy.demo import packaged_checkpoint, packaged_detector

    metas = [read_checkpoint(path()).meta for path in (packaged_checkpoint, packaged_detector)]
    streets, detector = (meta.get("cfg") or meta["config"] for meta in metas)
    old = (
        "norm_cfg = dict(type='SyncBN', requires_grad=True)\n"
        "img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], "
        "to_rgb=True)\ncrop_size = (512, 512)\ntest_pipeline = [dict(type='MultiScaleFlipAug', "
        "img_scale=(2048, 512), transforms=[dict(type='Normalize', **img_norm_cfg)])]\n" + streets
    )
    values = json.dumps(parse_config(streets).values, default=str)
    return {
        "streets.py": streets.encode(),
        "detector.py": detector.encode(),
        "old.py": old.encode(),
        "streets.json": values.encode(),
    }


def read_config_file(path: Path) -> None:
    """The config beside the packaged network's shapes, as ``fdconv inspect --config``."""
    from fdconv_deploy.checkpoints.inspect import report_on
    from fdconv_deploy.checkpoints.loading import read_config

    _show(report_on(_shapes(), config=read_config(path)))


READERS = {
    "checkpoint-zip": Reader(partial(_saved, zipped=True), damage_zip, read_checkpoint_file, 1250),
    "checkpoint-legacy": Reader(
        partial(_saved, zipped=False), damage_pickle, read_checkpoint_file, 1250
    ),
    "checkpoint-real": Reader(
        partial(_files, "mmengine/files/*.pth", "lightning/files/*", "fvcore/files/*.pth"),
        damage_zip,
        read_checkpoint_file,
        1250,
    ),
    "checkpoint-arrays": Reader(_arrays, damage_pickle, read_checkpoint_file, 1250),
    "checkpoint-safetensors": Reader(_safetensors, damage_safetensors, read_checkpoint_file, 1250),
    "checkpoint-index": Reader(_index, damage_text, read_index, 1250),
    "config": Reader(_configs, damage_text, read_config_file, 1250),
}
