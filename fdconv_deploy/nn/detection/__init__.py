"""Faster R-CNN and Mask R-CNN as mmdetection tests them, in PyTorch alone."""

from fdconv_deploy.nn.detection.detector import Detector

__all__ = ["Detector"]
