"""The worked examples, and every line of docs/own-networks.md that can be run."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fdconv_deploy.runtime import Bundle

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "own-networks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "layers", "said"),
    [
        ("unet", 9, r"9 FDConv layers, \(1, 5, 64, 96\), \d\.\de-0[67] from PyTorch"),
        ("neck", 18, r"p5 \(1, 64, 4, 5\), \d\.\de-0[67] from PyTorch"),
        ("convnet", 8, r"moved by \d\.\de-0[67] of(.|\n)*the same class as PyTorch: True"),
    ],
)
def test_examples(name: str, layers: int, said: str, tmp_path: Path, capsys: Any) -> None:
    example = importlib.import_module(f"examples.own.{name}")
    example.main(["-o", str(tmp_path / "bundle")])
    assert re.search(said, capsys.readouterr().out)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.graph["fdconv_layers"] == layers
    assert manifest.parity is not None
    for outputs in manifest.parity.batches.values():
        assert all(output.max_rel <= 5e-6 for output in outputs)


def test_the_guides_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks in their order, as one program."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    blocks.pop(["ultralytics" in block for block in blocks].index(True))  # run by its check.py
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/own-networks.md", "exec"), names)  # our own page
    assert names["answers"]["logits"].shape == (1, 5, 32, 48)


def test_the_guides_commands(tmp_path: Path) -> None:
    """On a ResNet-18 of torchvision's names, as wide as the groups of the guide ask for."""
    from fdconv_deploy.config import ResNetConfig
    from fdconv_deploy.nn import ResNet

    plain = ResNet(ResNetConfig(depth=18, conv=None, num_stages=1, out_indices=(0,)))
    torch.save(plain.state_dict(), tmp_path / "resnet50.pth")
    lines = re.findall(r"^\$ fdconv (convert .+)$", TEXT, re.M)
    assert len(lines) == 2
    for line in lines:
        command = [sys.executable, "-m", "fdconv_deploy", *line.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "4 layers" in done.stdout
        assert (tmp_path / line.split()[3]).is_file()


def test_the_guides_refusal() -> None:
    """The message it shows is the one that is given."""
    from fdconv_deploy.errors import UnsupportedLayerError
    from fdconv_deploy.nn import from_published
    from tests.reference.published import FDConv

    layer = FDConv(18, 18, 3, padding=1, kernel_num=3)
    layer.KSM_Local.complex_weight = torch.nn.Parameter(torch.zeros(1, 10, 2))
    with pytest.raises(UnsupportedLayerError) as caught:
        from_published(layer, "stem.conv")
    quoted = " ".join(re.findall(r"^> (.+)$", TEXT, re.M))
    assert str(caught.value) == quoted
