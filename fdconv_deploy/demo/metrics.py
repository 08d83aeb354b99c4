"""The scores, where the demo's training and export look for them."""

from fdconv_deploy.benchmark.metrics import Scores, confusion_matrix, scores

__all__ = ["Scores", "confusion_matrix", "scores"]
