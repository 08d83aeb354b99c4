"""What a config's dataset and test pipeline say: classes, preprocessing, test mode.

A detector's thresholds, which its config has as ``test_cfg``, are inferred with its heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from fdconv_deploy.checkpoints.config_parser import UNSET, Config, Section
from fdconv_deploy.checkpoints.settings import CHECKPOINT_META, Evidence, SettingResolver
from fdconv_deploy.config import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, TestMode

# Where configs have a dataset's names: mmengine's ``metainfo``, and mmcv 1.x's ``data``.
_DATASETS = (
    ("test_dataloader", "dataset", "metainfo"),
    ("val_dataloader", "dataset", "metainfo"),
    ("data", "test"),
    ("data", "val"),
    ("metainfo",),
)
_LARGEST_CROP = 16384  # pixels; export takes no larger side

# Loaders whose images are read as they do it: those of mmcv, and GDAL's in mmsegmentation.
_FILE_LOADERS = ("LoadImageFromFile", "LoadImageFromNDArray", "InferencerLoader")
_RASTER_LOADERS = ("LoadSingleRSImageFromFile",)
# Steps that load, pack or flip leave the pixels the network sees as they are.
_HARMLESS = (
    *_FILE_LOADERS, *_RASTER_LOADERS, "LoadAnnotations", "LoadPanopticAnnotations",
    "PackSegInputs", "PackDetInputs", "Resize", "Normalize", "RandomFlip", "ImageToTensor",
    "DefaultFormatBundle", "Collect", "MultiScaleFlipAug", "TestTimeAug",
)  # fmt: skip


def infer_classes(
    settings: SettingResolver[Any], counts: Collection[int], head: str = "decode head"
) -> None:
    """Resolve ``classes`` and ``palette``: the checkpoint's meta, else the config's dataset.

    The ``head`` has one of ``counts`` classes: one with one output has labels 0 and 1, of which a
    dataset may name both, or 1 alone.
    """
    classes = " or ".join(map(str, sorted(counts)))
    names, origin = _labels("classes", settings.evidence)
    settings.evidence.notes += _doubts(names, origin, settings.evidence)
    found = settings.resolve(
        "classes",
        config=names,
        config_name=origin,
        accepts=lambda value: not value or len(value) in counts,
        because=f"the {head} makes {classes} classes",
    )
    # As many colours as there are names.
    wanted = {len(found)} if found else set(counts)
    palette, origin = _labels("palette", settings.evidence)
    if palette is not UNSET and not _is_palette(palette, wanted):
        settings.evidence.notes.append(
            f"The palette in {origin} is not one RGB colour for each of the {classes} classes; "
            "it was left out."
        )
        palette = UNSET
    settings.resolve(
        "palette",
        kind=tuple[tuple[int, int, int], ...],
        config=palette,
        config_name=origin,
        accepts=lambda value: not value or _is_palette(value, wanted),
        because=f"a palette has one RGB triple, 0 to 255, for each of the {classes} classes",
    )


def count_names(evidence: Evidence) -> int:
    """How many class names the checkpoint's meta or the config has; 0 for none."""
    names, _ = _labels("classes", evidence)
    return 0 if names is UNSET else len(names)


def _labels(name: str, evidence: Evidence) -> tuple[Any, str]:
    """The list of that name in the checkpoint's meta or the config, and which of them has it."""
    lists = (found for found in _stated(name, evidence) if isinstance(found[0], (list, tuple)))
    return next(lists, (UNSET, "the config"))


def _stated(name: str, evidence: Evidence) -> Iterator[tuple[Any, str]]:
    """All there is under that name, the checkpoint's meta first, and which of them has it."""
    own = evidence.meta.get("dataset_meta")
    places = [(Section(place), CHECKPOINT_META) for place in (own, evidence.meta)]
    places += [(evidence.config.section(*path), "the config") for path in _DATASETS]
    for section, origin in places:
        for key in (name, name.upper()):
            value = section.stated(key)
            if value is not UNSET and value is not None and str(value) not in ("", "[]", "()"):
                yield value, origin


def _doubts(names: Any, origin: str, evidence: Evidence) -> Iterator[str]:
    """What a user should look at where class names are stated."""
    for value, where in _stated("classes", evidence):
        if not isinstance(value, (list, tuple)):
            yield (
                f"The class names in {where} are {str(value)[:40]!r}, which is no list; they were "
                "left out (--set 'classes=[…]' gives them)."
            )
            break
    counts = Counter(map(str, () if names is UNSET else names))
    name, count = max(counts.items(), key=lambda item: item[1], default=("", 1))
    if count > 1:
        yield (
            f"{count} classes are named {name!r} in {origin}: names cannot tell them apart "
            "(--set 'classes=[…]' gives others)."
        )


