"""A bundle as a page that segments in the browser, without a server of ours.

The folder holds the network as one .onnx file, onnxruntime-web's files and a page with the steps
before and after a run in JavaScript. Any static web server will do; nothing is fetched from
elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdconv_deploy.atomic_write import replace_folder, temporary_folder
from fdconv_deploy.errors import ExportError, in_the_way
from fdconv_deploy.export.options import Progress
from fdconv_deploy.export.targets.onnx_file import chosen_graph, export_onnx
from fdconv_deploy.runtime.bundle import Bundle
from fdconv_deploy.runtime.manifest import Manifest
from fdconv_deploy.runtime.postprocessing import logit_of
from fdconv_deploy.runtime.segmentation import classes_of

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # from Python 3.11 on

# The version that the page was tried with.
ONNXRUNTIME_WEB = "1.30.0"
DESCRIPTION = "network.json"
_MODEL, _RUNTIME = "model.onnx", "onnxruntime"
# Of the npm package: the API and what it loads, first to run on a GPU, then on the CPU. A visitor's
# browser downloads the one or the other.
_FILES = (
    "ort.webgpu.bundle.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
    "ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)


def export_web(
    bundle: Bundle | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    onnxruntime_web: str | os.PathLike[str] | None = None,
    size: tuple[int, int] | None = None,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
) -> Path:
    """Write the folder of a page that segments images in the browser.

    ``python -m http.server`` in that folder serves it.

    Args:
        bundle: a segmentor's bundle, or its folder, with a graph of batch size 1.
        output: the folder to write.
        onnxruntime_web: folder of the npm package onnxruntime-web, which holds ``dist``. If not
            given, ``node_modules/onnxruntime-web`` of the current folder or of one above it.
        size: (height, width) of the graph, of a bundle of several; its first if not given.
        overwrite: replace such a folder that is there.
        progress: called with a sentence as each step begins.

    Raises:
        BundleError: the bundle is damaged.
        ExportError: the page cannot do what the network needs, onnxruntime-web is not there, or
            ``output`` is in the way.
    """
    target = Path(os.path.abspath(output))  # noqa: PTH100 - keeps symlinks
    check_web_output(target, overwrite=overwrite)
    package, version = find_onnxruntime_web(onnxruntime_web)
    found = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, hold=True)
    found, batch = chosen_graph(found, size, 1)
    described = _description(found.manifest)
    with temporary_folder(target) as folder:
        model = export_onnx(found, folder / _MODEL, batch=batch, progress=progress).path
        progress("writing the page")
        with as_file(_page()) as page:
            shutil.copytree(page, folder, dirs_exist_ok=True)
        (folder / _RUNTIME).mkdir()
        for name in _FILES:
            shutil.copyfile(package / "dist" / name, folder / _RUNTIME / name)
        described |= {"bytes": model.stat().st_size, "onnxruntime_web": version}
        (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")
        replace_folder(folder, target)
    return target


def _page() -> Traversable:
    return files("fdconv_deploy.export.targets") / "web"


def check_web_output(target: Path, *, overwrite: bool) -> None:
    """Refuse a place of anything but a page to be replaced, and one that cannot be written to.

    Raises:
        ExportError: with what to do.
        OSError: the system refused.
    """
    with temporary_folder(target):
        pass
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    found = {path.name for path in target.iterdir()} if target.is_dir() else set()
    ours = {path.name for path in _page().iterdir()} | {DESCRIPTION, _MODEL, _RUNTIME}
    if DESCRIPTION not in found or found - ours:
        besides = ", ".join(sorted(found - ours)[:3])
        raise ExportError(
            f"{target} is there and is no page's folder"
            f"{besides and f' (it holds {besides})'}, so it is left alone. Give another name."
        )
    if not overwrite:
        raise in_the_way(ExportError, f"The page {target} exists already.")


def find_onnxruntime_web(given: str | os.PathLike[str] | None) -> tuple[Path, str]:
    """The folder of the npm package, and its version.

    Raises:
        ExportError: it is not there, or is a version without the files that the page loads.
    """
    here = Path.cwd()
    places = [folder / "node_modules/onnxruntime-web" for folder in (here, *here.parents)]
    if given is not None:
        places = [Path(given)]
    how = (
        f"npm install onnxruntime-web@{ONNXRUNTIME_WEB} puts it into node_modules here; of a copy "
        "from elsewhere, give the folder (--onnxruntime-web)."
    )
    package = next((place for place in places if (place / "package.json").is_file()), None)
    if package is None:
        where = f"in {places[0]}" if given is not None else f"in node_modules of {here} or above"
        raise ExportError(f"The npm package onnxruntime-web is not {where}. {how}")
    version = str(json.loads((package / "package.json").read_text()).get("version"))
    missing = [name for name in _FILES if not (package / "dist" / name).is_file()]
    if missing:
        raise ExportError(
            f"{package} is onnxruntime-web {version}, without the file dist/{missing[0]} that the "
            f"page loads; it was tried with {ONNXRUNTIME_WEB}. {how}"
        )
    return package, version


def _description(manifest: Manifest) -> dict[str, Any]:
    """What the page's JavaScript needs to know of the network.

    Raises:
        ExportError: the page has no such step.
    """
    network, size = manifest.architecture, manifest.input
    if network is None or size is None:
        raise ExportError(
            f"the page segments images, and the bundle is of a {manifest.kind}. Serve it with "
            "fdconv serve, or run its file (--format onnx) with onnxruntime-web."
        )
    how, head = network.preprocessing, network.decode_head
    lacking = {
        "panoptic answers": network.panoptic is not None,
        "sliding windows (export with --mode whole)": network.test.mode == "slide",
        f"images loaded as {how.loading!r}": how.loading != "color",
        "pixels resized as float32": how.to_float32,
        "Pillow's way to resize": how.resample != "opencv",
    }
    for step, needed in lacking.items():
        if needed:
            raise ExportError(
                f"the network needs {step}, which the page does not have. Serve the bundle with "
                "fdconv serve instead."
            )
    logit = None if head.label_threshold is None else logit_of(head.label_threshold)
    if logit is not None:  # JSON has no infinity; no logit is beyond float32
        logit = max(-1e39, min(logit, 1e39))
    names, colours = classes_of(network)
    return {
        "name": manifest.checkpoint.name if manifest.checkpoint else manifest.created_by,
        "height": size.height,
        "width": size.width,
        "fit": manifest.fit,
        "mean": how.mean,
        "std": how.std,
        "reversed": how.reversed,
        "scale": how.scale,
        "keep_ratio": how.keep_ratio,
        "size_divisor": how.size_divisor,
        "align_corners": head.align_corners,
        "threshold_logit": logit,
        "classes": names,
        "palette": colours,
    }
