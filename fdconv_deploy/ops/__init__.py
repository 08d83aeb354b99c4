"""The ``fdconv`` ONNX domain: one folder per operator.

Each holds the operator's specification (``__init__.py``), its ONNX function body of standard
operators, by which a graph runs on any runtime (``function.py``), its Triton kernels and their
launches, and its TensorRT plugin. `torch_ops` has the kernels as PyTorch operators, `native` both
operators in C for ONNX Runtime's CPU provider.

What a node is stands in its attributes; its function body declares them all.
"""

DOMAIN = "fdconv"
DOMAIN_VERSION = 1
# LayerNormalization came with 17; torch's exporter starts at 18.
OPSET = 18
