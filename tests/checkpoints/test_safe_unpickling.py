"""Pickles are read as data: every trick of the format ends in a record or a refusal.

Each program below is written opcode by opcode, as an attacker would, and read as a checkpoint's.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from datetime import datetime, timedelta, timezone
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fdconv_deploy.checkpoints import read_checkpoint
from fdconv_deploy.checkpoints.config_parser import parse_config
from fdconv_deploy.checkpoints.safe_unpickling import MAX_DEPTH, Made, plain, unpickle
from fdconv_deploy.errors import CheckpointError
from tests.checkpoints.small import WEIGHTS, bounded_work, saved


class Kind(Enum):
    A = "a"


class Settings(dict):
    pass


class Bound:
    """As mmengine's HistoryBuffer: its state names functions of its class."""

    def __init__(self) -> None:
        self.statistics = {"min": Bound.minimum}

    @staticmethod
    def minimum() -> None:
        raise AssertionError("called")


class Loud:
    """Says so if anything of it is called while it is read."""

    calls: list[str] = []  # noqa: RUF012 - shared on purpose

    def __reduce__(self) -> tuple[Any, ...]:
        return Loud.make, (1,), {"state": 2}, iter([3]), iter([("four", 5)])

    @classmethod
    def make(cls, *_: Any) -> Loud:
        cls.calls.append("make")
        return cls()

    def __setstate__(self, state: Any) -> None:
        self.calls.append("setstate")

    def append(self, item: Any) -> None:
        self.calls.append("append")

    def extend(self, item: Any) -> None:
        self.calls.append("extend")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.calls.append("setitem")


def with_pickle(path: Path, program: bytes) -> Path:
    """A checkpoint of PyTorch whose pickle is ``program``."""
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            is_pickle = entry.filename.endswith("data.pkl")
            target.writestr(entry.filename, program if is_pickle else source.read(entry))
    return path


