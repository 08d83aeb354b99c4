"""Mutate the files that the readers take, and see that each is read or refused with a sentence.

    python -m benchmarks.fuzz_readers --runs 8000 --json result.json
    python -m benchmarks.fuzz_readers --only checkpoint-zip --first 117 --runs 1 --keep folder

A reader is a row of `READERS`: where its seeds come from, how one of them is damaged, and the call
that a damaged one is given to. Anything but an answer or an error of this project counts as a
failure, and so does a run longer than ``--seconds`` or a process larger than ``--megabytes``. Runs
are made by child processes, many each, so that one that hangs or dies ends no more than itself.
Run N of a reader is the same whenever it is made.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pickle
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.options import keep, script
from fdconv_deploy.benchmark import machine
from fdconv_deploy.errors import FDConvError

ROOT = Path(__file__).parents[1]
REAL = ROOT / "tests/real_packages"
BATCH = 2000  # runs of one child process

Seeds = Callable[[], dict[str, bytes]]
Mutate = Callable[[random.Random, bytes, list[bytes]], bytes]


@dataclass(frozen=True)
class Reader:
    """One reader under test.

    Attributes:
        seeds: whole files, by the names that they are to have.
        mutate: makes a damaged one of a seed, given all seeds.
        read: what is done with the damaged file; it must return, or raise `FDConvError`.
    """

    seeds: Seeds
    mutate: Mutate
    read: Callable[[Path], object]


# Mutations

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


# Readers


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

    from fdconv_deploy.checkpoints import render

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
    from fdconv_deploy.checkpoints import parse_config, read_checkpoint
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
    from fdconv_deploy.checkpoints import read_config, report_on

    _show(report_on(_shapes(), config=read_config(path)))


READERS = {
    "checkpoint-zip": Reader(partial(_saved, zipped=True), damage_zip, read_checkpoint_file),
    "checkpoint-legacy": Reader(
        partial(_saved, zipped=False), damage_pickle, read_checkpoint_file
    ),
    "checkpoint-real": Reader(
        partial(_files, "mmengine/files/*.pth", "lightning/files/*", "fvcore/files/*.pth"),
        damage_zip,
        read_checkpoint_file,
    ),
    "checkpoint-arrays": Reader(_arrays, damage_pickle, read_checkpoint_file),
    "checkpoint-safetensors": Reader(_safetensors, damage_safetensors, read_checkpoint_file),
    "checkpoint-index": Reader(_index, damage_text, read_index),
    "config": Reader(_configs, damage_text, read_config_file),
}  # fmt: skip


# One run, in a child process


def mutated(name: str, number: int) -> tuple[str, bytes]:
    """The file of a reader's run: its name and content."""
    reader = READERS[name]
    rng = random.Random(f"{name}/{number}")
    seeds = _seeds(name)
    file = rng.choice(sorted(seeds))
    return file, reader.mutate(rng, seeds[file], list(seeds.values()))


@cache
def _seeds(name: str) -> dict[str, bytes]:
    return READERS[name].seeds()


def child(name: str, numbers: range, megabytes: int) -> None:
    """Make runs, saying before each that it begins and after each how it ended, as JSON lines."""
    import torch

    torch.set_num_threads(1)
    _seeds(name)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + (megabytes << 20), -1))
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            print(json.dumps({"begins": number}), flush=True)
            print(json.dumps(run_once(name, number, Path(folder))), flush=True)