def _is_palette(value: Any, counts: Collection[int]) -> bool:
    return len(value) in counts and all(
        isinstance(colour, (list, tuple))
        and len(colour) == 3
        and all(isinstance(level, int) and 0 <= level <= 255 for level in colour)
        for colour in value
    )


def infer_preprocessing(
    evidence: Evidence,
    *,
    channels: int = 3,
    scale: tuple[int, int] | None = None,
    size_divisor: int | None = None,
    harmless: Sequence[str] = (),
) -> Preprocessing:
    """Loading, mean, deviation, channel order and resize of the test pipeline.

    Mean and deviation stand in mmseg 1.x's ``data_preprocessor`` or 0.x's ``Normalize`` step
    (``img_norm_cfg``). ImageNet's, in RGB, are the published default of networks that take
    three bands; of others there is none.

    Args:
        evidence: has the config and takes the settings.
        channels: bands that the network takes.
        scale: the published default of the resize.
        size_divisor: the published default of networks whose input is padded; None of others.
        harmless: further steps that need no note, as they are done here, too.
    """
    config = evidence.config
    steps = _steps(config)
    section = _normalisation(config, steps, channels)
    loader = next((s for s in steps if s.type.startswith(("Load", "InferencerLoader"))), Section())
    resize, outer = _step(steps, "Resize"), _step(steps, "MultiScaleFlipAug")
    section["loading"] = _loading(loader, channels, evidence)
    section["to_float32"] = loader.stated("to_float32")
    if section["to_float32"] is UNSET and loader.type in (*_RASTER_LOADERS, *_FILE_LOADERS):
        # mmsegmentation 1.2.2's LoadSingleRSImageFromFile makes float32 by default.
        section["to_float32"] = loader.type in _RASTER_LOADERS
    section["keep_ratio"] = resize.stated("keep_ratio")
    settings = SettingResolver(evidence, Preprocessing, "preprocessing", section)
    accepted = {"bands", "unchanged", *{1: ("grayscale",), 3: ("color",)}.get(channels, ())}
    bands = f"the network takes {channels} band{'s' * (channels > 1)}"
    loading = settings.resolve(
        "loading",
        default="color" if channels == 3 else "bands",
        accepts=lambda value: value in accepted,
        because=f"{bands}, which is loading {' or '.join(sorted(accepted))}",
        matters=channels != 3 or section["loading"] not in (UNSET, "color"),
    )
    settings.resolve(
        "to_float32",
        default=loading == "bands",
        matters=loading != "color" or section["to_float32"] is True,
    )
    each = (
        f"{bands}, with a mean and a deviation each (--set 'preprocessing.mean=[…]' and "
        "--set 'preprocessing.std=[…]' give them)"
    )
    for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        settings.resolve(
            name,
            default=default if channels == 3 else UNSET,
            accepts=lambda value: len(value) == channels,
            because=each,
        )
    settings.resolve("bgr_to_rgb", default=loading != "bands", matters=channels == 3)
    keep_ratio = settings.resolve("keep_ratio", matters=bool(resize))
    written = resize.stated("scale", "img_scale")
    if written in (UNSET, None):
        written = outer.stated("img_scale")
    settings.resolve("scale", config=_scale(written, keep_ratio, evidence), default=scale)
    backend = {"cv2": "opencv", "pillow": "pillow"}.get(str(resize.stated("backend")), UNSET)
    detectron2 = evidence.framework == "detectron2"
    settings.resolve(
        "resample",
        config=backend,
        default="pillow" if detectron2 else "opencv",
        matters=detectron2 or backend == "pillow",
    )
    processor = _processor(config)
    divisor = processor.stated("test_cfg.size_divisor", "pad_size_divisor")
    if processor and divisor in (UNSET, None):
        divisor = 1
    settings.resolve(
        "size_divisor",
        # Detectors' inputs are padded whatever this is.
        config=UNSET if harmless else divisor,
        default=size_divisor or 1,
        matters=size_divisor is not None,
        note="mmsegmentation's ADE20K configs of Swin-B and Swin-L do not pad",
    )
    for step in steps:
        if step.type and step.type not in (*_HARMLESS, *harmless):
            evidence.notes.append(
                f"The config's test pipeline has a {step.type} step, which is not reproduced."
            )
    return settings.build()


