"""Generation speed on a CPU: jaxtrain's engine, transformers' generate with a static cache, Tunix's sampler.

Usage: python benchmarks/sample.py [--rounds 3] [--tunix-python PYTHON] [--only SIDE ...]

All sides load the same Hugging Face folder: the model of benchmarks/sft.py with random weights. Generation is greedy,
in float32, without log-probabilities and end-of-sequence token. There are two workloads: 16 prompts of 32 tokens with
128 new tokens each; and 64 requests of different lengths (log-normal), for which the engine refills 16 slots, while
the others run batches of 16, in order, until the longest is done. Only requested tokens count. In addition, for our
engine only, the time to the first tokens of 8 samples of a 512-token prompt is compared with that of one sample.

Sides, rounds and ratios are as in benchmarks/sft.py. Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from results import machine, write_section
from sample_sides import (
    LONGEST,
    MEDIAN,
    NEW,
    PROMPT,
    REPEATS,
    REQUESTS,
    SAMPLES,
    SHARED_PROMPT,
    SHORTEST,
    SLOTS,
    SPREAD,
    workloads,
)
from sft import Side, installed
from sft_sides import LLAMA

from converters.export_hf import export_hf
from converters.import_hf import read_config
from jaxtrain.nn.model import Model

GOALS = {"even": 1.5, "ragged": 3.0}
SHARED_GOAL = 1.2
NAMES = {
    "jaxtrain": "jaxtrain",
    "static": "transformers generate, static cache",
    "static_compiled": "transformers generate, static cache, torch.compile",
    "tunix": "Tunix Sampler",
}
PACKAGES = {"jaxtrain": "jaxtrain", "static": "transformers", "static_compiled": "transformers", "tunix": "tunix"}
SAME = 16  # number of equal first tokens, as a check that the sides run the same model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tunix-python", default=sys.executable, help="an interpreter that has google-tunix")
    parser.add_argument("--only", nargs="*", default=list(NAMES), choices=list(NAMES), help="other sides to run")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")

    pythons = dict.fromkeys(NAMES, sys.executable) | {"tunix": arguments.tunix_python}
    wanted = [name for name in NAMES if name in arguments.only or name == "jaxtrain"]
    chosen = [name for name in wanted if installed(pythons[name], PACKAGES[name])]
    skipped = [name for name in NAMES if name not in chosen]
    for name in skipped:
        print(f"{NAMES[name]}: skipped")
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_model(Path(temporary) / "model")
        sides = {name: Side(name, pythons[name], 1, "sample_sides.py", str(folder)) for name in chosen}
        warm = one_round(sides)
        for name in sides:
            print(f"{name}: compiled and warm after {sum(warm[w][name]['seconds'] for w in GOALS):.1f} s", flush=True)
        rounds = []
        for index in range(arguments.rounds):
            rounds.append(one_round(sides))
            print(f"round {index + 1}: " + "  ".join(shown(rounds[-1], workload) for workload in GOALS), flush=True)
        peaks = {name: side.end() for name, side in sides.items()}
        alike = {name: share_alike(folder, name) for name in sides}

    lines = [
        "| workload | side | useful tokens/s | CPU s | peak MB | same tokens | ours is faster by | goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for workload, work in workloads().items():
        for name in sides:
            answers = [each[workload] for each in rounds]
            speed = statistics.median(work.lengths.sum() / each[name]["seconds"] for each in answers)
            cpu = statistics.median(each[name]["cpu"] for each in answers)
            ratio = statistics.median(each[name]["seconds"] / each["jaxtrain"]["seconds"] for each in answers)
            versus = "- | -" if name == "jaxtrain" else f"{ratio:.2f}x | {GOALS[workload]:.1f}x"
            cells = f"{speed:.0f} | {cpu:.2f} | {peaks[name]:.0f} | {alike[name]:.0%}"
            lines.append(f"| {workload} | {NAMES[name]} | {cells} | {versus} |")
    text = "\n".join([*lines, "", *explained(rounds, skipped)])
    print(text)
    write_section("sample", "Generation on a CPU: 14.1 M parameters, float32, greedy", text)


def write_model(folder: Path) -> Path:
    config, hf = read_config(LLAMA)
    return export_hf(Model(config).init(jax.random.key(0)), config, hf, folder)


Round = dict[str, dict[str, dict[str, float]]]  # workload -> side -> "seconds" and "cpu"


def one_round(sides: dict[str, Side]) -> Round:
    """Run all workloads on all sides, in the order in which the sides define them."""
    answers: Round = {workload: {name: side.round() for name, side in sides.items()} for workload in GOALS}
    return answers | {workload: {"jaxtrain": sides["jaxtrain"].round()} for workload in ("one", "shared")}


def shown(answers: Round, workload: str) -> str:
    return f"{workload}: " + ", ".join(f"{name} {each['seconds']:.1f} s" for name, each in answers[workload].items())


def share_alike(folder: Path, name: str) -> float:
    """Share of the even workload's samples that start with the same tokens as ours."""
    ours, theirs = (np.load(folder / f"{side}.npy")[:, :SAME] for side in ("jaxtrain", name))
    return float((ours == theirs).all(1).mean())


def explained(rounds: list[Round], skipped: list[str]) -> list[str]:
    lengths = workloads()["ragged"].lengths
    waited = sum(int(batch.lengths.max()) * len(batch.lengths) for batch in workloads()["ragged"].batches())
    one, shared = (
        [each[workload]["jaxtrain"]["seconds"] / REPEATS for each in rounds] for workload in ("one", "shared")
    )
    ratio = statistics.median(b / a for a, b in zip(one, shared, strict=True))
    return [
        f"even: {SLOTS} x ({PROMPT} + {NEW}) tokens. ragged: {REQUESTS} requests of {PROMPT} + {SHORTEST}..{LONGEST}, "
        f"log-normal with median {MEDIAN} and sigma {SPREAD:.1f}, {lengths.sum()} requested tokens; batches of {SLOTS} "
        f"that run until the longest is done generate {waited}, {waited / lengths.sum():.2f}x as many. same tokens: "
        f"the share of even samples whose first {SAME} tokens equal ours.",
        "",
        f"First tokens of a {SHARED_PROMPT}-token prompt, jaxtrain: 1 sample {1e3 * statistics.median(one):.0f} ms, "
        f"{SAMPLES} samples {1e3 * statistics.median(shared):.0f} ms, {ratio:.2f}x (goal {SHARED_GOAL:.1f}x at most).",
        "",
        machine("jax", "torch", "transformers")
        + f". {len(rounds)} rounds in turn, medians; load average {os.getloadavg()[2]:.1f}.",
        *([f"Not measured: {', '.join(NAMES[name] for name in skipped)}."] if skipped else []),
    ]


if __name__ == "__main__":
    main()
