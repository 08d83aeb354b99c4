"""A bundle as a model of a Triton model repository, by the Python or the ONNX Runtime backend.

The Python backend's model takes images and gives masks: it runs a session of this package, with its
native operators, resizing and sliding windows. The ONNX Runtime backend's models are the graphs
alone, of standard operators, one model per batch size.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

import onnx

from fdconv_deploy.atomic_write import replace_folder, temporary_folder
from fdconv_deploy.errors import ExportError, in_the_way
from fdconv_deploy.export.options import Progress
from fdconv_deploy.export.targets.onnx_file import chosen_graph, prove, standard_model
from fdconv_deploy.ops import OPSET
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import MANIFEST_NAME, Manifest
from fdconv_deploy.runtime.segmentation import classes_of

TritonBackend = Literal["python", "onnxruntime"]
CONFIG = "config.pbtxt"
# Most images that the Python backend takes in one run, as `fdconv serve` in one request.
MAX_BATCH = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "int32": "TYPE_INT32", "bool": "TYPE_BOOL"}


def export_triton(
    bundle: Bundle | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    name: str | None = None,
    backend: TritonBackend = "python",
    sizes: Sequence[tuple[int, int]] = (),
    batches: Sequence[int] = (),
    overwrite: bool = False,
    progress: Progress = lambda _: None,
) -> list[Path]:
    """Write a bundle into a Triton model repository; other models in it are left alone.

    Args:
        bundle: the bundle, or its folder.
        output: the repository's folder.
        name: the model's; by default the bundle's folder's. Where the ONNX Runtime backend gets
            several graphs, ``_HEIGHTxWIDTH`` and ``_bN`` are appended.
        backend: "python": one model, `images` (N, H, W, C) of any size to `labels` (N, H, W), of a
            detector to objects in the image's own pixels. "onnxruntime": the graphs, proved
            as `export_onnx` does.
        sizes: (height, width) of the ONNX Runtime backend's graphs; every one if not given.
        batches: their batch sizes; every one if not given.
        overwrite: replace models of that name.
        progress: called with a sentence as each step begins.

    Returns:
        The folders of the models.

    Raises:
        BundleError: the bundle is damaged.
        ExportError: the name cannot be a model's, the bundle has no such graph or is of a module
            where images are asked for, or ``output`` is in the way.
    """
    found = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, hold=True)
    name = found.path.resolve().name if name is None else name
    repository = Path(output)
    check_repository(repository, name)
    if backend == "python":
        if sizes or batches:
            raise ExportError(
                "the Python backend's model holds the whole bundle and takes images of any size: "
                "leave sizes and batches out."
            )
        config = _python_config(name, found.manifest)
        target = _target(repository, name, overwrite)
        progress("copying the bundle")
        with temporary_folder(target) as folder:
            _write_python(found, folder, config)
            replace_folder(folder, target)
        return [target]
    chosen = [
        chosen_graph(found, at, number)
        for at in (*(sizes or found.manifest.sizes),) or (None,)
        for number in batches or found.batch_sizes
    ]
    names = [_graph_name(name, view, number, chosen) for view, number in chosen]
    targets = [_target(repository, one, overwrite) for one in names]
    with tempfile.TemporaryDirectory(prefix="fdconv-export-") as scratch:
        held = found.copy_to(Path(scratch, "bundle"))
        for (view, number), one, target in zip(chosen, names, targets, strict=True):
            here = Bundle(held.path, view.manifest, held.verify)
            progress(f"writing {one}")
            with temporary_folder(target) as folder:
                version = folder / "1"
                version.mkdir()
                onnx.save(
                    standard_model(here, number, OPSET),
                    str(version / "model.onnx"),
                    save_as_external_data=True,
                    location="weights.bin",
                )
                # onnx lets nobody else read it, and Triton runs as another user.
                for file in version.iterdir():
                    file.chmod((version / "model.onnx").stat().st_mode)
                progress(f"comparing {one} with the bundle's graph")
                prove(here, number, version / "model.onnx", Path(scratch))
                (folder / CONFIG).write_text(_onnxruntime_config(one, here.manifest, number))
                replace_folder(folder, target)
    return targets


def check_repository(repository: Path, name: str | None) -> None:
    """Refuse a name that no model can have, and a place that is no repository or takes no model.

    Raises:
        ExportError: with what to do.
        OSError: the system refused.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise ExportError(
            "A Triton model's name is that of its folder and part of its address: letters, digits, "
            f"'.', '_' and '-', at most 100, a letter or digit first; found {name!r}. Give another "
            "name."
        )
    if repository.exists() and not repository.is_dir():
        raise ExportError(f"{repository} is a file; a model repository is a folder of models.")
    if (repository / MANIFEST_NAME).is_file() or (repository / CONFIG).is_file():
        raise ExportError(
            f"{repository} is a bundle or one model; a model repository is a folder of models. "
            "Name the folder above, or another."
        )
    with temporary_folder(repository / "model"):
        pass


