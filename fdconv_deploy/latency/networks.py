"""The networks that are timed: bundles, checkpoints and services × backends × batch sizes."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from fdconv_deploy.config import DetectorConfig, Preprocessing, ResNetConfig, SegmentorConfig
from fdconv_deploy.errors import FDConvError, UsageError
from fdconv_deploy.ops.native import NCHW, Native
from fdconv_deploy.runtime import BACKENDS, Bundle, GraphRunner, Session
from fdconv_deploy.runtime.backends import NATIVE_BACKENDS, BackendOptions, select
from fdconv_deploy.runtime.backends.base import Phases
from fdconv_deploy.runtime.backends.tensorrt_engines import FOLDER
from fdconv_deploy.runtime.bundle import bundles_and_checkpoints
from fdconv_deploy.runtime.images import load_image
from fdconv_deploy.runtime.manifest import TensorSpec
from fdconv_deploy.runtime.preprocessing import check_image, resize, scene_bands
from fdconv_deploy.sample_images import manifest_feeds, sample_feeds, sample_image

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fdconv_deploy.nn import Segmentor
    from fdconv_deploy.nn.detection import Detector

Kind = Literal["bundle", "checkpoint", "service", "call"]
PAGEABLE = "copies from and to pageable memory, which wait"
TORCH_BACKENDS = ("eager", "compile", "folded", "fused")
ALL, CPU = "all", "onnxruntime-cpu"


class UnavailableError(FDConvError):
    """A target cannot be had on this machine; skipped where nobody asked for it by name."""


class RunOptions(BaseModel):
    """How targets are run."""

    model_config = ConfigDict(frozen=True)

    threads: int  # on a CPU
    size: tuple[int, int] | None = None  # (height, width) of a checkpoint's input
    whole: bool = False  # time a request from decoded pixels to labels, not the network alone
    image: Path | None = None  # packaged pictures when not given
    model: str | None = None  # of a service; its first when not given
    config: Path | None = None  # a checkpoint's
    # Settings that a checkpoint does not contain; of a call, whatever it takes.
    overrides: dict[str, Any] = {}
    weights: str | None = None  # which of a checkpoint's, see `read_checkpoint`
    tf32: bool | None = None  # see `open_session`


class Named(BaseModel):
    """What tells a target from others, also in a report."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    # A bundle's or checkpoint's path, a service's address, or for scripts "module:function", which
    # makes an `OpenTarget` of the target.
    source: str
    backend: str = "auto"  # or of BACKENDS, of TORCH_BACKENDS, or "http"
    native: Native = None  # whether ``fdconv`` operators run in C on a CPU, see `open_session`
    precision: str = "fp32"
    batch: int = 1

    @property
    def label(self) -> str:
        """For people: source, backend, kind of operators and precision."""
        short = self.source if self.kind == "service" else Path(self.source).name
        said: dict[Native, str] = {None: "", True: "native", NCHW: "native in NCHW"}
        parts = [short, self.backend, said.get(self.native, "portable"), self.precision]
        return ", ".join(part for part in parts if part)

    @property
    def name(self) -> str:
        """The label with the batch size."""
        return f"{self.label}, batch {self.batch}"


class Target(Named):
    """One thing to time. Travels to its `workers.Worker` as JSON."""

    options: RunOptions
    named: bool = True  # this backend was asked for, rather than every one there is

    def opened(self, device: str, **found: Any) -> Opened:
        """What turned out when it was opened: fields of `Opened`."""
        own = self.model_dump(include=set(Named.model_fields))
        own |= {"threads": self.options.threads, "device": device}
        whole = self.options.whole or self.kind == "service"
        return Opened(**{**own, "whole": whole, **found})


