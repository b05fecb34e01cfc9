"""One YAML file and dotted overrides in, a checked tree out; errors name the key and the nearest right one."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from jaxtrain.config.run import RunConfig


class ConfigError(ValueError):
    """A config that cannot be run. The message names every wrong key by its full path."""


# What users of other frameworks type, and what it is called here.
ALIASES = {
    "lr": "optimizer.learning_rate",
    "learning_rate": "optimizer.learning_rate",
    "warmup_steps": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "lr_scheduler_type": "optimizer.schedule",
    "max_steps": "train.steps",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.microbatches",
    "max_grad_norm": "train.max_grad_norm",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "seq_len": "data.max_length",
    "dataset": "data.train.path",
    "model_name_or_path": "model.path",
    "output_dir": "run.dir",
    "seed": "run.seed",
    "bf16": "model.compute_dtype",
    "gradient_checkpointing": "model.remat",
    "save_steps": "checkpoint.every",
    "eval_steps": "eval.every",
    "logging_steps": "log.every",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "target_modules": "model.lora.targets",
    "use_rslora": "model.lora.rslora",
    "entropy_coef": "rl.entropy_coefficient",
    "entropy_coeff": "rl.entropy_coefficient",
    "use_bias_correction_kl": "rl.kl_bias_correction",
}


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `dotted.key=value` overrides (values are YAML), check everything.

    Raises ConfigError for a missing file, broken YAML, an unknown key, a wrong type or an impossible combination.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        raise ConfigError(f"no config file {path}" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of sections, not {type(tree).__name__}")
    return parse_config(tree, str(path), overrides)


def parse_config(tree: dict[str, Any], origin: str = "config", overrides: list[str] | None = None) -> RunConfig:
    """Apply the overrides to a plain tree and check it; `origin` is named in the errors.

    Raises ConfigError that lists every fault at once.
    """
    for override in overrides or []:
        _override(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        faults = [_fault(e["loc"], e["type"], e["msg"], e["input"]) for e in error.errors()]
        raise ConfigError(f"{origin}:\n" + "\n".join(f"  {fault}" for fault in faults)) from None


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
        node = node[part]
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {key}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"override {key}: {part!r} is no index into a list of {len(node)}")
    return int(part)


def _fault(loc: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    # pydantic puts the tag of a union into the path; it is no key of the user's.
    keys = [str(part) for part in loc if not str(part).startswith("<")]
    path = ".".join(keys)
    if kind == "extra_forbidden":
        return f"unknown key {path}" + _suggest(keys)
    if kind == "missing":
        return f"{path} is missing"
    message = message.removeprefix("Value error, ")
    shown = "" if isinstance(value, dict | BaseModel) or kind == "value_error" else f" (got {value!r})"
    return f"{path}: {message}{shown}" if path else f"{message}{shown}"


def _suggest(keys: list[str]) -> str:
    """The nearest right key: in the same section, else by another framework's name, else anywhere."""
    *section, last = keys
    # An index into a list of sources is part of the path, but of no key's name.
    prefix = "".join(f"{part}." for part in section if not part.isdigit())
    known = dict(known_keys(RunConfig, ""))
    siblings = [key.removeprefix(prefix) for key in known if key.startswith(prefix)]
    siblings = [name for name in siblings if "." not in name]
    near = difflib.get_close_matches(last, siblings, 1) or [name for name in siblings if name.startswith(last)]
    if near:
        return f"; did you mean {'.'.join([*section, near[0]])}?"
    elsewhere = [ALIASES[last]] if last in ALIASES else [key for key in known if key.rpartition(".")[2] == last]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known here: {', '.join(siblings)}"


def known_keys(section: type[BaseModel], prefix: str):
    for name, field in section.model_fields.items():
        yield prefix + name, field
        for inner in dict.fromkeys(_sections(field.annotation)):
            yield from known_keys(inner, f"{prefix}{name}.")


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (UnionType, Union, Annotated, list):
        return [s for arg in get_args(annotation) for s in _sections(arg)]
    return []
