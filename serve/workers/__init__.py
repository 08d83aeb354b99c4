"""Inference in child processes."""
