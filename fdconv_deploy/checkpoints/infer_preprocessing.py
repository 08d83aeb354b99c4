"""What no weight tells: test mode, preprocessing, class names, palette."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from fdconv_deploy.checkpoints.config_parser import Config
from fdconv_deploy.checkpoints.evidence import UNSET, Evidence, stated, type_of
from fdconv_deploy.config import IMAGENET_MEAN, IMAGENET_STD, Loading, Preprocessing, TestMode
from fdconv_deploy.errors import CheckpointError

Pair = tuple[int, int]
_LARGEST_CROP = 16384  # pixels; export takes no larger side
# Loaders whose images are read as they do it: those of mmcv, and GDAL's in mmsegmentation.
_FILE_LOADERS = ("LoadImageFromFile", "LoadImageFromNDArray", "InferencerLoader")
_RASTER_LOADERS = ("LoadSingleRSImageFromFile",)
# Steps that load, pack or flip leave the pixels the network sees as they are.
_HARMLESS = (
    *_FILE_LOADERS,
    *_RASTER_LOADERS,
    "LoadAnnotations",
    "PackSegInputs",
    "PackDetInputs",
    "Resize",
    "Normalize",
    "RandomFlip",
    "ImageToTensor",
    "DefaultFormatBundle",
    "Collect",
    "MultiScaleFlipAug",
    "TestTimeAug",
)


def training_size(config: Config | None) -> tuple[int, int] | None:
    """(height, width) in pixels that a segmentor was trained on, where its config states it.

    That is mmsegmentation's ``crop_size``, which a config states at its top and in
    ``model.data_preprocessor.size``.
    """
    if config is None:
        return None
    stated: list[Any] = [
        config.section("model", "data_preprocessor").get("size"),
        config.section("data_preprocessor").get("size"),
        config.values.get("crop_size"),
    ]
    for value in stated:
        sides = (value, value) if isinstance(value, int) else value
        if (
            isinstance(sides, (list, tuple))
            and len(sides) == 2
            and all(isinstance(s, int) and 0 < s <= _LARGEST_CROP for s in sides)
        ):
            return sides[0], sides[1]
    return None


def infer_test_mode(config: Config, evidence: Evidence) -> TestMode:
    """Whole images or sliding crops: ``model.test_cfg``, or mmseg 0.x's own ``test_cfg``."""
    section = config.section("model", "test_cfg")
    old = config.section("test_cfg")
    if "mode" not in section and "mode" in old:
        section = old

    def settle(name: str, kind: Any, **knowledge: Any) -> Any:
        return evidence.settle(f"test.{name}", kind, **knowledge)

    mode = settle(
        "mode", Literal["whole", "slide"], config=stated(section, "mode"), default="whole"
    )
    slides = mode == "slide"
    sizes = {
        name: settle(
            name,
            Pair | None,
            config=_pair(stated(section, name)),
            default=UNSET if slides else None,
            accepts=lambda value: value is None or min(value) > 0,
            tells="test mode slide needs a (height, width) in pixels",
            matters=slides,
        )
        for name in ("crop_size", "stride")
    }
    return TestMode(mode=mode, **sizes)


