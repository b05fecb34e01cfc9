"""Parameters in bfloat16, rounded stochastically or to the nearest, beside float32, on the quickstart's model.

Usage: python benchmarks/rounding.py [--steps 350]

Trains configs/quickstart/sft.yaml with each, on the same data in the same order, and writes its section of
benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from results import machine, write_section

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.config import load_config
from jaxtrain.data.arithmetic import write_arithmetic
from jaxtrain.recipes import sft
from jaxtrain.session.record import read_metrics

CONFIG = Path(__file__).parents[1] / "configs/quickstart/sft.yaml"
SIDES = {
    "float32": [],
    "bfloat16, rounded stochastically": ["model.param_dtype=bfloat16", "optimizer.rounding=stochastic"],
    "bfloat16, rounded to the nearest": ["model.param_dtype=bfloat16"],
}


def losses(folder: Path, name: str, overrides: list[str], steps: int) -> tuple[list[float], float]:
    """The loss of every step, and that of the held-out rows after the last one."""
    run = folder / name.replace(" ", "-").replace(",", "")
    common = [f"run.dir={run}", f"train.steps={steps}", f"eval.every={steps}", f"checkpoint.every={steps}"]
    common += ["eval.generate=0", "log.every=1", "log.tensorboard=false"]
    paths = [f"data.train.path={folder}/train.jsonl", f"data.eval.path={folder}/eval.jsonl"]
    config = load_config(CONFIG, [*common, *paths, f"model.tokenizer={folder}/tokenizer", *overrides])
    assert sft.run(config).exit_code == 0
    lines = read_metrics(run)
    return [line["loss"] for line in lines if "loss" in line], [x["eval_loss"] for x in lines if "eval_loss" in x][-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=350)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_byte_tokenizer(folder / "tokenizer")
        write_arithmetic(folder, train_rows=6000, eval_rows=300, seed=0)
        found = {name: losses(folder, name, overrides, steps) for name, overrides in SIDES.items()}
    windows = [steps // 4, steps // 2, steps]
    rows = ["| parameters | " + " | ".join(f"loss before step {w}" for w in windows) + " | held-out loss |"]
    rows.append("|---|" + "---|" * (len(windows) + 1))
    for name, (each, held_out) in found.items():
        means = [f"{np.mean(each[max(w - 20, 0) : w]):.4f}" for w in windows]
        rows.append(f"| {name} | {' | '.join(means)} | {held_out:.4f} |")
    note = f"Means of 20 steps; the model, data and settings of the quickstart, in float32 otherwise. {machine('jax')}."
    write_section("rounding", "Parameters in bfloat16: rounding of updates", "\n".join([*rows, "", note]))
    print("\n".join(rows))
