"""What is known of a network's architecture, and who said so.

Names and shapes are what the weights are, so they win; a config or a user that
contradicts them is an error. Where they say nothing, the user is asked first, then the
config, then the published defaults, and a default is reported as assumed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fdconv_deploy.checkpoints.config_expressions import Unreadable
from fdconv_deploy.config import DetectorConfig, SegmentorConfig
from fdconv_deploy.errors import CheckpointError

Source = Literal[
    "names",
    "shapes",
    "saved buffers",
    "config",
    "checkpoint meta",
    "command line",
    "published default",
]

UNSET: Any = object()
Told = TypeVar("Told", SegmentorConfig, DetectorConfig)


class Fact(BaseModel):
    """One field of the architecture, its value and where that came from."""

    model_config = ConfigDict(frozen=True)

    field: str
    value: Any
    source: Source
    note: str = ""


class Inference(BaseModel, Generic[Told]):
    """An architecture and how it was told.

    ``told`` came from the file or the user, ``assumed`` are published defaults that
    nothing confirmed, ``notes`` say what could not be read or is not reproduced.
    """

    model_config = ConfigDict(frozen=True)

    architecture: Told
    told: tuple[Fact, ...] = ()
    assumed: tuple[Fact, ...] = ()
    notes: tuple[str, ...] = ()


class Evidence:
    """Collects facts, field by field, from four witnesses.

    Args:
        overrides: dotted field names (``backbone.style``) → values the user gave.
    """

    def __init__(self, overrides: Mapping[str, Any] | None = None) -> None:
        self.overrides = _flat(overrides or {})
        self.facts: list[Fact] = []
        self.notes: list[str] = []
        self._used: set[str] = set()

    def settle(
        self,
        field: str,
        kind: Any,
        *,
        default: Any = UNSET,
        config: Any = UNSET,
        config_name: str = "the config",
        exact: Any = UNSET,
        accepts: Callable[[Any], bool] | None = None,
        derived: Any = UNSET,
        tells: str = "",
        source: Source = "shapes",
        matters: bool = True,
        note: str = "",
    ) -> Any:
        """Decide one field and record who decided it.

        Args:
            field: its dotted name in :class:`SegmentorConfig`.
            kind: its type, which config and user values are converted to.
            default: the published default.
            config: what the config says. Unreadable values count as silence.
            config_name: what to call the config's entry in an error.
            exact: the value, if names and shapes leave only one.
            accepts: whether a value agrees with names and shapes, if they leave several.
            derived: the value to take if ``accepts`` refuses the default. Giving one says that
                all accepted values describe the same network, so the weights told it.
            tells: what names and shapes tell, for an error: "the weights have 3 stages".
            source: which of the two tells it.
            matters: False if the field has no effect in this network; then nobody is told of it.
            note: something to say beside a value that is assumed.

        Raises:
            CheckpointError: a witness contradicts the weights, or nobody knows the value.
        """
        self._used.add(field)
        if exact is not UNSET:
            derived, default, accepts = exact, UNSET, lambda value: value == exact
            tells = tells or f"the weights' {source} give {exact!r}"
        asked = self._converted(field, kind, self.overrides.get(field, UNSET), "the command line")
        # What the user says settles a quarrel between config and weights.
        config = config if asked is UNSET else UNSET
        written = self._converted(field, kind, config, config_name)
        for witness, value in (("the command line", asked), (config_name, written)):
            if value is not UNSET and accepts is not None and not accepts(value):
                raise CheckpointError(
                    f"{field}: {witness} says {value!r}, but {tells}. The weights decide: correct "
                    f"{witness}, or use the checkpoint it belongs to."
                )
        told_by_weights = derived is not UNSET
        origin: Source = "checkpoint meta" if config_name == "the checkpoint's meta" else "config"
        decisions: list[tuple[Any, Source]] = [(asked, "command line"), (written, origin)]
        if default is not UNSET and (accepts is None or accepts(default)):
            decisions.append((default, "published default"))
        decisions.append((derived, source))
        for value, decider in decisions:
            if value is not UNSET:
                if matters:
                    who = source if told_by_weights else decider
                    note = note if who == "published default" else ""
                    self.facts.append(Fact(field=field, value=value, source=who, note=note))
                return value
        raise CheckpointError(
            f"{field} is not known: {tells or 'names and shapes of the weights do not tell it'}. "
            f"Give the network's config, or {field} itself on the command line."
        )

    def _converted(self, field: str, kind: Any, value: Any, witness: str) -> Any:
        if value is UNSET or isinstance(value, Unreadable):
            return UNSET
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise CheckpointError(
                f"{field}: {witness} says {str(value)[:60]!r}, which is not possible: {reason}."
            ) from None

    def check_overrides(self) -> None:
        """Refuse names the user gave that no field has, with the nearest that one has.

        Raises:
            CheckpointError: such a name was given.
        """
        for name in self.overrides:
            if name not in self._used:
                near = difflib.get_close_matches(name, sorted(self._used), 3, 0.4)
                hint = (
                    f"Did you mean {' or '.join(near)}?" if near else "fdconv inspect lists them."
                )
                raise CheckpointError(f"{name!r} is not a field of this network. {hint}")

    def absorb(self, other: Evidence) -> None:
        """Take over what another one settled."""
        self.facts += other.facts
        self.notes += other.notes
        self._used |= other._used

    def inference(self, architecture: Told) -> Inference[Told]:
        """The result, facts split by whether anyone told them."""
        told = tuple(fact for fact in self.facts if fact.source != "published default")
        assumed = tuple(fact for fact in self.facts if fact.source == "published default")
        return Inference(
            architecture=architecture, told=told, assumed=assumed, notes=tuple(self.notes)
        )


def _flat(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted names, so that either form may be given."""
    flat: dict[str, Any] = {}
    for name, value in overrides.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def stated(section: Mapping[str, Any], *names: str) -> Any:
    """What a config's section says under the first of ``names`` it has.

    UNSET if it has none, or if what it says could not be read in full.
    """
    for name in names:
        if name in section:
            value = section[name]
            parts = value if isinstance(value, (list, tuple)) else (value,)
            return UNSET if any(isinstance(part, Unreadable) for part in parts) else value
    return UNSET


def type_of(section: Mapping[str, Any]) -> str:
    """A section's ``type`` without its module; empty if it is not there."""
    value = section.get("type")
    return value.rpartition(".")[2] if isinstance(value, str) else ""
