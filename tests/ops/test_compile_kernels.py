"""Compiling kernels ahead, in processes of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

# No `if __name__ == "__main__"`: what starts again from here would start others, and so on.
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.gpu.shapes import layer_sizes
from fdconv_deploy.ops.compile_kernels import compile_kernel, precompile
from fdconv_deploy.ops.frequency_assembly.launch import column_launch, row_launch
sizes = layer_sizes(32, 32, 1)
launches = [row_launch(sizes), column_launch(sizes)] * 2
precompile(launches, 90, lambda n, of: print(n, "of", of), ptx_version=80, workers=2)
cached = set(Path({cache!r}).iterdir())
ptx = [compile_kernel(launch, 90, 80).ptx for launch in launches]
assert cached == set(Path({cache!r}).iterdir()), "compiled again"
print("paths", any(folder in text for text in ptx for folder in ({root!r}, "/fdconv_deploy")))
"""


def test_precompile_from_a_script_without_a_guarded_main(tmp_path):
    root = str(Path(__file__).parents[2])
    cache = tmp_path / "cache"
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=root, cache=str(cache)))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Each distinct kernel once, the script's own lines once, and PTX without this machine's paths.
    assert done.stdout.splitlines() == ["1 of 2", "2 of 2", "paths False"]


# Triton's own way to a kernel, on a GPU that is not there: compiling needs none.
LAUNCHED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor
from benchmarks.gpu.shapes import layer_sizes
from fdconv_deploy.ops.compile_kernels import precompile
from fdconv_deploy.ops.frequency_assembly.launch import column_launch, row_launch
from fdconv_deploy.ops.launch import kernel_function

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

driver.set_active(Driver())
sizes = layer_sizes(32, 32, 1)
launches = [row_launch(sizes), column_launch(sizes, channels_last=True, dtype="float16")]
launches = [launch.early() for launch in launches]  # as PyTorch launches them there
precompile(launches, 90, workers=2)
cached = set(Path({cache!r}).rglob("*"))
types = dict(fp32=torch.float32, fp16=torch.float16, u8=torch.uint8, i32=torch.int32)
for launch in launches:
    given = [MockTensor.wrap_dtype(types[kind[1:]]) for _, kind in launch.arguments]
    kernel_function(launch.kernel).warmup(
        *given, launch.specialised(), grid=launch.grid(1), **launch.options()
    )
print(len(cached) > 0, set(Path({cache!r}).rglob("*")) - cached)
"""


def test_a_launch_finds_what_was_compiled_ahead(tmp_path):
    """Else benchmarks/gpu.sh compiles one kernel after another on the GPU's time."""
    cache = tmp_path / "cache"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DISABLE_LINE_INFO": "1"}
    script = LAUNCHED.format(root=str(Path(__file__).parents[2]), cache=str(cache))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True set()"]


def test_what_a_process_could_not_compile_is_said(tmp_path):
    from dataclasses import replace

    from benchmarks.gpu.shapes import layer_sizes
    from fdconv_deploy.errors import BackendError
    from fdconv_deploy.ops.compile_kernels import precompile
    from fdconv_deploy.ops.frequency_assembly.launch import row_launch

    unknown = replace(row_launch(layer_sizes(32, 32, 1)), kernel="no_such_kernel")
    with pytest.raises(BackendError, match="was not compiled: KeyError: 'no_such_kernel'"):
        precompile([unknown], 90, workers=1)


def test_a_gpu_older_than_turing_is_refused():
    from fdconv_deploy.errors import BackendError
    from fdconv_deploy.ops.compile_kernels import target_for

    assert [target_for(n) for n in (75, 88, 90, 110, 121)] == [75, 80, 90, 80, 121]
    with pytest.raises(BackendError, match=r"of compute capability 7\.0; .* need 7\.5"):
        target_for(70)
