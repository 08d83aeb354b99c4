"""Steps of `benchmarks.detector`, each run in a process of its own.

A step gets what is asked for, as JSON, and two paths: what it is given and what it makes. It
answers with JSON, to which the most memory that it held is added.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.networks import backbone, lively_heads, trained_like
from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.config import DetectorConfig, FPNConfig, MaskHeadConfig
from fdconv_deploy.export.validation.comparison import perturbed
from fdconv_deploy.nn.detection import Detector
from fdconv_deploy.runtime import open_session
from fdconv_deploy.sample_images import sample_detector_batch

Inputs = tuple[Tensor, Tensor]
Answer = dict[str, NDArray]
# What of an answer tells where a mask lies.
BOXED = ("boxes", "labels", "count")


def say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def build(width: int, *, masks: bool = True, kernel_num: int = 64) -> Detector:
    """The published detector at ``width`` (64), which finds objects on street scenes."""
    torch.manual_seed(0)
    architecture = DetectorConfig(
        backbone=backbone(50, kernel_num, width),
        neck=FPNConfig(in_channels=tuple(4 * width * 2**stage for stage in range(4))),
        mask_head=MaskHeadConfig() if masks else None,
    )
    network = Detector(architecture)
    trained_like(network.backbone)
    images, _ = sample_detector_batch(1, (416, 672), architecture.preprocessing)
    return lively_heads(network, torch.from_numpy(images))


def _pictures(size: tuple[int, int], count: int, preprocessing: Any) -> list[Inputs]:
    batches = (
        sample_detector_batch(1, size, preprocessing, seed=seed) for seed in range(1, count + 1)
    )
    return [(torch.from_numpy(images), torch.from_numpy(sizes)) for images, sizes in batches]


def _export(spec: dict[str, Any], file: Path, bundle: Path) -> dict[str, Any]:
    from fdconv_deploy.export import export_checkpoint

    start = time.perf_counter()
    export_checkpoint(file, bundle, size=tuple(spec["size"]), progress=say)
    return {"seconds": time.perf_counter() - start}


def _network(spec: dict[str, Any], file: Path, answers: Path) -> dict[str, Any]:
    network = load_checkpoint(file, require_fdconv=False)
    pictures = _pictures(spec["size"], spec["pictures"], network.architecture.preprocessing)

    def run(inputs: Inputs) -> Answer:
        images, sizes = inputs
        return _ask(network, {"images": images.numpy(), "sizes": sizes.numpy()})

    return _timed(run, pictures, spec["repeats"], answers)


def _bundle(spec: dict[str, Any], path: Path, answers: Path) -> dict[str, Any]:
    with open_session(path, backend="onnxruntime-cpu") as session:
        detector = session.bundle.manifest.detector
        assert detector is not None
        pictures = _pictures(spec["size"], spec["pictures"], detector.preprocessing)

        def run(inputs: Inputs) -> Answer:
            images, sizes = (tensor.numpy() for tensor in inputs)
            return session.run_batches({"images": images, "sizes": sizes})

        return _timed(run, pictures, spec["repeats"], answers)


def _timed(
    run: Callable[[Inputs], Answer], pictures: list[Inputs], repeats: int, answers: Path
) -> dict[str, Any]:
    """Run every picture, keep the answers, and time the first one again and again."""
    _save(answers, map(run, pictures))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(pictures[0])
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds)}


def _rounding(spec: dict[str, Any], file: Path, answers: Path) -> dict[str, Any]:
    """The network's answers to one picture, changed by a millionth."""
    network = load_checkpoint(file, require_fdconv=False)
    pictures = _pictures(spec["size"], spec["pictures"], network.architecture.preprocessing)
    images, sizes = (tensor.numpy() for tensor in pictures[spec["picture"]])
    answered = perturbed(partial(_ask, network), {"images": images, "sizes": sizes})
    _save(answers, islice(answered, spec.get("tries")))
    return {}


def _ask(network: Detector, feed: Mapping[str, NDArray]) -> Answer:
    with torch.inference_mode():
        outputs = network(*map(torch.from_numpy, feed.values()))
    return {n: o.numpy() for n, o in zip(network.output_names, outputs, strict=True)}


def _save(path: Path, answers: Iterable[Mapping[str, NDArray]]) -> None:
    named = {f"{i}.{n}": v for i, answer in enumerate(answers) for n, v in answer.items()}
    np.savez(path, **named)  # type: ignore[arg-type]


def load(path: Path) -> list[Answer]:
    with np.load(path) as file:
        count = len({name.split(".")[0] for name in file.files})
        answers: list[Answer] = [{} for _ in range(count)]
        for name in file.files:
            index, output = name.split(".")
            answers[int(index)][output] = file[name]
    return answers


def _exact(spec: dict[str, Any], file: Path, answers: Path) -> dict[str, Any]:
    """The network in float64: its answers, and its masks for the boxes of ``spec``'s answers.

    ``answers`` holds ``masks of NAME`` beside what each picture's answer is made of.
    """
    network = load_checkpoint(file, require_fdconv=False)
    pictures = _pictures(spec["size"], spec["pictures"], network.architecture.preprocessing)
    given = {name: load(Path(path)) for name, path in spec["answers"].items()}
    network.double()
    found = []
    for index, inputs in enumerate(pictures):
        images, sizes = (tensor.double() for tensor in inputs)
        with torch.inference_mode():
            features = network.features(images)
            proposals, valid = network.rpn_head.propose(features, sizes)
            best = network.roi_head.detect(features, proposals, valid, sizes)
            answer = dict(zip(network.output_names, best, strict=False))
            if network.roi_head.mask_head is not None:
                boxes, _, labels, count = best
                answer["masks"] = network.roi_head.masks(features, boxes, labels, count)
                for name, all_of_it in given.items():
                    asked = (torch.from_numpy(all_of_it[index][key]) for key in BOXED)
                    boxes, labels, count = asked
                    own = network.roi_head.masks(features, boxes.double(), labels, count)
                    answer[f"masks of {name}"] = own
        found.append({name: tensor.numpy() for name, tensor in answer.items()})
    _save(answers, found)
    return {}


STEPS = {
    "rounding": _rounding,
    "export": _export,
    "network": _network,
    "bundle": _bundle,
    "exact": _exact,
}


def main(name: str, spec: str, given: str, made: str) -> None:
    """Run a step, and print what it answers."""
    result = STEPS[name](json.loads(spec), Path(given), Path(made))
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    peak = max(resource.getrusage(one).ru_maxrss for one in who) / 1e6
    print(json.dumps(result | {"peak_gb": round(peak, 2)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
