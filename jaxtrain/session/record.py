"""The records of a run in its folder: the initial config, its changes, and the records in the checkpoints."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxtrain.config import ConfigError, RunConfig, load_config, parse_config
from jaxtrain.observe.run_files import CHANGES, CHECKPOINTS, CONFIG, INPUTS, METRICS, ORIGIN, QUICKSTART_MARK
from jaxtrain.session.inputs import Fingerprint
from jaxtrain.train.checkpoint import Checkpoints


def writes_checkpoints(url: str) -> bool:
    """Whether orbax writes checkpoints at a URL itself, from all hosts together."""
    return url.startswith("gs://")


def checkpoint_folder(folder: Path) -> str:
    """The folder of the checkpoints of the run in `folder`, or their URL if that is a copy of one at a URL."""
    url = (folder / ORIGIN).read_text() if (folder / ORIGIN).exists() else ""
    return f"{url}/{CHECKPOINTS}" if writes_checkpoints(url) else str(folder / CHECKPOINTS)


class SavedRun(NamedTuple):
    """The record of the run in a checkpoint."""

    config: RunConfig
    inputs: dict[str, Fingerprint]  # of the model's files, by config key
    step: int | None  # None: there is no checkpoint yet
    tokenizer: str | None = None  # its fingerprint


def parse_model(tree: dict[str, Any], origin: str) -> RunConfig:
    """The sections of a saved config that describe its model. The others, which may name files of the user that are not
    here, are left out, as are functions that return rows. Raises ConfigError."""
    needed = {section: tree[section] for section in ("run", "model", "mesh")}
    return parse_config({"recipe": "sft", **needed, "data": _without_functions(tree["data"])}, origin)


def _without_functions(data: Any) -> Any:
    """A saved section `data` without the keys of functions that return rows; each source still has a `path`."""
    if isinstance(data, list):
        return [_without_functions(each) for each in data]
    if not isinstance(data, dict):
        return data
    function = ("source", "args") if data.get("source") is not None else ()
    return {key: _without_functions(value) for key, value in data.items() if key not in function}


def best_step(folder: Path) -> int:
    """The step of the best evaluation of a run with `eval.best`, by its newest checkpoint. Raises ValueError."""
    with Checkpoints(checkpoint_folder(folder), 1, 1) as checkpoints:
        found = checkpoints.read_meta()
    step = found and (found[1].get("best") or {}).get("step")
    if step is None:
        raise ValueError(f"{folder} has no best checkpoint: the run needs eval.best, and an evaluation")
    return step


def read_saved_run(
    folder: Path, step: int | None = None, parse: Callable[[dict[str, Any], str], RunConfig] = parse_config
) -> SavedRun:
    """The record in the checkpoint of `step` (default: the newest), or the folder's config if there is no checkpoint.

    If the checkpoint's config is missing or cannot be read, the folder's is used, with a warning. Raises ValueError if
    the folder is not a run's, or has no checkpoint of `step`.
    """
    with Checkpoints(checkpoint_folder(folder), 1, 1) as checkpoints:
        found = checkpoints.read_meta(step)
    if found is None:
        return SavedRun(effective_config(folder), {}, None)
    step, meta = found
    if "config" not in meta:
        problem = "it holds none"
    else:
        try:
            config = parse(meta["config"], f"checkpoint {step}")
            return SavedRun(config, meta.get("inputs", {}), step, meta.get("tokenizer"))
        except ConfigError as error:
            problem = str(error)
    warnings.warn(
        f"{folder}: the config in the checkpoint of step {step} cannot be read, so {CONFIG} is used: {problem}",
        RuntimeWarning,
        stacklevel=2,
    )
    return SavedRun(effective_config(folder), meta.get("inputs", {}), step, meta.get("tokenizer"))


def effective_config(folder: Path) -> RunConfig:
    """The initial config of the run in `folder`, with the recorded changes. Raises ValueError if there is no run."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no {CONFIG}")
    changes = recorded_changes(folder)
    return parse_config(changes[-1]["config"], str(folder / CHANGES)) if changes else load_config(folder / CONFIG)


def effective_inputs(folder: Path) -> dict[str, Fingerprint]:
    """Fingerprints of the files that the run in `folder` last trained on; empty if it recorded none."""
    changes = recorded_changes(folder)
    if changes:
        return changes[-1]["inputs"]
    return json.loads((folder / INPUTS).read_text()) if (folder / INPUTS).exists() else {}


def recorded_changes(folder: Path) -> list[dict[str, Any]]:
    """The permitted changes of the config, in order."""
    file = folder / CHANGES
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def remove_quickstart_mark(folder: Path) -> None:
    """Remove the mark of another process's quickstart: once trained in, the folder belongs to the user."""
    mark = folder / QUICKSTART_MARK
    if mark.is_file() and json.loads(mark.read_text()).get("process") != os.getpid():
        mark.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Write a file such that it has either the old or the new content even if the process or the machine fails."""
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