class Opened(Named):
    """What turned out when a target was opened, and what its process took.

    Memory of a service's worker is None: it is only its client. ``peak_mb``, ``device_mb`` and
    ``cpu_seconds`` are those so far.
    """

    threads: int  # on a CPU
    whole: bool  # from decoded pixels to labels or objects, or of a service from an encoded image
    device: str  # "cpu", "cuda" or "service"
    choice: str = ""  # why it runs in that backend
    network: str = ""  # whichever of its layers are FDConv: by it unrelated ones are told
    operators: str = ""  # what runs the ``fdconv`` operators, and why
    size: tuple[int, int] | None = None  # (height, width) of its input
    manner: str = ""  # on a GPU, its rounding, streams and synchronisation
    engine: str | None = None  # TensorRT's file
    import_seconds: float = 0.0  # from starting the process until its libraries were imported
    load_seconds: float = 0.0
    first_ms: float = 0.0  # of the first request
    loaded_mb: int | None = None  # memory of the process after loading
    peak_mb: int | None = None  # the most that it held
    device_mb: int | None = None  # GPU memory taken since it started, where it is known
    gpu_uuid: str | None = None  # of the GPU that does the work, where it is known
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class OpenTarget:
    """A target that answers one request after another."""

    run: Callable[[], Any]  # one request; may be called from several threads at once
    opened: Opened
    close: Callable[[], None] = lambda: None
    phases: Callable[[], Phases] | None = None  # one more run, where its phases can be told apart


@dataclass(frozen=True)
class Skipped:
    """Something that was not timed, and why, as a sentence."""

    what: str
    why: str


def expand_targets(
    paths: Sequence[Path],
    options: RunOptions,
    *,
    urls: Sequence[str] = (),
    backends: Sequence[str] = (),
    batches: Sequence[int] = (),
    native: Sequence[Native] = (),
) -> tuple[list[Target], list[Skipped]]:
    """Every combination that means something, and those that do not exist.

    Args:
        paths: bundles' folders and checkpoint files.
        options: of every target; checkpoints take the first bundle's input size when none is given.
        urls: of running services.
        backends: names, or "all"; else the best for bundles, eager for checkpoints.
        batches: sizes; those of the bundles when not given.
        native: run bundles with operators in C, without, or both, on a CPU.

    Raises:
        UsageError: nothing can be timed, or an option fits nothing here.
        FDConvError: a path is missing, or a bundle cannot be opened.
    """
    known = (ALL, "auto", *BACKENDS, *TORCH_BACKENDS)
    for name in backends:
        if name not in known:
            raise UsageError(f"There is no backend {name!r}; there are {', '.join(known)}.")
    paths = bundles_and_checkpoints(paths)
    bundles = {path: Bundle.open(path, verify=False) for path in paths if path.is_dir()}
    batch_sizes = sorted({size for bundle in bundles.values() for size in bundle.batch_sizes})
    wanted = [1] if options.whole and not batches else list(dict.fromkeys(batches))
    wanted = wanted or batch_sizes or [1]
    if options.whole and wanted != [1]:
        raise UsageError(
            "A whole request is one image's: --end-to-end goes without --batch, or with --batch 1."
        )
    sizes = [size for bundle in bundles.values() for size in bundle.manifest.sizes]
    if options.size is None:
        options = options.model_copy(update={"size": sizes[0] if sizes else None})
    elif paths and len(bundles) == len(paths) and not urls and options.size not in sizes:
        has = ", ".join(f"{height}x{width}" for height, width in sorted(set(sizes)))
        raise UsageError(
            f"There is no graph of {options.size[0]}x{options.size[1]}: a bundle's graphs have the "
            f"sizes it was exported at, here {has or 'their own'}."
        )
    targets: list[Target] = []
    skipped: list[Skipped] = []
    for path, batch in product(paths, wanted):
        target = Target(kind="checkpoint", source=str(path), options=options, batch=batch)
        if (bundle := bundles.get(path)) is not None:
            if batch not in bundle.batch_sizes:
                why = f"It has graphs of {', '.join(map(str, bundle.batch_sizes))}."
                skipped.append(Skipped(f"{path.name}, batch {batch}", why))
                continue
            precision = bundle.manifest.precision
            target = target.model_copy(update={"kind": "bundle", "precision": precision})
        ways = _ways(target.kind == "bundle", backends, native)
        targets += [target.model_copy(update=way) for way in ways]
    targets += [Target(kind="service", source=url, options=options, backend="http") for url in urls]
    for batch in wanted:
        if all(one.batch != batch for one in targets if one.kind != "service") and skipped:
            raise UsageError(
                f"No bundle has a graph of batch {batch}. {skipped[0].why} Export again with "
                f"--batch {batch}, or ask for another."
            )
    for name in backends:
        if name != ALL and all(target.backend != name for target in targets):
            kind = "checkpoints" if name in TORCH_BACKENDS else "bundles (fdconv export)"
            raise UsageError(f"Backend {name!r} runs {kind}, and none was given.")
    if not targets:
        raise UsageError("Give a bundle's folder, a checkpoint, or --url of a running service.")
    if native and all(target.native is None for target in targets):
        raise UsageError(
            f"Native operators run bundles in {', '.join(NATIVE_BACKENDS)}: there is none here."
        )
    return targets, skipped


