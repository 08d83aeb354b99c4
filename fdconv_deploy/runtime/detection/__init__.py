"""From a detector's bundle to objects: boxes, scores, classes and masks."""

from .detecting import Detecting, PreparedDetection
from .detection import Detection

__all__ = ["Detecting", "Detection", "PreparedDetection"]
