"""What other runtimes make of exported networks: ``python -m benchmarks.runtimes``."""
