"""What an FDConv network is, and how a bundle of one runs.

FDConv: "Frequency Dynamic Convolution for Dense Image Prediction" (CVPR 2025,
arXiv 2503.18783).
"""

__version__ = "0.1.0"
