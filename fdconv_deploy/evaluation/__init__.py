"""Accuracy and speed of networks on labelled images, side by side: ``fdconv evaluate``."""
