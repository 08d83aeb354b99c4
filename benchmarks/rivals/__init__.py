"""The other dynamic convolutions of the FDConv paper's Table 1, to count and to time.

Our own compact PyTorch layers, written from the papers and checked against the authors'
published code where there is some, each put into the place in a ResNet-50 where its table
entry has it. They are for measuring: nobody's checkpoints load into them. Why each number
comes out as it does is in docs/table1.md.
"""

from __future__ import annotations

from benchmarks.rivals.frames import METHODS, Method, install

__all__ = ["METHODS", "Method", "install"]
