"""Trackers get the metrics of a run, and resume their own run with it."""

import json
import sys
from types import SimpleNamespace

import pytest

from jaxtrain.observe.trackers import SafeTracker, check_trackers, open_trackers

CONFIG = {"recipe": "sft", "train": {"steps": 3}}


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ValueError, match=r"log.to names mlflow.*pip install 'jaxtrain\[mlflow\]'"):
        check_trackers(["tensorboard", "mlflow"])
    check_trackers(["tensorboard"])


def test_a_resumed_run_has_the_trackers_id_of_before(tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(
        init=lambda project, **given: calls.append((project, given)),
        log=lambda metrics, step: calls.append((step, metrics)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for step in (1, 2):
        (tracker,) = open_trackers(["tensorboard", "trackio"], tmp_path, CONFIG)
        tracker.log(step, {"loss": 0.5})
        tracker.close()
    (_, first), logged, _, (_, second), *_ = calls
    assert first == second and first["resume"] == "allow" and first["config"] == CONFIG
    assert logged == (1, {"loss": 0.5})
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"trackio": first["name"]}


def test_a_tracker_that_fails_is_warned_of_once_and_the_run_goes_on(caplog):
    def fail(*_):
        raise RuntimeError("no connection")

    tracker = SafeTracker("wandb", SimpleNamespace(run_id="a", log=fail, close=fail))
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert caplog.text.count("no connection") == 1


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = set()
    for step in (1, 2):
        (tracker,) = open_trackers(["wandb"], tmp_path, CONFIG)
        tracker.log(step, {"loss": 0.5})
        tracker.close()
        ids.add(tracker.run_id)
    (run_id,) = ids
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))) in (1, 2)


def test_mlflow_in_a_local_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    for step in (1, 2):
        (tracker,) = open_trackers(["mlflow"], tmp_path, CONFIG)
        tracker.log(step, {"eval_pass@4": 0.5 * step})
        tracker.close()
    history = mlflow.MlflowClient().get_metric_history(tracker.run_id, "eval_pass_at_4")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 1.0)]
    assert mlflow.get_run(tracker.run_id).info.status == "FINISHED"
