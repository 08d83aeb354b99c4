"""A network's class names and their colours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fdconv_deploy.checkpoints.evidence import (
    CHECKPOINT_META,
    UNSET,
    Evidence,
    SettingResolver,
    stated,
)

# Where configs have a dataset's names: mmengine's ``metainfo``, and mmcv 1.x's ``data``.
_DATASETS = (
    ("test_dataloader", "dataset", "metainfo"),
    ("val_dataloader", "dataset", "metainfo"),
    ("data", "test"),
    ("data", "val"),
    ("metainfo",),
)


def infer_classes(
    settings: SettingResolver[Any], counts: Collection[int], head: str = "decode head"
) -> None:
    """Resolve ``classes`` and ``palette``: the checkpoint's meta, else the config's dataset.

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
    places = [(place, CHECKPOINT_META) for place in (own, evidence.meta)]
    places += [(evidence.config.section(*path), "the config") for path in _DATASETS]
    for section, origin in places:
        for key in (name, name.upper()):
            value = stated(section, key) if isinstance(section, Mapping) else UNSET
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
