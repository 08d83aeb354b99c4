"""Where each setting of a network comes from: the weights, the user, its config or a default.

Names and shapes are what the weights are, so they win; a config or a user that contradicts
them is an error. Where they leave a choice, the user decides, else the config, else the
published default, which is then listed as assumed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fdconv_deploy.checkpoints.config_parser import UNSET, Config, Section, Unreadable
from fdconv_deploy.config import Frozen
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

Framework = Literal["OpenMMLab", "detectron2"]

CHECKPOINT_META = "the checkpoint's meta"
_USUAL: Any = object()
ConfigT = TypeVar("ConfigT", bound=Frozen)


class Setting(BaseModel):
    """One field of a network's configuration, its value and where that came from."""

    model_config = ConfigDict(frozen=True)

    field: str
    value: Any
    source: Source
    note: str = ""


class Inference(BaseModel, Generic[ConfigT]):
    """A network's configuration and where its settings came from.

    ``found`` came from the file or the user, ``assumed`` are published defaults that nothing
    confirmed; ``notes`` say what could not be read or is not reproduced.
    """

    model_config = ConfigDict(frozen=True)

    architecture: ConfigT
    found: tuple[Setting, ...] = ()
    assumed: tuple[Setting, ...] = ()
    notes: tuple[str, ...] = ()


class Evidence:
    """What is known of one network so far.

    Attributes:
        overrides: the user's values by dotted field names; given so, or as nested dicts.
        config: from the checkpoint or the user.
        meta: the checkpoint's, for class names and palette.
        framework: whose names the tensors had, which decides some published defaults.
        settings: in the order in which they were resolved.
        notes: sentences for the user, the config's first.
        fields: dotted names of all fields that this network has.
    """

    def __init__(
        self,
        overrides: Mapping[str, Any] | None = None,
        config: Config | None = None,
        meta: Mapping[str, Any] | None = None,
        framework: Framework = "OpenMMLab",
    ) -> None:
        self.framework = framework
        self.overrides = _flat(overrides or {})
        self.config, self.meta = config or Config(), meta or {}
        self.settings: list[Setting] = []
        self.notes = list(self.config.notes)
        self.fields: set[str] = set()

    def inference(self, architecture: ConfigT) -> Inference[ConfigT]:
        """The result; a field of the user's that this network does not have is refused."""
        for name in self.overrides:
            if name not in self.fields:
                near = " or ".join(difflib.get_close_matches(name, sorted(self.fields), 3, 0.4))
                hint = f"Did you mean {near}?" if near else "fdconv inspect lists them."
                raise CheckpointError(f"{name!r} is not a field of this network. {hint}")
        assumed = tuple(s for s in self.settings if s.source == "published default")
        found = tuple(s for s in self.settings if s.source != "published default")
        return Inference(
            architecture=architecture, found=found, assumed=assumed, notes=tuple(self.notes)
        )


