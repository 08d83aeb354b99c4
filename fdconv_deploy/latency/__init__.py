"""Latency, throughput, memory and energy of networks, side by side: what ``fdconv bench`` does.

`sides` says what is timed, `child` times one side in a process of its own, `turns` lets the
children take turns, `measure` puts a report together, `console`, `tables` and `html` show it.
Nothing here imports torch before a child that runs a checkpoint does.
"""
