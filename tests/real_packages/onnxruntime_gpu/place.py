"""One graph in ONNX Runtime's CUDA provider: `python place.py GRAPH OPTIONS OPTIMIZED`.

Run by `make.py` in an interpreter that has onnxruntime-gpu, with a stub in place of CUDA's
libraries. Prints JSON: how many nodes of each operator each provider was given, the provider's
options, and why a session that captures a CUDA graph is refused (None where it is not).
"""

import json
import sys
from collections import Counter

import onnxruntime

graph, options, optimized = sys.argv[1:]
onnxruntime.set_default_logger_severity(4)


def session(**more: str) -> onnxruntime.InferenceSession:
    made = onnxruntime.SessionOptions()
    made.log_severity_level = 4
    made.add_session_config_entry("session.disable_quant_qdq", "1")  # as the backend does
    made.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if not more:
        made.optimized_model_filepath = optimized
    provider = ("CUDAExecutionProvider", json.loads(options) | more)
    return onnxruntime.InferenceSession(graph, made, [provider, "CPUExecutionProvider"])


first = session()
assert first.get_providers()[0] == "CUDAExecutionProvider", "the stub was not taken for CUDA"
placed: Counter[str] = Counter()
for part in first.get_provider_graph_assignment_info():
    placed.update(f"{part.ep_name} {node.op_type}" for node in part.get_nodes())
refused = None
try:
    session(enable_cuda_graph="1")
except Exception as error:
    refused = str(error).strip().splitlines()[0]
print(
    json.dumps(
        {
            "placed": placed,
            "options": first.get_provider_options()["CUDAExecutionProvider"],
            "capture_refused": refused,
        }
    )
)
