"""One YAML file and dotted overrides in, a checked tree out; errors name the key and the nearest right one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jaxtrain.config.aliases import ALIASES, VALUES, recipe_hint, remark
from jaxtrain.config.keys import known_keys
from jaxtrain.config.run_config import RunConfig


class ConfigError(ValueError):
    """A config that cannot be run. The message names every wrong key by its full path."""


_MOVED_SECTIONS = ("rl.sampling",)  # whose keys are elsewhere now, each named by its error


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `dotted.key=value` overrides (values are YAML), check everything.

    Raises ConfigError for a missing file, broken YAML, an unknown key, a wrong type or an impossible combination.
    """
    return parse_config(read_tree(path), str(path), overrides)


def read_tree(path: str | Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of a YAML file, unchecked, over that of the file that its key `extends` names.

    Sections are merged key by key; any other value, lists included, replaces that of the extended file, whose path is
    relative to the file that names it. Null removes a key that cannot be null. `extended_by` are the files on the way
    here. Raises ConfigError for a missing file, broken YAML, or files that extend each other.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.yaml")], 1)
        raise ConfigError(f"no config file {path}" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of sections, not {type(tree).__name__}")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends must be the path of a YAML file (got {base!r})")
    if path.resolve() in extended_by:
        raise ConfigError(f"{path} extends itself, through {', '.join(str(each) for each in extended_by)}")
    return _merged(read_tree(path.parent / base, (*extended_by, path.resolve())), tree)


def merged_text(path: str | Path) -> str:
    """The content of a YAML file with that of the files it extends, as YAML. Raises ConfigError as `read_tree`."""
    text = Path(path).read_text()
    return yaml.safe_dump(read_tree(path), sort_keys=False) if "extends" in text else text


def _merged(base: dict[str, Any], changes: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`base` with the changes; null removes a key of `base` that cannot be null."""
    merged = base | changes
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = _merged(base[key], value, f"{prefix}{key}.")
        elif value is None and key in base and prefix + key in _never_null():
            del merged[key]
    return merged


@lru_cache(maxsize=1)
def _never_null() -> frozenset[str]:
    return frozenset(name for name, key in known_keys() if not key.may_be_null)


def parse_config(tree: dict[str, Any], origin: str = "config", overrides: list[str] | None = None) -> RunConfig:
    """Apply the overrides to a plain tree and check it; `origin` is named in the errors.

    Raises ConfigError that lists every fault at once.
    """
    for override in overrides or []:
        _override(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        faults: dict[str, list[str]] = {origin: [], "overrides": []}
        for details in error.errors():
            faults["overrides" if _is_overridden(details, overrides or []) else origin] += _faults(details)
        blocks = [
            f"{place}:\n" + "\n".join(f"  {fault}" for fault in found) for place, found in faults.items() if found
        ]
        raise ConfigError("\n".join(blocks)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved tree as YAML, which `load_config` reads back to an equal config, without keys that are unused."""
    return yaml.safe_dump(config_tree(config), sort_keys=False)


def config_tree(config: RunConfig) -> dict[str, Any]:
    """The resolved tree as plain values, which `parse_config` reads back, without keys that are unused."""
    return config.model_dump(mode="json", exclude=config.unused)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-5` as a string, as everybody finds out once. This one reads it as a number."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_FLOAT = r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


_NAMED = ("algorithm", "objective")  # sections that may be given as a name alone


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, key)]
            continue
        if node.get(part) is None:
            node[part] = {}
        if isinstance(node[part], str) and part in _NAMED:
            node[part] = {"name": node[part]}
        node = node[part]
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {key}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"override {key}: {part!r} is not an index into a list of {len(node)}")
    return int(part)


def _keys_of(error: ErrorDetails) -> list[str]:
    # pydantic puts the tag of a union into the path; it is no key of the user's.
    return [str(part) for part in error["loc"] if not str(part).startswith("<")]


def _is_overridden(error: ErrorDetails, overrides: list[str]) -> bool:
    """Whether the value at fault, or a section that holds it, was given as an override."""
    path = ".".join(_keys_of(error))
    given = [override.partition("=")[0] for override in overrides]
    return any(path == key or path.startswith(f"{key}.") for key in given)


def _faults(error: ErrorDetails) -> Iterator[str]:
    keys = _keys_of(error)
    path, message, value = ".".join(keys), error["msg"].removeprefix("Value error, "), error["input"]
    match error["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument" if path in _MOVED_SECTIONS and isinstance(value, dict):
            yield from (f"unknown key {path}.{name}{_suggest([*keys, name])}" for name in value)
        case "extra_forbidden" | "unexpected_keyword_argument" | "unknown_field":
            yield f"unknown key {path}{_suggest(keys, error.get('ctx', {}).get('known'))}"
        case "missing":
            yield f"{path} is missing"
        case kind:
            shown = "" if isinstance(value, dict | BaseModel) or kind == "value_error" else f" (got {value!r})"
            shown += recipe_hint(value) if path == "recipe" else _unquoted(kind, value)
            yield f"{message}{shown}" if message.startswith(path) else f"{path}: {message}{shown}"


def _unquoted(kind: str, value: Any) -> str:
    """Hint for a value whose only error is its type."""
    if not isinstance(value, str):
        return ""
    if kind == "list_type":
        return f"; did you mean [{value}]?"
    right = {"int_type": (int,), "float_type": (int, float), "bool_type": (bool,)}.get(kind, ())
    try:
        plain = yaml.load(value, _Loader) if right else value
    except yaml.YAMLError:
        return ""
    return f": write {value} without quotes" if type(plain) in right else ""


def _suggest(keys: list[str], siblings: list[str] | None = None) -> str:
    """The right key: of another framework's name or of the same name elsewhere, else the nearest in the section."""
    *section, last = keys
    # An index into a list of sources is part of the path, but of no key's name.
    prefix = "".join(f"{part}." for part in section if not part.isdigit())
    known = dict(known_keys())
    if siblings is None:
        siblings = [key.removeprefix(prefix) for key in known if key.startswith(prefix)]
        siblings = [name for name in siblings if "." not in name]
    known.pop(".".join(keys), None)  # an objective lacks keys that others have
    if last == "steps" and f"{prefix}every" in known:
        elsewhere = [f"{prefix}every"]
    elif last in ALIASES:
        elsewhere = [ALIASES[last]]
    else:
        elsewhere = [key for key in known if key.rpartition(".")[2] == last]
    elsewhere.sort(key=lambda key: key.split(".")[-2:-1] != section[-1:])  # in a section of the same name, if any
    near = difflib.get_close_matches(last, siblings, 1) or [name for name in siblings if name.startswith(last)]
    if elsewhere or near:
        key = elsewhere[0] if elsewhere else ".".join([*section, near[0]])
        return f"; did you mean {key}{f': {VALUES[last]}' if last in VALUES else ''}?{remark(last)}"
    return f"; known here: {', '.join(siblings)}"
