"""A file with `stages`: runs of which each starts from the model of the one before.

    run: {dir: runs/pipeline}
    model: {path: SmolLM2-135M-Instruct}
    stages:
      - {name: sft, recipe: sft, data: ..., train: ...}
      - {name: dpo, recipe: preference, data: ..., train: ...}

Keys beside `stages` apply to every stage, unless the stage overrides them. A stage's folder is `run.dir/NAME`; its
model is `run.dir/NAME/export`, which the next stage reads: `model.path` and the other keys that an export settles,
beside `stages` or in an override of all stages, are of the first stage alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from jaxtrain.config.load import ConfigError, parse_config, read_tree
from jaxtrain.config.marks import in_home
from jaxtrain.config.run_config import RunConfig

EXPORT = "export"  # in a stage's folder
_ORIGIN = ("path", "config", "tokenizer", "add_tokens", "chat_template")  # keys of `model` that an export settles
_OF_FIRST = tuple(f"model.{key}{end}" for key in (*_ORIGIN, "lora.path") for end in "=.")  # overrides


class Stage(NamedTuple):
    name: str
    config: RunConfig
    folder: Path

    @property
    def export(self) -> Path:
        return self.folder / EXPORT


def has_stages(path: str | Path) -> bool:
    return "stages" in read_tree(path)


def load_stages(path: str | Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of a file in their order. Overrides are of every stage, or of one, as `NAME.section.key=value`.

    Raises ConfigError for a file that is not such, and for any fault of a stage, which it names.
    """
    tree = read_tree(path)
    shared = {key: value for key, value in tree.items() if key != "stages"}
    given = tree["stages"]
    if not isinstance(given, list) or not given or not all(isinstance(each, dict) for each in given):
        raise ConfigError(f"{path}: stages should be a list of mappings, each with `name` and `recipe`")
    names = [each.get("name") for each in given]
    if not all(isinstance(name, str) and name.isidentifier() for name in names) or len(set(names)) < len(names):
        raise ConfigError(f"{path}: every stage needs a `name` of its own, of letters, digits and underscores")
    home = (shared.get("run") or {}).get("dir")
    if not isinstance(home, str):
        raise ConfigError(f"{path}: run.dir, the folder of all stages, is missing")
    own = {name: [each.removeprefix(f"{name}.") for each in overrides if each.startswith(f"{name}.")] for name in names}
    common = [each for each in overrides if each.partition(".")[0] not in names]
    if moved := [each for each in common if each.startswith("run.dir=")]:
        home = moved[-1].partition("=")[2]
        common = [each for each in common if not each.startswith("run.dir=")]
    home = in_home(home)
    if "://" in home:
        raise ConfigError(f"{path}: run.dir={home}: stages read each other's exports in a local or mounted folder")
    stages: list[Stage] = []
    for each in given:
        name = each["name"]
        parts = {key: value for key, value in each.items() if key != "name"}
        base = shared
        if stages:
            model = {key: value for key, value in (shared.get("model") or {}).items() if key not in _ORIGIN}
            base = shared | {"model": {**model, "path": str(stages[-1].export)}}
            common = [change for change in common if not change.startswith(_OF_FIRST)]
        folder = Path(home) / name
        tree = _merged_one_level(base, parts) | {"run": {**(shared.get("run") or {}), "dir": str(folder)}}
        config = parse_config(deepcopy(tree), f"{path}, stage {name}", [*common, *own[name]])
        if stages:
            _check_start(config, stages, f"{path}, stage {name}", lora=(parts.get("model") or {}).get("lora"))
        stages.append(Stage(name, config, folder))
    return stages


def _check_start(config: RunConfig, before: Sequence[Stage], where: str, *, lora: Any) -> None:
    """Raise ConfigError for a stage that would read the export before it as something else than it is. `lora`: the
    stage's own section."""
    last = before[-1]
    if config.model.path != str(last.export):
        return
    if config.model.lora and config.model.lora.path and not lora:
        raise ConfigError(
            f"{where}: model.lora.path would be added to the export of stage {last.name} a second time: give `lora` in "
            f"the `model` of stage {before[0].name} instead"
        )
    if last.config.recipe == "reward" and config.recipe != "reward":
        models = [stage for stage in before if stage.config.recipe != "reward"]
        start = str(models[-1].export) if models else "the checkpoint to start from"
        raise ConfigError(
            f"{where}: stage {last.name} exports a reward model, from which recipe {config.recipe} cannot start: give "
            f"the stage its own model.path, such as {start}"
        )


def _merged_one_level(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of `other` are merged into those of `base`, one level deep; lists and other values replace."""
    merged = dict(base)
    for key, value in other.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged
