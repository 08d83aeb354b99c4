"""A bundle's graph as one .onnx file of standard operators, for other runtimes than ours.

A bundle's graphs keep FDConv's layers as functions and their weights in a file beside them, which
ONNX Runtime reads from 1.25.1 on. Other runtimes know no functions. docs/runtimes.md says which
take the file.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_model
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from fdconv_deploy.atomic_write import atomic_path, temporary_folder
from fdconv_deploy.errors import ExportError, in_the_way
from fdconv_deploy.export.options import Progress
from fdconv_deploy.export.validation.subprocess_run import fresh
from fdconv_deploy.export.validation.tolerance import ONNX_FILE_TOLERANCES
from fdconv_deploy.ops import DOMAIN, OPSET
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.sample_images import sample_feeds

# Below it, ``Softmax``, ``Squeeze`` and others mean or take something else.
OLDEST = 13
# Operators that not every version can hold: the versions from the one since which the defaults mean
# what they mean now, to the last that ONNX Runtime has a kernel of.
_RANGES = {"RoiAlign": (16, 21)}


@dataclass(frozen=True)
class OnnxFile:
    """A file that was written and proved.

    Attributes:
        path: where it is.
        opset: version of the standard operators.
        nodes: how many there are.
        max_rel: largest difference from the bundle's graph, as a share of the largest value.
    """

    path: Path
    opset: int
    nodes: int
    max_rel: float


def export_onnx(
    bundle: Bundle | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    opset: int = OPSET,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
) -> OnnxFile:
    """Write one of a bundle's graphs as a self-contained file of standard ONNX operators.

    The file is run by stock ONNX Runtime in a fresh process, and kept if it answers as the bundle's
    graph does, which was itself proved equal to the network.

    Args:
        bundle: the bundle, or its folder.
        output: the file to write, ``*.onnx``.
        size: (height, width) of the graph, of a bundle of several; its first if not given.
        batch: batch size of the graph; the smallest if not given.
        opset: version of the standard operators, 13 or newer; a detector's 16 to 21.
        overwrite: replace a file that is there.
        progress: called with a sentence as each step begins.

    Raises:
        BundleError: the bundle is damaged.
        ExportError: it has no such graph, the graph has no form in that opset, the file would be
            over 2 GB or does not answer as the bundle's graph, or ``output`` is in the way.
    """
    from fdconv_deploy.export.graph import check_model  # imports torch, which takes seconds

    path = Path(output)
    check_output(path, overwrite=overwrite)
    found = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, hold=True)
    found, batch = chosen_graph(found, size, batch)
    with tempfile.TemporaryDirectory(prefix="fdconv-export-") as name:
        files = found.copy_to(Path(name, "bundle"))
        progress("writing the operators out")
        model = standard_model(files, batch, opset)
        with atomic_path(path) as temporary:
            onnx.save(model, str(temporary))
            check_model(str(temporary))
            progress("comparing the file with the bundle's graph")
            max_rel = prove(files, batch, temporary, Path(name), opset)
        return OnnxFile(path, opset, len(model.graph.node), max_rel)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse a name that is no .onnx file's, or taken, and a place that cannot be written to.

    Raises:
        ExportError: with what to do.
        OSError: the system refused.
    """
    if path.suffix != ".onnx":
        raise ExportError(f"The output is a file called *.onnx, not {path.name!r}.")
    if path.is_dir():
        raise ExportError(f"{path} is a folder. Give the name of a file in it.")
    if path.exists() and not overwrite:
        raise in_the_way(ExportError, f"The file {path} exists already.")
    with temporary_folder(path):
        pass


def chosen_graph(
    bundle: Bundle, size: tuple[int, int] | None, batch: int | None
) -> tuple[Bundle, int]:
    """The bundle at one input size, and the batch size of one of its graphs.

    Raises:
        ExportError: it has no such graph.
    """
    sizes = bundle.manifest.sizes
    if size is not None and size not in sizes:
        listed = ", ".join(f"{height}x{width}" for height, width in sizes) or "none"
        raise ExportError(f"the bundle has no graph of {size[0]}x{size[1]}; it has {listed}.")
    if batch is not None and batch not in bundle.batch_sizes:
        listed = ", ".join(map(str, bundle.batch_sizes))
        raise ExportError(f"the bundle has no graph of batch size {batch}; it has {listed}.")
    at = size or next(iter(sizes), None)
    return bundle if at is None else bundle.at(at), batch or bundle.batch_sizes[0]


