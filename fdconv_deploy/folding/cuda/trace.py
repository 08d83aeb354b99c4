"""A network traced by torch, each convolution in it with all that follows it in one module.

Of what follows, BatchNorm, a sum with a shortcut and ReLU are taken in, in this order, as long as
each is the only reader of the one before. Everything else stays as torch traced it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fdconv_deploy.errors import ExportError
from fdconv_deploy.folding.cuda.layer import FinishedConv2d, FusedConv2d
from fdconv_deploy.folding.layer import FoldedConv, sides_of
from fdconv_deploy.folding.modulation import array, normalisation
from fdconv_deploy.folding.network import layer_stand_in, replace_layers

ATEN = torch.ops.aten
LAYER = torch.ops.fdconv_deploy.folded_layer.default
NORM = {ATEN.batch_norm.default}
SUM = {ATEN.add.Tensor, ATEN.add_.Tensor}
RELU = {ATEN.relu.default, ATEN.relu_.default}
CONVOLUTION = {ATEN.conv2d.default, ATEN.conv2d.padding}


class _Use(nn.Module):
    """One use of a layer in the traced network.

    hidden: of the dynamic layer that reads what comes out, and takes it pooled.
    """

    hidden: Tensor | None

    def __init__(self, layer: FusedConv2d | FinishedConv2d, relu: bool) -> None:
        super().__init__()
        self.layer, self.relu = layer, relu
        self.register_buffer("hidden", None)

    def forward(
        self, x: Tensor, partial: Tensor | None = None, shortcut: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """The outcome, with its pooled parts where ``hidden`` is set."""
        # ``partial`` is None for a plain convolution, whose weight is its own.
        y, parts = self.layer.run(x, partial, shortcut, self.hidden, self.relu)
        return y if self.hidden is None else (y, parts)


@dataclass
class _Chain:
    """A convolution's node and the nodes after it that become its end, in order."""

    nodes: list[fx.Node]
    norm: fx.Node | None = None
    shortcut: fx.Node | None = None
    relu: bool = False


def trace_fused(
    network: nn.Module,
    example: Tensor,
    folded: Mapping[str, FoldedConv],
    dtype: torch.dtype,
    channels_last: bool,
    device: torch.device,
) -> nn.Module:
    """The traced network on a device; arguments as of `fuse_network`."""
    stripped = replace_layers(network, layer_stand_in).to(dtype)
    try:
        program = torch.export.export(stripped, (example.to(dtype),), strict=False)
    except Exception as error:  # whatever a network's own code does under tracing
        raise ExportError(
            f"torch cannot trace the network, so it cannot be fused: {error} Use fold_network, "
            "or an exported bundle."
        ) from error
    traced = program.module(check_guards=False)
    assert isinstance(traced, fx.GraphModule)
    _Fusing(network, traced, folded, dtype, channels_last).run()
    for node in traced.graph.nodes:
        if "device" in node.kwargs:  # where it was traced
            node.update_kwarg("device", device)
    # Of no export any more, with what is used alone.
    return fx.GraphModule(traced, traced.graph).to(device)


def _changed_between(first: fx.Node, last: fx.Node, own: Sequence[fx.Node] = ()) -> bool:
    """Whether a node between the two, not one of ``own``, changes a tensor in place.

    Then the first one's work may not be done in the last one's place, nor the other way round: the
    tensor may be what either reads, or a view of it.
    """
    node = first.next
    while node is not last:
        target = node.target
        if (
            isinstance(target, torch._ops.OpOverload)
            and target._schema.is_mutable
            and node not in own
        ):
            return True
        node = node.next
    return False


def _shape(node: Any) -> tuple[int, ...] | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