def _ways(
    bundle: bool, backends: Sequence[str], native: Sequence[Native]
) -> Iterator[dict[str, Any]]:
    """The backends and operators that a bundle or a checkpoint is run in, as a target has them."""
    of_kind = ("auto", *BACKENDS) if bundle else TORCH_BACKENDS
    for name in dict.fromkeys(backends or of_kind[:1]):
        names = [name] if name in of_kind else []
        if name == ALL:
            names = [each for each in of_kind if each not in ("auto", *backends)]
        for each in names:
            natively = native if bundle and each in ("auto", *NATIVE_BACKENDS) else ()
            here = CPU if natively and each == "auto" else each
            for one in natively or [None]:
                yield {"backend": here, "native": one, "named": name != ALL}


def open_target(target: Target) -> OpenTarget:
    """Load everything a target needs, without running it; ``FDConvError`` if it cannot be had."""
    opening = {"bundle": _open_bundle, "service": _open_service, "checkpoint": _open_checkpoint}
    if target.kind in opening:
        return opening[target.kind](target)
    module, _, function = target.source.partition(":")
    made: OpenTarget = getattr(import_module(module), function)(target)
    return made


def _in_words(architecture: SegmentorConfig | DetectorConfig) -> str:
    backbone = architecture.backbone
    size = backbone.depth if isinstance(backbone, ResNetConfig) else backbone.widths[0]
    on = f"{backbone.type}-{size}"
    if isinstance(architecture, DetectorConfig):
        masks = "Faster" if architecture.mask_head is None else "Mask"
        return f"{masks} R-CNN on {on}, {architecture.bbox_head.num_classes} classes"
    head = architecture.decode_head
    return f"{head.type} on {on}, {head.num_classes} classes"


def _open_bundle(target: Target) -> OpenTarget:
    bundle, options = opened_bundle(target), target.options
    how = BackendOptions(threads=options.threads, native=target.native, tf32=options.tf32)
    backend, choice, graphs = select(bundle, target.backend, how)
    graph: Any = graphs.get(target.batch) or backend.load(bundle, target.batch)
    bundle.release()  # only this batch is run
    session = Session(bundle, GraphRunner(bundle, backend, choice, {target.batch: graph}))
    shapes = (spec.shape for spec in bundle.manifest.inputs[target.batch])
    native = target.native
    if native is None and backend.operators.startswith("native"):
        native = True
    described = bundle.manifest.architecture or bundle.manifest.detector
    found: dict[str, Any] = dict(
        backend=session.backend,
        native=native,
        choice=choice,
        network=_in_words(described) if described else "",
        operators=backend.operators,
        size=next((shape[2:] for shape in shapes if len(shape) == 4), None),
    )
    run: Callable[[], Any]
    phases = None
    if options.whole:
        image = _picture(session.input_size, session.preprocessing, options)
        run = partial(session.detect if session.detects else session.segment, image)
    else:
        inputs = bundle_inputs(bundle, target)
        run = partial(session.run_raw, inputs)
        phases = partial(graph.phases, inputs) if hasattr(graph, "phases") else None
        if backend.device == "cuda":
            runtimes = f"{backend.operators}, on one stream; waited for after every run; {PAGEABLE}"
            found["manner"] = getattr(graph, "manner", runtimes)
        if backend.name == "tensorrt":
            found["engine"] = str(bundle.path / FOLDER / graph.name)
    return OpenTarget(run, target.opened(backend.device, **found), session.close, phases)


