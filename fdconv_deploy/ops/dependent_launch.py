"""A kernel that starts while the one before it ends (sm_90 and newer)."""

# mypy: ignore-errors
import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def begin(dependent: tl.constexpr):
    """Wait for what earlier kernels wrote, and let the next kernel start.

    Constants may be read before. The next kernel waits here in its turn, so it may start at once.
    """
    if dependent:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
