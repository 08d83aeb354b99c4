"""Enough of pydantic for `fdconv_deploy.config` on a GPU machine that lacks it: plain defaults.

Nothing is validated. What builds networks from configurations written in this repository needs
no validation; what reads manifests or files does, and is not for this.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar


class ValidationError(ValueError):
    """Never raised here."""


class BaseModel:
    """Fields are class attributes and keyword arguments, of subclasses too."""

    model_fields: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        own = {
            name: SimpleNamespace(default=cls.__dict__.get(name))
            for name, kind in inspect.get_annotations(cls).items()
            if not str(kind).startswith("ClassVar")
        }
        cls.model_fields = {**cls.model_fields, **own}

    def __init__(self, **given: Any) -> None:
        unknown = given.keys() - type(self).model_fields.keys()
        assert not unknown, f"{type(self).__name__} has no fields {unknown}"
        self.__dict__.update(given)


def _decorator(**_options: Any) -> Any:
    return lambda function: function


def install_if_missing() -> bool:
    """Put it in pydantic's place, where pydantic is not installed; whether it was needed."""
    try:
        importlib.import_module("pydantic")
    except ImportError:
        pass
    else:
        return False
    module = ModuleType("pydantic")
    module.__dict__.update(
        BaseModel=BaseModel,
        ConfigDict=dict,
        Discriminator=lambda *_: None,
        Field=lambda default=None, **_: default,
        SerializerFunctionWrapHandler=object,
        Tag=lambda _: None,
        ValidationError=ValidationError,
        model_serializer=_decorator,
        model_validator=_decorator,
    )
    sys.modules["pydantic"] = module
    return True
