"""The model card of an exported run: README.md with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from jaxtrain.hub import is_hub_name
from jaxtrain.observe.history import STD_ERROR, read_series
from jaxtrain.observe.run_files import recorded_config, recorded_sources

_TASKS = {"reward": "text-classification"}
_ABSOLUTE = re.compile(r"(/|[A-Za-z]:\\)\S*[/\\]")


def model_card(run: Path, step: int, *, adapter: bool) -> str:
    """The card of the checkpoint of `step` of the run in a folder; `adapter`: the export is a PEFT folder.

    It names the base model, the data, the metrics of that step and the config. Of absolute paths only the last part is
    written, since a card is usually published.
    """
    config = _without_folders(recorded_config(run))
    recipe, base = config["recipe"], config.get("model", {}).get("path")
    metadata: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    if base and is_hub_name(base):
        metadata["base_model"] = base.partition("@")[0]
    if data := list(
        dict.fromkeys(path.removeprefix("hf:") for _, path in recorded_sources(config) if path.startswith("hf:"))
    ):
        metadata["datasets"] = [name.partition("@")[0] for name in data]
    metadata |= {"pipeline_tag": _TASKS.get(recipe, "text-generation"), "tags": ["jaxtrain", recipe]}
    begin = f"Trained from {base}" if base else "Trained from random weights"
    parts = [
        f"---\n{_yaml(metadata)}---",
        f"# {Path(config.get('run', {}).get('dir', run)).name}",
        f"{begin} by jaxtrain {version('jaxtrain')}, recipe `{recipe}`, {step} steps.",
    ]
    if sources := [f"- {use}: {path}" for use, path in recorded_sources(config)]:
        parts += ["## Data", "\n".join(sources)]
    if metrics := list(_metrics(run, step)):
        parts += ["## Metrics", "\n".join(["| metric | value | step |", "|---|---|---|", *metrics])]
    parts += ["## Config", f"```yaml\n{_yaml(config)}```"]
    return "\n\n".join(parts) + "\n"


def _metrics(run: Path, step: int) -> Iterator[str]:
    """Lines of the table: the last values up to `step` of the loss, the reward and all evaluations."""
    series = read_series(run)
    for name, values in series.items():
        evaluated = name.startswith("eval_") and not name.endswith(STD_ERROR)
        until = [number for number, at in enumerate(values.steps) if at <= step]
        if until and (evaluated or name in ("loss", "reward")):
            error = series.get(name + STD_ERROR)
            spread = dict(zip(error.steps, error.values, strict=True)).get(values.steps[until[-1]]) if error else None
            text = f"{values.values[until[-1]]:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
            yield f"| {name} | {text} | {values.steps[until[-1]]} |"


def _without_folders(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_folders(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_folders(value) for value in tree]
    return _ABSOLUTE.sub("", tree, count=1) if isinstance(tree, str) and _ABSOLUTE.match(tree) else tree


def _yaml(tree: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