def infer_preprocessing(
    config: Config,
    evidence: Evidence,
    *,
    channels: int = 3,
    scale: Pair | None = None,
    harmless: Sequence[str] = (),
) -> Preprocessing:
    """Loading, mean, deviation, channel order and resize of the test pipeline.

    ``channels``: bands that the network takes. ``scale``: the published default of the resize.
    ``harmless``: further steps that need no word, as they are done here, too.

    Mean and deviation stand in mmseg 1.x's ``data_preprocessor`` or 0.x's ``Normalize`` step
    (``img_norm_cfg``). ImageNet's, in RGB, are the published default of networks that take
    three bands; of others there is none.
    """
    steps = _steps(config)
    processor = config.section("model", "data_preprocessor") or config.section("data_preprocessor")
    normalize = next((step for step in steps if type_of(step) == "Normalize"), {})
    old = normalize or config.section("img_norm_cfg")
    section = processor or old
    mean, std = stated(section, "mean"), stated(section, "std")
    if processor and processor.get("mean") is None and "mean" not in old:
        mean, std = (0.0,), (1.0,)  # mmseg 1.x does not normalise without a mean

    def settle(name: str, kind: Any, **knowledge: Any) -> Any:
        return evidence.settle(f"preprocessing.{name}", kind, **knowledge)

    loading, to_float32 = _loading(steps, channels, settle, evidence)
    each = (
        f"the network takes {channels} band{'s' * (channels > 1)}, with a mean and a deviation "
        f"each (--set 'preprocessing.mean=[…]' and --set 'preprocessing.std=[…]' give them)"
    )
    swapped = stated(section, "bgr_to_rgb", "to_rgb")
    if stated(section, "rgb_to_bgr") is True:
        swapped = True  # the same swap under another name
    values = {
        "mean": settle(
            "mean",
            tuple[float, ...],
            config=_each(mean, channels),
            default=IMAGENET_MEAN if channels == 3 else UNSET,
            accepts=lambda value: len(value) == channels,
            tells=each,
        ),
        "std": settle(
            "std",
            tuple[float, ...],
            config=_each(std, channels),
            default=IMAGENET_STD if channels == 3 else UNSET,
            accepts=lambda value: len(value) == channels and min(value) > 0,
            tells=f"{each}, and a deviation is above 0",
        ),
        "bgr_to_rgb": settle(
            "bgr_to_rgb",
            bool,
            config=swapped,
            default=loading != "bands",
            matters=channels == 3,
        ),
        "loading": loading,
        "to_float32": to_float32,
    }
    resize = next((step for step in steps if type_of(step) == "Resize"), {})
    outer = next((step for step in steps if type_of(step) == "MultiScaleFlipAug"), {})
    keep_ratio = settle(
        "keep_ratio", bool, config=stated(resize, "keep_ratio"), default=True, matters=bool(resize)
    )
    told = stated(resize, "scale", "img_scale")
    if told in (UNSET, None):
        told = stated(outer, "img_scale")
    scale = settle("scale", Pair | None, config=_scale(told, keep_ratio, evidence), default=scale)
    for step in steps:
        if type_of(step) and type_of(step) not in (*_HARMLESS, *harmless):
            evidence.notes.append(
                f"The config's test pipeline has a {type_of(step)} step, which is not reproduced."
            )
    return Preprocessing(**values, keep_ratio=keep_ratio, scale=scale)


def _loading(
    steps: Sequence[Mapping[str, Any]], channels: int, settle: Any, evidence: Evidence
) -> tuple[Loading, bool]:
    """How the pipeline's first step loads files, and whether it makes them float32.

    By mmcv 2.1.0's ``LoadImageFromFile`` (``color_type``, ``imdecode_backend``) and
    mmsegmentation 1.2.2's ``LoadSingleRSImageFromFile``, which makes float32 unless told.
    """
    loader = next((s for s in steps if type_of(s).startswith(("Load", "InferencerLoader"))), {})
    kind = type_of(loader)
    told: Any = UNSET
    if kind in _RASTER_LOADERS:
        told = "bands"
    elif kind in _FILE_LOADERS:
        told = stated(loader, "color_type")
        told = "color" if told is UNSET else str(told).removesuffix("_ignore_orientation")
        if stated(loader, "imdecode_backend") == "tifffile":
            told = "bands"
        if told == "color" and channels != 3:
            evidence.notes.append(
                f"The config's {kind} gives three bands, and the network takes {channels}. Every "
                "band of a file is taken, in the file's order (preprocessing.loading=bands)."
            )
            told = "bands"
    accepted = {"bands", "unchanged", *{1: ("grayscale",), 3: ("color",)}.get(channels, ())}
    loading = settle(
        "loading",
        Loading,
        config=told,
        default="color" if channels == 3 else "bands",
        accepts=lambda value: value in accepted,
        tells=f"the network takes {channels} band{'s' * (channels > 1)}, which is loading "
        + " or ".join(sorted(accepted)),
        matters=channels != 3 or told not in (UNSET, "color"),
    )
    floats = stated(loader, "to_float32")
    if floats is UNSET and kind in (*_RASTER_LOADERS, *_FILE_LOADERS):
        floats = kind in _RASTER_LOADERS
    to_float32 = settle(
        "to_float32",
        bool,
        config=floats,
        default=loading == "bands",
        matters=loading != "color" or floats is True,
    )
    return loading, to_float32


