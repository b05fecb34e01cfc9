"""Signals to a run in a separate process: at start-up, during an evaluation, during a rollout with a slow reward."""

import json
import signal
import subprocess
import time
from pathlib import Path

import commands
import pytest
import yaml
from recipe_runs import rl_tree

SOON = 20.0  # seconds within which a process ends whose work would take a minute, on a busy machine


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    reward = {"function": f"{Path(__file__).parent / 'digits.py'}:slow_digits", "seconds": 100.0}
    rl = rl_tree(
        folder,
        data={"max_length": 64},
        checkpoint={"every": 1000},
        rl={"prompts": 2, "generations": 2, "rewards": [reward], "slots": 4},
    )
    shared = {key: rl[key] for key in ("run", "model", "data", "optimizer", "checkpoint", "log")}
    sft = shared | {"recipe": "sft", "train": {"steps": 1000, "batch_size": 2}}
    (folder / "rl.yaml").write_text(yaml.safe_dump(rl))
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft))
    return folder


def wait_until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def handles(process: subprocess.Popen) -> bool:
    """Whether a process has a handler for SIGUSR1."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


def end(process: subprocess.Popen, number: signal.Signals) -> str:
    start = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    assert time.monotonic() - start < SOON, output
    assert "Traceback" not in output
    return output


def logged(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("seconds", [0.0, 2.0], ids=["at once", "a little later"])
def test_during_start_up(place, seconds):
    """At the second signal it imports or compiles, depending on the machine."""
    run = place / f"start-{seconds}"
    process = commands.start(place / "sft.yaml", f"run.dir={run}", "checkpoint.every=1", devices=1)
    wait_until(lambda: handles(process), process)
    time.sleep(seconds)
    if not logged(run):
        assert "SIGHUP: stopped" in end(process, signal.SIGHUP)
    process.kill()
    process.communicate()


def test_during_an_evaluation(place):
    run, eval_file = place / "eval", place / "many.jsonl"
    eval_file.write_text((place / "eval.jsonl").read_text() * 3000)
    overrides = (f"run.dir={run}", f"data.eval.path={eval_file}", "eval.every=3", "data.packing=false")
    process = commands.start(place / "sft.yaml", *overrides, devices=1)
    wait_until(lambda: len(logged(run)) == 3, process)
    time.sleep(1.0)
    output = end(process, signal.SIGUSR1)
    assert "SIGUSR1: stopped after step 3, which was saved" in output
    assert (run / "checkpoints" / "3").is_dir()
    assert not any("eval_loss" in line for line in logged(run))


def stopped_run(place: Path, rewards: Path, staleness: int, number: signal.Signals) -> list[str]:
    """The arguments of a run in `rewards`/run that a signal has stopped while the reward of its third step was slow."""
    run = [str(slow_config(place, rewards, slow_from=3)), f"rl.placement.staleness={staleness}"]
    process = commands.start(Path(run[0]), run[1], devices=1)
    wait_until(lambda: (rewards / "waiting").exists() and len(logged(rewards / "run")) == 2, process)
    assert f"{number.name}: stopped after step 2, which was saved" in end(process, number)
    assert (rewards / "run" / "checkpoints" / "2").is_dir()
    (rewards / "slow_from").unlink()
    return run


def test_during_a_rollout_with_a_slow_reward(place, tmp_path):
    """The last completed step is saved, and the resumed run samples the same as an uninterrupted one."""
    on_policy = stopped_run(place, tmp_path / "on policy", 0, signal.SIGINT)
    ahead = stopped_run(place, tmp_path / "ahead of time", 1, signal.SIGTERM)
    whole = [str(slow_config(place, tmp_path / "whole", slow_from=100)), *on_policy[1:]]
    commands.Job(place, 1, [["train", *run] for run in (on_policy, ahead, whole)], devices=1).finish()
    for name in ("on policy", "ahead of time"):
        assert [line["step"] for line in logged(tmp_path / name / "run")] == [1, 2, 3, 4]
    # Ahead of time the weights that sample depend on the time that things take.
    for line, expected in zip(logged(tmp_path / "on policy" / "run"), logged(tmp_path / "whole" / "run"), strict=True):
        assert [line[name] for name in ("loss", "reward")] == [expected[name] for name in ("loss", "reward")]


def test_two_processes_during_a_rollout_with_slow_rewards(place, tmp_path):
    """Both wait for a reward of their own. The signal reaches one of them, and both save and end."""
    file, folder = slow_config(place, tmp_path / "two", slow_from=5), tmp_path / "two"
    job = commands.Job(place, 2, [["train", str(file)]], devices=2)
    job.wait_until(lambda: (folder / "waiting").exists() and len(logged(folder / "run")) == 2)
    start = time.monotonic()
    job.processes[1].send_signal(signal.SIGTERM)
    [printed] = job.finish(128 + signal.SIGTERM)
    assert time.monotonic() - start < SOON, printed
    assert "SIGTERM: stopped after step 2, which was saved" in printed[0]
    assert not any("Traceback" in output for output in printed)
    assert (folder / "run" / "checkpoints" / "2").is_dir()


def slow_config(place: Path, folder: Path, slow_from: int) -> Path:
    """A run in `folder`/run whose reward takes a minute from the given call on."""
    folder.mkdir()
    (folder / "slow_from").write_text(str(slow_from))
    config = yaml.safe_load((place / "rl.yaml").read_text())
    config["run"]["dir"] = str(folder / "run")
    config["rl"]["rewards"][0]["args"] = {"folder": str(folder)}
    file = place / f"{folder.name}.yaml"  # beside the compiled programs
    file.write_text(yaml.safe_dump(config))
    return file


def test_during_the_first_rollout_with_a_slow_reward(place, tmp_path):
    file = slow_config(place, tmp_path / "first", slow_from=1)
    process = commands.start(file, devices=1)
    wait_until(lambda: (tmp_path / "first" / "waiting").exists(), process)
    assert "SIGTERM: stopped before the first step" in end(process, signal.SIGTERM)
    assert not list((tmp_path / "first" / "run" / "checkpoints").glob("*"))
