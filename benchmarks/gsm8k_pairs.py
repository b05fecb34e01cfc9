"""Trains SmolLM2-135M on pairs of a correct and an incorrect solution of GSM8K: DPO and a reward model, both with LoRA.

Usage: python benchmarks/gsm8k_pairs.py MODEL_FOLDER GSM8K_FOLDER [--steps 60] [--work FOLDER]

The pairs are from GSM8K's example_model_solutions.jsonl, one for each question with both kinds of solutions; the last
64 questions are held out. Measured on these: how often the correct solution has the higher (implicit) reward, and by
how much, before and after training; and how many of these questions the model answers with the right final number,
greedily in up to 200 tokens, before and after DPO. Before it DPO's rewards are 0 by definition; those of the reward
model are its values after one step whose learning rate is too small to change a weight. The export of the reward model
is loaded in transformers: its rewards of the held-out solutions must be those of the run's evaluation to 1e-4. With
--work an interrupted benchmark is resumed. Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gsm8k_answers import greedy_accuracy
from results import machine, write_section

import jaxtrain as jt
from jaxtrain.session.export import export_run

HELD_OUT, ROWS, LENGTH, RANK, TOLERANCE = 64, 2, 384, 16, 1e-4
ANSWER_TOKENS = 200
RATES = {"preference": 1e-4, "reward": 2e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder of SmolLM2-135M-Instruct")
    parser.add_argument("data", type=Path, help="folder with GSM8K's example_model_solutions.jsonl")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="pairs")
    parser.add_argument("--work", type=Path, help="folder for the runs; default: one that is deleted at the end")
    arguments = parser.parse_args()
    rows = pairs(arguments.data / "example_model_solutions.jsonl")
    split = rows[: -arguments.held_out], rows[-arguments.held_out :]
    with tempfile.TemporaryDirectory() as temporary:
        measure(arguments.model, split, arguments.work or Path(temporary), arguments.steps)


def pairs(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        solutions = [each for each in row.values() if isinstance(each, dict)]
        kinds = {kind: [each["solution"] for each in solutions if each["is_correct"] is kind] for kind in (True, False)}
        if all(kinds.values()):
            chosen, rejected = ([{"role": "assistant", "content": kinds[kind][0]}] for kind in (True, False))
            asked = {"question": row["question"], "answer": row["ground_truth"]}
            found.append({"prompt": message(row["question"]), "chosen": chosen, "rejected": rejected, **asked})
    return found


def message(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def measure(model: Path, split: tuple[list[dict], list[dict]], work: Path, steps: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    files = [work / "train.jsonl", work / "eval.jsonl"]
    for file, rows in zip(files, split, strict=True):
        columns = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in columns))

    def train(recipe: str, name: str, run_steps: int, learning_rate: float) -> dict[str, float]:
        tree = {
            "recipe": recipe,
            "run": {"dir": str(work / name)},
            "model": {
                "path": str(model),
                "compute_dtype": "float32",
                "remat": "none",
                "lora": {"rank": RANK},
            },
            "data": {
                "train": {"path": str(files[0])},
                "eval": {"path": str(files[1])},
                "max_length": LENGTH,
                "row_length": 2 * LENGTH,
            },
            "train": {"steps": run_steps, "batch_size": ROWS},
            "optimizer": {"learning_rate": learning_rate, "schedule": "constant"},
            "eval": {"every": run_steps},
            "log": {"to": []},
        }
        jt.run(jt.parse_config(tree))
        lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
        return {name: value for line in lines for name, value in line.items()}

    policy = train("preference", "dpo", steps, RATES["preference"])
    before = train("reward", "reward-before", 1, 1e-30)
    after = train("reward", "reward", steps, RATES["reward"])
    if not (work / "dpo-export").exists():
        export_run(work / "dpo", work / "dpo-export")
    right = [
        greedy_accuracy(jt.load(folder, dtype="float32"), split[1], ANSWER_TOKENS, 2 * LENGTH)
        for folder in (model, work / "dpo-export")
    ]
    difference = export_difference(work / "reward", work / "reward-export", split[1], after)
    text = "\n".join(
        [
            "| run | held-out loss before | after | accuracy before | after | margin before | after | tokens/s |",
            "|---|---|---|---|---|---|---|---|",
            f"| DPO | {np.log(2):.4f} | {policy['eval_loss']:.4f} | - | {policy['eval_rewards/accuracies']:.3f} "
            f"| 0 | {policy['eval_rewards/margins']:.3f} | {policy['tokens_per_second']:.0f} |",
            f"| reward model | {before['eval_loss']:.4f} | {after['eval_loss']:.4f} | {before['eval_accuracy']:.3f} "
            f"| {after['eval_accuracy']:.3f} | {before['eval_margin']:.3f} | {after['eval_margin']:.3f} "
            f"| {after['tokens_per_second']:.0f} |",
            "",
            f"Of the {len(split[1])} held-out questions {right[0]:.1%} were answered right before DPO, and "
            f"{right[1]:.1%} after.",
            f"{len(split[0])} pairs to train on, {len(split[1])} held out. {steps} steps of {ROWS} packed rows of "
            f"{2 * LENGTH} tokens, LoRA r{RANK}, float32, learning rates {RATES['preference']:g} and "
            f"{RATES['reward']:g}. The reward model's calibration error is {after['eval_calibration_error']:.3f}. The "
            f"rewards of its export in transformers differ from the evaluation's by at most {difference:.1e} (mean, "
            f"minimum, maximum and margin).",
            f"{machine('jax', 'transformers')}. Load average {os.getloadavg()[2]:.1f}.",
        ]
    )
    print(text)
    write_section("gsm8k_pairs", "SmolLM2-135M-Instruct on pairs of solutions of GSM8K", text)
    if difference > TOLERANCE:
        raise SystemExit(f"the exported reward model differs by {difference:.1e}, more than {TOLERANCE:g}")


def export_difference(run: Path, out: Path, rows: list[dict], metrics: dict[str, float]) -> float:
    """Between the rewards of the run's evaluation, of the pairs that fit, and those of its export in transformers."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not out.exists():
        export_run(run, out)
    model = AutoModelForSequenceClassification.from_pretrained(out, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(out)

    def reward(ids: list[int]) -> float:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits.item()

    pairs = [
        [tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False) for side in ("chosen", "rejected")]
        for row in rows
    ]
    scores = np.array([list(map(reward, pair)) for pair in pairs if max(map(len, pair)) <= LENGTH])
    found = {"mean_reward": scores.mean(), "min_reward": scores.min(), "max_reward": scores.max()}
    found["margin"] = (scores[:, 0] - scores[:, 1]).mean()
    return max(abs(value - metrics[f"eval_{name}"]) for name, value in found.items())


if __name__ == "__main__":
    main()
