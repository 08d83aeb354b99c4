"""From a detector's bundle to objects: boxes, scores, classes and masks."""

from fdconv_deploy.runtime.detection.detection import Detection
from fdconv_deploy.runtime.detection.pipeline import Detecting, PreparedDetection

__all__ = ["Detecting", "Detection", "PreparedDetection"]
