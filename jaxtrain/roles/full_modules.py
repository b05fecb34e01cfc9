"""Which parameters `model.lora.modules_to_save` names: modules that are trained in full beside the adapters."""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from converters.families.registry import weight_rows
from converters.weight_rows import flatten
from jaxtrain.config import ModelSection
from jaxtrain.lora import split_adapters
from jaxtrain.named import did_you_mean
from jaxtrain.nn.model import Model
from jaxtrain.ops.quantize import is_quantized

KEY = "model.lora.modules_to_save"
_TABLES = {"embed.weight": "embed_tokens", "lm_head.kernel": "lm_head"}


def with_full_modules(section: ModelSection, model: Model) -> Model:
    """The model with the paths of what `model.lora.modules_to_save` names, or of what the folder `model.lora.path` has.

    Raises ValueError for a name that matches no module, that of a module with an adapter or a quantised kernel, that of
    a tied head without its embedding, and names that differ from what the folder has.
    """
    assert section.lora is not None and model.lora is not None
    names, from_folder = section.lora.modules_to_save, model.lora.full_paths
    paths = from_folder if names is None else _paths(names, model)
    if section.lora.path is not None and set(paths) != set(from_folder):
        raise ValueError(
            f"{KEY}={names}, but the adapter in {section.lora.path} has {', '.join(from_folder) or 'none'}; leave the "
            "key out"
        )
    _check(paths, section, model)
    tables = _TABLES.keys() & flatten(model.abstract()).keys()
    missing = sorted(tables - set(paths))
    if model.new_tokens is None or missing == sorted(tables):
        return replace(model, lora=replace(model.lora, full_paths=paths))
    if missing:
        raise ValueError(
            f"{KEY}: with model.add_tokens the new tokens need rows in both tables: name {_TABLES[missing[0]]} too"
        )
    # The tables are trained in full, with the rows of new tokens.
    return replace(model, lora=replace(model.lora, full_paths=paths), new_tokens=None)


def _paths(names: Sequence[str], model: Model) -> tuple[str, ...]:
    modules = _modules(model)
    found: dict[str, None] = {}
    for name in names:
        matched = [path for path, holders in modules.items() if any(_names(name, holder) for holder in holders)]
        if not matched and not (model.tied and fnmatchcase("lm_head", name)):
            raise _no_module(name, model, modules)
        found |= dict.fromkeys(matched)
    tied = [name for name in names if model.tied and fnmatchcase("lm_head", name)]
    if tied and "embed.weight" not in found:
        raise ValueError(
            f"{KEY}: {tied[0]} is tied to the embedding, both are one tensor: name embed_tokens as well, or neither"
        )
    return tuple(found)


def _modules(model: Model) -> dict[str, list[str]]:
    """The base's parameters, each with the paths of the module that holds it: by our names and by transformers'."""
    base = flatten(split_adapters(model.abstract())[1])
    modules = {path: [re.sub(r"^layers\b", "layers.*", path).rpartition(".")[0]] for path in base}
    for row in weight_rows(model.config):
        if row.ours in modules and not row.alias:
            modules[row.ours].append(re.sub(r"\{\w+\}", "*", row.hf).rpartition(".")[0])
    return modules


def _names(name: str, module: str) -> bool:
    """Whether `name` is the module at the dotted path `module`, or one that holds it; leading parts may be left out."""
    parts = module.split(".")
    ends = range(1, len(parts) + 1)
    return any(fnmatchcase(".".join(parts[start:end]), name) for end in ends for start in range(end))


def _no_module(name: str, model: Model, modules: dict[str, list[str]]) -> ValueError:
    if any(name in path.split(".") for path in flatten(split_adapters(model.abstract())[0])):
        return ValueError(f"{KEY}: {name} is trained anyway, leave it out")
    known = sorted({holder.rpartition(".")[2] for holders in modules.values() for holder in holders})
    hint = did_you_mean(name, known)
    if re.search(r"\blayers\.\d", name):
        hint = "; layers are stacked, and trained all or none: write layers.*"
    return ValueError(f"{KEY}: the model has no module {name!r}{hint} (it has {', '.join(known)})")


def _check(paths: Collection[str], section: ModelSection, model: Model) -> None:
    leaves, axes = flatten(model.abstract()), flatten(model.axes())
    for path in paths:
        module = path.rpartition(".")[0]
        if path not in leaves:
            raise ValueError(f"{KEY}: the model has no {path} (model.head={section.head})")
        if f"{module}.lora_a" in leaves:
            raise ValueError(f"{KEY} names {module}, which has an adapter: leave it out, or out of model.lora.targets")
        if section.quantize and is_quantized(path, axes[path]):
            raise ValueError(
                f"{KEY} names {module}, whose kernel model.quantize={section.quantize} stores in blocks that cannot be "
                "trained: leave it out, or out of model.quantize"
            )
