"""Losses and gradient norms of the first steps of preference objectives and reward models, here and in TRL's trainers.

Usage: python benchmarks/preference_losses.py [--trl-python PYTHON]

A Llama of random weights, float32, AdamW at a constant rate, a batch of 6 rows that are not packed, 5 steps on it:
losses and gradient norms must agree to 1e-4 relative in every case. `--trl-python` is an interpreter that has TRL,
torch and datasets. Writes its section of benchmarks/RESULTS.md and exits with 1 where a number differs.

Some conventions differ, and the cases avoid them: TRL's ORPO also takes the negative log-likelihood of the prompt (its
prompts are a single token here, which has no likelihood); TRL's CPO and ORPO write an end of text after a chat template
(their rows are strings here); TRL cuts the prompts of a pair from the left separately (none is cut here). TRL's DPO has
no margin, and its sigmoid ignores label_smoothing. KTO's answers to other prompts are the same where a batch is the
whole data set.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from losses import SENTENCE, make_model
from results import machine, write_section

ROWS, STEPS, LENGTH = 6, 5, 64
LEARNING_RATE, TOLERANCE = 1e-4, 1e-4


def cases() -> dict[str, dict[str, Any]]:
    """By name: `rows`, jaxtrain's `objective` (and `data`), and TRL's `trainer` and its arguments."""
    rng = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choice(SENTENCE.split()) for _ in range(rng.randint(least, most)))

    def rows(make: Any) -> list[dict[str, Any]]:
        return [make() for _ in range(ROWS)]

    def answer(longest: int = 8) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": words(1, longest)}]

    def prompt() -> list[dict[str, str]]:
        return [{"role": "user", "content": words(1, 8)}, *answer(), {"role": "user", "content": words(1, 4)}]

    def pair(longest: int = 8) -> dict[str, Any]:
        return {"prompt": prompt(), "chosen": answer(longest), "rejected": answer(longest)}

    def strings(prompt: str) -> dict[str, str]:
        return {"prompt": prompt, "chosen": " " + words(2, 9), "rejected": " " + words(2, 9)}

    def dpo(loss: Any, longest: int = 8, **shared: Any) -> dict[str, Any]:
        kinds, weights = ([loss], None) if isinstance(loss, str) else (list(loss), list(loss.values()))
        return {
            "rows": rows(lambda: pair(longest)),
            "objective": {"name": "DPO", "loss": loss, **shared},
            "trainer": "DPOTrainer",
            "trl": {"loss_type": kinds, "loss_weights": weights, **shared},
        }

    def no_reference(objective: dict[str, Any], trainer: str, prompt: str, **trl: Any) -> dict[str, Any]:
        made = rows(lambda: strings(prompt or words(2, 6)))
        data = {"prompt_format": "plain"}
        return {"rows": made, "objective": objective, "data": data, "trainer": trainer, "trl": trl}

    def kto(objective: dict[str, Any], loss: str, **trl: Any) -> dict[str, Any]:
        labels = iter([True, False, True, True, False, True])
        return {
            "rows": rows(lambda: {"prompt": prompt(), "completion": answer(), "label": next(labels)}),
            "objective": {"name": "KTO", **objective},
            "trainer": "KTOTrainer",
            "trl": {"loss_type": loss, **trl},
        }

    def reward(center: float, more: Any = dict) -> dict[str, Any]:
        return {
            "rows": rows(lambda: pair() | more()),
            "objective": {"name": "BradleyTerry", "center": center},
            "trainer": "RewardTrainer",
            "trl": {"center_rewards_coefficient": center or None},
        }

    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    return {
        "DPO sigmoid": dpo("sigmoid"),
        "DPO sigmoid, beta 0.5": dpo("sigmoid", beta=0.5),
        "DPO sigmoid, answers cut at their ends": dpo("sigmoid", longest=40),
        "DPO hinge": dpo("hinge"),
        "DPO ipo": dpo("ipo"),
        "DPO robust, label_smoothing 0.1": dpo("robust", label_smoothing=0.1),
        "DPO sigmoid_norm": dpo("sigmoid_norm", beta=2.0),
        "DPO apo_zero": dpo("apo_zero"),
        "DPO apo_down": dpo("apo_down"),
        "DPO sft": dpo("sft"),
        "DPO 0.8 sigmoid + 0.3 apo_zero + sft (MPO)": dpo({"sigmoid": 0.8, "apo_zero": 0.3, "sft": 1.0}),
        "CPO": no_reference({"name": "CPO", "alpha": 0.7}, "CPOTrainer", "", cpo_alpha=0.7),
        "CPO, label_smoothing 0.1": no_reference(
            {"name": "CPO", "label_smoothing": 0.1}, "CPOTrainer", "", cpo_alpha=1.0, label_smoothing=0.1
        ),
        "SimPO": no_reference(
            {"name": "SimPO", "beta": 2.5, "gamma": 0.8},
            "CPOTrainer",
            "",
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=2.5,
            simpo_gamma=0.8,
        ),
        "ORPO": no_reference({"name": "ORPO", "beta": 0.3}, "ORPOTrainer", "x", beta=0.3),
        "KTO": kto({"beta": 0.2}, "kto", beta=0.2),
        "KTO, weights 1.5 and 0.5": kto(weights, "kto", **weights),
        "KTO apo_zero": kto({"loss": "apo_zero"}, "apo_zero_unpaired"),
        "reward model": reward(0.0),
        "reward model, center 0.05": reward(0.05),
        "reward model, margins": reward(0.0, lambda: {"margin": rng.random()}),
    }


def make_reward_model(folder: Path) -> None:
    """Beside the language model, one of the same body with a scalar head."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype="float32")
    model.config.pad_token_id = tokenizer.pad_token_id
    torch.nn.init.normal_(model.score.weight, std=0.1)
    model.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")


