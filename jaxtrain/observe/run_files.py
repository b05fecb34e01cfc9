"""The names of what a run writes into its folder, and its config as it was written."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

CONFIG = "config.yaml"  # the initial config; written once
INPUTS = "inputs.json"  # fingerprints of the initial input files
CHANGES = "config_changes.jsonl"  # permitted changes, each with its step and the complete config after it
FINISHED = "finished.json"  # the step after which the run was complete
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
HEARTBEATS = "heartbeats"  # of every process, rewritten several times a minute
PROFILE = "profile"  # traces of steps
TRACKERS = "trackers.json"  # the ids of the run in each
LOGS = "logs"  # the messages of every process
REPORT = "report.html"
FIRST_ROWS = "first_rows.json"  # what the first batch trains on, for the report
TRAJECTORIES = "trajectories"  # samples of recipe rl
LOCK = ".lock"  # names the process that uses the folder
ORIGIN = ".url"  # in a local copy: the URL of the run's folder
QUICKSTART_MARK = ".made-by-quickstart"  # lists the files that the quickstart made here and may replace

# Everything that a run writes into its folder, except for the lock.
RUN_FILES = (
    *(CONFIG, INPUTS, CHANGES, FINISHED, CHECKPOINTS, METRICS, HEARTBEATS, LOGS, REPORT, FIRST_ROWS, TRACKERS),
    *(PROFILE, "tensorboard", "inspection", "experience", TRAJECTORIES),
)


def recorded_sources(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The paths of the data of a `recorded_config`, each after its use, train or eval."""
    for use in ("train", "eval"):
        section = config.get("data", {}).get(use)
        for source in section if isinstance(section, list) else [section] if section else []:
            yield use, str(source["path"])


def recorded_config(run: Path) -> dict[str, Any]:
    """The config of the run in a folder, with the permitted changes; not checked, so the files it names may be gone."""
    changes = run / CHANGES
    if changes.is_file() and (lines := changes.read_text(encoding="utf-8").splitlines()):
        return json.loads(lines[-1])["config"]
    return yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
