"""Runs on several processes: exhausted data, on some before others, a signal to one of them, and a kill."""

import json
import random
import shutil
import signal
from pathlib import Path

import commands
import pytest
import yaml
from recipe_runs import killed_copy

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.config import load_config
from jaxtrain.recipes import sft
from jaxtrain.session.record import read_metrics

EVERY_STEP = ("train.epochs=2", "checkpoint.every=1")
ROW_ON_ALL = ("train.epochs=1", "mesh.context=4", "checkpoint.every=2")
# The 27 rows of an epoch end within step 4: a run is killed before it, or after it.
KILLED_AFTER = random.choice([3, 4])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """27 rows without packing for batches of 8 in 8 shards: some hosts have four batches an epoch, others three."""
    folder = tmp_path_factory.mktemp("hosts")
    write_byte_tokenizer(folder / "tokenizer")
    rows = [{"prompt": f"What is {n}?", "completion": "x" * (n % 7 + 1)} for n in range(27)]
    lines = [json.dumps(row) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines))
    lines[15] = "nonsense"  # of shard 7, which the last host reads
    (folder / "broken.jsonl").write_text("\n".join(lines))
    config = {
        "recipe": "sft",
        "run": {"dir": str(folder / "run")},
        "model": {"config": commands.MODEL, "tokenizer": str(folder / "tokenizer"), "compute_dtype": "float32"},
        "data": {"train": {"path": str(folder / "train.jsonl")}, "max_length": 64, "packing": False},
        "train": {"batch_size": 8, "microbatches": 2},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"},
        "checkpoint": {"every": 1000},
        "log": {"every": 1, "to": []},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    return folder


def alone(place: Path, name: str, *overrides: str, **options) -> list[dict]:
    """The log of a run on one host, in this process; its eight devices hold the rows in four parts, as the jobs' do."""
    mesh = "mesh={preset: fsdp_tensor, tensor: 2}"
    sft.run(load_config(place / "sft.yaml", [f"run.dir={place / name}", mesh, *overrides]), **options)
    return read_metrics(place / name)


@pytest.fixture(scope="module")
def one(place) -> dict[int, list[dict]]:
    """The logs of one host, by epochs."""
    return {epochs: alone(place, f"1-{epochs}", f"train.epochs={epochs}") for epochs in (1, 2)}


def job(place: Path, count: int, runs: dict[str, tuple[str, ...]]) -> commands.Job:
    """Runs by name, with their overrides."""
    file = str(place / "sft.yaml")
    return commands.Job(
        place, count, [["train", file, f"run.dir={place / name}", *more] for name, more in runs.items()], devices=4
    )


@pytest.fixture(scope="module")
def two(place) -> list[list[str]]:
    """What two hosts print: of three runs, and of one that a signal to the second host ends. Of "row" all devices, and
    thus both hosts, hold parts of the same rows."""
    runs = {"2-1": ("train.epochs=1",), "2-2": (*EVERY_STEP, "checkpoint.keep=10"), "row": ROW_ON_ALL}
    runs["signal"] = ("train.steps=100000",)
    started, log = job(place, 2, runs), place / "signal" / "metrics.jsonl"
    started.wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 3)
    started.processes[1].send_signal(signal.SIGUSR1)
    return started.finish(128 + signal.SIGUSR1)


@pytest.fixture(scope="module")
def four(place, two) -> list[list[str]]:
    """What four hosts print: of a run, of two that go on where two hosts were killed, and of one with broken data."""
    started, checkpoints = job(place, 2, {"killed": EVERY_STEP}), place / "killed" / "checkpoints"
    started.wait_until(lambda: (checkpoints / str(KILLED_AFTER)).is_dir())
    first = KILLED_AFTER - 3
    started.processes[first].kill()
    assert started.processes[1 - first].wait(60) == 137  # which does not wait for the one that was killed
    printed = started.printed()[0][1 - first]
    assert f"process {first} on" in printed and "so all processes of the job end: it was killed" in printed
    killed_copy(place / "2-2", place / "cut", 7 - KILLED_AFTER)
    broken = (f"data.train.path={place / 'broken.jsonl'}", "data.shuffle=false", "train.steps=100")
    runs = {"4-1": ("train.epochs=1",), "killed": EVERY_STEP, "cut": EVERY_STEP, "broken": broken}
    return job(place, 4, runs).finish(2)


@pytest.mark.parametrize(("count", "epochs"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_hosts_whose_data_end_at_different_steps_end_together(place, one, two, four, count, epochs):
    name, steps = f"{count}-{epochs}", 3 * epochs + 1
    if count > 1:
        printed = two[epochs - 1] if count == 2 else four[0]
        assert f"trained {steps} of {steps} steps, {epochs}.00 epochs, {27 * epochs} examples" in printed[0]
    assert (place / name / "checkpoints" / str(steps)).is_dir()
    lines, expected = read_metrics(place / name), one[epochs]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    # Half of the last batch's rows are padding, and with microbatches whole microbatches of a host are.
    assert all(line["loss"] > 0 and line["skipped_steps"] == 0 for line in lines)
    assert [line["num_tokens"] for line in lines] == [line["num_tokens"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


def test_a_row_on_two_hosts_is_read_by_both_and_counted_once(place, one, two):
    lines = read_metrics(place / "row")
    for name in ("num_tokens", "epoch", "data/examples", "packing_density"):
        assert [line[name] for line in lines] == [line[name] for line in one[1]], name
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in one[1]], rel=1e-4)
    assert "27 examples" in two[2][0]


def test_two_hosts_resume_a_run_with_exhausted_data_from_one_host(place, two):
    """The data of some hosts was exhausted; with another epoch they continue."""
    shutil.copytree(place / "2-1", place / "on")
    with pytest.raises(ValueError, match=r"train\.epochs: 1\.0 -> 2\.0"):
        alone(place, "on", "train.epochs=2")
    lines = alone(place, "on", "train.epochs=2", allow_change=["train.epochs"])
    # At the end of the first epoch five shards were padded, so that three rows are left at the end of the second.
    assert [line["epoch"] for line in lines[3:]] == pytest.approx([1, 35 / 27, 43 / 27, 51 / 27])


def test_a_signal_to_one_host_stops_both_after_the_same_step(place, two):
    last = read_metrics(place / "signal")[-1]["step"]
    assert (place / "signal" / "checkpoints" / str(last)).is_dir()


def test_an_error_in_the_data_of_one_host_ends_all(four):
    printed = four[-1]
    assert any("broken.jsonl:16: broken JSON" in output for output in printed)
    assert "process 3 on" in printed[0] and "broken.jsonl:16: broken JSON" in printed[0]
    assert not any("Traceback" in output for output in printed)


@pytest.mark.parametrize("name", ["killed", "cut"])
def test_killed_at_the_boundary_of_an_epoch_and_resumed_on_other_hosts(place, one, four, name):
    assert sorted(path.name for path in (place / name / "checkpoints").iterdir()) == ["6", "7"]
    names = ("step", "epoch", "num_tokens", "learning_rate", "data/examples")
    lines, expected = read_metrics(place / name), one[2]
    assert [[line[name] for name in names] for line in lines] == [[line[name] for name in names] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
