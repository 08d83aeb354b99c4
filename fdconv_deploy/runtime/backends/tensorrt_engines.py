"""The TensorRT engines of a bundle: which there are, what each was built for, which one fits.

Engines are built on the user's machine, for its GPU, after the bundle was exported. They lie in
the bundle's folder ``engines``, beside an index of their own, so that the bundle's manifest and
its hashes stay as they are::

    engines/index.json
    engines/nvidia-h200-trt11.4.0.106-fp16-b1.plan
    engines/nvidia-h200-trt11.4.0.106-fp16-b1.layers.json

Loading an engine runs code that it holds. So one is only ever loaded from inside the bundle and
with the hash that the index gives; whoever can write there can run code here, as with a library.
"""

from __future__ import annotations

import hashlib
import re
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field

from fdconv_deploy.atomic_write import write_atomically
from fdconv_deploy.config import Frozen
from fdconv_deploy.errors import BackendError, BundleError
from fdconv_deploy.runtime.bundle import Bundle, inside, read_versioned
from fdconv_deploy.runtime.manifest import FileInfo, OutputParity, Sha256

FOLDER = "engines"
INDEX = f"{FOLDER}/index.json"
INDEX_VERSION = 1

Hardware = Literal["none", "same_compute_capability", "ampere_plus"]


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


class Machine(Frozen):
    """What an engine is built for and runs on.

    gpu: the name its driver gives; capability: e.g. 90 for 9.0; driver: its version; tensorrt:
    the version of the installed package.
    """

    gpu: str
    capability: int
    driver: str
    tensorrt: str

    def __str__(self) -> str:
        return (
            f"{self.gpu} (compute capability {_dotted(self.capability)}, driver {self.driver}), "
            f"TensorRT {self.tensorrt}"
        )


class Fingerprint(Frozen):
    """All that an engine depends on. ``graph``: see `graph_hash`.

    plugins: whether FDConv layers run in this package's kernels. hardware, version_compatible:
    the compatibility levels it was built at; tf32: whether float32 products may round.
    """

    machine: Machine
    graph: Sha256
    plugins: bool
    hardware: Hardware = "none"
    version_compatible: bool = False
    tf32: bool = False

    def problem(
        self, machine: Machine, graph: str, *, tf32: bool = False, lean: bool = False
    ) -> str | None:
        """Why an engine of this fingerprint does not serve, as a clause; None when it does.

        tf32: whether float32 products may round; lean: whether the runtime is tensorrt_lean.
        """
        mine = self.machine
        if graph != self.graph:
            return "it was built from another graph than this bundle holds now"
        if lean and not self.version_compatible:
            return (
                "it was built without --version-compatible, and tensorrt_lean runs no others; "
                "install tensorrt, or build it so"
            )
        if self.tf32 and not tf32:
            return (
                "it was built with --tf32, which is not asked for now (by tf32=True, or by "
                "FDCONV_TF32=1 in the environment)"
            )
        if mine.tensorrt != machine.tensorrt and not (
            self.version_compatible and _newer_or_same(mine.tensorrt, machine.tensorrt)
        ):
            return f"it was built with TensorRT {mine.tensorrt}, and {machine.tensorrt} is here"
        if self.hardware == "none" and mine.gpu != machine.gpu:
            return f"it was built for another GPU, {mine.gpu}, and {machine.gpu} is here"
        if self.hardware != "ampere_plus" and mine.capability != machine.capability:
            return (
                f"it was built for compute capability {_dotted(mine.capability)}, and "
                f"{_dotted(machine.capability)} is here"
            )
        if self.hardware == "ampere_plus" and machine.capability < 80:
            return f"it needs compute capability 8.0, and {_dotted(machine.capability)} is here"
        if self.hardware == "none" and mine.driver != machine.driver:
            return f"it was built under driver {mine.driver}, and {machine.driver} is here"
        return None


class EngineRecord(Frozen):
    """One engine. ``name``: of its file in the folder; ``parity``: against ONNX Runtime."""

    name: str
    batch: int = Field(ge=1)
    precision: str
    file: FileInfo
    fingerprint: Fingerprint
    built_at: datetime
    build_seconds: float = Field(ge=0)
    parity: tuple[OutputParity, ...] = ()
    kernels: dict[str, int] = Field(default_factory=dict)


class EngineIndex(Frozen):
    """The contents of ``engines/index.json``."""

    format_version: int = INDEX_VERSION
    engines: tuple[EngineRecord, ...] = ()


def _newer_or_same(built: str, here: str) -> bool:
    """Whether a version-compatible engine's version can be read by the one that is here."""
    old, new = ([int(n) for n in re.findall(r"\d+", v)[:2]] for v in (built, here))
    return old[:1] == new[:1] and old <= new


