"""Run in a process of its own: some forms and sizes with what FDCONV_NATIVE_ISA allows."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.ops.native import test_blocked_bands as blocked
from tests.ops.native import test_frequency_assembly as assembly
from tests.ops.native import test_kernel_attention as attention

if __name__ == "__main__":
    library = Path(sys.argv[1])
    for form in (assembly.FORMS[0], *assembly.FORMS[-6:]):
        assembly.test_every_form(form, library)
    for sizes in ((16, 16, 3), (32, 48, 3), (14, 22, 3), (24, 25, 5), (64, 96, 3)):
        assembly.test_sizes(*sizes, 2, library)
    for layout in attention.LAYOUTS:
        for norm, sizes in enumerate([(5, 7, 9, 33), (64, 64, 64), (3, 40, 70)]):
            attention.test_every_form(33 + norm, 18, sizes, norm == 2, norm, layout, library)
        attention.test_averages_are_near_float64((97, 123), layout, library)
    for block in blocked.BLOCKS:
        for size in blocked.SIZES:
            blocked.test_sizes_and_kernels(size, 3, block, library)
        for act, groups in (("softmax", 2), ("tanh", 9), ("sigmoid", 65)):
            blocked.test_every_form((2, 3, 4, 8), act, groups, True, block, library)
