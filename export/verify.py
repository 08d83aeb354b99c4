"""A finished bundle against the PyTorch network, on real images or made-up ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.detection_parity import perturbed
from export.detector_inputs import made_up_detector_inputs
from export.inputs import made_up_images
from export.parity import compare, compare_all
from export.rules import Rule
from fdconv_deploy.architecture import Frozen
from fdconv_deploy.errors import ExportError
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.nn.segmentor import Segmentor
from fdconv_deploy.runtime import Session
from fdconv_deploy.runtime.manifest import OutputParity

Pictures = Sequence[tuple[str, NDArray[np.uint8]]]


@dataclass(frozen=True)
class Verified:
    """One comparison: what went in, at which batch size, and how far an output is off.

    ``slack``: how many times the tolerance this output may err.
    """

    source: str
    batch: int
    parity: OutputParity
    slack: float = 1.0

    @property
    def distance(self) -> float:
        """What the tolerance is held against, where it is about errors."""
        return self.parity.max_rel / self.slack


def verify_bundle(
    session: Session, network: Segmentor | Detector, images: Pictures = ()
) -> list[Verified]:
    """Compare answers on each image, or on made-up inputs at every batch size.

    Logits are compared number by number, a detector's answers object by object.

    Args:
        session: on the bundle.
        network: what it was exported from, in eval mode.
        images: (name, HxWx3 uint8 RGB); each is brought to the bundle's size as the runtime
            does it, and both sides get the same tensor.

    Raises:
        ExportError: the bundle is of another network, or finds other objects.
    """
    manifest = session.bundle.manifest
    theirs: Frozen | None = manifest.architecture or manifest.detector
    _check_same(theirs, network.architecture)
    if isinstance(network, Detector):
        return _detector(session, network, images)
    return _segmentor(session, network, images)


def _check_same(theirs: Frozen | None, ours: Frozen) -> None:
    if theirs is None:
        raise ExportError(
            "the bundle is of a module, not of a network that a checkpoint could be compared "
            "with. Its own parity report is in its manifest.json."
        )
    if type(theirs) is not type(ours):
        raise ExportError(
            "one of the bundle and the checkpoint is of a detector, the other of a segmentation "
            "network. Give the checkpoint the bundle was exported from."
        )
    if theirs != ours:
        fields = type(theirs).model_fields
        other = [name for name in fields if getattr(theirs, name) != getattr(ours, name)]
        raise ExportError(
            f"the bundle was exported from another network than this checkpoint's: they differ "
            f"in {', '.join(other)}. If it was exported with --config or --set, give the same."
        )


def _segmentor(session: Session, network: Segmentor, images: Pictures) -> list[Verified]:
    if images:
        inputs = [(name, session.prepare(image).input[None]) for name, image in images]
    else:
        made_up = partial(
            made_up_images,
            size=session.input_size,
            preprocessing=network.architecture.preprocessing,
            channels=network.architecture.backbone.in_channels,
        )
        inputs = [(_made_up(batch), made_up(batch).numpy()) for batch in session.batch_sizes]
    results = []
    for name, tensor in inputs:
        with torch.no_grad():
            expected = network(torch.from_numpy(tensor)).numpy()
        parity = compare("logits", session.run(tensor), expected, classes=True)
        results.append(Verified(name, len(tensor), parity))
    return results


def _detector(session: Session, network: Detector, images: Pictures) -> list[Verified]:
    inputs: list[tuple[str, tuple[Tensor, ...]]] = []
    for name, image in images:
        row = session.prepare_detection(image).input[None]
        inputs.append((name, (torch.tensor(row["images"]), torch.tensor(row["sizes"]))))
    if not images:
        preprocessing, size = network.architecture.preprocessing, session.input_size
        for batch in session.batch_sizes:
            made_up = made_up_detector_inputs(batch, size, preprocessing)
            inputs.append((_made_up(batch), made_up))
    rule = Rule("detections", network.architecture.test.rcnn.score_thr)

    def ask(feed: Mapping[str, NDArray]) -> dict[str, NDArray]:
        with torch.no_grad():
            outputs = network(*map(torch.from_numpy, feed.values()))
        return {n: o.numpy() for n, o in zip(network.output_names, outputs, strict=True)}

    results = []
    for name, tensors in inputs:
        feed = {n: t.numpy() for n, t in zip(("images", "sizes"), tensors, strict=True)}
        actual = session.run_detector(feed["images"], feed["sizes"])
        try:
            found = compare_all(actual, ask(feed), rule, perturbed(ask, feed))
        except ExportError as error:
            raise ExportError(f"{name}: {error}") from error
        batch = len(tensors[0])
        results += [Verified(name, batch, p, rule.slack(p.name)) for p in found]
    return results


def _made_up(batch: int) -> str:
    return f"made-up images, batch {batch}"
