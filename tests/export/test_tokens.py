"""FDConv over tokens in a user's network: the graph's answers, portable and native."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fdconv_deploy.export.api import export_module
from fdconv_deploy.nn import FDLinear, FDTokenConv
from fdconv_deploy.ops.native import build, compiler
from tests.export.graphs import relative, run_file
from tests.reference.lively import enliven

TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compiler() is None:
        pytest.skip("no C compiler for the native operators (cc, gcc, clang or $CC)")
    return build(tmp_path_factory.mktemp("native"))


def natively(path: Path, x: Tensor, library: Path) -> list:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


class Transformer(nn.Module):
    """Tokens of one axis and of two, windows as images of their own, a vector per image."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = enliven(FDTokenConv(20, 80, kernel_num=5), 1)
        self.narrow = enliven(FDTokenConv(80, 20, kernel_num=4), 2)
        self.in_windows = enliven(FDTokenConv(20, 24, kernel_num=4), 3)
        self.linear = enliven(FDLinear(24, 33, kernel_num=3), 4)
        self.soft = enliven(FDLinear(33, 20, kernel_num=4, ksm_global_act="softmax"), 5)
        self.head = enliven(FDLinear(20, 18, kernel_num=2, ksm_global_act="tanh", bias=False), 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, 6, 8, 20)``."""
        x = x + self.narrow(nn.functional.gelu(self.wide(x)))
        windows = x.unflatten(1, (2, 3)).unflatten(3, (2, 4)).transpose(2, 3).reshape(-1, 12, 20)
        y = self.linear(self.in_windows(windows).reshape(len(x), 48, 24))
        y = self.soft(y)
        return y, self.head(y.mean(1))


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_exported_tokens(tmp_path: Path, library: Path, batch: int) -> None:
    network = Transformer().eval()
    x = torch.randn(batch, 6, 8, 20) + torch.randn(batch, 1, 1, 20)
    bundle = export_module(network, x, tmp_path / "bundle")
    path = bundle.model_path(batch)
    for answers in (run_file(path, x.numpy()), natively(path, x, library)):
        for ours, theirs in zip(answers, network(x), strict=True):
            assert relative(ours, theirs.numpy()) <= TOLERANCE
    assert len(bundle.manifest.group_maps) == 6


@pytest.mark.parametrize("name", ["bnc_default", "softmax", "noconvert"])
def test_exported_linear_layer_gives_what_published_code_computes(
    oracle: Path, tmp_path: Path, name: str
) -> None:
    cases = json.loads((oracle / "fdlinear/index.json").read_text())["cases"]
    case = next(c for c in cases if c["file"] == f"{name}.safetensors")
    tensors = load_file(oracle / "fdlinear" / case["file"])
    layer = FDLinear(**case["ctor"]).eval()
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    layer.load_state_dict(state)
    bundle = export_module(nn.Sequential(layer).eval(), tensors["x"], tmp_path / "bundle")
    (answer,) = run_file(bundle.model_path(2), tensors["x"].numpy())
    assert relative(answer, tensors["y"].numpy()) <= TOLERANCE
