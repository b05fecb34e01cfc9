"""Writes docs/reference.md from the public names and their docstrings, docs/config.md from the keys of a config, and
docs/migration.md from the names of other frameworks.

Usage: python docs/make_reference.py
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import jaxtrain
from jaxtrain.config import known_keys
from jaxtrain.config.aliases import ALIASES, VALUES, recipe_names, remark

PAGE = Path(__file__).parent / "reference.md"
CONFIG_PAGE = Path(__file__).parent / "config.md"
MIGRATION_PAGE = Path(__file__).parent / "migration.md"
SECTIONS = {
    "Config": ("parse_config", "load_config", "RunConfig", "Dataset", "ConfigError"),
    "Runs": ("run", "Session", "Outcome"),
    "Models": ("load", "generate", "save", "export_run", "Role", "TrainedRole", "SamplingParams", "Completion"),
    "Reinforcement learning": ("Environment", "Opening", "Reply", "Algorithm"),
    "Modules": ("objectives", "rl", "mesh"),
}


def reference() -> str:
    """The page."""
    parts = ["# Reference", "The names of `import jaxtrain as jt`. Written by `docs/make_reference.py`."]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}")
        for name in names:
            parts += _entry(f"jt.{name}", getattr(jaxtrain, name), "###")
    return "\n\n".join(parts) + "\n"


def config_reference() -> str:
    """The page of the keys. A section that stands at several keys is written at the first."""
    parts = ["# Config", _OF_CONFIG]
    first: dict[Any, str] = {}
    skipped: tuple[str, ...] = ()
    for name, key in known_keys():
        if name.startswith(skipped):
            continue
        same = next((first[section] for section in key.sections if section in first), None)
        if same is not None:
            skipped = (*skipped, f"{name}.")
        first = dict.fromkeys(key.sections, name) | first
        default = f", default `{key.default_text}`" if key.default_text else ""
        texts = [key.text, f"The keys are those of `{same}`." if same else ""]
        line = f"`{name}` ({key.kind_text}{default}): {' '.join(filter(None, texts))}".removesuffix(": ")
        parts.append(f"## {name}\n\n{key.text}" if "." not in name and key.sections else f"- {line.strip()}")
    return "\n".join(f"\n{part}\n" if part.startswith("#") else part for part in parts).lstrip() + "\n"


def migration_reference() -> str:
    """The page of the names of other frameworks, by the section of ours that they belong to."""
    parts = [_OF_MIGRATION, "## What is trained\n\n| there | here |\n|---|---|"]
    parts[-1] += "".join(f"\n| {', '.join(f'`{name}`' for name in names)} | {ours} |" for ours, names in recipe_names())
    sections: dict[str, list[str]] = {}
    for name, key in ALIASES.items():
        value = f"; `true` is `{VALUES[name]}`" if name in VALUES else ""
        note = (remark(name).strip(" ()") + value).removeprefix("; ")
        sections.setdefault(key.partition(".")[0], []).append(f"| `{name}` | `{key}` | {note} |")
    for section, rows in sections.items():
        parts.append("\n".join([f"## {section}\n", "| there | here | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


_OF_MIGRATION = """# From TRL, axolotl and Tunix

What is typed there, and the key that means the same here; written by `docs/make_reference.py`. A config with one of
these names is refused with the same answer. [config.md](config.md) describes every key.

- A run is one YAML file and one command, `jaxtrain train run.yaml section.key=value`; there is no launcher of processes
  around it on one host. `jaxtrain preview run.yaml` shows what would be trained on.
- A trainer class or command (`SFTTrainer`, `DPOTrainer`, `axolotl train` with `rl: dpo`, `PeftTrainer`, `GRPOLearner`)
  is a `recipe` with an `objective` or an `rl.algorithm`.
- `train.batch_size` is the global batch in packed rows, over all devices and microbatches. With other frameworks it is
  the product of the batch of a device, the devices and the accumulated steps, in examples.
- Data sets have TRL's columns (`messages`, `prompt` and `completion`, `chosen` and `rejected`, `label`), and
  `data.*.columns` maps others; reward functions have TRL's signature. Metrics have TRL's names.
