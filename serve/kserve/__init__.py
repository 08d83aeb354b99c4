"""KServe's Open Inference Protocol, version 2: tensors in, tensors out, over REST and gRPC."""
