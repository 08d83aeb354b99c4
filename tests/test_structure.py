"""The package's shape: who may import whom, no circles, and how large it may be."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.structure import ROOT, circles, import_graph, modules

# No more than there are: lower the figures with each cut, raise them with a new kind of network
# or runtime only. There were 220 files and 40,000 lines before the paper's other networks, panoptic
# answers and the service's bounds; 240 and 48,000 before the blocked layout, OpenVINO, Triton, the
# browser and the GPU's fused path; 262 and 54,000 before Ray, 255 and 55,014 with it.
PACKAGE_FILES, PACKAGE_LINES = 209, 48_350
# Folder → what nothing in it may import, neither at once nor when it runs.
FORBIDDEN = {
    "fdconv_deploy.export": ["demo", "evaluation", "latency", "serve", "cli"],
    "fdconv_deploy.serve": ["nn", "checkpoints", "folding", "export", "evaluation", "latency"],
    "fdconv_deploy.runtime": ["nn", "checkpoints", "folding", "export", "serve", "cli"],
    "fdconv_deploy.nn": ["checkpoints", "folding", "export", "runtime", "serve"],
    "fdconv_deploy.folding": ["checkpoints", "export", "runtime", "serve"],
    "fdconv_deploy.checkpoints": ["folding", "export", "serve", "evaluation", "latency"],
}


def test_package_has_no_import_circles() -> None:
    assert circles(import_graph(ROOT)) == []


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_package_imports_flow_one_way(folder: str) -> None:
    forbidden = tuple(f"fdconv_deploy.{name}" for name in FORBIDDEN[folder])
    found = [
        f"{name} imports {target}"
        for name, targets in import_graph(ROOT).items()
        for target in sorted(targets)
        if f"{name}.".startswith(f"{folder}.")
        and any(f"{target}.".startswith(f"{one}.") for one in forbidden)
    ]
    assert found == []


def test_package_stays_small() -> None:
    files = modules(ROOT)
    assert len(files) <= PACKAGE_FILES
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files.values())
    assert lines <= PACKAGE_LINES


@pytest.mark.parametrize(
    "module", ["fdconv_deploy", "runtime", "serve", "cli.app", "client", "sample_images"]
)
def test_import_loads_no_torch(module: str) -> None:
    name = module if module == "fdconv_deploy" else f"fdconv_deploy.{module}"
    code = (
        f"import json, sys, {name}\n"
        "heavy = ('torch', 'onnx', 'onnxruntime', 'matplotlib', 'fdconv_deploy.export')\n"
        "print(json.dumps([name for name in heavy if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
