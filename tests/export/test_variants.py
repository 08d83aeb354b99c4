"""Variants of the published class that public copies have, from either road to the graph's answer.

Each layer imitates a kind of public copy: C3k2_FDConv forks with the first published band
modulation; a collection of plug-in modules with GroupNorm(1, C) in the attention, as ``bn`` or
``norm``; a fork that gives ``irfft2`` its size. They are written anew, by the reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.config import BandModulationConfig, FDConvConfig
from fdconv_deploy.export.api import export_checkpoint, export_module
from fdconv_deploy.ops.native import build, compiler
from tests.checkpoints.test_saved_buffers import MASKS, masks_of
from tests.export.graphs import relative, run_file
from tests.nn.test_from_published import copy_of
from tests.reference.lively import lively_input
from tests.reference.networks import small_segmentor

FIRST_VERSION = {"k_list": [2, 4, 8], "masks": "per_call"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compiler() is None:
        pytest.skip("no C compiler for the native operators (cc, gcc, clang or $CC)")
    return build(tmp_path_factory.mktemp("native"))


def run_natively(path: Path, x: NDArray[np.float32], library: Path) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


NETWORKS: dict[str, list[dict[str, Any]]] = {
    "first version's masks": [
        dict(fbm_cfg=FIRST_VERSION),
        dict(in_channels=20, out_channels=18, kernel_num=3, fbm_cfg=FIRST_VERSION, stride=2),
    ],
    "other normalisations": [
        dict(ksm_global_norm="group"),
        dict(in_channels=20, kernel_size=1, padding=0, ksm_global_norm="group", norm_name="norm"),
        dict(in_channels=20, ksm_global_norm="none"),
    ],
    "odd columns, and all at once": [
        dict(out_channels=19, kernel_num=3, fbm_cfg=FIRST_VERSION, ksm_global_norm="group"),
        dict(in_channels=19, out_channels=21, kernel_num=3, ksm_global_norm="none"),
        dict(in_channels=21, kernel_size=1, padding=0, kernel_num=4),
    ],
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_exported_copies_answer_as_they_do(tmp_path: Path, library: Path, name: str) -> None:
    """ONNX Runtime's answer, of the portable graph and by native operators."""
    copies = [copy_of(seed, **arguments) for seed, arguments in enumerate(NETWORKS[name])]
    parts: list[nn.Module] = [part for copy in copies for part in (copy, nn.Tanh())]
    network = nn.Sequential(*parts).eval()
    x = lively_input((2, 18, 14, 11))
    made = export_module(network, x, tmp_path / "bundle", batches=(2,))
    assert len(made.manifest.graph["converted_layers"]) == len(copies)
    expected = network(x).numpy()
    path = made.model_path(2)
    assert relative(run_file(path, x.numpy())[0], expected) <= 2e-6
    assert relative(run_natively(path, x.numpy(), library), expected) <= 2e-6


@torch.no_grad()
def test_an_exported_checkpoint_of_a_variant_answers_as_it_does(tmp_path: Path) -> None:
    """GroupNorm under another name, an odd width, bands told by saved masks, saved indices."""
    bands = BandModulationConfig(k_list=(2, 3, 16), max_size=(32, 48))
    conv = FDConvConfig(kernel_num=2, ksm_global_norm="group", fbm_cfg=bands)
    network = small_segmentor(base=17, stages=2, conv=conv)
    state = {
        key.replace("KSM_Global.bn.", "KSM_Global.norm."): value
        for key, value in network.state_dict().items()
    }
    for name, module in network.named_modules():
        if hasattr(module, "FBM") and module.FBM is not None:
            state[f"{name}{MASKS}"] = masks_of(bands.k_list, bands.max_size)
            state[f"{name}.indices"] = module.indices
    torch.save({"state_dict": state}, tmp_path / "copy.pth")
    made = export_checkpoint(tmp_path / "copy.pth", tmp_path / "bundle", size=(64, 96))
    x = lively_input((1, 3, 64, 96))
    expected = network(x).numpy()
    assert relative(load_checkpoint(tmp_path / "copy.pth")(x).numpy(), expected) <= 1e-6
    assert relative(run_file(made.model_path(1), x.numpy())[0], expected) <= 1e-5
    assert made.manifest.graph["frequency_order"] == "torch"
    assert "frequency_order" not in made.manifest.graph["assumed"]
