"""How a network amplifies noise on its input: ``python -m benchmarks.stability CHECKPOINT``.

For every size and kind of frame, noise of ``--noise`` of the prepared image's largest value is
added, and the logits' largest change is printed as a share of the largest logit: in float64,
which is the network's own amplification, and in float32, which adds its rounding. Beside it
stands how far float32 is from float64 without noise.

``--layers`` adds, layer by layer, what the largest amplification consists of: the relative
change of each dynamic layer's input and output, and the largest normalised value that its
attention saw, in standard deviations of what training saw.

Two checkpoints or more are measured on the same frames with the same noise, in one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.options import keep, script
from examples.streets.scenes import draw_scene
from fdconv_deploy.checkpoints import load_checkpoint
from fdconv_deploy.config import Preprocessing
from fdconv_deploy.demo import HELD_OUT_SEEDS, packaged_checkpoint
from fdconv_deploy.latency import machine
from fdconv_deploy.nn import Segmentor
from fdconv_deploy.nn.fdconv import dynamic_layers

Frame = NDArray[np.float32]
Size = tuple[int, int]

NOISE = 1e-6
# The change of logits that the packaged network is trained to stay below.
TOLERANCE = 1e-3
PHOTOGRAPHS = Path(__file__).parent / "photographs"
SIZES: tuple[Size, ...] = (
    (64, 64),
    (96, 320),
    (192, 256),
    (256, 256),
    (384, 512),
    (512, 512),
    (1024, 1024),
    (1024, 2048),
)
FLAT = {"gray": 128.0, "black": 0.0, "white": 255.0}
LETTERBOXES = {"black": 0.0, "gray": 114.0}


@dataclass(frozen=True)
class Amplification:
    """What noise did to one frame; all are shares of the logits' largest value.

    Attributes:
        noise_float64: change of the logits by noise, computed in float64.
        noise_float32: the same in float32.
        rounding: float32 against float64, without noise.
        largest: the logits' largest value itself.
    """

    size: Size
    frame: str
    noise_float64: float
    noise_float32: float
    rounding: float
    largest: float

    @property
    def change(self) -> float:
        """The larger change by noise."""
        return max(self.noise_float64, self.noise_float32)


def frames(
    size: Size, preprocessing: Preprocessing, scenes: int, photographs: Sequence[Path] = ()
) -> Iterator[tuple[str, Frame]]:
    """Frames of a size by name, RGB 0..255 float32 ``(H, W, 3)``.

    Drawn scenes; the same letterboxed as ``--fit pad`` does it and within black and gray
    borders; flat frames; photographs, stretched.
    """
    height, width = size
    mean = np.array(preprocessing.mean, np.float32)
    for seed in HELD_OUT_SEEDS[:scenes]:
        yield f"scene {seed}", draw_scene(seed, height, width)[0].astype(np.float32)
    for name, value in FLAT.items():
        yield name, np.full((height, width, 3), value, np.float32)
    yield "mean colour", np.tile(mean, (height, width, 1))
    inner = draw_scene(HELD_OUT_SEEDS[0], height, width)[0].astype(np.float32)
    for name, narrow in (
        ("bars below", (height // 2, width)),
        ("bars right", (height, width // 2)),
    ):
        padded = np.tile(mean, (height, width, 1))
        padded[: narrow[0], : narrow[1]] = cv2.resize(inner, narrow[::-1])
        yield name, padded
    quarter = height // 4
    for name, value in LETTERBOXES.items():
        boxed = np.full((height, width, 3), value, np.float32)
        boxed[quarter : quarter + height // 2] = cv2.resize(inner, (width, height // 2))
        yield f"{name} bars", boxed
    for path in photographs:
        found = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        if found is None:
            raise SystemExit(f"{path} is not an image that OpenCV reads.")
        yield (
            path.name,
            cv2.resize(found, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32),
        )


def prepared(preprocessing: Preprocessing, frame: Frame) -> Tensor:
    """A frame as the network takes it, float32 ``(1, 3, H, W)``."""
    mean, std = (np.array(v, np.float32) for v in (preprocessing.mean, preprocessing.std))
    return torch.from_numpy(((frame - mean) / std).transpose(2, 0, 1)[None].copy())


def perturbed(x: Tensor, noise: float, seed: int) -> Tensor:
    """``x`` float64 with normal noise of ``noise`` times its largest value, or 1, added.

    (The mean colour is zeros, to which a share of the largest value would add nothing.)
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x.double() + noise * max(float(x.abs().max()), 1.0) * drawn


def share(changed: Tensor, logits: Tensor) -> float:
    """The largest change as a share of the largest logit."""
    largest = logits.double().abs().max()
    return float((changed.double() - logits.double()).abs().max() / largest)


