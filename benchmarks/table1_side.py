"""A row of Table 1 in one form, in the process that times it.

What the form does not need is not imported: a process's memory is what it is measured by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fdconv_deploy.latency.networks import OpenTarget, Target
from fdconv_deploy.sample_images import sample_batch

WEIGHTS = "weights.safetensors"


def open_side(target: Target) -> OpenTarget:
    """``overrides``: ``form``, ``name``, ``folder``, and what `table1_latency.prepare` noted."""
    given = target.options.overrides
    place = Path(given["folder"]) / given["name"]
    return (_exported if given["form"] == "exported" else _eager)(target, place)


def open_session(file: Path, threads: int, library: str | None = None) -> Any:
    """An ONNX Runtime session whose threads sleep between runs, or they took others' cores.

    :param library: of native operators.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if library is not None:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _exported(target: Target, place: Path) -> OpenTarget:
    (file,) = (place / "onnx").glob("*.onnx")
    session = open_session(file, target.options.threads, target.options.overrides.get("library"))
    feeds = {session.get_inputs()[0].name: sample_batch(1, tuple(target.options.overrides["size"]))}
    return OpenTarget(lambda: session.run(None, feeds), target.opened("cpu"))


def _eager(target: Target, place: Path) -> OpenTarget:
    import torch
    from safetensors.torch import load_model

    from benchmarks.table1_rows import Frame, make

    torch.set_num_threads(target.options.threads)
    network = make(target.options.overrides["name"], Frame(**target.options.overrides["frame"]))
    load_model(network, str(place / WEIGHTS))  # some rows' layers share their weights
    x = torch.from_numpy(sample_batch(1, tuple(target.options.overrides["size"])))

    def run() -> Any:
        # Outside inference mode PyTorch would keep every layer's input for a backward pass.
        with torch.inference_mode():
            return network(x)

    return OpenTarget(run, target.opened("cpu"))