def _tensor(name: str, kind: str, dims: Sequence[int], options: str = "") -> str:
    """A tensor in config.pbtxt, without the batch where the model has one."""
    listed = ", ".join(map(str, dims or [1]))  # never empty: one number is a row of one
    return f'  {{ name: "{name}" data_type: {kind} dims: [{listed}]{options} }}'


def _config(
    name: str, backend: str, batch: int, inputs: list[str], outputs: list[str], *more: str
) -> str:
    lines = [f'name: "{name}"', f'backend: "{backend}"', f"max_batch_size: {batch}"]
    for title, tensors in (("input", inputs), ("output", outputs)):
        lines += [f"{title} [", ",\n".join(tensors), "]"]
    return "\n".join([*lines, *more, ""])


def _python_config(name: str, manifest: Manifest) -> str:
    """The config.pbtxt of the Python backend's model.

    Raises:
        ExportError: the bundle is of a module, which takes no images.
    """
    if manifest.kind == "segmentor" and manifest.architecture is not None:
        how = manifest.architecture.preprocessing
        wide = len(classes_of(manifest.architecture)[0]) > 256
        outputs = [_tensor("labels", "TYPE_UINT16" if wide else "TYPE_UINT8", [-1, -1])]
        if manifest.architecture.panoptic is not None:
            outputs.append(_tensor("ids", "TYPE_INT32", [-1, -1]))
    elif manifest.kind == "detector" and manifest.detector is not None:
        how = manifest.detector.preprocessing
        specs = manifest.outputs[min(manifest.outputs)]
        outputs = [_tensor(spec.name, _TYPES[spec.dtype], spec.shape[1:]) for spec in specs]
    else:
        raise ExportError(
            f"the Python backend's model takes images, and the bundle is of a {manifest.kind}. "
            "Write the ONNX Runtime backend's form, which takes the network's own inputs."
        )
    # Files of colours are decoded to bytes; bands are numbers of any type.
    kind = "TYPE_UINT8" if how.loading == "color" else "TYPE_FP32"
    image = _tensor("images", kind, [-1, -1, how.channels], " allow_ragged_batch: true")
    preferred = ", ".join(str(n) for n in sorted(manifest.models) if n <= MAX_BATCH)
    return _config(
        name, "python", MAX_BATCH, [image], outputs,
        f"dynamic_batching {{ preferred_batch_size: [{preferred}] }}",
        "# The session chooses its device itself; what Triton hands over lies in main memory.",
        "instance_group [{ count: 1 kind: KIND_CPU }]",
        "# As open_session takes it; so is a parameter 'threads', CPU threads of a run.",
        'parameters { key: "backend" value { string_value: "auto" } }',
    )  # fmt: skip


def _onnxruntime_config(name: str, manifest: Manifest, batch: int) -> str:
    """The config.pbtxt of one graph, whose batch size is fixed: Triton's "no batching", 0."""
    inputs, outputs = (
        [_tensor(spec.name, _TYPES[spec.dtype], spec.shape) for spec in specs]
        for specs in (manifest.inputs[batch], manifest.outputs[batch])
    )
    file = 'default_model_filename: "model.onnx"'
    return _config(name, "onnxruntime", 0, inputs, outputs, file)


def _write_python(bundle: Bundle, folder: Path, config: str) -> None:
    version = folder / "1"
    for name in (MANIFEST_NAME, *bundle.manifest.files):
        to = version / "bundle" / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, to)
    Bundle.open(version / "bundle")  # its hashes tell that the copy is whole
    with as_file(files("fdconv_deploy.export.targets") / "triton_model.py") as model:
        shutil.copyfile(model, version / "model.py")
    (folder / CONFIG).write_text(config)


def _graph_name(name: str, view: Bundle, batch: int, chosen: list[tuple[Bundle, int]]) -> str:
    """A graph's name, with what tells it from the others written with it."""
    if len({one.manifest.input for one, _ in chosen}) > 1:
        name += f"_{view.manifest.input}"
    return name + f"_b{batch}" * (len({number for _, number in chosen}) > 1)


def _target(repository: Path, name: str, overwrite: bool) -> Path:
    target = Path(os.path.abspath(repository / name))  # noqa: PTH100 - keeps symlinks
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not (target / CONFIG).is_file():
            raise ExportError(
                f"{target} is there and is no Triton model, so it is left alone. Give another name."
            )
        if not overwrite:
            raise in_the_way(ExportError, f"The model {target} exists already.")
    return target