@torch.no_grad()
def amplification(
    networks: dict[torch.dtype, Segmentor], x: Tensor, size: Size, name: str, noise: float
) -> Amplification:
    """What noise does to a prepared frame.

    Args:
        networks: the same network in float32 and in float64.
        x: the prepared frame, float32 ``(1, 3, H, W)``.
        size: its height and width.
        name: what the frame is.
        noise: the noise's standard deviation as a share of ``x``'s largest value.
    """
    logits = {dtype: network(x.to(dtype)) for dtype, network in networks.items()}
    moved = perturbed(x, noise, seed=0)
    changes = {
        dtype: share(network(moved.to(dtype)), logits[dtype]) for dtype, network in networks.items()
    }
    return Amplification(
        size,
        name,
        changes[torch.float64],
        changes[torch.float32],
        share(logits[torch.float32], logits[torch.float64]),
        float(logits[torch.float64].abs().max()),
    )


@contextmanager
def watched(network: nn.Module) -> Iterator[dict[str, list[tuple[Tensor, Tensor, float]]]]:
    """Collects (input, output, largest normalised attention value) of each dynamic layer."""
    seen: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    largest: dict[str, float] = {}
    hooks = []
    for name, layer in dynamic_layers(network).items():

        def keep_normalised(_: nn.Module, __: Any, out: Tensor, name: str = name) -> None:
            largest[name] = float(out.abs().max())

        def keep_layer(_: nn.Module, x: Any, y: Tensor, name: str = name) -> None:
            seen.setdefault(name, []).append((x[0], y, largest.get(name, 0.0)))

        hooks.append(layer.KSM_Global.bn.register_forward_hook(keep_normalised))
        hooks.append(layer.register_forward_hook(keep_layer))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def layer_table(network: Segmentor, x: Tensor, noise: float) -> Table:
    """How noise grows from layer to layer, by relative norms, in ``network``'s float64."""
    with watched(network) as seen:
        network(x.double())
        network(perturbed(x, noise, 0))
    table = Table("change of input", "of output", "attention's largest value, σ")
    table.add_column("layer", no_wrap=True)
    for name, ((x0, y0, largest), (x1, y1, _)) in seen.items():
        inward, outward = (float((b - a).norm() / a.norm()) for a, b in ((x0, x1), (y0, y1)))
        table.add_row(f"{inward:.1e}", f"{outward:.1e}", f"{largest:.3g}", name)
    return table


def both(path: Path) -> dict[torch.dtype, Segmentor]:
    """A checkpoint's network in float32 and in float64."""
    networks = {}
    for dtype in (torch.float64, torch.float32):
        network = load_checkpoint(path, require_fdconv=False)
        assert isinstance(network, Segmentor), f"{path} holds no segmentor"
        networks[dtype] = network.to(dtype)
    return networks


def measure(
    networks: dict[torch.dtype, Segmentor],
    sizes: Sequence[Size],
    scenes: int,
    photographs: Sequence[Path],
    noise: float,
    only: str | None = None,
) -> Iterator[Amplification]:
    """Every frame of every size, or the one called ``only``."""
    preprocessing = networks[torch.float64].architecture.preprocessing
    for size in sizes:
        for name, frame in frames(size, preprocessing, scenes, photographs):
            if only in (None, name):
                yield amplification(networks, prepared(preprocessing, frame), size, name, noise)


def images_in(folder: Path) -> list[Path]:
    """A folder's images, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))


def size_of(text: str) -> Size:
    """``192x256`` as (192, 256)."""
    height, width = text.split("x")
    return int(height), int(width)


def main() -> None:
    """Parse the command line and go."""
    parser = script(__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="*", default=[packaged_checkpoint()])
    parser.add_argument("--size", type=size_of, action="append", metavar="HEIGHTxWIDTH")
    parser.add_argument("--scenes", type=int, default=2, help="drawn scenes of each size")
    parser.add_argument("--photographs", type=Path, default=PHOTOGRAPHS, metavar="FOLDER")
    parser.add_argument("--noise", type=float, default=NOISE)
    parser.add_argument("--layers", action="store_true", help="how the worst frame's noise grows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    photographs = images_in(options.photographs)
    console = Console(soft_wrap=True, highlight=False)
    result = {}
    for path in options.checkpoint:
        found = []
        console.print(f"{path}, noise of {options.noise:.0e} of the largest input value")
        console.print("size, frame: change in float64, in float32; rounding; largest logit")
        sizes = options.size or SIZES
        for each in measure(both(path), sizes, options.scenes, photographs, options.noise):
            found.append(each)
            height, width = each.size
            console.print(
                f"  {height}x{width} {each.frame}: {each.noise_float64:.1e} "
                f"{each.noise_float32:.1e} {each.rounding:.1e} {each.largest:.3g}"
            )
        worst = max(found, key=lambda each: each.change)
        over = sum(each.change > TOLERANCE for each in found)
        console.print(
            f"worst: {worst.frame} at {worst.size[0]}x{worst.size[1]}, {worst.change:.1e}; "
            f"{over} of {len(found)} above {TOLERANCE:.0e}"
        )
        if options.layers:
            network = both(path)[torch.float64]
            preprocessing = network.architecture.preprocessing
            named = dict(frames(worst.size, preprocessing, options.scenes, photographs))
            x = prepared(preprocessing, named[worst.frame])
            console.print(layer_table(network, x, options.noise))
        result[path.name] = [asdict(each) for each in found]
    where = machine.describe(options.threads)
    keep(options, "stability", where, {"noise": options.noise, "checkpoints": result})


if __name__ == "__main__":
    main()
