"""Faster R-CNN and Mask R-CNN as mmdetection tests them, in PyTorch alone."""

from fdconv_deploy.nn.detection.detector import Detector, build_detector

__all__ = ["Detector", "build_detector"]
