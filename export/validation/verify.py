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
from fdconv_deploy.export.source_network import network_of
from fdconv_deploy.export.validation.sample_inputs import InputSource
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
    if len(session.sizes) < 2:
        return _verify(session, network, images, tolerance)
    taken = [(session.images.prepare(image).network, (name, image)) for name, image in images]
    verdicts = []
    for size in session.sizes:
        given = [image for at, image in taken if at == size]
        if given or not images:
            verdicts += _verify(session.at(size), network, given, tolerance, named=True)
    return verdicts


def _verify(
    session: Session,
    network: Segmentor | Detector,
    images: Sequence[tuple[str, NDArray[np.uint8]]],
    tolerance: float | None,
    *,
    named: bool = False,
) -> list[Verdict]:
    """Judge the graphs of one input size, which is ``named`` beside what they are judged on."""
    manifest = session.bundle.manifest
    source = network_of(network, session.input_size)
    at = f" at {manifest.input}" * named
    packaged = [replace(one, name=one.name + at) for one in source.inputs]
    allowed = TOLERANCES[manifest.precision] if tolerance is None else tolerance
    native = native_library(True)[0] if session.operators.startswith("native") else None

    with tempfile.TemporaryDirectory(prefix="fdconv-verify-") as folder:
        judge = Judge(source, Path(folder))
        files = session.bundle.copy_to(Path(folder, "bundle"))

        def judged(
            batch: int, first: Sequence[InputSource], more: Sequence[InputSource]
        ) -> Verdict:
            path = files.model_path(batch) if manifest.precision == "fp32" else None
            subject = Subject(batch, session.run_batches, manifest.precision, allowed, path, native)
            return judge.judge(subject, first, more)

        if images:
            given = [_image_source(session, name + at, image) for name, image in images]
            return [judged(session.batch_sizes[0], given, packaged)]
        return [judged(b, packaged[:1], packaged[1:]) for b in session.batch_sizes]


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
        one = [torch.from_numpy(value[None]) for value in inputs.values()]
        return tuple(tensor.repeat(batch, *[1] * (tensor.ndim - 1)) for tensor in one)

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
