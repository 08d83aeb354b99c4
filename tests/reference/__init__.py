"""An FDConv layer in float64 numpy, written from the paper and its published description.

It shares no code with ``fdconv_deploy``: its own radii, sort, band masks, inverse transform
and convolution. Tests hold the network, the folds and the operators against it.
"""

from tests.reference.introsort import introsort_order
from tests.reference.layer import ReferenceFDConv
from tests.reference.spectrum import bin_order, bin_radii

__all__ = ["ReferenceFDConv", "bin_order", "bin_radii", "introsort_order"]
