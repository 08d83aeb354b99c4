"""Graphs of lower precision, float16 and int8, and what they cost layer by layer."""
