"""One convolution in the place of several, one by each kernel row.

An export convolves by rows where stock ONNX Runtime is faster so: it saves a transposition of the
kernels. Native operators write kernels in any order, and a single convolution takes less.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from fdconv_deploy.runtime.onnx_messages import attributes, captured, drop_unread, make_node

_GEOMETRY = ("strides", "pads", "dilations")


def join_kernel_rows(graph: Any) -> int:
    """Convolve with whole kernels where the export convolves by rows.

    Args:
        graph: a ``GraphProto`` of `onnx_messages.read_model`, changed in place. Its assemblies are
            then such as only native operators run.

    Returns:
        How many layers' convolutions were joined.
    """
    nodes = list(graph.node)
    links = _Links({}, defaultdict(list))
    for value in graph.output:
        links.readers[value.name].append(value)
    for node in nodes:
        links.producers.update(dict.fromkeys(node.output, node))
        for name in {*node.input, *captured(node)}:
            links.readers[name].append(node)
    joined = {}  # by the output of the node whose place it takes
    for node in nodes:
        given = attributes(node)
        if node.domain == "fdconv" and given.get("by_rows"):
            found = links.convolution(node.output[0])
            if found is None:
                continue
            inputs, output, group = found
            geometry = {name: given[name] for name in _GEOMETRY}
            joined[output] = make_node("Conv", inputs, [output], group=group, **geometry)
            node.op_type = node.op_type.replace("_ByRows", "")
            next(each for each in node.attribute if each.name == "by_rows").i = 0
    del graph.node[:]
    graph.node.extend(joined.get(node.output[0], node) for node in nodes)
    drop_unread(graph)
    return len(joined)


@dataclass
class _Links:
    """Tensors' producers, and their readers: nodes, and outputs of the graph."""

    producers: dict[str, Any]
    readers: dict[str, list[Any]]

    def convolution(self, kernels: str) -> tuple[list[str], str, int] | None:
        """Inputs, output and group of the one convolution; None where it is not as exported."""
        rows: list[Any] = []
        waiting = [kernels]
        while waiting:
            name = waiting.pop(0)
            for reader in self.readers[name]:
                operator = getattr(reader, "op_type", "")
                if operator in ("Split", "Reshape") and reader.input[0] == name:
                    waiting += reader.output
                elif operator == "Conv" and reader.input[1] == name:
                    rows.append(reader)
                else:
                    return None
        sources, biases = set(), []
        for row in rows:
            cut = self.producers.get(row.input[0])
            sliced = cut if cut is not None and cut.op_type == "Slice" else row
            sources.add(sliced.input[0])
            biases += row.input[2:]
        # From the sum of the last two rows backwards, all that is added are rows.
        total = rows[0].output[0] if rows else ""
        for _ in rows[1:]:
            readers = self.readers[total]
            if len(readers) != 1 or getattr(readers[0], "op_type", "") != "Add":
                return None
            total = readers[0].output[0]
        added = self._added(total)
        if len(sources) != 1 or len(biases) > 1 or added != {row.output[0] for row in rows}:
            return None
        return [sources.pop(), kernels, *biases], total, attributes(rows[0]).get("group", 1)

    def _added(self, total: str) -> set[str]:
        node = self.producers.get(total)
        if node is None or node.op_type != "Add":
            return {total}
        return self._added(node.input[0]) | self._added(node.input[1])
