"""A finished bundle against the PyTorch network, on real images or packaged ones."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fdconv_deploy.checkpoints import LoadedDetector, LoadedSegmentor, load_checkpoint
from fdconv_deploy.checkpoints.loading import recorded_weights
from fdconv_deploy.config import Frozen
from fdconv_deploy.errors import ExportError
from fdconv_deploy.export.validation.sample_inputs import InputSource, network_of
from fdconv_deploy.export.validation.tolerance import TOLERANCES
from fdconv_deploy.export.validation.verdict import Judge, Subject, Verdict
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.ops.native import native_library
from fdconv_deploy.runtime import Session


def verify_bundle(
    session: Session,
    network: Segmentor | Detector,
    images: Sequence[tuple[str, NDArray[np.uint8]]] = (),
    *,
    tolerance: float | None = None,
) -> list[Verdict]:
    """Judge a bundle as an export judges its graphs.

    The whole is run by the session. The layers of a float32 graph are run by ONNX Runtime on
    the CPU, in a process of their own, with native operators where the session has them.

    Args:
        session: on the bundle.
        network: what it was exported from, in eval mode.
        images: (name, HxWx3 uint8 RGB); each is brought to the bundle's size as the runtime
            does it, and both sides get the same tensor. Packaged pictures if none are given,
            and where these images cannot tell.
        tolerance: what export allows at the bundle's precision if not given.

    Returns:
        One verdict on all images of each input size that they take, or one per input and batch
        size on packaged pictures.

    Raises:
        ExportError: the bundle is of another network, or its answers have another form.
    """
    manifest = session.bundle.manifest
    _check_same(manifest.architecture or manifest.detector, network.architecture)
    several = len(session.sizes) > 1
    allowed = TOLERANCES[manifest.precision] if tolerance is None else tolerance
    native = native_library(True)[0] if session.operators.startswith("native") else None
    verdicts = []
    for size in session.sizes:
        view = session.at(size) if several else session
        at = f" at {view.bundle.manifest.input}" if several else ""
        given = [
            _image_source(view, name + at, image)
            for name, image in images
            if not several or session.images.prepare(image).network == size
        ]
        if images and not given:
            continue
        source = network_of(network, view.input_size)
        packaged = [replace(one, name=one.name + at) for one in source.inputs]
        inputs = (given, packaged) if given else (packaged[:1], packaged[1:])
        with tempfile.TemporaryDirectory(prefix="fdconv-verify-") as folder:
            judge = Judge(source, Path(folder))
            files = view.bundle.copy_to(Path(folder, "bundle"))
            for batch in view.batch_sizes[:1] if given else view.batch_sizes:
                path = files.model_path(batch) if manifest.precision == "fp32" else None
                run, precision = view.run_batches, manifest.precision
                subject = Subject(batch, run, precision, allowed, path, native)
                verdicts.append(judge.judge(subject, *inputs))
    return verdicts


def load_exported(
    session: Session,
    checkpoint: Path,
    *,
    config: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: str | None = None,
) -> LoadedSegmentor | LoadedDetector:
    """Read a checkpoint as the export of a session's bundle read it.

    Which weights of several, and which order of frequencies, was decided then, maybe by the user.
    """
    manifest = session.bundle.manifest
    order = manifest.graph.get("frequency_order")
    return load_checkpoint(
        checkpoint,
        config=config,
        overrides=overrides,
        weights=weights or recorded_weights(manifest, checkpoint),
        frequency_order=order if order in ("torch", "stable") else "auto",
        require_fdconv=False,
    )


def _image_source(session: Session, name: str, image: NDArray[np.uint8]) -> InputSource:
    """An image as often as a batch needs it."""

    def rows(batch: int) -> tuple[Tensor, ...]:
        inputs = session.images.prepare(image).inputs
        return tuple(torch.from_numpy(np.stack([one] * batch)) for one in inputs.values())

    return InputSource(name, rows)


def _check_same(exported: Frozen | None, given: Frozen) -> None:
    if exported is None:
        raise ExportError(
            "the bundle is of a module, not of a network that a checkpoint could be compared "
            "with. Its own parity report is in its manifest.json."
        )
    if type(exported) is not type(given):
        raise ExportError(
            "one of the bundle and the checkpoint is of a detector, the other of a segmentation "
            "network. Give the checkpoint the bundle was exported from."
        )
    if exported != given:
        fields = type(exported).model_fields
        different = [name for name in fields if getattr(exported, name) != getattr(given, name)]
        raise ExportError(
            f"the bundle was exported from another network than this checkpoint's: they differ "
            f"in {', '.join(different)}. If it was exported with --config or --set, give the same."
        )
