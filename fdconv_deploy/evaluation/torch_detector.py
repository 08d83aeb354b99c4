"""A PyTorch detector's side of an evaluation, with the same steps around it as a bundle's."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fdconv_deploy.evaluation.interleaving import Answer, Side
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.runtime import Detection
from fdconv_deploy.runtime.detection import detector_classes, finish, prepare, published_input
from fdconv_deploy.runtime.preprocessing import check_image


def torch_side(
    network: Detector, path: Path, *, size: tuple[int, int] | None = None
) -> Side[Detection]:
    """The published network's side.

    :param network: in eval mode.
    :param path: where it comes from, for the report.
    :param size: (height, width) that images are brought to, a bundle's; when not given, each
        image is resized and padded as the published pipeline does it.
    """
    detector = network.architecture

    def answer(image: NDArray[np.uint8]) -> Answer[Detection]:
        start = time.perf_counter()
        shape = check_image(image).shape
        target = size or published_input((shape[0], shape[1]), detector.preprocessing)
        images = np.empty((1, 3, *target), np.float32)
        placement = prepare(image, target, detector.preprocessing, out=images[0])
        sizes = torch.tensor([[placement.height, placement.width]], dtype=torch.float32)
        prepared = time.perf_counter()
        with torch.inference_mode():
            outputs = network(torch.from_numpy(images), sizes)
        spent = time.perf_counter() - prepared
        named = {
            name: tensor[0].numpy()
            for name, tensor in zip(network.output_names, outputs, strict=True)
        }
        seconds = {"preprocess": prepared - start, "inference": spent}
        return Answer(finish(named, placement, detector, seconds), spent)

    details = {
        "kind": "checkpoint",
        "backend": "pytorch",
        "precision": "fp32",
        "size": None if size is None else list(size),
    }
    return Side(str(path), answer, detector_classes(detector), details)
