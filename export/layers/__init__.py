"""Folded layers, written straight into the graph: no exporter ever sees their inside.

Frequency assembly and band modulation become single nodes of the ``fdconv`` domain, whose
functions go into the model; the rest is a handful of standard nodes.
"""

from fdconv_deploy.export.layers.writer import LayerWriter

__all__ = ["LayerWriter"]
