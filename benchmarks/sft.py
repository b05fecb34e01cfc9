"""SFT training speed on a CPU: jaxtrain, a plain PyTorch loop, TRL's SFTTrainer, Tunix's PeftTrainer.

Usage: python benchmarks/sft.py [--rounds 7] [--steps 2] [--trl-python PYTHON] [--tunix-python PYTHON]

A Llama of 14.1 M parameters (32000 tokens, width 256, 6 layers, 8 heads and 4 kv heads of 32, mlp 1024, tied), batches
of 8 x 512 tokens, float32, AdamW, clipped gradients. Every implementation ("side") runs in a separate process. The
sides take turns in rounds; a ratio is the median over the rounds of a side's time relative to ours. TRL and Tunix may
be installed in other virtual environments; a side that is not installed is skipped. Writes its section of
benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from results import machine, write_section
from sft_sides import LENGTH, MARK, ROWS

GOALS = {"torch": 1.0, "trl": 2.0, "tunix": 1.7}
NAMES = {
    "jaxtrain": "jaxtrain",
    "torch": "PyTorch loop (transformers, sdpa, fused AdamW)",
    "trl": "TRL SFTTrainer",
    "tunix": "Tunix PeftTrainer",
}


class Side:
    """A process that runs a round on request."""

    def __init__(self, name: str, python: str, steps: int, script: str = "sft_sides.py", *more: str):
        command = [python, str(Path(__file__).with_name(script)), name, str(steps), *more]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def round(self) -> dict[str, float]:
        return self._ask("go")

    def end(self) -> float:
        """Peak resident memory in MB."""
        return self._ask("end")["peak_mb"]

    def _ask(self, line: str) -> dict[str, float]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        for answer in self.process.stdout:
            if answer.startswith(MARK):
                return json.loads(answer.removeprefix(MARK))
        raise SystemExit(f"{self.process.args} ended with code {self.process.wait()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has trl and torch")
    parser.add_argument("--tunix-python", default=sys.executable, help="an interpreter that has google-tunix")
    arguments = parser.parse_args()

    pythons = {"jaxtrain": sys.executable, "torch": sys.executable}
    pythons |= {"trl": arguments.trl_python, "tunix": arguments.tunix_python}
    skipped = [name for name, python in pythons.items() if not installed(python, name)]
    for name in skipped:
        print(f"{NAMES[name]} is not installed: skipped")
    sides = {name: Side(name, pythons[name], arguments.steps) for name in pythons if name not in skipped}

    for name, side in sides.items():
        print(f"{name}: compiled and warm after {side.round()['seconds']:.1f} s", flush=True)
    rounds = []
    for index in range(arguments.rounds):
        rounds.append({name: side.round() for name, side in sides.items()})
        speeds = {name: tokens_per_second(answer, arguments.steps) for name, answer in rounds[-1].items()}
        print(f"round {index + 1}: " + "  ".join(f"{n} {s:.0f} tokens/s" for n, s in speeds.items()), flush=True)
    peaks = {name: side.end() for name, side in sides.items()}

    lines = [
        "| side | tokens/s | CPU s per step | peak MB | ours is faster by | goal |",
        "|---|---|---|---|---|---|",
    ]
    for name in sides:
        speed = statistics.median(tokens_per_second(answers[name], arguments.steps) for answers in rounds)
        cpu = statistics.median(answers[name]["cpu"] for answers in rounds) / arguments.steps
        ratio = statistics.median(answers[name]["seconds"] / answers["jaxtrain"]["seconds"] for answers in rounds)
        versus = "- | -" if name == "jaxtrain" else f"{ratio:.2f}x | {GOALS[name]:.1f}x"
        lines.append(f"| {NAMES[name]} | {speed:.0f} | {cpu:.2f} | {peaks[name]:.0f} | {versus} |")
    how = (
        f"{arguments.rounds} rounds of {arguments.steps} steps in turn, medians; load average {os.getloadavg()[2]:.1f}."
    )
    missing = [f"Not installed, so not measured: {', '.join(NAMES[name] for name in skipped)}."] if skipped else []
    text = "\n".join([*lines, "", machine("jax", "torch", "transformers") + ". " + how, *missing])
    print(text)
    write_section("sft", "SFT on a CPU: 14.1 M parameters, 8 x 512 tokens, float32, AdamW", text)


def tokens_per_second(answer: dict[str, float], steps: int) -> float:
    return ROWS * LENGTH * steps / answer["seconds"]


def installed(python: str, name: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec(name) is not None
    return subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode == 0


if __name__ == "__main__":
    main()