def opened_bundle(target: Target) -> Bundle:
    """A target's bundle; of several input sizes that which was asked for, or else the first."""
    bundle, wanted = Bundle.open(target.source), target.options.size
    sizes = bundle.manifest.sizes
    return bundle.at(wanted if wanted in sizes else sizes[0]) if sizes else bundle


def bundle_inputs(
    bundle: Bundle, target: Target, batch: int | None = None
) -> dict[str, NDArray[Any]]:
    """Inputs of the bundle's graph of the target's batch size, or of another, by name."""
    described = bundle.manifest.architecture or bundle.manifest.detector
    how = described.preprocessing if described else Preprocessing()
    return manifest_feeds(bundle.manifest, batch or target.batch, image=_given(target.options, how))


def _given(options: RunOptions, how: Preprocessing) -> NDArray[Any] | None:
    return None if options.image is None else load_image(options.image, how)


def _picture(size: tuple[int, int], how: Preprocessing, options: RunOptions) -> NDArray[Any]:
    """The image given or a packaged picture, (height, width, C) of exactly that size."""
    pixels = _given(options, how)
    if pixels is None:
        return scene_bands(sample_image(0, size), how)
    return resize(check_image(pixels, how), *size, how.resample)


def _open_service(target: Target) -> OpenTarget:
    from fdconv_deploy.client import Client

    url, options, wanted = target.source, target.options, target.options.model
    with Client(url) as client:
        cards = client.models()
    names = [card["name"] for card in cards]
    if not cards or (wanted is not None and wanted not in names):
        raise FDConvError(
            f"The service at {url} has the models {', '.join(names) or 'none'}"
            + (f", not {wanted!r}." if wanted else ".")
        )
    card = next((card for card in cards if card["name"] == wanted), cards[0])
    size = card["input"]["height"], card["input"]["width"]
    preprocessing = Preprocessing.model_validate(card.get("preprocessing", {}))
    if options.image is not None:
        body = options.image.read_bytes()
    elif preprocessing.loading == "color":
        from fdconv_deploy.runtime.visualization import encode

        body = encode(_picture(size, preprocessing, options), "JPEG")
    else:
        buffer = io.BytesIO()
        np.save(buffer, _picture(size, preprocessing, options), allow_pickle=False)
        body = buffer.getvalue()
    name, detects = card["name"], card.get("kind") == "detector"
    of_thread = threading.local()

    def run() -> Any:
        client = getattr(of_thread, "client", None)
        if client is None:
            # A refusal is part of what a client sees, so it is not asked again in silence.
            client = of_thread.client = Client(url, retries=0)
        return client.detect(body, name) if detects else client.mask(body, name)

    choice = f"model {name}, {card.get('backend') or 'not loaded yet'}"
    precision = card.get("precision", "?")
    return OpenTarget(run, target.opened("service", choice=choice, size=size, precision=precision))


def load_network(target: Target) -> tuple[Segmentor | Detector, tuple[Tensor, ...]]:
    """A checkpoint's network, in eval mode on the CPU, and the inputs that it is run on."""
    import torch

    from fdconv_deploy.checkpoints import load_checkpoint

    options = target.options
    torch.set_num_threads(options.threads)
    network = load_checkpoint(
        target.source,
        config=options.config,
        overrides=options.overrides,
        weights=options.weights,
        require_fdconv=False,
    )
    config, size = network.architecture, options.size
    if isinstance(config, SegmentorConfig):
        size = size or config.test.crop_size
    else:
        size = size or config.published_size
    if size is None:
        raise FDConvError(
            f"{Path(target.source).name} was tested on whole images and records no size. Say "
            "which: --size 512x512, or give a bundle beside it."
        )
    how = config.preprocessing
    specs = [TensorSpec(name="images", shape=(target.batch, how.channels, *size))]
    if isinstance(config, DetectorConfig):
        specs.append(TensorSpec(name="sizes", shape=(target.batch, 2)))
    feeds = sample_feeds(specs, how, image=_given(options, how))
    return network, tuple(map(torch.from_numpy, feeds.values()))


