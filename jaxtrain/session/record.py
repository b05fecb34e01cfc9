"""What a folder records of its run: the config that it began with, changes since, and what the checkpoints hold."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from jaxtrain.config import ConfigError, RunConfig, load_config, parse_config
from jaxtrain.session.inputs import Fingerprint
from jaxtrain.train.checkpoint import Checkpoints

CONFIG = "config.yaml"  # as the run began; written once
INPUTS = "inputs.json"  # fingerprints of the files that it began with
CHANGES = "config_changes.jsonl"  # permitted changes since, each with its step and the whole config after it
FINISHED = "finished.json"  # after which step the run ended by itself
CHECKPOINTS = "checkpoints"
QUICKSTART_MARK = ".made-by-quickstart"  # the quickstart's: which files here it made and may replace

# Everything that a run writes into its folder, besides the lock.
RUN_FILES = (
    *(CONFIG, INPUTS, CHANGES, FINISHED, CHECKPOINTS),
    *("metrics.jsonl", "tensorboard", "inspection", "experience", "trajectories"),
)


class SavedRun(NamedTuple):
    """What a checkpoint says of its run."""

    config: RunConfig
    inputs: dict[str, Fingerprint]  # of the model's files, by config key
    step: int | None  # None: there is no checkpoint yet
    tokenizer: str | None = None  # its fingerprint


def read_saved_run(folder: Path, step: int | None = None) -> SavedRun:
    """The config in the checkpoint of `step` (default: the newest), or the folder's where there is no checkpoint.

    Where a checkpoint was written before configs could be read back from it, the folder's is used, with a warning.
    Raises ValueError where the folder is none of a run or has no checkpoint of `step`.
    """
    with Checkpoints(str(folder / CHECKPOINTS), 1, 1) as checkpoints:
        found = checkpoints.read_meta(step)
    if found is None:
        return SavedRun(effective_config(folder), {}, None)
    step, meta = found
    if "config" not in meta:
        problem = "it holds none"
    else:
        try:
            config = parse_config(meta["config"], f"checkpoint {step}")
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
    """The config that the run in `folder` began with, with the changes recorded since.

    Raises ValueError where the folder is none of a run.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no folder of a run: it holds no {CONFIG}")
    changes = recorded_changes(folder)
    return parse_config(changes[-1]["config"], str(folder / CHANGES)) if changes else load_config(folder / CONFIG)


def effective_inputs(folder: Path) -> dict[str, Fingerprint]:
    """Fingerprints of the files that the run in `folder` last trained on; none of a run that recorded none."""
    changes = recorded_changes(folder)
    if changes:
        return changes[-1]["inputs"]
    return json.loads((folder / INPUTS).read_text()) if (folder / INPUTS).exists() else {}


def recorded_changes(folder: Path) -> list[dict[str, Any]]:
    """The permitted changes of the config, in order."""
    file = folder / CHANGES
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def drop_mark_of_another_process(folder: Path) -> None:
    """Training into a folder that another process's quickstart made: from now on its files are the user's."""
    mark = folder / QUICKSTART_MARK
    if mark.is_file() and json.loads(mark.read_text()).get("process") != os.getpid():
        mark.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it has its old content or the new one, whenever the process or the machine stops."""
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