def standard_model(bundle: Bundle, batch: int, opset: int) -> ModelProto:
    """A graph of a bundle with nothing but standard operators and tensors, weights included.

    Raises:
        ExportError: see `set_opset`, and `check_one_file`.
    """
    from fdconv_deploy.export.graph import check_one_file

    graph = bundle.model_path(batch)
    model = inline_functions(onnx.load(str(graph), load_external_data=False))
    # Weights are joined last: what goes through onnx's C++ code must stay below 2 GB.
    model = set_opset(onnx.shape_inference.infer_shapes(model, data_prop=True), opset)
    check_one_file(model, "Keep the bundle, whose weights lie in a file of their own.")
    load_external_data_for_model(model, str(graph.parent))
    del model.metadata_props[:]
    # What a reader of the file needs to feed it and to name its answers, as JSON.
    manifest = bundle.manifest
    found: dict[str, Any] = {"kind": manifest.kind, "precision": manifest.precision}
    if network := manifest.architecture or manifest.detector:
        how = network.preprocessing
        found |= {"classes": network.classes, "palette": network.palette}
        found |= {"mean": how.mean, "std": how.std, "fit": manifest.fit}
    for key, value in found.items():
        model.metadata_props.add(key=f"fdconv.{key}", value=json.dumps(value))
    return model


def inline_functions(model: ModelProto) -> ModelProto:
    """Write every ``fdconv`` node out as its function's body, in nodes named after it.

    Constants of bodies become initializers: TVM and MNN read no ``Constant`` whose value is a list
    of integers. ``model`` is left as it is; its external data need not be loaded.
    """
    inlined = onnx.inliner.inline_local_functions(model)
    for domain in [found for found in inlined.opset_import if found.domain == DOMAIN]:
        inlined.opset_import.remove(domain)
    nodes = iter(inlined.graph.node)
    for original in model.graph.node:
        node = next(nodes)
        if original.domain == DOMAIN:  # its body lies where it was, and ends in its output
            node.name = f"{original.name}.{node.output[0]}"
            while original.output[0] not in node.output:
                node = next(nodes)
                node.name = f"{original.name}.{node.output[0]}"
    lift = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    lifted = ir.to_proto(lift(ir.from_proto(inlined)).model)
    # Initializers say themselves what they are, and `set_opset` may take some away.
    made = {output for node in lifted.graph.node for output in node.output}
    known = [value for value in lifted.graph.value_info if value.name in made]
    del lifted.graph.value_info[:]
    lifted.graph.value_info.extend(known)
    return lifted


def set_opset(model: ModelProto, opset: int) -> ModelProto:
    """The model in version ``opset`` of the standard operators.

    Args:
        model: without functions, its shapes inferred; may be changed.
        opset: from `OLDEST` to the newest that the installed ``onnx`` knows.

    Raises:
        ExportError: there is no such version, or an operator of the graph is not in it.
    """
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST <= opset <= newest:
        raise ExportError(
            f"the opset is {OLDEST} to {newest} (the newest that onnx {onnx.__version__} knows), "
            f"not {opset}."
        )
    for node in model.graph.node:
        first, last = _RANGES.get(node.op_type, (opset, opset))
        if not first <= opset <= last:
            raise ExportError(
                f"the graph's {node.op_type} {node.name!r} cannot be written in opset {opset}: it "
                f"meant something else before {first}, and ONNX Runtime runs none newer than "
                f"{last}. Choose an opset from {first} to {last}."
            )
    standard = next(entry for entry in model.opset_import if not entry.domain)
    if opset > standard.version:
        try:
            model = onnx.version_converter.convert_version(model, opset)
        except RuntimeError as error:
            raise ExportError(
                f"onnx cannot convert this graph to opset {opset}: {error}. Choose an opset nearer "
                f"to {standard.version}."
            ) from error
    elif opset < standard.version:
        _lower(model, standard.version, opset)
        standard.version = opset
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    return model


def _lower(model: ModelProto, current: int, opset: int) -> None:
    graph = model.graph
    values = [*graph.value_info, *graph.input, *graph.output]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        _refuse(node, current, opset)
        if node.op_type == "Split" and "num_outputs" in attributes and opset < 18:
            axis = helper.get_node_attr_value(node, "axis") if "axis" in attributes else 0
            sizes = np.array([shapes[output][axis] for output in node.output], np.int64)
            graph.initializer.append(numpy_helper.from_array(sizes, f"{node.output[0]}.split"))
            node.input.append(f"{node.output[0]}.split")
            node.attribute.remove(attributes["num_outputs"])
        elif node.op_type == "LayerNormalization" and opset < 17:
            nodes += _layer_normalization(node, graph.initializer, opset)
            continue
        _reduced_axes(node, constants, opset)
        known = onnx.defs.get_schema(node.op_type, opset).attributes
        defaults = onnx.defs.get_schema(node.op_type, current).attributes
        for name, attribute in attributes.items():
            if name in known or attribute not in node.attribute:
                continue
            # What a zero in a Reshape's shape means is no matter where there is none.
            shape = constants.get(node.input[1]) if name == "allowzero" else None
            harmless = shape is not None and bool(numpy_helper.to_array(shape).all())
            if attribute != defaults[name].default_value and not harmless:
                raise _not_in(node, opset, f"its {name} is {helper.get_attribute_value(attribute)}")
            node.attribute.remove(attribute)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    read = {output.name for output in graph.output}.union(*(node.input for node in nodes))
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)  # axes that became attributes