def read(program: bytes) -> Any:
    return unpickle(io.BytesIO(program), len(program))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_scripts_save_beside_weights_is_inert(
    tmp_path: Path, protocol: int, zipped: bool
) -> None:
    beside = {
        "hub": Bound(),
        "kind": Kind.A,
        "when": datetime(2026, 11, 28, tzinfo=timezone.utc),
        "spent": timedelta(hours=3),
        "args": Namespace(lr=0.1, out=Path("/x")),
        "count": Counter("aab"),
        "settings": Settings(a=1),
        "method": "".join,
        "type": torch.nn.Conv2d,
        "dtype": torch.float16,
        "device": torch.device("cuda:0"),
        "generator": np.random.default_rng(0),
        "exact": Fraction(1, 3),
        "names": {"a"},
        "frozen": frozenset({1}),
        "range": range(3),
        "slice": slice(1, 2),
        "complex": 1j,
        "big": 1 << 100,
        "loud": Loud(),
    }
    path = saved(
        tmp_path / "a.pth",
        {"state_dict": WEIGHTS, "meta": beside, **beside},
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    found = read_checkpoint(path)
    assert found.state_dict.keys() == WEIGHTS.keys()
    assert found.meta["settings"] == {"a": 1}
    assert found.meta["names"] == ["a"]
    assert found.meta["kind"] is None
    assert Loud.calls == []


def test_numpy_values_of_the_meta_are_numbers(tmp_path: Path) -> None:
    values = {
        "array": np.arange(6, dtype=">i4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "scalar": np.float32(1.5),
        "flag": np.bool_(True),
        "object": np.array([Kind.A, None], dtype=object),
        "text": np.array(["a"]),
    }
    for protocol in (2, 5):
        content = {"state_dict": WEIGHTS, "meta": values}
        meta = read_checkpoint(saved(tmp_path / "a", content, pickle_protocol=protocol)).meta
        assert meta["array"] == meta["fortran"] == [[0, 1, 2], [3, 4, 5]]
        assert meta["scalar"] == 1.5
        assert meta["flag"] is True
        assert meta["object"] is meta["text"] is None


HOSTILE = {
    "global": b"cos\nsystem\nX\x04\x00\x00\x00echo\x85R.",
    "inst": b"(X\x04\x00\x00\x00echoios\nsystem\n.",
    "object": b"(cos\nsystem\nX\x04\x00\x00\x00echoo.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04echo\x85R.",
    "dotted": b"\x80\x04\x8c\x02os\x8c\x0bpath.exists\x93)R.",
    "new object": b"\x80\x02csubprocess\nPopen\nX\x02\x00\x00\x00ls\x85\x81.",
    "new object ex": b"\x80\x04csubprocess\nPopen\nX\x02\x00\x00\x00ls\x85}\x92.",
    "builtin": b"c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",
    "builtins": b"cbuiltins\nexec\nX\x01\x00\x00\x001\x85R.",
    "import": b"cimportlib\nimport_module\nX\x02\x00\x00\x00os\x85R.",
    "nested module": b"cos.path\nexists\n)R.",
    "modules": b"csys\nmodules\n.",
    "files": b"cio\nopen\nX\x01\x00\x00\x00x\x85R.",
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_code_that_runs_programs_is_refused_by_name(tmp_path: Path, program: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"names \S+, which is code and not weights"):
        read_checkpoint(with_pickle(tmp_path / "a.pth", program))


def test_nothing_is_imported_and_no_attribute_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    program = b"\x80\x04}(\x8c\x01a\x8c\x0bevil_module\x8c\x05x.y.z\x93)R"
    program += b"\x8c\x01bcevil_module\nrun\n)\x81u."
    found = read(program)
    assert str(found["a"]) == "evil_module.x.y.z"
    assert "evil_module" not in sys.modules


def test_state_and_items_set_nothing_on_classes_or_stand_ins() -> None:
    """BUILD on a class would set attributes on it; on an object call its __setstate__."""
    state = b"}X\x08\x00\x00\x00__init__X\x01\x00\x00\x00xs"
    name = read(b"cevil\nClass\n" + state + b"b.")
    made = read(b"cevil\nClass\n)R" + state + b"b.")
    assert not hasattr(name, "__dict__") or "__init__" not in vars(name)
    assert isinstance(made, Made)
    assert made.state == {"__init__": "x"}
    assert callable(made.__init__)
    assert str(read(b"c__builtin__\ngetattr\n(cevil\nClass\nX\x01\x00\x00\x00mtR)R.")) == "getattr"


def test_extension_codes_of_this_process_are_not_looked_up() -> None:
    import copyreg

    copyreg.add_extension("os", "system", 240)
    try:
        assert isinstance(read(b"\x80\x02\x82\xf0)R."), Made)
    finally:
        copyreg.remove_extension("os", "system", 240)


class Whole(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Conv2d(1, 1, 1)


def rebuilt(state: Any) -> Any:
    raise AssertionError("called")


class Packed:
    def __reduce__(self) -> tuple[Any, ...]:
        return rebuilt, ({"backbone.conv1.weight": torch.ones(2)},)


class Scaled(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (Whole(), r"whole network, pickled as code \(\S*Whole\).*state_dict"),
        ({"model": Whole(), "epoch": 3}, "model is a whole network"),
        ({"ema": Whole(), "model": None}, "ema is a whole network"),
        ({"state_dict": Packed()}, r"state_dict is made by \S*rebuilt, which is code"),
        (Packed(), r"made by \S*rebuilt"),
        (WEIGHTS | {"backbone.x": Packed()}, r"backbone\.x is made by \S*rebuilt"),
        (WEIGHTS | {"backbone.x": torch.ones(2).as_subclass(Scaled)}, r"backbone\.x is made by"),
    ],
)
def test_weights_behind_code_are_refused_by_name(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(saved(tmp_path / "a.pth", content))


@pytest.mark.filterwarnings("ignore:.*(deprecated|prototype)")
def test_quantised_and_nested_tensors_are_refused_by_name(tmp_path: Path) -> None:
    for value, says in (
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised"),
        (torch.nested.nested_tensor([torch.ones(2)]), "nested"),
    ):
        with pytest.raises(CheckpointError, match=rf"backbone\.x is a {says} tensor"):
            read_checkpoint(saved(tmp_path / "a.pth", WEIGHTS | {"backbone.x": value}))


def test_subclasses_of_dicts_with_plain_items_are_state_dicts(tmp_path: Path) -> None:
    found = read_checkpoint(saved(tmp_path / "a.pth", {"model": Settings(WEIGHTS)}))
    assert found.state_dict.keys() == WEIGHTS.keys()


# Small programs that would take for ever, or all memory, if they were followed to the letter.


def nested_pairs(depth: int) -> bytes:
    """``t = (t, t)`` so many times: two to the power of ``depth`` parts, if they are followed."""
    return b")" + b"2\x86" * depth


def claims(size: bytes, stride: bytes, elements: bytes = b"K\x06") -> bytes:
    """A state dict of one tensor over the archive's storage 0."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    return (
        b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n("
        + storage + elements + b"tQK\x00" + size + stride + b"\x89}tRs."
    )  # fmt: skip


HUGE = b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x0f"


BOMBS = {
    "hash of nested pairs": b"\x80\x04}" + nested_pairs(60) + b"K\x01s.",
    "set of nested pairs": b"\x80\x04\x8f(" + nested_pairs(60) + b"\x90.",
    "key of many bits": b"\x80\x02}\x8b\x00\x10\x00\x00" + b"\x7f" * 4096 + b"K\x01s.",
    "length beyond the file": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "length of 64 bits": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"abc.",
    "frame of 64 bits": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f" + b"}.",
    "memo far away": b"\x80\x02}r\xff\xff\xff\x7fj\xff\xff\xff\x7f0.",
    "copies": b"\x80\x02](" + b"K\x01" * 20_000 + b"eq\x00"
    + b"c__builtin__\ntuple\nq\x01" + b"h\x01h\x00\x85R0" * 5_000 + b".",
    "no end": b"\x80\x02" + b"(" * 100_000,
    "deep lists": b"\x80\x02" + b"]" * 30_000 + b"a" * 29_999 + b".",
    "deep calls": b"\x80\x02cx\ny\n" + b")R" * 30_000 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 30_000 + b".",
    "huge size": claims(HUGE + b"\x85", b"K\x00\x85"),
    "huge sizes": claims((HUGE * 3) + b"\x87", b"K\x00K\x00K\x00\x87"),
    "huge stride": claims(b"K\x02\x85", HUGE + b"\x85"),
    "negative stride": claims(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"),
    "negative size": claims(b"J\xff\xff\xff\xff\x85", b"K\x01\x85"),
    "stride too many": claims(b"K\x02\x85", b"K\x01K\x01\x86"),
    "expanded": claims(b"J\xff\xff\xff\x0f\x85", b"K\x00\x85"),
    "many names": b"\x80\x02}("
    + b"".join(b"J%bK\x01" % i.to_bytes(4, "little") for i in range(20_000)) + b"u.",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "mark alone": b"(.",
    "stop alone": b".",
    "memo of nothing": b"\x80\x04\x94.",
    "buffers": b"\x80\x05\x97\x98.",
    "persistent text": b"Pabc\n.",
    "wrong storage": b"\x80\x02}X\x01\x00\x00\x00a(K\x01K\x02tQs.",
}  # fmt: skip


@pytest.mark.parametrize("program", BOMBS.values(), ids=BOMBS)
def test_small_files_take_little_work_and_memory(tmp_path: Path, program: bytes) -> None:
    path = with_pickle(tmp_path / "a.pth", program)
    tracemalloc.start()
    try:
        with bounded_work(5_000_000), pytest.raises(CheckpointError):
            read_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_claims_of_many_tensors_together_are_bounded(tmp_path: Path) -> None:
    """Each claims a MiB of four bytes, which alone is let through."""
    state = {f"backbone.{i}": torch.ones(1).expand(1 << 18) for i in range(100)}
    with pytest.raises(CheckpointError, match="many times"):
        read_checkpoint(saved(tmp_path / "a.pth", state))


def test_meta_is_a_bounded_tree() -> None:
    shared: list[Any] = [1] * 100
    for _ in range(100):
        shared = [shared, shared]
    assert plain({"a": shared})["a"] is not None
    loop: list[Any] = []
    loop.append(loop)
    found, depth = plain(loop), 0
    while found:
        found, depth = found[0], depth + 1
    assert depth == MAX_DEPTH + 1
    array = read(pickle.dumps(np.zeros(100_000), protocol=5))
    assert sum(part is not None for part in plain([array] * 100)) < 3


def test_text_that_cannot_be_printed_is_replaced() -> None:
    read(b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.").encode("utf-8")
    json.dumps(parse_config("a = ['\\ud800', {'\\ud800': 1}]").values, ensure_ascii=False).encode()
    json.dumps(parse_config('{"a": ["\\ud800"]}').values, ensure_ascii=False).encode()
    assert isinstance(read(b"\x80\x02\x8b\x00\x10\x00\x00" + b"\x7f" * 4096 + b"."), Made)


def test_environment_switches_of_torch_change_nothing(tmp_path: Path) -> None:
    """In a process of its own, where torch was told to load everything."""
    target = tmp_path / "touched"
    path = tmp_path / "a.pth"
    program = b"cos\nsystem\nX%b%b\x85R." % (
        len(f"touch {target}").to_bytes(4, "little"),
        f"touch {target}".encode(),
    )
    with_pickle(path, program)
    code = (
        "import sys; from fdconv_deploy.checkpoints import read_checkpoint\n"
        "from fdconv_deploy.errors import CheckpointError\n"
        "try: read_checkpoint(sys.argv[1])\n"
        "except CheckpointError: sys.exit(7)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=False,
        env=os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    )
    assert done.returncode == 7
    assert not target.exists()


def test_ordered_dicts_of_old_pickles(tmp_path: Path) -> None:
    """Protocol 2 of Python 2: pairs as an argument."""
    found = read(b"\x80\x02ccollections\nOrderedDict\n](](U\x01aK\x01e](U\x01bK\x02ee\x85R.")
    assert found == OrderedDict(a=1, b=2)


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


class Opens:
    """Calls a builtin when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.target), "w")


@pytest.mark.parametrize("attack", [Evil, Opens])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("force", [False, True])
def test_code_in_a_file_is_never_run(
    tmp_path: Path, attack: type, zipped: bool, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force:  # torch's own switch to full unpickling must not reach here
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target = tmp_path / "touched"
    content = {"state_dict": WEIGHTS, "meta": {"x": attack(target)}}
    path = saved(tmp_path / "evil.pth", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"names (posix\.system|open|\S*open), .*not weights"):
        read_checkpoint(path)
    assert not target.exists()


def test_raw_pickle_is_not_run_either(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Evil(target), protocol=2))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not target.exists()


def test_stand_ins_do_nothing_with_hostile_state(tmp_path: Path) -> None:
    """A pickle may call the allowed names with anything; no array is built of it."""

    def opcodes(module: str, name: str, arguments: bytes) -> bytes:
        return b"c" + module.encode() + b"\n" + name.encode() + b"\n" + arguments + b"R"

    huge = b"K\x05J\xff\xff\xff\x7f\x86"  # (5, 2**31 - 1)
    for module, name in (
        ("numpy", "ndarray"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy", "dtype"),
        ("argparse", "Namespace"),
        ("mmengine.logging.history_buffer", "HistoryBuffer"),
    ):
        raw = b"\x80\x02}(X\x04\x00\x00\x00meta}X\x01\x00\x00\x00x" + opcodes(module, name, huge)
        raw += b"s" + b"u."
        buffer = io.BytesIO()
        torch.save(WEIGHTS, buffer)
        path = tmp_path / "a.pth"
        with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
            for entry in source.infolist():
                is_pickle = entry.filename.endswith("data.pkl")
                target.writestr(entry.filename, raw if is_pickle else source.read(entry))
        with pytest.raises(CheckpointError, match="holds no weights"):
            read_checkpoint(path)


def test_allow_list_does_not_outlive_a_read(tmp_path: Path) -> None:
    before = set(map(str, torch.serialization.get_safe_globals()))
    read_checkpoint(saved(tmp_path / "a.pth", WEIGHTS))
    assert set(map(str, torch.serialization.get_safe_globals())) == before
