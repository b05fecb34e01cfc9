import json
import subprocess
import sys
import time

import pytest

from jaxtrain.observe.heartbeat import Heartbeat
from jaxtrain.observe.status import read_status, status_text

FACTS = {
    "step": 30,
    "of_steps": 100,
    "seconds_per_step": 2.0,
    "activity": "steps",
    "seconds": {"steps": 60.0, "compiling": 15.0, "saving": 0.0, "lost": 25.0},
}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("recipe: sft\n")
    lines = [{"step": 20, "eval_loss": 1.5}, {"step": 30, "loss": 0.25, "tokens_per_second": 1234.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31, "lo')
    for step in ("10", "20", "30.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    return tmp_path


def beat(run, state="running", age=0.0, process=0, **further):
    Heartbeat(run, process, 2, lambda: FACTS).stop(state, time=time.time() - age, **further)


def test_a_running_run(run):
    beat(run)
    status = read_status(run)
    assert (status["state"], status["recipe"], status["step"], status["of_steps"]) == ("running", "sft", 30, 100)
    assert status["eta"] == 140 and status["tokens_per_second"] == 1234.5 and status["goodput"] == 0.6
    assert status["checkpoint"]["step"] == 20 and status["evaluations"] == {"step": 20, "eval_loss": 1.5}
    text = status_text(json.loads(json.dumps(status)))
    for words in (
        "running (steps)",
        "30 of 100",
        "1,234 tokens/s",
        "0:02:20",
        "loss 0.25",
        "60.0% of 0:01:40",
        "25.0%  lost",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("state", "age", "expected"),
    [("running", 3600, "dead"), ("stopped", 3600, "stopped"), ("finished", 1, "finished"), ("failed", 1, "failed")],
)
def test_states(run, state, age, expected):
    beat(run, state, age)
    status = read_status(run)
    assert status["state"] == expected and status["eta"] is None
    assert status["heartbeat_age"] == pytest.approx(age, abs=5)


def test_a_run_without_heartbeats(run):
    assert read_status(run)["state"] == "unknown"
    (run / "metrics.jsonl").unlink()
    assert read_status(run)["state"] == "not started"
    (run / "finished.json").write_text('{"step": 3}')
    assert read_status(run)["state"] == "finished"


def test_a_run_that_loads_is_starting(run):
    (run / ".lock").write_text("")  # released
    beat(run, age=3600)
    assert read_status(run)["state"] == "dead"
    (run / ".lock").write_text('{"pid": 1}')
    assert read_status(run)["state"] == "starting"
    beat(run)
    assert read_status(run)["state"] == "running"


def test_a_dead_process_is_named(run):
    beat(run)
    beat(run, age=500, process=1)
    assert [each["state"] for each in read_status(run)["processes"]] == ["running", "dead"]
    assert "1 on " in status_text(read_status(run))


def test_a_folder_of_runs_is_named_as_such(run):
    (run / "sft").mkdir()
    (run / "config.yaml").rename(run / "sft" / "config.yaml")
    with pytest.raises(ValueError, match=r"is not the folder of a run: it has no config\.yaml; those in it are: sft"):
        read_status(run)


def test_the_status_is_read_without_jax(run):
    code = (
        "import sys; from pathlib import Path; from jaxtrain.observe.status import read_status; "
        f"read_status(Path({str(run)!r})); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
