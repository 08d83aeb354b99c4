"""A network's class names and their colours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fdconv_deploy.checkpoints.evidence import (
    CHECKPOINT_META,
    UNSET,
    Evidence,
    SettingResolver,
    stated,
)


def infer_classes(
    settings: SettingResolver[Any], counts: Collection[int], head: str = "decode head"
) -> None:
    """Resolve ``classes`` and ``palette``: the checkpoint's meta, else the config's dataset.

    The meta has them as ``dataset_meta``, ``CLASSES`` or ``PALETTE``, a dataset as mmengine's
    ``metainfo`` or in mmcv 1.x's ``data``.

    Args:
        settings: of the whole network.
        counts: how many classes the head has. More than one number for a head with one output:
            its labels are 0 and 1, and a dataset may name both, or 1 alone.
        head: what to call the head in an error.

    Raises:
        CheckpointError: there are not as many names as the head has classes.
    """
    classes = " or ".join(map(str, sorted(counts)))
    names, origin = _labels("classes", settings.evidence)
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
    config, meta = evidence.config, evidence.meta
    for place in (meta.get("dataset_meta"), meta):
        if isinstance(place, Mapping):
            for key in (name, name.upper()):
                if place.get(key) and isinstance(place[key], (list, tuple)):
                    return place[key], CHECKPOINT_META
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
        and all(isinstance(level, int) and 0 <= level <= 255 for level in colour)
        for colour in value
    )
