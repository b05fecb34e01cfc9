"""The keys of a config: what types their values have, what their defaults are, and what they mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typing_extensions import Doc

from jaxtrain.config.dataclass_sections import FieldsOf
from jaxtrain.config.run_config import RunConfig


class ConfigKey(NamedTuple):
    kind: Any  # the type of its value
    default: Any  # MISSING: it has none
    text: str  # what it means

    @property
    def sections(self) -> tuple[type | FieldsOf, ...]:
        """What its value may be a section of."""
        return tuple(dict.fromkeys(_sections(self.kind)))

    @property
    def may_be_null(self) -> bool:
        return _kind_text(self.kind) == "value" or "null" in _kind_text(self.kind).split(" | ")

    @property
    def kind_text(self) -> str:
        """The type, as a user writes values of it."""
        return _kind_text(self.kind)

    @property
    def default_text(self) -> str:
        """The default, as it is written in YAML; empty for a section and where there is none."""
        value = self.default
        if value is MISSING or self.sections:
            return ""
        if isinstance(value, tuple):
            value = list(value)
        return {None: "null", True: "true", False: "false"}[value] if _is_plain(value) else str(value)


def known_keys(section: type | FieldsOf = RunConfig, prefix: str = "") -> Iterator[tuple[str, ConfigKey]]:
    """The dotted keys of a section, those of the sections within it included."""
    if isinstance(section, FieldsOf):
        keys = _keys_of_dataclass(section.hints(), section.kind)
    elif issubclass(section, BaseModel):
        keys = {name: _key_of_field(field) for name, field in section.model_fields.items()}
    else:
        keys = _keys_of_dataclass(get_type_hints(section, include_extras=True), section)
    for name, key in keys.items():
        yield prefix + name, key
        for inner in key.sections:
            yield from known_keys(inner, f"{prefix}{name}.")


def _key_of_field(field: FieldInfo) -> ConfigKey:
    kind = next((mark for mark in field.metadata if isinstance(mark, FieldsOf)), None) or field.annotation
    default = MISSING if field.default is PydanticUndefined else field.default
    if field.default_factory is not None:
        default = field.get_default(call_default_factory=True, validated_data={})
    return ConfigKey(kind, default, " ".join((field.description or "").split()))


def _keys_of_dataclass(hints: dict[str, Any], section: type) -> dict[str, ConfigKey]:
    defaults = {field.name: field.default for field in fields(section)}
    return {name: ConfigKey(kind, defaults.get(name, MISSING), _doc(kind)) for name, kind in hints.items()}


def _doc(kind: Any) -> str:
    marks = get_args(kind) if get_origin(kind) is Annotated else ()
    return next((mark.documentation for mark in marks if isinstance(mark, Doc)), "")


def _sections(kind: Any) -> list[type | FieldsOf]:
    if isinstance(kind, FieldsOf) or (isinstance(kind, type) and (issubclass(kind, BaseModel) or is_dataclass(kind))):
        return [kind]
    if get_origin(kind) in (UnionType, Union, Annotated, list):
        return [section for part in get_args(kind) for section in _sections(part)]
    return []


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _kind_text(kind: Any) -> str:
    if isinstance(kind, FieldsOf) or _sections(kind) == [kind]:
        return "section"
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _kind_text(parts[0])
    if origin is Literal:
        return " | ".join(str(part) for part in parts)
    if origin in (UnionType, Union):
        return " | ".join(dict.fromkeys(_kind_text(part) for part in parts))
    if origin in (list, tuple, Sequence):
        return f"list of {_kind_text(parts[0])}" if parts else "list"
    if kind is Any:
        return "value"
    names: dict[Any, str] = {NoneType: "null", bool: "true | false", float: "number", int: "integer", str: "text"}
    return names.get(kind) or (
        "mapping" if origin is not None or kind is dict else getattr(kind, "__name__", str(kind))
    )
