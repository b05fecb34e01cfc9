"""Compares the step times of several implementations ("sides"), which take turns in rounds as in benchmarks/sft.py."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Mapping

from results import machine, write_section
from sft import Side, installed


def compare(
    description: str | None, name: str, title: str, names: Mapping[str, str], goals: Mapping[str, float], *, rounds: int
) -> None:
    """Measure the sides of `<name>_sides.py`, whose `names` begin with ours, and write the section `name`.

    `goals`: by how much ours should be faster than each other side. `rounds` is a default of the command line.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has trl and torch")
    parser.add_argument("--tunix-python", default=sys.executable, help="an interpreter that has google-tunix")
    parser.add_argument("--only", nargs="*", default=list(names), choices=list(names), help="sides to run")
    arguments = parser.parse_args()

    pythons = {"jaxtrain": sys.executable, "torch": sys.executable}
    pythons |= {"trl": arguments.trl_python, "tunix": arguments.tunix_python}
    skipped = [side for side, python in pythons.items() if side not in arguments.only or not installed(python, side)]
    for side in skipped:
        print(f"{names[side]}: skipped")
    sides = {
        side: Side(side, python, arguments.steps, f"{name}_sides.py")
        for side, python in pythons.items()
        if side not in skipped
    }
    for side, process in sides.items():
        print(f"{side}: compiled and warm after {process.round()['seconds']:.1f} s", flush=True)
    measured = []
    for index in range(arguments.rounds):
        measured.append({side: process.round() for side, process in sides.items()})
        times = "  ".join(f"{side} {answer['seconds']:.1f} s" for side, answer in measured[-1].items())
        print(f"round {index + 1}: {times}", flush=True)
    peaks = {side: process.end() for side, process in sides.items()}

    lines = ["| side | s per step | CPU s per step | peak MB | ours is faster by | goal |", "|---|---|---|---|---|---|"]
    for side in sides:
        seconds = statistics.median(answers[side]["seconds"] for answers in measured) / arguments.steps
        cpu = statistics.median(answers[side]["cpu"] for answers in measured) / arguments.steps
        ratio = statistics.median(answers[side]["seconds"] / answers["jaxtrain"]["seconds"] for answers in measured)
        versus = "- | -" if side == "jaxtrain" else f"{ratio:.2f}x | {goals[side]:.1f}x"
        lines.append(f"| {names[side]} | {seconds:.2f} | {cpu:.2f} | {peaks[side]:.0f} | {versus} |")
    how = (
        f"{arguments.rounds} rounds of {arguments.steps} steps in turn, medians; load average {os.getloadavg()[2]:.1f}."
    )
    missing = [f"Not measured: {', '.join(names[side] for side in skipped)}."] if skipped else []
    text = "\n".join([*lines, "", machine("jax", "torch", "transformers") + ". " + how, *missing])
    print(text)
    write_section(name, title, text)
