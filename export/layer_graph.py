"""A folded layer -> nodes of a graph: small standard operators and two ``fdconv`` ones."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import FunctionProto

from fdconv_deploy.folding.bands import FoldedBands
from fdconv_deploy.folding.layer import FoldedConv
from fdconv_deploy.ops import DOMAIN
from fdconv_deploy.ops.frequency_assembly import AssemblyForm, assembly_function
from fdconv_deploy.ops.frequency_band_modulation import BandForm, band_function

Array = NDArray[Any]


class LayerWriter:
    """Writes folded layers into one graph, for one batch size, sharing equal constants."""

    def __init__(self, graph: gs.Graph, batch: int) -> None:
        self.graph, self.batch = graph, batch
        self.functions: dict[str, FunctionProto] = {}
        self._constants: dict[str, gs.Constant] = {}
        self._uses: Counter[str] = Counter()
        self._layer = ""

    def _constant(self, name: str, values: Array) -> gs.Constant:
        """A constant; layers with equal values share the first one's."""
        values = np.ascontiguousarray(values)
        content = hashlib.sha256(values.tobytes())
        content.update(repr((values.shape, values.dtype.str)).encode())
        key = content.hexdigest()
        if key not in self._constants:
            self._constants[key] = gs.Constant(f"{self._layer}.{name}", values)
        return self._constants[key]

    def _shape(self, *sizes: int) -> gs.Constant:
        return self._constant("shape_" + "x".join(map(str, sizes)), np.array(sizes, np.int64))

    def _add(
        self, op: str, name: str, *inputs: gs.Tensor, outputs: int = 1, **attributes: Any
    ) -> list[gs.Variable]:
        domain = attributes.pop("domain", None)
        names = [f"{self._layer}.{name}" + (f".{i}" if i else "") for i in range(outputs)]
        results = [gs.Variable(n, dtype=np.float32) for n in names]
        node = gs.Node(
            op, f"{self._layer}.{name}", attributes, list(inputs), results, domain=domain
        )
        self.graph.nodes.append(node)
        return results

    def _op(self, op: str, name: str, *inputs: gs.Tensor, **attributes: Any) -> gs.Variable:
        return self._add(op, name, *inputs, **attributes)[0]

    def write(self, layer: FoldedConv, x: gs.Tensor) -> gs.Variable:
        """Append a layer's nodes.

        Args:
            x: ``(batch, I, H, W)`` float32.

        Returns:
            ``(batch, O, H', W')`` float32.
        """
        # A layer may be used more than once, and a network may be nothing but a layer.
        self._layer = layer.name or "layer"
        self._uses[self._layer] += 1
        if self._uses[self._layer] > 1:
            self._layer += f".use{self._uses[self._layer]}"
        average = self._op("GlobalAveragePool", "average", x)
        average = self._op("Flatten", "average.flat", average, axis=1)
        if layer.bands is not None:
            x = self._bands(layer.bands, x)
        if layer.constant_weight is not None:
            return self._constant_convolution(layer, x)
        attention = self._attention(layer, average)
        kernel = self._assembly(layer, average, attention)
        if layer.modulation.channel and layer.channel_side == "feature":
            shape = self._shape(self.batch, layer.in_channels, 1, 1)
            scale = self._op("Reshape", "channel.map", attention["channel"], shape)
            x = self._op("Mul", "channel.scaled", x, scale)
        return self._convolution(layer, x, kernel, attention)

    def _attention(self, layer: FoldedConv, average: gs.Tensor) -> dict[str, gs.Variable]:
        folded = layer.modulation
        hidden = self._op(
            "Gemm",
            "hidden",
            average,
            self._constant("hidden.weight", folded.hidden),
            self._constant("hidden.bias", folded.hidden_bias),
            transB=1,
        )
        hidden = self._op("Relu", "hidden.relu", hidden)
        hidden = self._op("Mul", "hidden.squared", hidden, hidden)
        logits = self._op(
            "Gemm",
            "heads",
            hidden,
            self._constant("heads.weight", folded.heads),
            self._constant("heads.bias", folded.head_bias),
            transB=1,
        )
        sizes = {
            "kernel": folded.kernel,
            "filter": folded.filter,
            "spatial": folded.spatial,
            "channel": folded.channel,
        }
        present = {name: size for name, size in sizes.items() if size}
        if len(present) == 1:
            parts = [logits]
        else:
            if not folded.softmax:
                logits = self._op("Sigmoid", "gates", logits)
            lengths = self._constant("heads.sizes", np.array(list(present.values()), np.int64))
            parts = self._add("Split", "attention", logits, lengths, outputs=len(present), axis=1)
        result = dict(zip(present, parts, strict=True))
        if folded.softmax:
            result["kernel"] = self._op("Softmax", "kernel.attention", result["kernel"], axis=1)
        elif len(present) == 1:
            result["kernel"] = self._op("Sigmoid", "kernel.attention", result["kernel"])
        return result

    def _row_scale(self, layer: FoldedConv, attention: dict[str, gs.Variable]) -> gs.Tensor | None:
        """Filter attention times a following BatchNorm's scale, ``(B or 1, O, 1, 1)``."""
        scale = layer.output_scale
        constant = None
        if scale is not None:
            constant = self._constant("output_scale", scale.reshape(1, -1, 1, 1))
        if not layer.modulation.filter:
            return constant
        shape = self._shape(self.batch, layer.out_channels, 1, 1)
        gate = self._op("Reshape", "filter.map", attention["filter"], shape)
        return gate if constant is None else self._op("Mul", "filter.scaled", gate, constant)

    def _column_scale(
        self, layer: FoldedConv, attention: dict[str, gs.Variable]
    ) -> gs.Tensor | None:
        """Spatial and channel attention along the kernel matrix, ``(B, 1, kh or 1, C)``."""
        height, width = layer.kernel_size
        channel = spatial = None
        if layer.modulation.channel and layer.channel_side == "kernel":
            shape = self._shape(self.batch, 1, layer.in_channels, 1)
            channel = self._op("Reshape", "channel.column", attention["channel"], shape)
        if layer.modulation.spatial:
            shape = self._shape(self.batch, height, 1, width)
            spatial = self._op("Reshape", "spatial.column", attention["spatial"], shape)
        if channel is None:
            # Without channel attention there is no spatial one either.
            assert spatial is None
            return None
        if spatial is not None:
            channel = self._op("Mul", "columns.gate", channel, spatial)
            rows = height
        else:
            # Same for every kernel column of a channel.
            rows = 1
            if width > 1:
                ones = self._constant("columns.ones", np.ones((1, 1, 1, width), np.float32))
                channel = self._op("Mul", "columns.gate", channel, ones)
        shape = self._shape(self.batch, 1, rows, layer.in_channels * width)
        return self._op("Reshape", "columns.scale", channel, shape)

    def _assembly(
        self, layer: FoldedConv, average: gs.Tensor, attention: dict[str, gs.Variable]
    ) -> gs.Variable:
        assert layer.spectrum is not None
        columns, rows = layer.spectrum.column_transform, layer.spectrum.row_transform
        f1, f2 = columns.factors.first, columns.factors.second
        r1, classes, slots = rows.factors.first, rows.classes, rows.slots.size
        (height, width), length = layer.kernel_size, layer.spectrum.columns
        local = layer.local
        row_scale = self._row_scale(layer, attention) if layer.filter_side == "kernel" else None
        column_scale = self._column_scale(layer, attention)
        planes = layer.spectrum.values.shape[0]
        form = AssemblyForm(
            planes=planes > 1,
            local=local is not None,
            column_scale=column_scale is not None,
            row_scale=row_scale is not None,
            spatial_kernel=height > 1,
        )
        lead = (planes,) if planes > 1 else ()
        values = layer.spectrum.values.reshape(*lead, f1, 2, f2 * slots)
        groups = layer.spectrum.groups.reshape(*lead, f1, f2 * slots)

        def single(values: Array) -> Array:
            return values.astype(np.float32)

        inputs: list[gs.Tensor] = [
            attention["kernel"],
            self._constant("spectrum", values),
            self._constant("groups", groups),
            self._constant(f"columns{length}.inner", single(columns.inner)),
            self._constant(f"columns{length}.outer", single(columns.outer)),
            self._constant(f"rows{layer.spectrum.rows}.inner", single(rows.inner)),
            self._constant(f"rows{layer.spectrum.rows}.outer", single(rows.outer)),
        ]
        attributes: dict[str, Any] = {
            "column_inner_shape": [0, f1, 2 * f2, slots],
            "column_outer_shape": [0, 2 * f1, f2 * slots],
            "columns_shape": [0, 2 * length, slots],
            "row_inner_shape": [0, classes, 2 * r1, length],
            "row_outer_shape": [0, 2 * classes, r1 * length],
            "matrix_shape": [0, layer.spectrum.rows, length],
            "kernel_shape": [-1, layer.in_channels, height, width],
        }
        if local is not None:
            window = width * local.taps
            # Windows start (kw - 1) + kw·(taps // 2) before a channel's first column. In
            # their order the taps come first and the kernel's columns, reversed, second.
            before = width - 1 + width * (local.taps // 2)
            order = [
                (width - 1 - place % width) * local.taps + place // width for place in range(window)
            ]
            normalised = self._op(
                "LayerNormalization",
                "local.input",
                average,
                self._constant("local.norm.weight", local.norm_weight),
                self._constant("local.norm.bias", local.norm_bias),
                axis=-1,
                epsilon=float(local.epsilon),
            )
            inputs += [
                normalised,
                self._constant(f"window{window}", np.eye(window, dtype=np.float32)[:, None]),
                self._constant("local.weight", local.weight[:, order]),
            ]
            attributes |= {
                "local_spread": [0, 0, 0, 0, 0, width - 1],
                "local_shape": [0, 1, length],
                "local_pads": [0, 0, before, 0, 0, window - 1 - before],
            }
        if column_scale is not None or row_scale is not None:
            attributes["scaled_shape"] = [0, layer.out_channels, height, length]
        inputs += [scale for scale in (column_scale, row_scale) if scale is not None]
        if form.spatial_kernel:
            shape = [0, layer.out_channels, height, layer.in_channels, width]
            attributes["interleaved_shape"] = shape
        self.functions[form.name] = assembly_function(form)
        return self._op(form.name, "assembly", *inputs, domain=DOMAIN, **attributes)

    def _bands(self, bands: FoldedBands, x: gs.Tensor) -> gs.Variable:
        channels = int(bands.conv_weight.shape[1]) * bands.groups
        height, width, groups = bands.height, bands.width, bands.groups
        form = BandForm(len(bands.bands), bands.softmax)
        inputs: list[gs.Tensor] = [
            x,
            self._constant("bands.conv.weight", bands.conv_weight),
            self._constant("bands.conv.bias", bands.conv_bias),
            self._constant("bands.mix", bands.mix[:, :, None, None]),
            self._constant("bands.mix.bias", bands.mix_bias),
            self._constant(f"bands{height}x{width}.to_columns", bands.to_columns),
            self._constant(f"bands{height}x{width}.to_rows", bands.to_rows),
        ]
        pad = bands.conv_weight.shape[-1] // 2
        attributes: dict[str, Any] = {
            "groups": groups,
            "conv_pads": [pad] * 4,
            "rows_shape": [0, channels, height * (2 if bands.complex_rows else 1), -1],
            "factors_shape": [0, groups, bands.terms, height, width],
            "grouped_shape": [0, groups, channels // groups, height, width],
            "feature_shape": [0, channels, height, width],
        }
        if bands.softmax:
            attributes["bands_shape"] = [0, groups, -1, height, width]
            attributes["flat_shape"] = [0, bands.conv_weight.shape[0], height, width]
        for index, band in enumerate(bands.bands):
            name = f"bands{height}x{width}.{index}"
            inputs.append(self._constant(f"{name}.from_rows", band.from_rows))
            inputs.append(self._constant(f"{name}.from_columns", band.from_columns))
            attributes[f"band{index}_ends"] = [band.rows, band.columns]
            attributes[f"band{index}_shape"] = [0, channels, height, -1]
        self.functions[form.name] = band_function(form)
        return self._op(form.name, "bands", *inputs, domain=DOMAIN, **attributes)

    def _convolution(
        self,
        layer: FoldedConv,
        x: gs.Tensor,
        kernel: gs.Tensor,
        attention: dict[str, gs.Variable],
    ) -> gs.Variable:
        batch, features = self.batch, self.batch * layer.in_channels
        scale = self._row_scale(layer, attention) if layer.filter_side == "feature" else None
        inputs = [x, kernel]
        if batch > 1:
            inputs[0] = self._op("Reshape", "input", x, self._shape(1, features, *layer.input_size))
        if scale is None and layer.bias is not None:
            inputs.append(self._constant("bias", np.tile(layer.bias, batch)))
        y = self._op("Conv", "convolution", *inputs, group=batch, **_geometry(layer))
        if batch > 1:
            shape = self._shape(batch, layer.out_channels, *layer.output_size)
            y = self._op("Reshape", "output", y, shape)
        if scale is not None:
            y = self._op("Mul", "output.scaled", y, scale)
            if layer.bias is not None:
                bias = self._constant("bias.map", layer.bias.reshape(1, -1, 1, 1))
                y = self._op("Add", "output.shifted", y, bias)
        return y

    def _constant_convolution(self, layer: FoldedConv, x: gs.Tensor) -> gs.Variable:
        weight = layer.constant_weight
        assert weight is not None
        if layer.output_scale is not None:
            weight = weight * layer.output_scale[:, None, None, None]
        inputs = [x, self._constant("weight", weight)]
        if layer.bias is not None:
            inputs.append(self._constant("bias", layer.bias))
        return self._op("Conv", "convolution", *inputs, **_geometry(layer))


def _geometry(layer: FoldedConv) -> dict[str, Any]:
    return {
        "kernel_shape": list(layer.kernel_size),
        "strides": list(layer.stride),
        "pads": list(layer.padding),
        "dilations": list(layer.dilation),
    }
