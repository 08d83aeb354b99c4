"""The folded network on an NVIDIA GPU: fused kernels, channels-last half precision, CUDA graph.

Needs Triton and a CUDA build of PyTorch.
"""

from fdconv_deploy.environment import install
from fdconv_deploy.errors import BackendError

try:
    import triton as _triton  # type: ignore[import-untyped,import-not-found,unused-ignore]  # noqa: F401
except ImportError:
    raise BackendError(
        "the fused GPU kernels need Triton, which is not installed. Install it "
        f"({install('triton')}), or use fold_network."
    ) from None

from fdconv_deploy.folding.cuda.layer import FusedConv2d
from fdconv_deploy.folding.cuda.network import (
    CapturedNetwork,
    FusedNetwork,
    fuse_network,
    require_cuda,
)

__all__ = ["CapturedNetwork", "FusedConv2d", "FusedNetwork", "fuse_network", "require_cuda"]
