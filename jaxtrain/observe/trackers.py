"""Trackers of experiments that get the metrics of a run besides metrics.jsonl: Weights & Biases, MLflow, trackio.

Each resumes its own run when ours is resumed: its id is in `trackers.json` of the run's folder. Where a tracker writes
to, and whether it is offline, is set by its own variables, such as WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxtrain.observe.run_files import TRACKERS

log = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"  # which `MetricLog` writes itself
PROJECT = "jaxtrain"  # unless the tracker's own variable names another


class Tracker(Protocol):
    run_id: str  # of the tracker

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_trackers(names: Sequence[str], run: Path, config: Mapping[str, Any]) -> list[SafeTracker]:
    """The trackers `names` of the run in a folder, in whose files their ids are kept. `config` is shown with it.

    Raises ValueError for one whose package is missing.
    """
    file = run / TRACKERS
    ids = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    opened = []
    for name in _others(names):
        tracker = SafeTracker(name, _OPEN[name](_imported(name), run, config, ids.get(name)))
        ids[name] = tracker.run_id
        opened.append(tracker)
    if opened:
        file.write_text(json.dumps(ids, indent=1) + "\n", encoding="utf-8")
    return opened


class SafeTracker:
    """A tracker whose failures are warned of once, and do not end the run."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker, self._warned = name, tracker, False
        self.run_id = tracker.run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.log(step, metrics))

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever its client raises: the metrics are in metrics.jsonl too
            if not self._warned:
                log.warning("%s does not take the metrics, which metrics.jsonl has: %s", self._name, error)
            self._warned = True


class _Wandb:
    def __init__(self, wandb: Any, run: Path, config: Mapping[str, Any], run_id: str | None) -> None:
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.run_id = run_id or uuid.uuid4().hex[:12]
        options = {"project": project, "name": run.name, "dir": str(run), "config": dict(config)}
        self._run = wandb.init(id=self.run_id, resume="allow", **options)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, mlflow: Any, run: Path, config: Mapping[str, Any], run_id: str | None) -> None:
        self._mlflow, self._client = mlflow, mlflow.MlflowClient()
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            run_id = self._client.create_run(experiment, run_name=run.name).info.run_id
            self._client.log_dict(run_id, dict(config), "config.json")
        assert run_id is not None
        self.run_id = run_id
        self._client.update_run(run_id, status="RUNNING")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now, kind = int(time.time() * 1000), self._mlflow.entities.Metric
        # Its names may not have an @, as pass@k has.
        values = [kind(name.replace("@", "_at_"), value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=values)

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


class _Trackio:
    def __init__(self, trackio: Any, run: Path, config: Mapping[str, Any], run_id: str | None) -> None:
        self._trackio = trackio
        self.run_id = run_id or f"{run.name}-{uuid.uuid4().hex[:6]}"  # its runs are resumed by their names
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        trackio.init(project, name=self.run_id, config=dict(config), resume="allow", embed=False)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


_OPEN: dict[str, Callable[..., Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker whose package is missing."""
    for name in _others(names):
        _imported(name)


def _others(names: Sequence[str]) -> list[str]:
    return [name for name in names if name != TENSORBOARD]


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"log.to names {name}, which cannot be imported ({error}): pip install 'jaxtrain[{name}]'"
        ) from error