def _open_checkpoint(target: Target) -> OpenTarget:
    """A checkpoint in PyTorch: as published, compiled, folded, or folded and fused.

    On a GPU where PyTorch sees one; inputs and answers are in host memory then, too, as a
    bundle's are.
    """
    import torch

    network, inputs = load_network(target)
    size, how = (inputs[0].shape[2], inputs[0].shape[3]), network.architecture
    choice = f"PyTorch {torch.__version__}"
    found: dict[str, Any] = dict(choice=choice, network=_in_words(how), size=size)
    if target.options.whole:
        from fdconv_deploy.evaluation.networks import torch_target

        if target.backend != "eager":
            raise UnavailableError(
                "A checkpoint's whole request is timed in backend 'eager' only; this is "
                f"{target.name}."
            )
        answer = torch_target(network, Path(target.source), sizes=[size]).answer
        ask = partial(answer, _picture(size, how.preprocessing, target.options))
        return OpenTarget(ask, target.opened("cpu", **found))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = BackendOptions(tf32=target.options.tf32).rounds_to_tf32
    # cuDNN's is on by default.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rounds
    made = _variant(target.backend, network, inputs, device)
    if target.backend == "fused":
        found["precision"] = "fp16"

    def on_host(answer: Any) -> Any:
        return answer.cpu() if isinstance(answer, torch.Tensor) else tuple(map(on_host, answer))

    def run() -> Any:
        # Outside inference mode PyTorch would keep every layer's input for a backward pass.
        with torch.inference_mode():
            return on_host(made(*(x.to(device) for x in inputs)))

    if device == "cpu":
        return OpenTarget(run, target.opened(device, **found))
    graph = "one CUDA graph a run" if target.backend == "fused" else "no CUDA graph"
    found["manner"] = f"TF32 {'on' if rounds else 'off'}; {graph}, on one stream; {PAGEABLE}"

    def phases() -> Phases:
        with torch.inference_mode():
            return torch_phases(made, inputs, on_host, torch.cuda)

    return OpenTarget(run, target.opened(device, **found), phases=phases)


def torch_phases(
    network: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    on_host: Callable[[Any], Any],
    cuda: Any,
) -> Phases:
    """One run of a network on a GPU by phase, by ``cuda``, the module ``torch.cuda``.

    Inputs are in host memory, and ``on_host`` copies an answer there.
    """
    events = [cuda.Event(enable_timing=True) for _ in range(4)]
    events[0].record()
    moved = [x.to(cuda.current_device()) for x in inputs]
    events[1].record()
    answer = network(*moved)
    events[2].record()
    on_host(answer)
    events[3].record()
    cuda.synchronize()
    h2d, compute, d2h = (a.elapsed_time(b) / 1e3 for a, b in pairwise(events))
    start = time.perf_counter()
    network(*moved)
    cuda.synchronize()
    return Phases(h2d, compute, d2h, time.perf_counter() - start)


def _variant(
    backend: str, network: nn.Module, inputs: tuple[Tensor, ...], device: str
) -> Callable[..., Any]:
    if backend == "fused":
        import torch

        from fdconv_deploy.folding.cuda import CapturedNetwork, fuse_network, require_cuda

        require_cuda()
        if len(inputs) > 1:
            raise UnavailableError("Backend 'fused' takes networks of one input, not detectors.")
        example = inputs[0]
        fused = fuse_network(network, example, dtype=torch.float16, channels_last=True)
        return CapturedNetwork(fused, example)
    if backend == "folded":
        from fdconv_deploy.folding.network import fold_network

        return fold_network(network, inputs).to(device)
    network = network.to(device)
    if backend == "compile":
        import torch

        return torch.compile(network)
    return network