def graph_hash(bundle: Bundle, batch: int) -> str:
    """Of the graph of a batch size and its weights, from the manifest's hashes."""
    manifest = bundle.manifest
    names = [manifest.models[batch], *([manifest.weights] if manifest.weights else [])]
    return hashlib.sha256("".join(manifest.files[n].sha256 for n in names).encode()).hexdigest()


def engine_name(bundle: Bundle, batch: int, machine: Machine) -> str:
    """The file an engine goes by, without its ending: as its graph, ``b1`` or ``512x256-b1``."""
    gpu = re.sub(r"[^a-z0-9]+", "-", machine.gpu.lower()).strip("-") or "gpu"
    version = re.sub(r"[^0-9a-z.]+", "", machine.tensorrt)
    graph = Path(bundle.manifest.models[batch]).stem.removeprefix("model.").replace(".", "-")
    return f"{gpu}-trt{version}-{bundle.manifest.precision}-{graph}"


def has_engines(bundle: Bundle) -> bool:
    """Whether any engine was ever built for a bundle."""
    return (bundle.path / INDEX).exists()


def read_index(bundle: Bundle) -> EngineIndex:
    """The engines there are; BundleError where the index is damaged or of a newer format."""
    if not (bundle.path / INDEX).exists():
        return EngineIndex()
    advice = f"Remove the folder {bundle.path / FOLDER} and run `fdconv build` again."
    return read_versioned(inside(bundle.path, INDEX), EngineIndex, INDEX_VERSION, advice)


def find_engine(
    bundle: Bundle, batch: int, machine: Machine, *, tf32: bool = False, lean: bool = False
) -> EngineRecord:
    """The engine of a batch size that this machine can run, the newest if several.

    tf32: whether its float32 products may round; lean: whether tensorrt_lean shall run it.

    Raises:
        BackendError: there is none, with what there is and why it does not serve.
        BundleError: the index is damaged.
    """
    records = [r for r in read_index(bundle).engines if r.batch == batch]
    graph = graph_hash(bundle, batch)
    reasons = []
    for record in sorted(records, key=lambda r: r.built_at, reverse=True):
        reason = record.fingerprint.problem(machine, graph, tf32=tf32, lean=lean)
        if reason is None:
            return record
        reasons.append(f"{record.name}: {reason}")
    found = "none was built yet" if not reasons else "there is " + "; ".join(reasons)
    raise BackendError(
        f"The bundle {bundle.path} has no engine of batch {batch} for this machine, {machine}: "
        f"{found}. Build one: `fdconv build {bundle.path}`. Until then, backend "
        "'onnxruntime-cuda' or 'onnxruntime-cpu' runs this bundle."
    )


def read_engine(bundle: Bundle, record: EngineRecord) -> bytes:
    """An engine's bytes; BundleError where they are not of its record's length and hash."""
    name = f"{FOLDER}/{record.name}.plan"
    advice = f"Build it again: `fdconv build {bundle.path} --force`."
    try:
        data = inside(bundle.path, name).read_bytes()
    except BundleError as error:
        raise BundleError(f"The engine {name!r} cannot be opened: {error} {advice}") from error
    if len(data) != record.file.bytes or hashlib.sha256(data).hexdigest() != record.file.sha256:
        raise BundleError(
            f"The engine {name!r} of the bundle {bundle.path} is not the one that was built: its "
            f"sha256 differs from that in {INDEX}. It is not loaded, since an engine is code. "
            f"{advice}"
        )
    return data


def keep_engine(bundle: Bundle, record: EngineRecord, plan: bytes, layers: str | None) -> None:
    """Write a built engine into the bundle and list it, in place of one of its name.

    layers: what TensorRT says of its layers, JSON.
    """
    folder = engines_folder(bundle)
    assert hashlib.sha256(plan).hexdigest() == record.file.sha256
    if layers is not None:
        write_atomically(folder / f"{record.name}.layers.json", layers.encode())
    try:
        others = [r for r in read_index(bundle).engines if r.name != record.name]
    except BundleError:
        others = []  # what it listed cannot be trusted any more
    index = EngineIndex(engines=(*others, record))
    write_atomically(folder / f"{record.name}.plan", plan)
    write_atomically(bundle.path / INDEX, (index.model_dump_json(indent=2) + "\n").encode())


def engines_folder(bundle: Bundle) -> Path:
    """The folder of engines, made if need be; BundleError where it leads outside the bundle."""
    folder = bundle.path / FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise BundleError(
            f"The folder {folder} cannot be made ({error.strerror}). Engines are stored in the "
            "bundle: make it writable, or copy it to where you may write."
        ) from error
    if not folder.resolve().is_relative_to(bundle.path.resolve()):
        raise BundleError(f"{folder} leads outside the bundle. Remove the link.")
    return folder
