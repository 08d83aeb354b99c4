"""Exports for runtimes other than ours."""
