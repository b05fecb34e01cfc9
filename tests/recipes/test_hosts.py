"""Runs on several processes: data that end, on some of them before others, and a signal that reaches one."""

import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import commands
import pytest
import yaml

from converters.tokenizer import write_byte_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """27 rows without packing for batches of 8 in 8 shards: some hosts have four batches an epoch, others three."""
    folder = tmp_path_factory.mktemp("hosts")
    write_byte_tokenizer(folder / "tokenizer")
    rows = [{"prompt": f"What is {n}?", "completion": "x" * (n % 7 + 1)} for n in range(27)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "recipe": "sft",
        "run": {"dir": str(folder / "run")},
        "model": {"config": commands.MODEL, "tokenizer": str(folder / "tokenizer"), "compute_dtype": "float32"},
        "data": {"train": {"path": str(folder / "train.jsonl")}, "max_length": 64, "packing": False},
        "train": {"steps": 100, "batch_size": 8, "microbatches": 2},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"},
        "checkpoint": {"every": 1000},
        "log": {"every": 1, "tensorboard": False},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    return folder


def start(place: Path, count: int, *overrides: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)} if count > 1 else {}
    ranks = [{"JAX_PROCESS_ID": str(rank)} if count > 1 else {} for rank in range(count)]
    command = (place / "sft.yaml", *overrides)
    return [commands.start(*command, devices=4 // count, **cluster, **rank) for rank in ranks]


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), outputs
    return outputs


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("epochs", [1, 2])
def test_hosts_whose_data_end_at_different_steps_end_together(place, epochs):
    losses = {}
    for count in (1, 2, 4):
        run = place / f"{count}-{epochs}"
        outputs = finish(start(place, count, f"run.dir={run}", f"data.train.epochs={epochs}"))
        assert all(f"is exhausted after step {3 * epochs + 1} of 100" in output for output in outputs)
        assert (run / "checkpoints" / str(3 * epochs + 1)).is_dir()
        lines = logged(run)
        assert [line["step"] for line in lines] == list(range(1, 3 * epochs + 2))
        losses[count] = [(line["loss"], line["num_tokens"]) for line in lines]
        # Half of the last batch's rows are padding, and with microbatches whole microbatches of a host are.
        assert all(
            loss > 0 and line["skipped_steps"] == 0 for (loss, _), line in zip(losses[count], lines, strict=True)
        )
    for count in (2, 4):
        assert [tokens for _, tokens in losses[count]] == [tokens for _, tokens in losses[1]]
        assert [loss for loss, _ in losses[count]] == pytest.approx([loss for loss, _ in losses[1]], rel=1e-4)


def test_a_run_on_two_hosts_goes_on_from_the_end_of_its_data_on_one(place):
    """Its data state has hosts that were exhausted: with another epoch they go on."""
    run = place / "on"
    finish(start(place, 2, f"run.dir={run}", "data.train.epochs=1", "train.steps=3"))
    finish(start(place, 1, f"run.dir={run}", "data.train.epochs=1", "train.steps=100"))
    assert [line["step"] for line in logged(run)] == [1, 2, 3, 4]


def test_a_signal_to_one_host_stops_both_after_the_same_step(place):
    run = place / "signal"
    processes = start(place, 2, f"run.dir={run}", "train.steps=100000", "log.every=1")
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or len(logged(run)) < 3:
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGUSR1)
    finish(processes, 138)
    last = logged(run)[-1]["step"]
    assert (run / "checkpoints" / str(last)).is_dir()


def test_an_error_in_the_data_of_one_host_ends_both(place):
    lines = (place / "train.jsonl").read_text().splitlines()
    lines[15] = "nonsense"  # of shard 7, which the second host reads
    (place / "broken.jsonl").write_text("\n".join(lines))
    overrides = (f"run.dir={place / 'broken'}", f"data.train.path={place / 'broken.jsonl'}", "data.shuffle=false")
    outputs = finish(start(place, 2, *overrides), 2)
    assert any("broken.jsonl:16: broken JSON" in output for output in outputs)
    assert any("another process cannot go on" in output for output in outputs)
    assert not any("Traceback" in output for output in outputs)
