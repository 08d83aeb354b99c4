"""Exports for other runtimes than this package's."""
