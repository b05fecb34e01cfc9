"""SFT speed on one GPU: jaxtrain and a transformers + torch.compile loop, packed rows of 8192 tokens, bfloat16.

Usage: python benchmarks/gpu_sft.py [0.6B | 1.7B] [--attention auto] [--turns 2] [--steps 10]
       python benchmarks/gpu_sft.py --tiny     runs both sides on the CPU as a test, without meaningful speeds

Random weights with Qwen3's shapes. The sides take turns, each in a separate process that has the complete GPU.
transformers runs with sdpa and, if flash_attn is installed, with flash attention; the faster one counts. MFU uses the
same FLOPs for all sides (jaxtrain/observe/flops.py) and the GPU's dense bfloat16 peak. Writes its section of
benchmarks/RESULTS.md. Exits with an error if there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gpu_sft_sides import MARK, packed_rows
from results import machine, write_section

from converters.import_hf import read_config
from jaxtrain.observe.flops import peak_flops, train_flops

GOAL, PRIME_RL = 1.2, 26_000  # prime-rl: tokens/s with 0.6B on one H100
ROWS, LENGTH = 4, 8192
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "attention_bias": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}
SHAPES = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144},
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="0.6B")
    parser.add_argument("--attention", default="auto", choices=("auto", "xla", "cudnn"), help="of jaxtrain")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a turn")
    parser.add_argument("--tiny", action="store_true", help="smoke run on the CPU; writes no results")
    arguments = parser.parse_args()
    if arguments.tiny:
        smoke()
        return
    name = f"Qwen3-{arguments.shape}"
    text = compare(QWEN3 | SHAPES[arguments.shape], arguments.attention, arguments.turns, arguments.steps)
    print(text)
    write_section(f"gpu_sft_{arguments.shape}", f"SFT on a GPU: {name}, packed rows of {LENGTH} tokens, bfloat16", text)


def compare(hf: dict[str, Any], attention: str, turns: int, steps: int) -> str:
    """A table of all sides, with the best turn of each."""
    spec = {"hf": hf, "rows": ROWS, "length": LENGTH, "steps": steps, "platform": "gpu"}
    theirs = ["sdpa", *(["flash_attention_2"] if importlib.util.find_spec("flash_attn") else [])]
    sides = {"jaxtrain": {"side": "jaxtrain", "attention": attention}}
    sides |= {f"transformers, torch.compile, {each}": {"side": "torch", "attention": each} for each in theirs}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for turn in range(turns):
        for name, side in sides.items():
            answers[name].append(run_side(spec | side))
            print(f"turn {turn + 1}: {name}: {answers[name][-1]}", flush=True)

    batch = packed_rows(ROWS, LENGTH, hf["vocab_size"])
    tokens = np.count_nonzero(batch.segment_ids)
    flops = train_flops(read_config(hf)[0], batch.segment_ids, batch.loss_weights)
    best = {name: min(each, key=lambda answer: answer["seconds"]) for name, each in answers.items()}
    ours = best["jaxtrain"]
    peak = peak_flops(ours["device"])
    lines = ["| side | tokens/s | MFU | peak GiB | first loss | ours is faster by |", "|---|---|---|---|---|---|"]
    for name, answer in best.items():
        mfu = "-" if peak is None else f"{flops / answer['seconds'] / peak:.1%}"
        versus = "-" if answer is ours else f"{answer['seconds'] / ours['seconds']:.2f}x"
        lines.append(
            f"| {name} | {tokens / answer['seconds']:,.0f} | {mfu} | {answer['peak_bytes'] / 2**30:.1f} "
            f"| {answer['loss']:.3f} | {versus} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Goals: {GOAL}x the faster loop; with 0.6B more than {PRIME_RL:,} tokens/s (prime-rl, one H100). "
            f"{ROWS} rows a step, one at a time; attention: {attention}. Best of {turns} turns, each the median of "
            f"{steps} steps.",
            f"{ours['device']}. {machine('jax', 'torch', 'transformers')}.",
        ]
    )


def smoke() -> None:
    spec = {"hf": QWEN3 | TINY, "rows": 2, "length": 512, "steps": 2, "platform": "cpu"}
    for side in ({"side": "jaxtrain", "attention": "auto"}, {"side": "torch", "attention": "sdpa"}):
        print(side["side"], run_side(spec | side), flush=True)


def run_side(spec: dict[str, Any]) -> dict[str, Any]:
    """One turn of a side. If the side fails, exits with its error message."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    if spec["platform"] == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(Path(__file__).with_name("gpu_sft_sides.py")), json.dumps(spec)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    raise SystemExit(done.returncode or f"{spec['side']} printed no result")


if __name__ == "__main__":
    main()
