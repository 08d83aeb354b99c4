"""From a bundle to answers. Nothing here imports torch or onnx."""

from .bundle import Bundle, BundleWriter, Manifest, ParityReport

__all__ = ["Bundle", "BundleWriter", "Manifest", "ParityReport"]
