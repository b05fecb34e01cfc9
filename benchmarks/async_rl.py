"""Compares asynchronous with synchronous reinforcement learning: steps per second with two processes, one core each.

Usage: python benchmarks/async_rl.py [--steps 40] [--rounds 3]

A trainer and one Ray worker are each pinned to a core, so that only waiting time is saved. They run GRPO on arithmetic
prompts, with a model and lengths for which a rollout and an update take about the same time (both are in the table).
Staleness 0 (on policy), 1 and 2 take turns in separate processes. The first steps, which compile, are excluded. The
time of a step is that between the files of its samples. Needs Ray. Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from results import machine, write_section

WARM = 10  # warm-up steps, which are excluded
GOAL = 1.5
MODEL = {
    "model_type": "llama",
    "vocab_size": 2000,  # of which the tokenizer knows 259: few samples end early, so few shapes are compiled
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=384, help="of a completion: more make the rollout longer")
    parser.add_argument("--side", type=int, help="train with this staleness into --dir (what the sides are run with)")
    parser.add_argument("--dir", type=Path)
    arguments = parser.parse_args()
    if arguments.side is not None:
        train(arguments.dir, arguments.side, arguments.steps, arguments.tokens)
        return

    measured: dict[int, list[dict[str, float]]] = {0: [], 1: [], 2: []}
    for number in range(arguments.rounds):
        for staleness, results in measured.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, "--side", str(staleness), "--dir", folder]
                command += ["--steps", str(arguments.steps), "--tokens", str(arguments.tokens)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                results.append(read(Path(folder) / "run"))
            print(f"round {number + 1}, staleness {staleness}: {results[-1]}", flush=True)

    lines = [
        "| staleness | s per step | rollout s | update s | measured staleness | steps/s against synchronous | goal |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for staleness, results in measured.items():
        columns = {name: statistics.median(result[name] for result in results) for name in results[0]}
        turns = zip(measured[0], results, strict=True)
        ratio = statistics.median(before["step"] / after["step"] for before, after in turns)
        versus = "- | -" if staleness == 0 else f"{ratio:.2f}x | {GOAL}x" if staleness == 1 else f"{ratio:.2f}x | -"
        lines.append(
            f"| {staleness} | {columns['step']:.2f} | {columns['rollout']:.2f} | {columns['update']:.2f} | "
            f"{columns['staleness']:.2f} | {versus} |"
        )
    how = (
        f"{arguments.rounds} rounds of {arguments.steps} steps in turn, medians; load average {os.getloadavg()[2]:.1f}."
    )
    text = "\n".join([*lines, "", machine("jax", "ray") + ". " + how])
    print(text)
    write_section("async-rl", "Asynchronous GRPO: a trainer and a Ray worker, one core each", text)


def train(folder: Path, staleness: int, steps: int, tokens: int) -> None:
    """Runs in a separate process, since JAX and Ray use the cores that are available when they start."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("this needs two cores")
    import ray

    os.environ["JAX_PLATFORMS"] = "cpu"
    os.sched_setaffinity(0, {cores[1]})
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    os.sched_setaffinity(0, {cores[0]})

    from converters.tokenizer import write_byte_tokenizer
    from jaxtrain.config import parse_config
    from jaxtrain.data.arithmetic import write_arithmetic
    from jaxtrain.recipes import rl

    write_byte_tokenizer(folder / "tokenizer")
    files = write_arithmetic(folder, train_rows=512, eval_rows=8, seed=0)
    model = {"config": MODEL, "tokenizer": str(folder / "tokenizer"), "compute_dtype": "float32", "remat": "none"}
    placement = {"kind": "ray", "workers": 1, "staleness": staleness}
    section = {
        "prompts": 4,
        "generations": 2,
        "max_completion_length": tokens,
        "rewards": [{"function": "exact_answer"}, {"function": "repetition_penalty", "args": {"ngram": 1}}],
        "reward_workers": 1,
        "slots": 8,
        "placement": placement,
        "print_samples": 0,
    }
    config = {
        "recipe": "rl",
        "run": {"dir": str(folder / "run")},
        "model": model,
        "data": {
            "train": {"path": str(files.train)},
            "max_length": tokens + 64,
        },
        "train": {"steps": steps},
        "log": {"every": 1, "to": []},
        "checkpoint": {"every": 10 * steps},
        "rl": section,
    }
    rl.run(parse_config(config, "benchmark"))
    ray.shutdown()


def read(run: Path) -> dict[str, float]:
    """Medians over the steps after the warm-up."""
    written = sorted(path.stat().st_mtime for path in (run / "trajectories").glob("*.parquet"))[WARM:]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line][WARM:]

    def median(name: str) -> float:
        return statistics.median(line[name] for line in lines)

    return {
        "step": statistics.median(b - a for a, b in pairwise(written)),
        "rollout": median("time/rollout"),
        "update": median("time/update") + median("time/logps"),
        "staleness": statistics.fmean(line["staleness/mean"] for line in lines),
    }


if __name__ == "__main__":
    main()