def training_size(config: Config | None) -> tuple[int, int] | None:
    """(height, width) in pixels that a segmentor was trained on: mmsegmentation's ``crop_size``."""
    if config is None:
        return None
    for value in (
        config.section("model", "data_preprocessor").get("size"),
        config.section("data_preprocessor").get("size"),
        config.values.get("crop_size"),
    ):
        sides = _pair(value)
        two = isinstance(sides, (list, tuple)) and len(sides) == 2
        if two and all(isinstance(s, int) and 0 < s <= _LARGEST_CROP for s in sides):
            return sides[0], sides[1]
    return None


def infer_test_mode(evidence: Evidence) -> TestMode:
    """Whole images or sliding crops: ``model.test_cfg``, or mmseg 0.x's own ``test_cfg``."""
    section = evidence.config.section("model", "test_cfg")
    older = evidence.config.section("test_cfg")
    section = older if "mode" in older and "mode" not in section else section
    sizes = {name: _pair(section.stated(name)) for name in ("crop_size", "stride")}
    settings = SettingResolver(evidence, TestMode, "test", section | sizes)
    slides = settings.resolve("mode") == "slide"
    for name in sizes:
        settings.resolve(
            name,
            default=UNSET if slides else None,
            accepts=lambda value: value is not None or not slides,
            because="test mode slide needs a (height, width) in pixels",
            matters=slides,
        )
    return settings.build()


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _normalisation(config: Config, steps: Sequence[Section], channels: int) -> dict[str, Any]:
    """Mean, deviation and channel order that the config states, as :class:`Preprocessing`'s."""
    processor = _processor(config)
    older = _step(steps, "Normalize") or config.section("img_norm_cfg")
    section = processor or older
    mean, std = section.stated("mean"), section.stated("std")
    if processor and processor.get("mean") is None and "mean" not in older:
        mean, std = (0.0,), (1.0,)  # mmseg 1.x does not normalise without a mean
    swapped = section.stated("bgr_to_rgb", "to_rgb")
    if section.stated("rgb_to_bgr") is True:
        swapped = True  # the same swap under another name
    return {"mean": _each(mean, channels), "std": _each(std, channels), "bgr_to_rgb": swapped}


def _processor(config: Config) -> Section:
    return config.section("model", "data_preprocessor") or config.section("data_preprocessor")


def _loading(loader: Section, channels: int, evidence: Evidence) -> Any:
    """How the pipeline's loader reads files.

    By mmcv 2.1.0's ``LoadImageFromFile`` (``color_type``, ``imdecode_backend``) and
    mmsegmentation 1.2.2's ``LoadSingleRSImageFromFile``.
    """
    kind = loader.type
    if kind not in (*_RASTER_LOADERS, *_FILE_LOADERS):
        return UNSET
    if kind in _RASTER_LOADERS or loader.stated("imdecode_backend") == "tifffile":
        return "bands"
    colours = loader.stated("color_type")
    colours = "color" if colours is UNSET else str(colours).removesuffix("_ignore_orientation")
    if colours == "color" and channels != 3:
        evidence.notes.append(
            f"The config's {kind} gives three bands, and the network takes {channels}. Every "
            "band of a file is taken, in the file's order (preprocessing.loading=bands)."
        )
        return "bands"
    return colours


def _each(value: Any, channels: int) -> Any:
    """One value stands for every band, as broadcasting has it in SegDataPreProcessor."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return tuple(value) * channels
    return value


def _scale(value: Any, keep_ratio: bool, evidence: Evidence) -> Any:
    """(long, short) where the ratio is kept, whichever comes first in the config."""
    if isinstance(value, list) and value and isinstance(value[0], (list, tuple)):
        if len(value) > 1:
            evidence.notes.append(f"The test pipeline has {len(value)} scales; the first is used.")
        value = value[0]
    two = isinstance(value, (list, tuple)) and len(value) == 2
    if two and keep_ratio and all(isinstance(side, int) for side in value):
        return max(value), min(value)
    return value


def _step(steps: Sequence[Section], kind: str) -> Section:
    return next((step for step in steps if step.type == kind), Section())


def _steps(config: Config) -> list[Section]:
    """The test pipeline's steps, those inside a MultiScaleFlipAug too."""
    places = (
        config.values.get("test_pipeline"),
        config.section("test_dataloader", "dataset").get("pipeline"),
        config.section("data", "test").get("pipeline"),
    )
    pipeline = next((place for place in places if isinstance(place, (list, tuple))), ())
    found: list[Section] = []
    for step in map(Section, pipeline):
        inner = step.get("transforms")
        found += [step, *map(Section, inner if isinstance(inner, (list, tuple)) else ())]
    return found
