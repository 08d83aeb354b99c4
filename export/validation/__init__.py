"""Whether a graph is its network: one verdict for export, verify and evaluate."""
