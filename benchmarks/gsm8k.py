"""Trains SmolLM2-135M on GSM8K on a CPU: 60 short steps of full fine-tuning and of LoRA, by the command line.

Usage: python benchmarks/gsm8k.py MODEL_FOLDER GSM8K_FOLDER [--work FOLDER]
e.g.   python benchmarks/gsm8k.py SmolLM2-135M-Instruct gsm8k --work runs/gsm8k-benchmark

The held-out loss is that of `jaxtrain train`; the loss before training is that after one step with a learning rate too
small to change a float32 weight. The export of each run answers a held-out question in transformers. With --work an
interrupted benchmark is resumed. Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from results import machine, write_section

from jaxtrain.config import load_config
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.declare import declare

CONFIGS = Path(__file__).parents[1] / "configs" / "sft"
STEPS, ROWS, LENGTH, HELD_OUT = 60, 2, 256, 32
RUNS = {
    "full": ("smollm2_gsm8k.yaml", ["optimizer.learning_rate=5e-5"]),
    "LoRA r16": ("smollm2_gsm8k_lora.yaml", ["optimizer.learning_rate=5e-4"]),
}
NO_LEARNING = ["train.steps=1", "optimizer.learning_rate=1e-30", "optimizer.warmup_steps=0"]
NEW_TOKENS = 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder of SmolLM2-135M-Instruct")
    parser.add_argument("data", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--work", type=Path, help="folder for the runs; default: one that is deleted at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(arguments.model, arguments.data, arguments.work or Path(temporary))


def measure(model: Path, data: Path, work: Path) -> None:
    common = [
        f"model.path={model}",
        "model.compute_dtype=float32",
        "model.remat=none",
        f"data.train.path={data / 'train.jsonl'}",
        f"data.eval.path={data / 'test.jsonl'}",
        f"data.eval.limit={HELD_OUT}",
        f"data.max_length={LENGTH}",
        f"train.steps={STEPS}",
        f"train.batch_size={ROWS}",
        f"eval.every={STEPS}",
        "log.to=[]",
    ]
    with (data / "test.jsonl").open() as file:
        question = json.loads(file.readline())["question"]
    before = train("smollm2_gsm8k.yaml", [*common, *NO_LEARNING], work / "before")
    lines = [
        "| run | trained parameters | held-out loss before | after | accuracy before | after | tokens/s | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    answers = []
    for name, (config, overrides) in RUNS.items():
        run = work / name.split()[0].lower()
        after = train(config, [*common, *overrides], run)
        lines.append(
            f"| {name} | {trained_parameters(config, common) / 1e6:.1f} M "
            f"| {before['eval_loss']:.4f} | {after['eval_loss']:.4f} "
            f"| {before['eval_mean_token_accuracy']:.3f} | {after['eval_mean_token_accuracy']:.3f} "
            f"| {after['tokens_per_second']:.0f} | {after['peak_memory_gib']:.2f} |"
        )
        text = exported_answer(run, work / f"{run.name}-export", question)
        answers.append(f"{name}, exported, in transformers, greedily:\n\n```\n{text}\n```")
    text = "\n".join(
        [
            *lines,
            "",
            f"{STEPS} steps of {ROWS} packed rows of {LENGTH} tokens, float32; held out: the first {HELD_OUT} rows of "
            f"test.jsonl. tokens/s: median over windows of ten steps, the first one, which compiles, left out.",
            f"{machine('jax', 'transformers')}. Load average {os.getloadavg()[2]:.1f}.",
            "",
            f"Asked: {question}",
            "",
            *answers,
        ]
    )
    print(text)
    write_section("gsm8k", "SmolLM2-135M-Instruct on GSM8K", text)


def train(config: str, overrides: list[str], run: Path) -> dict[str, float]:
    """Run `jaxtrain train`. Returns the last value of each metric, and the median of `tokens_per_second`."""
    start = time.perf_counter()
    jaxtrain("train", str(CONFIGS / config), *overrides, f"run.dir={run}")
    print(f"{run.name}: {time.perf_counter() - start:.0f} s", flush=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = {name: value for line in lines for name, value in line.items()}
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return metrics | {"tokens_per_second": statistics.median(speeds[1:] or speeds)}


def trained_parameters(config: str, overrides: list[str]) -> int:
    run = load_config(CONFIGS / config, overrides)
    declared = declare(run.model, make_mesh(run.mesh), run.mesh.preset)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(declared.trained))


def exported_answer(run: Path, out: Path, question: str) -> str:
    """Export the run, and let transformers answer a question with the export."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.rmtree(out, ignore_errors=True)
    jaxtrain("export", str(run), str(out))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def jaxtrain(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "jaxtrain.cli", *arguments], check=True)


if __name__ == "__main__":
    main()