def run_once(name: str, number: int, folder: Path) -> dict[str, Any]:
    """Make one run: how it ended (read, refused or failed), what was said, how long it took."""
    file, content = mutated(name, number)
    path = folder / file
    path.write_bytes(content)
    start = time.perf_counter()
    how, detail = "read", ""
    try:
        READERS[name].read(path)
    except FDConvError as error:
        how, detail = "refused", str(error).replace(str(folder), "")
        try:
            detail.encode()
        except UnicodeEncodeError:
            how = "failed"  # a message that cannot be printed is none
    except BaseException:  # whatever it is, it is what is looked for here
        how, detail = "failed", traceback.format_exc()
    finally:
        path.unlink()
    return {
        "number": number,
        "how": how,
        "detail": detail,
        "seconds": time.perf_counter() - start,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


# All runs


def child_command(name: str, batch: list[int], options: argparse.Namespace) -> list[str]:
    """What starts the child process of one batch of runs."""
    return [
        *(sys.executable, "-m", "benchmarks.fuzz_readers", "--child", "--only", name),
        *("--first", str(batch[0]), "--runs", str(len(batch))),
        *("--megabytes", str(options.megabytes)),
    ]


def runs_of(name: str, numbers: range, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How each run ended. One that hangs or kills its process is ended and reported."""
    left = list(numbers)
    while left:
        batch, left = left[:BATCH], left[BATCH:]
        command = child_command(name, batch, options)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        assert process.stdout is not None
        current: int | None = None
        try:
            for line in said(process, options.seconds):
                if line is None:
                    break
                end = json.loads(line)
                current = end.get("begins")
                if "how" in end:
                    yield end
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if current is not None:
            how = "hung" if process.returncode == -9 else f"ended with {process.returncode}"
            yield {"number": current, "how": "failed", "detail": f"its process {how}"}
            left = [number for number in batch if number > current] + left
        elif process.returncode != 0:
            raise SystemExit(f"The child process of {name} stopped between runs.")


def said(process: subprocess.Popen[bytes], seconds: float) -> Iterator[bytes | None]:
    """What a process says; None if it says nothing for so long. It may take longer to start."""
    patience = 300.0
    assert process.stdout is not None
    rest = b""
    while True:
        ready, _, _ = select.select([process.stdout], [], [], patience)
        if not ready:
            yield None
            return
        more = process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
        if not more:
            process.wait()
            return
        *lines, rest = (rest + more).split(b"\n")
        yield from lines
        patience = seconds


def summary(name: str, ends: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, the slowest run and the largest process of one reader."""
    count = {how: sum(end["how"] == how for end in ends) for how in ("read", "refused", "failed")}
    seconds = [end["seconds"] for end in ends if "seconds" in end]
    return {
        "reader": name,
        "runs": len(ends),
        **count,
        "slowest_seconds": round(max(seconds, default=0), 2),
        "peak_mb": round(max((end.get("peak_mb", 0) for end in ends), default=0)),
        "failures": [
            {"number": end["number"], "detail": end["detail"]}
            for end in ends
            if end["how"] == "failed"
        ],
    }


def main() -> None:
    parser = script(__doc__, threads=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=int, default=8000, help="of all readers together")
    parser.add_argument("--only", choices=READERS, action="append", help="this reader; repeatable")
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--seconds", type=float, default=60, help="longest run that is no hang")
    parser.add_argument("--megabytes", type=int, default=2048, help="largest process")
    parser.add_argument("--keep", type=Path, help="write the mutated files here, and run nothing")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.only or list(READERS)
    each = -(-options.runs // len(names))
    numbers = range(options.first, options.first + each)
    if options.child:
        child(names[0], numbers, options.megabytes)
        return
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        for name in names:
            for number in numbers:
                file, content = mutated(name, number)
                (options.keep / f"{name}_{number}_{file}").write_bytes(content)
        return
    results = []
    for name in names:
        found = summary(name, list(runs_of(name, numbers, options)))
        print(
            f"{name}: {found['runs']} runs, {found['read']} read, {found['refused']} refused, "
            f"{found['failed']} failed; slowest {found['slowest_seconds']} s, "
            f"peak {found['peak_mb']} MB",
            flush=True,
        )
        for failure in found["failures"]:
            print(f"  run {failure['number']}: {failure['detail']}")
        results.append(found)
    keep(options, "fuzz-readers", machine.describe(1), {"readers": results})
    bad = [r for r in results if r["failed"] or r["peak_mb"] > options.megabytes]
    if bad:
        raise SystemExit(f"Failures in {', '.join(r['reader'] for r in bad)}.")


if __name__ == "__main__":
    main()
