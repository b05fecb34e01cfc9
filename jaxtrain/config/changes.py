"""How a run's config differs from the one that the run began with, in what changes its numbers."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, NamedTuple

from pydantic import BaseModel

from jaxtrain.config.dataclass_sections import OBJECTIVE
from jaxtrain.config.keys import known_keys
from jaxtrain.config.load import ConfigError
from jaxtrain.config.marks import InputPath, MayChange
from jaxtrain.config.python_values import import_path
from jaxtrain.config.run_config import RunConfig
from jaxtrain.named import did_you_mean


class Change(NamedTuple):
    key: str  # dotted, as an override is written
    old: Any  # None: not given
    new: Any
    is_input: bool  # the path of files that the run reads

    def __str__(self) -> str:
        return f"{self.key}: {_show(self.old)} -> {_show(self.new)}"


def differences(old: RunConfig, new: RunConfig) -> list[Change]:
    """The keys whose values differ and may not, by the marks on the fields (see `jaxtrain.config.marks`)."""
    return list(_between_sections(old, new, "", new))


def input_paths(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys marked InputPath that have a value, and the path that each has."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), prefix + name
        if value is not None and any(isinstance(mark, InputPath) for mark in field.metadata):
            yield key, value
        elif isinstance(value, BaseModel):
            yield from input_paths(value, f"{key}.")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from input_paths(item, f"{key}.{number}.")


def check_keys(keys: Sequence[str], config: RunConfig) -> None:
    """Raises ConfigError for a key that no config has. Below a free-form mapping any key is accepted."""
    # An objective of the user's own has keys of its own.
    known = {name: key.kind for name, key in known_keys()}
    known |= {f"objective.{name}": Any for name in OBJECTIVE.section(config.objective)}
    for key in keys:
        names = [part for part in key.split(".") if not part.isdigit()]
        parents = [".".join(names[:length]) for length in range(1, len(names) + 1)]
        if parents and (parents[-1] in known or _is_free_form(parents, known)):
            continue
        raise ConfigError(f"--allow-change {key}: no such key{did_you_mean(key, known)}")


def covers(keys: Sequence[str], key: str) -> bool:
    """Whether `key`, or a section that it belongs to, is one of `keys`."""
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in keys)


def _is_free_form(parents: list[str], known: dict[str, Any]) -> bool:
    deepest = next((parent for parent in reversed(parents) if parent in known), None)
    return deepest is not None and "dict[" in str(known[deepest])


def _between_sections(old: BaseModel, new: BaseModel, prefix: str, config: RunConfig) -> Iterator[Change]:
    for name, field in type(new).model_fields.items():
        before, after = (_recorded(config, name) for config in (old, new))
        if before == after:
            continue
        mark = next((mark for mark in field.metadata if isinstance(mark, MayChange)), None)
        if mark is None or not mark.when(before, after, config):
            is_input = any(isinstance(mark, InputPath) for mark in field.metadata)
            yield from _between_values(before, after, prefix + name, is_input, config)


def _between_values(old: Any, new: Any, key: str, is_input: bool, config: RunConfig) -> Iterator[Change]:
    if old == new:
        return
    if isinstance(old, BaseModel) and type(old) is type(new):
        yield from _between_sections(old, new, f"{key}.", config)
    elif isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _between_values(old.get(name), new.get(name), f"{key}.{name}", False, config)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _between_values(before, after, f"{key}.{number}", False, config)
    else:
        yield Change(key, _plain(old), _plain(new), is_input)


def _recorded(section: BaseModel, name: str) -> Any:
    """The value of a field; what a config records of it, where that is a function, a class or a dataclass."""
    value = getattr(section, name)
    return section.model_dump(mode="json", include={name})[name] if is_dataclass(value) else import_path(value)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