def _refuse(node: NodeProto, current: int, opset: int) -> None:
    """Refuse an operator that has no form in an older version."""
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        raise _not_in(node, opset, "it holds a graph of its own")
    if onnx.defs.has(node.op_type, opset) or node.op_type == "LayerNormalization":
        return
    since = onnx.defs.get_schema(node.op_type, current).since_version
    raise _not_in(node, opset, f"it came with opset {since}")


def _not_in(node: NodeProto, opset: int, why: str) -> ExportError:
    return ExportError(
        f"the graph's {node.op_type} {node.name!r} cannot be written in opset {opset}: {why}. "
        "Choose a newer one."
    )


def _reduced_axes(node: NodeProto, constants: dict[str, TensorProto], opset: int) -> None:
    """Axes of a reduction as an attribute, where the version has them so."""
    schema = onnx.defs.get_schema(node.op_type, opset)
    if len(node.input) != 2 or len(schema.inputs) != 1 or "axes" not in schema.attributes:
        return
    axes = numpy_helper.to_array(constants[node.input.pop()])
    node.attribute.append(helper.make_attribute("axes", axes.tolist()))


def _layer_normalization(
    node: NodeProto, initializers: list[TensorProto], opset: int
) -> Iterator[NodeProto]:
    """The operator by those it is defined by."""
    x, scale, *bias = node.input
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    stem = node.output[0]
    if given.get("axis", -1) != -1 or len(node.output) > 1:
        raise _not_in(node, opset, "it normalises over several axes, or gives its mean")
    epsilon = numpy_helper.from_array(
        np.array(given.get("epsilon", 1e-5), np.float32), f"{stem}.epsilon"
    )
    initializers.append(epsilon)
    last = stem if not bias else f"{stem}.scaled"
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("ReduceMean", [x], f"{stem}.mean", {"axes": [-1]}),
        ("Sub", [x, f"{stem}.mean"], f"{stem}.centred", {}),
        ("Mul", [f"{stem}.centred"] * 2, f"{stem}.squared", {}),
        ("ReduceMean", [f"{stem}.squared"], f"{stem}.variance", {"axes": [-1]}),
        ("Add", [f"{stem}.variance", epsilon.name], f"{stem}.above_zero", {}),
        ("Sqrt", [f"{stem}.above_zero"], f"{stem}.deviation", {}),
        ("Div", [f"{stem}.centred", f"{stem}.deviation"], f"{stem}.normalised", {}),
        ("Mul", [f"{stem}.normalised", scale], last, {}),
        *([("Add", [last, *bias], stem, {})] if bias else []),
    ]
    for operator, inputs, output, attributes in steps:
        yield helper.make_node(operator, inputs, [output], name=output, **attributes)


def prove(bundle: Bundle, batch: int, path: Path, folder: Path, opset: int = OPSET) -> float:
    """Run a file and the bundle's graph, using a folder; their difference, of the largest value.

    Raises:
        ExportError: the file does not load or run, or answers otherwise.
    """
    manifest = bundle.manifest
    network = manifest.architecture or manifest.detector
    how = network.preprocessing if network else None
    detects = manifest.kind == "detector"
    feeds = sample_feeds(manifest.inputs[batch], how, vary_sizes=detects)
    names = [spec.name for spec in manifest.outputs[batch]]
    expected = fresh(bundle.model_path(batch), names, folder)(feeds)
    advice = ""
    if opset != OPSET:
        advice = f" Choose the bundle's own opset, {OPSET}, in which nothing is rounded otherwise."
    try:
        found = fresh(path, names, folder)(feeds)
    except ExportError as error:  # of an operator that it has in other versions only
        raise ExportError(f"{error}.{advice}") from error
    errors = {name: _error(found[name], expected[name]) for name in names}
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= (allowed := ONNX_FILE_TOLERANCES[manifest.precision]):
        raise ExportError(
            f"the file's {worst} differs from the bundle's by {errors[worst]:.1e} of its largest "
            f"value, {allowed:.0e} is allowed. Nothing was kept.{advice}"
        )
    return errors[worst]


def _error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return np.inf
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(found, expected) else np.inf
    largest = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(found.astype(np.float64) - expected).max(initial=0.0)) / largest