def model_of(folder: Path, case: dict[str, Any]) -> str:
    return str(folder / "reward" if case["trainer"] == "RewardTrainer" else folder)


def ours(folder: Path, case: dict[str, Any]) -> dict[str, list[float]]:
    import jaxtrain as jt

    with tempfile.TemporaryDirectory() as runs:
        tree = {
            "recipe": "reward" if case["trainer"] == "RewardTrainer" else "preference",
            "model": {"path": model_of(folder, case), "compute_dtype": "float32"},
            "data": {
                "train": {"rows": case["rows"]},
                "max_length": LENGTH,
                "packing": False,
                "shuffle": False,
                "virtual_shards": 1,
                **case.get("data", {}),
            },
            "objective": case["objective"],
            "train": {"steps": STEPS, "batch_size": ROWS},
            "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
            "log": {"every": 1, "to": []},
            "run": {"dir": f"{runs}/run"},
        }
        jt.run(jt.parse_config(tree))
        lines = [json.loads(line) for line in Path(runs, "run", "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines if name in line] for name in ("loss", "grad_norm")}


def trl(folder: Path, case: dict[str, Any]) -> dict[str, list[float]]:
    import trl
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental import cpo, orpo

    places = {"CPOTrainer": cpo, "ORPOTrainer": orpo}
    name = case["trainer"]
    place = places.get(name, trl)
    base, config = getattr(place, name), getattr(place, name.replace("Trainer", "Config"))
    found: dict[str, list[float]] = {"loss": [], "grad_norm": []}

    class InOrder(base):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            found["loss"].append(loss.item())
            return loss

        def log(self, logs, *args, **kwargs):
            if "grad_norm" in logs:
                found["grad_norm"].append(logs["grad_norm"])
            super().log(logs, *args, **kwargs)

    with tempfile.TemporaryDirectory() as output:
        arguments = config(
            output_dir=output,
            per_device_train_batch_size=ROWS,
            max_steps=STEPS,
            max_length=LENGTH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            **{key: value for key, value in case["trl"].items() if value is not None},
        )
        kind = AutoModelForSequenceClassification if name == "RewardTrainer" else AutoModelForCausalLM
        path = model_of(folder, case)
        model = kind.from_pretrained(path, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(path)
        InOrder(
            model, args=arguments, train_dataset=Dataset.from_list(case["rows"]), processing_class=tokenizer
        ).train()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has trl, torch and datasets")
    parser.add_argument("--trl-side", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trl_side:
        folder = Path(arguments.trl_side)
        found = {name: trl(folder, case) for name, case in cases().items()}
        (folder / "losses.json").write_text(json.dumps(found))
        return

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        make_reward_model(folder)
        command = [arguments.trl_python, __file__, "--trl-side", name]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # faster for a tiny model
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=one_thread)
        theirs = json.loads((folder / "losses.json").read_text())
        here = {name: ours(folder, case) for name, case in cases().items()}

    lines = [
        f"| objective | losses of {STEPS} steps | largest relative difference from TRL's | of the gradient norms |",
        "|---|---|---|---|",
    ]
    worst = 0.0
    for name, found in here.items():
        differences = {key: difference(values, theirs[name][key]) for key, values in found.items()}
        worst = max(worst, *differences.values())
        losses = " ".join(f"{loss:.4f}" for loss in found["loss"])
        lines.append(f"| {name} | {losses} | {differences['loss']:.1e} | {differences['grad_norm']:.1e} |")
    text = "\n".join([*lines, "", machine("jax", "transformers") + "."])
    print(text)
    write_section("preference_losses", "The first losses of preference objectives beside TRL's", text)
    if worst > TOLERANCE:
        raise SystemExit(f"a number differs by {worst:.1e}, more than {TOLERANCE:g}")


def difference(here: list[float], there: list[float]) -> float:
    """The largest relative one."""
    assert len(here) == STEPS
    return max(abs(one - other) / abs(other) for one, other in zip(here, there, strict=True))


if __name__ == "__main__":
    main()
