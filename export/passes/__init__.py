"""Graph passes, each one idea. They take and change an onnx-graphsurgeon graph."""