def _each(value: Any, channels: int) -> Any:
    """One value stands for every band, as broadcasting has it in SegDataPreProcessor."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return tuple(value) * channels
    return value


def _scale(value: Any, keep_ratio: bool, evidence: Evidence) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], (list, tuple)):
        if len(value) > 1:
            evidence.notes.append(f"The test pipeline has {len(value)} scales; the first is used.")
        value = value[0]
    two = isinstance(value, (list, tuple)) and len(value) == 2
    if two and keep_ratio and all(isinstance(side, int) for side in value):
        return max(value), min(value)
    return value


def infer_classes(
    counts: Collection[int],
    config: Config,
    meta: Mapping[str, Any],
    evidence: Evidence,
    *,
    head: str = "decode head",
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Class names and their colours, from the checkpoint's meta, else the config's dataset.

    Args:
        counts: how many classes the head has. More than one number for a head with one output:
            its labels are 0 and 1, and a data set may name both, or 1 alone.

    Raises:
        CheckpointError: there are not as many names as the head has classes.
    """
    classes = " or ".join(map(str, sorted(counts)))
    names, origin = _labels("classes", config, meta)
    palette, painted = _labels("palette", config, meta)
    settled = evidence.settle(
        "classes",
        tuple[str, ...],
        config=names,
        config_name=origin,
        default=(),
        accepts=lambda value: not value or len(value) in counts,
        tells=f"the {head} makes {classes} classes",
    )
    # As many colours as there are names.
    wanted = {len(settled)} if settled else set(counts)
    if palette is not UNSET and not _is_palette(palette, wanted):
        evidence.notes.append(
            f"The palette in {painted} is not one RGB colour for each of the {classes} classes; "
            "it was left out."
        )
        palette = UNSET
    colours = evidence.settle(
        "palette",
        tuple[tuple[int, int, int], ...],
        config=palette,
        config_name=painted,
        default=(),
        accepts=lambda value: not value or _is_palette(value, wanted),
        tells=f"a palette has one RGB triple, 0 to 255, for each of the {classes} classes",
    )
    return settled, colours


def count_names(config: Config, meta: Mapping[str, Any]) -> int:
    """How many class names the checkpoint's meta or the config has; 0 for none."""
    names, _ = _labels("classes", config, meta)
    return 0 if names is UNSET else len(names)


def _labels(name: str, config: Config, meta: Mapping[str, Any]) -> tuple[Any, str]:
    dataset = meta.get("dataset_meta")
    for place in (dataset, meta):
        if isinstance(place, Mapping):
            for key in (name, name.upper()):
                if place.get(key) and isinstance(place[key], (list, tuple)):
                    return place[key], "the checkpoint's meta"
    places = (
        config.section("test_dataloader", "dataset", "metainfo"),
        config.section("val_dataloader", "dataset", "metainfo"),
        config.section("data", "test"),
        config.section("data", "val"),
        config.section("metainfo"),
    )
    for section in places:
        value = stated(section, name, name.upper())
        if value and isinstance(value, (list, tuple)):
            return value, "the config"
    return UNSET, "the config"


def _is_palette(value: Any, counts: Collection[int]) -> bool:
    return len(value) in counts and all(
        isinstance(colour, (list, tuple))
        and len(colour) == 3
        and all(isinstance(part, int) and 0 <= part <= 255 for part in colour)
        for colour in value
    )


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _steps(config: Config) -> list[dict[str, Any]]:
    """The test pipeline's steps, those inside a MultiScaleFlipAug too."""
    found: list[dict[str, Any]] = []
    places = (
        config.values,
        config.section("test_dataloader", "dataset"),
        config.section("data", "test"),
    )
    for section, name in zip(places, ("test_pipeline", "pipeline", "pipeline"), strict=True):
        value = section.get(name)
        if isinstance(value, (list, tuple)):
            for step in value:
                if isinstance(step, dict):
                    found.append(step)
                    inner = step.get("transforms")
                    if isinstance(inner, (list, tuple)):
                        found += [item for item in inner if isinstance(item, dict)]
            break
    return found


def refuse_other_normalisation(config: Config) -> None:
    """Refuse a batch normalisation epsilon that the network here would not use.

    Raises:
        CheckpointError: some ``norm_cfg`` of the model has another ``eps``, or is no BN.
    """
    for part in ("backbone", "decode_head"):
        norm = config.section("model", part, "norm_cfg")
        kind, epsilon = type_of(norm), stated(norm, "eps")
        if kind and kind not in ("BN", "BN2d", "SyncBN", "MMSyncBN", "BatchNorm2d"):
            network = type_of(config.section("model", part))
            which = f"{part}, a {network}," if network else part
            raise CheckpointError(
                f"The config's {which} normalises with {kind}. "
                "Expected a ResNet and heads with BN or SyncBN; others are not supported."
            )
        if epsilon not in (UNSET, 1e-5):
            raise CheckpointError(
                f"The config's {part} has norm_cfg.eps={epsilon!r}. Expected 1e-5, which the "
                "network here uses; another would change every output."
            )
