"""What is refused of an export's options, before anything is loaded."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fdconv_deploy.errors import ExportError
from fdconv_deploy.export import ExportOptions, export_checkpoint

PICTURE = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"size": (0, 64)}, "1 to 16384 pixels, got 0x64"),
        ({"size": (64, -1)}, "1 to 16384 pixels"),
        ({"size": (16385, 64)}, "1 to 16384 pixels, got 16385x64"),
        ({"batches": ()}, "batch sizes must be 1 or more"),
        ({"batches": (0,)}, "batch sizes must be 1 or more"),
        ({"batches": (1, -2)}, r"batch sizes must be 1 or more, got \[1, -2\]"),
        ({"tolerance": -1.0}, r"0 or more, e\.g\. 0\.0001; got -1"),
        ({"tolerance": float("nan")}, r"0 or more, e\.g\. 0\.0001; got nan"),
        ({"tolerance": float("inf")}, r"0 or more, e\.g\. 0\.0001; got inf"),
        ({"precision": "fp8"}, "precision is fp32, fp16 or int8, not 'fp8'"),
        ({"fit": "crop"}, "fit is stretch or pad, not 'crop'"),
        ({"activations": "both"}, "activations is unsigned or signed, not 'both'"),
        ({"precision": "int8"}, "int8 needs images to learn the activations' ranges from"),
        ({"calibration": [PICTURE]}, "calibration images are for int8, and the precision is fp32"),
        ({"keep_fp32": ["decode_head"]}, "keep_fp32 names modules that stay float32"),
    ],
)
def test_options_that_do_not_fit_are_refused(fields, hint):
    with pytest.raises(ExportError, match=hint):
        ExportOptions(**fields)


def test_fields_replace_those_of_given_options():
    given = ExportOptions(batches=[4, 1, 4], tolerance=1e-3)
    assert given.batches == (1, 4)
    changed = ExportOptions.of(given, {"tolerance": None, "precision": "fp16"})
    assert (changed.batches, changed.allowed) == ((1, 4), 2e-2)
    assert (given.precision, given.allowed) == ("fp32", 1e-3)
    with pytest.raises(ExportError, match="batch sizes"):
        ExportOptions.of(given, {"batches": ()})


def test_an_unknown_field_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="batch_sizes"):
        export_checkpoint("none.pth", tmp_path / "bundle", batch_sizes=(1,))


def test_options_import_neither_torch_nor_onnx():
    script = (
        "import fdconv_deploy.export.options, sys;"
        "print([name for name in ('torch', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
