"""Latency, throughput, memory and energy of networks side by side: ``fdconv bench``."""
