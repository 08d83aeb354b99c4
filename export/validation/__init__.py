"""How graphs, bundles and engines are validated: one verdict for all of them."""
