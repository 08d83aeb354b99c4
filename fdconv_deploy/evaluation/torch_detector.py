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
from fdconv_deploy.runtime.detection import DetectionPipeline, detector_classes
from fdconv_deploy.runtime.preprocessing import check_image, published_detector_input


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
        height, width = check_image(image).shape[:2]
        target = size or published_detector_input((height, width), detector.preprocessing)
        pipeline = DetectionPipeline(detector, target)
        prepared = pipeline.prepare(image)
        inputs = [torch.from_numpy(prepared.inputs[name][None]) for name in ("images", "sizes")]
        start = time.perf_counter()
        with torch.inference_mode():
            outputs = network(*inputs)
        spent = time.perf_counter() - start
        named = {
            name: tensor[0].numpy()
            for name, tensor in zip(network.output_names, outputs, strict=True)
        }
        return Answer(pipeline.finish(prepared, named, spent), spent)

    details = {
        "kind": "checkpoint",
        "backend": "pytorch",
        "precision": "fp32",
        "size": None if size is None else list(size),
    }
    return Side(str(path), answer, detector_classes(detector), details)
