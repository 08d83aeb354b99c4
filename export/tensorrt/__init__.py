"""TensorRT engines: the graph with plugins, the build, the check of its answers."""