- Models and adapters are Hugging Face and PEFT folders on both sides.
- There is no `device_map`, FSDP or DeepSpeed config: [`mesh`](config.md) says how many devices each axis has, and
  `fsdp` takes those that are left."""


_OF_CONFIG = """Every key of a run's YAML file, as `jaxtrain config` shows them; written by `docs/make_reference.py`.

A file may begin with `extends: other.yaml`, a path relative to it: sections are merged key by key, and other values
replace those of the extended file; `key: null` removes one that cannot be null. `section.key=value` on the command line
is written over both, as YAML.
`~/` at the start of a path is the home folder. `jaxtrain config --schema` prints the JSON schema for editors. The keys
of `objective` depend on its class, whose
docstring describes them ([rl-objectives.md](rl-objectives.md), [preferences.md](preferences.md),
[distillation.md](distillation.md)); those listed are of clipped policy objectives.
"""


def _entry(name: str, thing: Any, heading: str) -> list[str]:
    if isinstance(thing, ModuleType):
        parts = [f"{heading} {name}", _doc(thing)]
        for member, value in _members(thing).items():
            if member in jaxtrain.__all__:
                parts.append(f"{heading}# {name}.{member}\n\nIs `jt.{member}`.")
            else:
                parts += _entry(f"{name}.{member}", value, heading + "#")
        return parts
    if inspect.isclass(thing):
        return [f"{heading} {name}", *_class(thing)]
    if callable(thing):
        return [f"{heading} {name}", _code(f"{name}{_signature(thing)}"), _doc(thing)]
    return [f"{heading} {name}", f"{', '.join(f'`{key}`' for key in thing)}."]


def _members(module: ModuleType) -> dict[str, Any]:
    """The names that a module says are public, or its own classes and functions."""
    if hasattr(module, "__all__"):
        return {name: getattr(module, name) for name in module.__all__}
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    }


def _class(kind: type) -> list[str]:
    parts = [_doc(kind)] if kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(") else []
    if fields := _fields(kind):
        parts.append(_code(fields))
    for name, member in vars(kind).items():
        plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        function = plain.fget if isinstance(plain, property) else getattr(plain, "func", plain)
        if name[0] == "_" or not inspect.isfunction(function) or function.__module__ != kind.__module__:
            continue
        text = inspect.getdoc(function)
        shown = f"`{name}`" if function is not plain else f"`{name}{_signature(function, drop=1)}`"
        parts.append(f"- {shown}" + (f": {textwrap.indent(text, '  ').strip()}" if text else ""))
    return parts


def _fields(kind: type) -> str:
    """The lines of a class that declare its fields, with their comments or docstrings, as they are in the source."""
    source, definition = textwrap.dedent(inspect.getsource(kind)), _definition(kind)
    assert isinstance(definition, ast.ClassDef)
    fields = [node for node in definition.body if isinstance(node, ast.AnnAssign)]
    if not fields:
        return ""
    lines, first = source.splitlines(), fields[0].lineno - 1
    while lines[first - 1].strip().startswith("#"):
        first -= 1
    last, *after = definition.body[definition.body.index(fields[-1]) :]
    if after and isinstance(after[0], ast.Expr):  # its docstring
        last = after[0]
    return textwrap.dedent("\n".join(lines[first : last.end_lineno]))


def _signature(function: Any, drop: int = 0) -> str:
    """As it is written in the source: a default's value may differ between machines. `drop`: leading parameters that
    are not shown, such as `self`."""
    definition = _definition(inspect.unwrap(function))
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    arguments.args = arguments.args[drop:]
    returns = f" -> {ast.unparse(definition.returns)}" if definition.returns else ""
    return f"({ast.unparse(arguments)}){returns}"


def _definition(thing: Any) -> ast.stmt:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    return definition


def _doc(thing: Any) -> str:
    return inspect.getdoc(thing) or ""


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


if __name__ == "__main__":
    PAGE.write_text(reference())
    CONFIG_PAGE.write_text(config_reference())
    MIGRATION_PAGE.write_text(migration_reference())
