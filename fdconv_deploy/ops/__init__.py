"""The ``fdconv`` ONNX domain: one folder per operator.

Each holds the operator's meaning in numpy (``reference.py``) and its body of standard ONNX
operators (``function.py``), which makes a graph that uses it run on any runtime.
"""

DOMAIN = "fdconv"
DOMAIN_VERSION = 1
# LayerNormalization came with 17; torch's exporter starts at 18.
OPSET = 18