class SettingResolver(Generic[ConfigT]):
    """Resolves the fields of one configuration model, and builds it.

    Args:
        evidence: takes the settings, and holds what the user gave.
        model: its fields' types convert values of the user and the config.
        prefix: of the fields' dotted names, as ``backbone.conv``; empty for the whole network.
        section: the config's values, by the model's field names.
        defaults: published defaults that are not the model's, ``note`` for those assumed.
    """

    def __init__(
        self,
        evidence: Evidence,
        model: type[ConfigT],
        prefix: str,
        section: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any] | None = None,
        note: str = "",
    ) -> None:
        self.evidence = evidence
        self.model = model
        self.prefix = f"{prefix}." if prefix else ""
        self.section = Section(section)
        self.defaults = defaults or {}
        self.note = note
        self.values: dict[str, Any] = {}

    def resolve(
        self,
        name: str,
        *,
        kind: Any = None,
        config: Any = _USUAL,
        config_name: str = "the config",
        default: Any = _USUAL,
        exact: Any = UNSET,
        accepts: Callable[[Any], bool] | None = None,
        derived: Any = UNSET,
        because: str = "",
        source: Source = "shapes",
        matters: bool = True,
        note: str = "",
    ) -> Any:
        """Decide one field of the model and record what decided it.

        Args:
            name: the field; ``kind`` is its type, by default the model's.
            config: the config's value, by default its section's entry of that name, and
                ``config_name`` what to call it in an error. One not read counts as none.
            default: the published default, by default the model's; ``note`` is for one assumed.
            exact: the value, if the weights leave only one.
            accepts: whether a value agrees with the weights, if they leave several.
            derived: the value to take if ``accepts`` refuses the default. Giving one says that
                all accepted values describe the same network, so that the weights decided it.
            because: what the weights have, for an error: "the weights have 3 stages".
            source: what of the weights decides it.
            matters: False if the field has no effect in this network; then it is not listed.

        Raises:
            CheckpointError: the config or the user contradicts the weights, or the value is in
                none of them and has no default.
        """
        field = self.prefix + name
        self.evidence.fields.add(field)
        if config is _USUAL:
            config = self.section.stated(name)
        if default is _USUAL:
            info = self.model.model_fields[name]
            default = self.defaults.get(name, UNSET if info.is_required() else info.default)
            note = note or (self.note if name in self.defaults else "")
        if exact is not UNSET:
            derived, default, accepts = exact, UNSET, lambda value: value == exact
            because = because or f"the weights' {source} give {exact!r}"
        adapter = _adapter(self.model, name) if kind is None else TypeAdapter(kind)
        override = self.evidence.overrides.get(field, UNSET)
        given = _converted(field, adapter, override, "the command line")
        # The user settles what config and weights disagree on.
        config = config if given is UNSET else UNSET
        written = _converted(field, adapter, config, config_name)
        for witness, value in (("the command line", given), (config_name, written)):
            if value is not UNSET and accepts is not None and not accepts(value):
                raise CheckpointError(
                    f"{field}: {witness} says {value!r}, but {because}. The weights decide: correct"
                    f" {witness}, or use the checkpoint it belongs to."
                )
        if default is not UNSET and accepts is not None and not accepts(default):
            default = UNSET
        choices: dict[Source, Any] = {
            "command line": given,
            "checkpoint meta" if config_name == CHECKPOINT_META else "config": written,
            "published default": default,
            source: derived,
        }
        decider = next((witness for witness, value in choices.items() if value is not UNSET), None)
        if decider is None:
            raise CheckpointError(
                f"{field} is not known: {because or 'names and shapes leave it open'}. "
                f"Give the network's config (--config), or {field} itself (--set {field}=…)."
            )
        value = self.values[name] = choices[decider]
        if derived is not UNSET:
            decider = source
        if matters:
            note = note if decider == "published default" else ""
            setting = Setting(field=field, value=value, source=decider, note=note)
            self.evidence.settings.append(setting)
        return value

    def exact(self, source: Source, **values: Any) -> None:
        """Fields whose values follow from the weights; UNSET ones are resolved without them."""
        for name, value in values.items():
            self.resolve(name, exact=value, source=source)

    def build(self, *, matters: bool = True, **others: Any) -> ConfigT:
        """The model, its remaining fields from the user, the config or the defaults.

        ``others`` are resolved elsewhere; the remaining ones are listed if they ``matter``.
        """
        for name in self.model.model_fields:
            if name not in self.values and name not in others:
                self.resolve(name, matters=matters)
        return self.model(**(self.values | others))


@cache
def _adapter(model: type[Frozen], name: str) -> TypeAdapter[Any]:
    field = model.model_fields[name]
    finite = ConfigDict(allow_inf_nan=False)
    return TypeAdapter(Annotated[field.annotation, field], config=finite)  # type: ignore[arg-type]


def _converted(field: str, adapter: TypeAdapter[Any], value: Any, witness: str) -> Any:
    if value is UNSET or isinstance(value, Unreadable):
        return UNSET
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise CheckpointError(
            f"{field}: {witness} says {str(value)[:60]!r}, which is not possible: {reason}."
        ) from None


def _flat(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted names."""
    flat: dict[str, Any] = {}
    for name, value in overrides.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def from_first(indices: Any, count: int) -> Any:
    """A config's indices of ``count`` outputs, or its one, counted from the first output."""
    indices = (indices,) if isinstance(indices, int) else indices
    if not isinstance(indices, (list, tuple)):
        return indices
    return tuple(i + count if isinstance(i, int) and i < 0 else i for i in indices)
