"""Latency, throughput, memory and accuracy, side by side."""
