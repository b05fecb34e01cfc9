"""`jaxtrain train` in a process of its own, as a user starts it and a scheduler ends it."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    """All processes of a folder share their compiled programs."""
    environment = (
        os.environ
        | environment
        | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {os.environ['JAXTRAIN_TEST_XLA_FLAGS']}",
            "JAX_COMPILATION_CACHE_DIR": str(config.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    )
    command = [sys.executable, "-m", "jaxtrain.cli", "train", str(config), *overrides]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train(config: Path, *overrides: str, devices: int = 8) -> str:
    process = start(config, *overrides, devices=devices)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def interrupt(config: Path, run: Path, how: signal.Signals, *overrides: str, lines: range, devices: int = 8) -> int:
    """Start a run, end it by a signal at a random moment after a random one of its `lines`; return the exit code."""
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