class _Fusing:
    def __init__(
        self,
        network: nn.Module,
        traced: fx.GraphModule,
        folded: Mapping[str, FoldedConv],
        dtype: torch.dtype,
        channels_last: bool,
    ) -> None:
        self.network, self.traced, self.folded = network, traced, folded
        self.dtype, self.channels_last = dtype, channels_last
        self.made: dict[Any, FusedConv2d] = {}

    def run(self) -> None:
        graph = self.traced.graph
        for node in list(graph.nodes):
            if node.op == "call_function" and (
                node.target is LAYER
                or (
                    node.target in CONVOLUTION
                    and len(_shape(node) or ()) == 4
                    and self._constant(node)
                )
            ):
                self._replace(self._chain(node))
        self._pool_ahead()
        graph.eliminate_dead_code()
        graph.lint()

    def _values(self, node: Any) -> Any:
        """A parameter's or buffer's values in float64, as the network holds it."""
        if node is None:
            return None
        holder, _, name = node.target.rpartition(".")
        return array(getattr(self.network.get_submodule(holder), name))

    def _constant(self, node: fx.Node) -> bool:
        """Whether a convolution's weight and bias are the network's own."""
        return all(
            given is None or (isinstance(given, fx.Node) and given.op == "get_attr")
            for given in node.args[1:3]
        )

    def _chain(self, first: fx.Node) -> _Chain:
        chain = _Chain([first])
        while (
            len(readers := list(chain.nodes[-1].users)) == 1
            and not _changed_between(first, readers[0], chain.nodes)
            and self._taken(chain, readers[0])
        ):
            chain.nodes += readers
        return chain

    def _taken(self, chain: _Chain, reader: fx.Node) -> bool:
        """Take a node into the chain if it may come next."""
        if chain.relu or reader.op != "call_function" or len(_shape(chain.nodes[0]) or ()) != 4:
            return False
        if reader.target in NORM:
            fits = chain.shortcut is None and chain.norm is None and not reader.args[5]
            if fits:
                chain.norm = reader
            return fits
        if reader.target in SUM:
            last = chain.nodes[-1]
            fits = (
                chain.shortcut is None
                and not reader.kwargs.get("alpha")
                and len({_shape(given) for given in reader.args[:2]}) == 1
                and reader.args[0] is not reader.args[1]
                # Else the shortcut itself changes, which others may see through a view of it.
                and (reader.target is ATEN.add.Tensor or reader.args[0] is last)
            )
            if fits:
                left, right = reader.all_input_nodes
                chain.shortcut = right if left is last else left
            return fits
        chain.relu = reader.target in RELU
        return chain.relu

    def _replace(self, chain: _Chain) -> None:
        graph, first, last = self.traced.graph, chain.nodes[0], chain.nodes[-1]
        name = f"fused_{first.name}"
        self.traced.add_module(name, _Use(self._layer(first, chain.norm), chain.relu))
        with graph.inserting_after(last):
            call = graph.call_module(name, (first.args[0], None, chain.shortcut))
        call.meta["val"] = last.meta["val"]
        last.replace_all_uses_with(call)
        for node in reversed(chain.nodes):
            graph.erase_node(node)

    def _layer(self, node: fx.Node, norm: fx.Node | None) -> FusedConv2d | FinishedConv2d:
        scale = shift = None
        if norm is not None:
            epsilon: Any = norm.args[7]
            scale, shift = normalisation([*map(self._values, norm.args[1:5])], epsilon)
        if node.target is not LAYER:
            return self._plain(node, scale, shift)
        key = node.args[1], None if norm is None else norm.args[1:5]
        if key not in self.made:
            folded = self.folded[str(node.args[1])]
            if scale is not None and shift is not None:
                bias = shift if folded.bias is None else folded.bias * scale + shift
                folded = replace(folded, output_scale=scale.astype("f4"), bias=bias.astype("f4"))
            self.made[key] = FusedConv2d(folded, self.dtype, self.channels_last)
        return self.made[key]

    def _plain(
        self, node: fx.Node, scale: np.ndarray | None, shift: np.ndarray | None
    ) -> FinishedConv2d:
        weight = self._values(node.args[1])
        defaults: Sequence[Any] = (None, (1, 1), (0, 0), (1, 1), 1)
        given = [*node.args[2:], *defaults[len(node.args) - 2 :]]
        bias, (stride, padding, dilation, groups) = self._values(given[0]), given[1:]
        if scale is not None and shift is not None:
            weight = weight * scale[:, None, None, None]
            bias = shift if bias is None else bias * scale + shift
        return FinishedConv2d(
            stride=_pair(stride), padding=sides_of(padding, weight.shape[2:], _pair(dilation)),
            dilation=_pair(dilation), groups=groups, bias=bias, weight=weight, dtype=self.dtype,
            channels_last=self.channels_last,
        )  # fmt: skip

    def _pool_ahead(self) -> None:
        """Let the end of a convolution pool for the dynamic layer that reads it, if one does."""
        graph = self.traced.graph
        for node in list(graph.nodes):
            use = self._use(node)
            if use is None or (isinstance(use.layer, FusedConv2d) and use.layer.folded.tokens):
                continue
            for reader in node.users:
                layer = None if (other := self._use(reader)) is None else other.layer
                if (
                    isinstance(layer, FusedConv2d)
                    and reader.args[0] is node
                    and layer.dynamic
                    and not layer.folded.tokens
                    and not _changed_between(node, reader)
                ):
                    use.hidden = layer.get_buffer("hidden")
                    # It gives a pair from now on, of which all others read the first.
                    with graph.inserting_after(node):
                        parts = graph.call_function(operator.getitem, (node, 1))
                        y = graph.call_function(operator.getitem, (node, 0))
                    node.replace_all_uses_with(y, lambda user, own=(y, parts): user not in own)
                    reader.args = (y, parts, *reader.args[2:])
                    break

    def _use(self, node: fx.Node) -> _Use | None:
        if node.op != "call_module":
            return None
        module = self.traced.get_submodule(str(node.target))
        return module if isinstance(module, _Use) else None


def _pair(given: Sequence[int]) -> tuple[int, int]:
    """Of a vertical and a horizontal number, or of one for both."""
    return (given[0], given[-1])
