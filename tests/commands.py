"""Starts and signals `jaxtrain` in separate processes, also the processes of a job."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from in_turn import END

MODEL = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
"""The smallest model that is trained like any other."""


def start(config: Path, *overrides: str, devices: int = 8, **environment: str) -> subprocess.Popen:
    command = ["-m", "jaxtrain.cli", "train", str(config), *overrides]
    return _start(command, devices, subprocess.PIPE, environment)


def _start(command: list[str], devices: int, stdout: Any, environment: dict[str, str]) -> Any:
    flags = f"--xla_force_host_platform_device_count={devices} {os.environ['JAXTRAIN_TEST_XLA_FLAGS']}"
    environment = os.environ | environment | {"XLA_FLAGS": flags}
    command = [sys.executable, *command]
    return subprocess.Popen(command, env=environment, stdout=stdout, stderr=subprocess.STDOUT, text=True)


class Job:
    """Processes that run the same commands of `jaxtrain` together, one after the other, on `devices` in all.

    A command that fails is the last one. To start a process and to join the others takes longer than a tiny run.
    """

    def __init__(self, folder: Path, processes: int, commands: Sequence[Sequence[str]], devices: int = 8):
        """`folder`: of what the processes print."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        self._logs = [folder / f"job-{address.rpartition(':')[2]}-{rank}.log" for rank in range(processes)]
        program = [str(Path(__file__).with_name("in_turn.py")), json.dumps(commands)]
        self.processes = []
        for rank, file in enumerate(self._logs):
            names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
            cluster = dict(zip(names, (address, str(processes), str(rank)), strict=True)) if processes > 1 else {}
            with file.open("w") as stdout:  # a pipe that nobody reads would be full some day
                self.processes.append(_start(program, devices // processes, stdout, cluster))

    def printed(self) -> list[list[str]]:
        """What the processes have printed so far: for each command, by process."""
        parts = [file.read_text().split(END) for file in self._logs]
        return list(map(list, zip(*parts, strict=False)))

    def wait_until(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or self.processes[0].poll() is not None:
                self.kill()
                raise AssertionError(self.printed())
            time.sleep(0.01)

    def finish(self, code: int = 0) -> list[list[str]]:
        """Wait for the processes, which end with `code`, and return what they have `printed`."""
        for process in self.processes:
            process.wait(600)
        assert [process.returncode for process in self.processes] == [code] * len(self.processes), self.printed()
        return self.printed()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def train(config: Path, *overrides: str, devices: int = 8) -> str:
    process = start(config, *overrides, devices=devices)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def interrupt(config: Path, run: Path, how: signal.Signals, *overrides: str, lines: range, devices: int = 8) -> int:
    """Start a run and signal it at a random time after a random one of its `lines`; return the exit code."""
    process = start(config, f"run.dir={run}", *overrides, devices=devices)
    chosen = random.Random(os.getpid())
    at, seen, since, step = chosen.choice(lines), 0, time.monotonic(), float("inf")
    while process.poll() is None:
        count = _lines(run / "metrics.jsonl")
        if count != seen:
            step = min(step, time.monotonic() - since)  # the shortest so far, so that the run does not end meanwhile
            seen, since = count, time.monotonic()
        if count >= at:
            time.sleep(chosen.random() * step)
            process.send_signal(how)
            break
        time.sleep(0.005)
    process.communicate(timeout=600)
    return process.returncode


def _lines(metrics: Path) -> int:
    return sum(line.startswith('{"step"') for line in metrics.read_text().splitlines()) if metrics.exists() else 0
