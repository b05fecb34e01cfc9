"""Processes on this machine: restarted after a failure, ended together, and stopped by signals."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import commands
import pytest
import yaml
from launch_stubs import path_with, write_config, write_stub
from launched_job import worker_of

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.launch import local
from jaxtrain.launch.job import make_job
from jaxtrain.launch.local import LocalBackend


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script instead of `jaxtrain train`; it finds `rank`, `attempt` and the folder `home`."""
    config = write_config(tmp_path)
    monkeypatch.setattr(local, "_SETTLE_SECONDS", 0.2)
    monkeypatch.setattr(local, "_GRACE_SECONDS", 0.3)

    def submit(script: str, nodes: int = 2, retries: int = 3) -> int:
        head = f"""
import os, pathlib, signal, sys, time
home, rank = pathlib.Path({str(tmp_path)!r}), os.environ.get("JAX_PROCESS_ID", "0")
attempt = len(list(home.glob(f"started-{{rank}}-*")))
(home / f"started-{{rank}}-{{attempt}}").write_text(os.environ.get("JAX_COORDINATOR_ADDRESS", ""))
"""
        monkeypatch.setattr(local, "_command", lambda job: [sys.executable, "-c", head + script])
        return LocalBackend().submit(make_job(config, [], nodes=nodes, retries=retries, name=None))

    return submit


def attempts(folder: Path, rank: int = 0) -> list[str]:
    """The coordinator's address of each attempt."""
    return [path.read_text() for path in sorted(folder.glob(f"started-{rank}-*"))]


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_failure_is_restarted_on_another_port(run, tmp_path, nodes):
    assert run("sys.exit(1 if attempt < 2 else 0)", nodes) == 0
    addresses = attempts(tmp_path)
    assert len(addresses) == 3
    if nodes == 2:
        assert attempts(tmp_path, 1) == addresses
        assert len(set(addresses)) == 3


def test_restarts_are_bounded_and_the_first_failure_gives_the_exit_code(run, tmp_path):
    script = "time.sleep(0.1) if rank == '0' else None; sys.exit(5 if rank == '0' else 7)"
    assert run(script, retries=1) == 7
    assert len(attempts(tmp_path)) == 2


@pytest.mark.parametrize("code", [2, 143])
def test_an_error_of_the_users_and_a_stop_are_not_restarted(run, tmp_path, code):
    assert run(f"sys.exit({code})") == code
    assert len(attempts(tmp_path)) == 1


def test_an_error_of_the_users_is_the_cause_although_another_process_fails_first(run, tmp_path):
    assert run("time.sleep(0.1 * int(rank)); sys.exit(134 if rank == '0' else 2)") == 2
    assert len(attempts(tmp_path)) == 1


@pytest.mark.parametrize("handler", ["SIG_DFL", "SIG_IGN"])
def test_when_one_process_fails_the_others_are_ended(run, tmp_path, capfd, handler):
    script = f"""
signal.signal(signal.SIGTERM, signal.{handler})
if rank == "1":
    time.sleep(0.3)
    print("no memory left")
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    start = time.monotonic()
    assert run(script, nodes=3, retries=0) == 137
    assert time.monotonic() - start < 10
    assert "[1] no memory left\n" in capfd.readouterr().err  # the output of process 0 is always shown, of others then


def test_what_a_process_leaves_behind_is_ended(run, tmp_path):
    run("import subprocess; p = subprocess.Popen(['sleep', '60']); (home / 'child').write_text(str(p.pid))", nodes=1)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_signals_reach_every_process_and_end_the_restarts(run, tmp_path):
    script = """
def save(number, frame):
    (home / f"saved-{rank}").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
(home / f"ready-{rank}").touch()
time.sleep(60)
"""

    def stop() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    assert run(script) == 143
    assert len(list(tmp_path.glob("saved-*"))) == 2 and len(attempts(tmp_path)) == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_gpus_are_shared_equally(tmp_path, monkeypatch):
    job = make_job(write_config(tmp_path), [], nodes=2, retries=0, name=None)
    write_stub(tmp_path / "bin", "nvidia-smi", "for i in 0 1 2 3; do echo GPU $i: NVIDIA H100; done")
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin"))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert re.findall(r"JAX_LOCAL_DEVICE_IDS=(\S+)", LocalBackend().render(job)) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    with pytest.raises(ValueError, match="cannot share 3 GPUs"):
        LocalBackend().render(job)
    assert "DEVICE_IDS" not in LocalBackend(env={"JAX_PLATFORMS": "cpu"}).render(job)


def test_a_killed_process_does_not_end_a_run(tmp_path):
    """`jaxtrain launch` trains in two processes; one is killed, and both continue from the last checkpoint."""
    write_byte_tokenizer(tmp_path / "tokenizer")
    rows = [{"prompt": f"What is {n}?", "completion": "x" * (n % 7 + 1)} for n in range(64)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, steps = tmp_path / "run", 60
    config = {
        "recipe": "sft",
        "run": {"dir": str(run)},
        "model": {"config": commands.MODEL, "tokenizer": str(tmp_path / "tokenizer"), "compute_dtype": "float32"},
        "data": {"train": {"path": str(tmp_path / "train.jsonl")}, "max_length": 64, "packing": False},
        "train": {"batch_size": 8, "steps": steps},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "schedule": "constant"},
        "checkpoint": {"every": 10},
        "log": {"every": 1, "to": []},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    flags = f"--xla_force_host_platform_device_count=1 {os.environ['JAXTRAIN_TEST_XLA_FLAGS']}"
    environ = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-m", "jaxtrain.cli", "launch", str(tmp_path / "sft.yaml"), "--nodes", "2"]
    launched = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    while not list((run / "checkpoints").glob("[0-9]*")):
        assert time.monotonic() < deadline and launched.poll() is None
        time.sleep(0.02)
    worker = worker_of(launched.pid, rank=1)
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    output, _ = launched.communicate(timeout=300)
    assert launched.returncode == 0, output
    assert "process 1 of 2: exit code 137 (SIGKILL)" in output
    assert "starting again from the last checkpoint: restart 1 of 3" in output
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, steps + 1))
