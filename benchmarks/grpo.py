"""GRPO step time on a CPU: jaxtrain, a plain PyTorch loop, TRL's GRPOTrainer, Tunix's GRPOLearner.

Usage: python benchmarks/grpo.py [--rounds 3] [--steps 2] [--trl-python PYTHON] [--tunix-python PYTHON]

The model of benchmarks/sft.py; a step samples 8 prompts of 64 tokens 4 times, 64 new tokens each, and updates once on
the 32 samples, float32, AdamW, no reference. Every side is a process of its own; they take turns, round by round, and a
ratio is the median over the rounds of one side's time over ours. TRL and Tunix may live in virtual environments of
their own; a side that is not installed is skipped. Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys

from grpo_sides import NEW, PROMPT, PROMPTS, SAMPLES
from results import machine, write_section
from sft import Side, installed

GOALS = {"torch": 1.3, "trl": 2.0, "tunix": 2.0}
NAMES = {
    "jaxtrain": "jaxtrain",
    "torch": "PyTorch loop (transformers' generate, sdpa, fused AdamW)",
    "trl": "TRL GRPOTrainer",
    "tunix": "Tunix GRPOLearner",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has trl and torch")
    parser.add_argument("--tunix-python", default=sys.executable, help="an interpreter that has google-tunix")
    parser.add_argument("--only", nargs="*", default=list(NAMES), choices=list(NAMES), help="sides to run")
    arguments = parser.parse_args()

    pythons = {"jaxtrain": sys.executable, "torch": sys.executable}
    pythons |= {"trl": arguments.trl_python, "tunix": arguments.tunix_python}
    skipped = [name for name, python in pythons.items() if name not in arguments.only or not installed(python, name)]
    for name in skipped:
        print(f"{NAMES[name]}: skipped")
    sides = {
        name: Side(name, pythons[name], arguments.steps, "grpo_sides.py") for name in pythons if name not in skipped
    }
    for name, side in sides.items():
        print(f"{name}: compiled and warm after {side.round()['seconds']:.1f} s", flush=True)
    rounds = []
    for index in range(arguments.rounds):
        rounds.append({name: side.round() for name, side in sides.items()})
        print(
            f"round {index + 1}: " + "  ".join(f"{n} {a['seconds']:.1f} s" for n, a in rounds[-1].items()), flush=True
        )
    peaks = {name: side.end() for name, side in sides.items()}

    lines = ["| side | s per step | CPU s per step | peak MB | ours is faster by | goal |", "|---|---|---|---|---|---|"]
    for name in sides:
        seconds = statistics.median(answers[name]["seconds"] for answers in rounds) / arguments.steps
        cpu = statistics.median(answers[name]["cpu"] for answers in rounds) / arguments.steps
        ratio = statistics.median(answers[name]["seconds"] / answers["jaxtrain"]["seconds"] for answers in rounds)
        versus = "- | -" if name == "jaxtrain" else f"{ratio:.2f}x | {GOALS[name]:.1f}x"
        lines.append(f"| {NAMES[name]} | {seconds:.2f} | {cpu:.2f} | {peaks[name]:.0f} | {versus} |")
    how = (
        f"{arguments.rounds} rounds of {arguments.steps} steps in turn, medians; load average {os.getloadavg()[2]:.1f}."
    )
    missing = [f"Not measured: {', '.join(NAMES[name] for name in skipped)}."] if skipped else []
    text = "\n".join([*lines, "", machine("jax", "torch", "transformers") + ". " + how, *missing])
    print(text)
    title = f"A GRPO step on a CPU: 14.1 M parameters, {PROMPTS} prompts x {SAMPLES}, {PROMPT} + {NEW} tokens, float32"
    write_section("grpo", title, text)


if __name__ == "__main__":
    main()
