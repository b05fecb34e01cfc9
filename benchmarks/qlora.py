"""QLoRA: memory and losses of the same LoRA run with a float32, bfloat16, int8 and nf4 base.

Usage: python benchmarks/qlora.py MODEL_FOLDER GSM8K_FOLDER
e.g.   python benchmarks/qlora.py SmolLM2-135M-Instruct gsm8k

Every run uses the same batches and computes in float32, so the losses differ only by the rounding of the frozen
weights. Sizes are those of the compiler. Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from pathlib import Path
from typing import Any

import jax
from results import machine, write_section
from trainer import trained_role

from jaxtrain.config import RunConfig, load_config
from jaxtrain.data.formats import Encoder
from jaxtrain.data.pipeline import TrainStream, count_shards
from jaxtrain.objectives.sft import SFT
from jaxtrain.roles.tokenizer import make_tokenizer
from jaxtrain.types import Batch

CONFIG = Path(__file__).parents[1] / "configs" / "sft" / "smollm2_gsm8k_lora.yaml"
STEPS, ROWS, LENGTH = 8, 2, 256
BASES = {
    "float32": ["model.param_dtype=float32"],
    "bfloat16": ["model.param_dtype=bfloat16"],
    "int8": ["model.param_dtype=bfloat16", "model.quantize=int8"],
    "nf4": ["model.param_dtype=bfloat16", "model.quantize=nf4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder of SmolLM2-135M-Instruct")
    parser.add_argument("data", type=Path, help="folder with GSM8K's train.jsonl")
    arguments = parser.parse_args()
    common = [
        f"model.path={arguments.model}",
        f"data.train.path={arguments.data / 'train.jsonl'}",
        f"data.max_length={LENGTH}",
        f"train.batch_size={ROWS}",
        "model.compute_dtype=float32",
        "model.lora.dropout=0.0",
        "optimizer.learning_rate=1e-3",
        "optimizer.warmup_steps=0",
        "optimizer.schedule=constant",
    ]
    batches = first_batches(load_config(CONFIG, common))
    lines = [
        "| frozen base | base MB | bits per kernel weight | temporaries MB | loss, step 1 | step 8 | s per step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, overrides in BASES.items():
        lines.append(f"| {name} " + measure(load_config(CONFIG, [*common, *overrides]), batches))
        print(lines[-1], flush=True)
    text = "\n".join(
        [
            *lines,
            "",
            f"SmolLM2-135M-Instruct on GSM8K, LoRA r16 on all linear modules, {ROWS} rows of {LENGTH} tokens, computed "
            "in float32, remat full; embedding and norms of the quantised bases are bfloat16. Time of the last step.",
            f"{machine('jax')}. Load average {os.getloadavg()[0]:.1f}.",
        ]
    )
    print(text)
    write_section("qlora", "QLoRA: a quantised frozen base", text)


def first_batches(config: RunConfig) -> list[Batch]:
    encode = Encoder(make_tokenizer(config.model))
    shards = count_shards(config.data, ROWS)
    with TrainStream(
        config.data.train_sources,
        config.data,
        encode,
        rows=ROWS,
        seed=config.run.seed,
        shards=range(shards),
        num_shards=shards,
    ) as stream:
        return list(itertools.islice(stream, STEPS))


def measure(config: RunConfig, batches: list[Batch]) -> str:
    role = trained_role(config, SFT())
    program = role.lower(role.place(batches[0])).compile()
    losses, seconds = [], 0.0
    for batch in batches:
        start = time.perf_counter()
        report = role.update(role.place(batch))
        losses.append(float(report.means["loss"].value))
        seconds = time.perf_counter() - start
    base = role.frozen
    kernels = [node["kernel"] for part in ("attn", "mlp") for node in base["layers"][part].values()]
    targets = [node["kernel"] for part in ("attn", "mlp") for node in role.declared.target["layers"][part].values()]
    weights = sum(kernel.size for kernel in targets)
    temporaries = program.memory_analysis().temp_size_in_bytes
    return (
        f"| {tree_bytes(base) / 1e6:.1f} | {8 * tree_bytes(kernels) / weights:.2f} | {temporaries / 1e6:.0f} "
        f"| {losses[0]:.4f} | {losses[-1]:.4f} | {seconds:.1f} |"
    )


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree on the device."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
